//! Makes BARs reachable: by exit where nothing better is known, by memory slots and doorbells where
//! the function names parts that need none.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{
    BarIndex, BarKind, BarMapper, BarPart, BarRegion, PAGE_SIZE, PciFunction, Segment, Windows,
};

use super::bus::Bar;
use crate::kvm::{AddressMap, Buses, Doorbell, Doorbells};
use crate::memory::{Peer, Region, Regions};
use crate::shortage;
use busway_pci::Complaints;

/// End of the I/O ports.
const PORTS_END: u64 = 0x1_0000;
/// Parts without a shortcut that are warnings in the log: the guest can map a BAR as often as it likes.
const LOUD_COMPLAINTS: u32 = 8;

/// The machine's [`BarMapper`].
pub(super) struct Bars {
    buses: Buses,
    regions: Arc<Regions>,
    doorbells: Doorbells,
    /// Where BARs of each segment may be, in their order. Elsewhere is another segment's part, RAM or something of the
    /// platform's, which would win.
    windows: Vec<Windows>,
    mapped: Mutex<BTreeMap<Key, Shortcuts>>,
    complaints: Complaints,
}

/// Whether it is ports, and the first address.
type Key = (bool, u64);

/// What a mapped BAR has beside its place on the address map.
#[derive(Default)]
struct Shortcuts {
    regions: Vec<Arc<Region>>,
    doorbells: Vec<Doorbell>,
    /// Of a BAR smaller than a page: the page, which is on the list while no other BAR is in it.
    page: Option<Page>,
}

struct Page {
    region: Arc<Region>,
    listed: bool,
}

impl fmt::Debug for Bars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bars")
            .field("windows", &self.windows)
            .finish_non_exhaustive()
    }
}

impl Bars {
    pub(super) fn new(
        buses: Buses,
        regions: Arc<Regions>,
        doorbells: Doorbells,
        windows: Vec<Windows>,
    ) -> Self {
        Self {
            buses,
            regions,
            doorbells,
            windows,
            mapped: Mutex::default(),
            complaints: Complaints::first(LOUD_COMPLAINTS),
        }
    }

    fn bus(&self, region: &BarRegion) -> &AddressMap {
        match region.kind {
            BarKind::Io => &self.buses.ports,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => &self.buses.mmio,
        }
    }

    fn check_place(&self, segment: Segment, region: &BarRegion) -> io::Result<()> {
        let end = region.address.checked_add(region.size);
        let fits = |window: &Range<u64>| {
            end.is_some_and(|end| window.start <= region.address && end <= window.end)
        };
        let number = usize::try_from(segment.0).unwrap_or(usize::MAX);
        let Some(windows) = self.windows.get(number) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let memory = || windows.memory32.iter().chain(&windows.memory64);
        let free = match region.kind {
            // Those of the board's own devices win.
            BarKind::Io if segment == Segment(0) => fits(&(0..PORTS_END)),
            BarKind::Io => fits(&windows.io),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => memory().any(fits),
        };
        if free {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            match self.windows.len() {
                1 => "it is outside of the windows for PCI devices",
                _ => "it is outside of the windows for devices of its PCI segment",
            },
        ))
    }

    /// Takes the parts that need no exit. A part that cannot be had so is reached by exit as well,
    /// only slower.
    fn shortcuts(&self, function: &Arc<dyn PciFunction>, region: &BarRegion) -> Shortcuts {
        let mut shortcuts = Shortcuts::default();
        if region.kind == BarKind::Io {
            return shortcuts;
        }
        for part in function.parts(region.index) {
            let taken = match part {
                BarPart::Memory { offset, size, host } => {
                    let inside = offset
                        .checked_add(size)
                        .is_some_and(|end| end <= region.size);
                    let page = region.size < PAGE_SIZE
                        && (offset, size) == (0, PAGE_SIZE)
                        && region.address.is_multiple_of(PAGE_SIZE);
                    if !inside && !page {
                        continue;
                    }
                    // SAFETY: a function answers for the memory that its parts name for as long as
                    // it lives, and the region holds it; device memory has no Rust reference to it.
                    let part = unsafe {
                        Region::device(
                            &format!("{} of {}", region.index, function.name()),
                            region.address.saturating_add(offset),
                            size,
                            host.0,
                            function.clone(),
                        )
                    };
                    if !inside {
                        shortcuts.page = Some(Page {
                            region: Arc::new(part),
                            listed: false,
                        });
                        continue;
                    }
                    let part = Arc::new(match function.is_peer() {
                        true => part.for_peers(peer(function, region.index, offset, size)),
                        false => part,
                    });
                    self.regions
                        .add(part.clone())
                        .map(|()| shortcuts.regions.push(part))
                        .map_err(|error| shortage::explained(&error))
                }
                BarPart::Doorbell { offset, event } => self
                    .doorbells
                    .ring(region.address.saturating_add(offset), &event)
                    .map(|doorbell| shortcuts.doorbells.push(doorbell))
                    .map_err(|error| shortage::explained(&error)),
            };
            if let Err(error) = taken {
                log::log!(
                    self.complaints.next(log::Level::Warn),
                    "{} of {} at {:#x} is slower than it could be, for each access to a part of it \
                     leaves the guest: {error}",
                    region.index,
                    function.name(),
                    region.address
                );
            }
        }
        shortcuts
    }

    /// Gives the page around `region` to the one BAR in it or, where there are more, to none.
    fn share_page(&self, mapped: &mut BTreeMap<Key, Shortcuts>, region: &BarRegion) {
        let (ports, start) = key(region);
        let start = start - start % PAGE_SIZE;
        if ports || region.size >= PAGE_SIZE {
            return;
        }
        let inside = (false, start)..(false, start.saturating_add(PAGE_SIZE));
        let alone = mapped.range(inside.clone()).count() == 1;
        let pages = mapped
            .range_mut(inside)
            .filter_map(|(_, s)| s.page.as_mut());
        for page in pages.filter(|page| page.listed != alone) {
            page.listed = alone;
            if !alone {
                self.regions.remove(&page.region);
            } else if let Err(error) = self.regions.add(page.region.clone()) {
                page.listed = false;
                log::debug!("{} is reached by exits: {error}", page.region);
            }
        }
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<Key, Shortcuts>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How other devices can reach a part of a BAR. It holds nothing: whoever maps the part by it does.
fn peer(function: &Arc<dyn PciFunction>, bar: BarIndex, offset: u64, size: u64) -> Peer {
    let weak = Arc::downgrade(function);
    Peer {
        device: function.name(),
        dma_buf: Box::new(move || {
            weak.upgrade()
                .and_then(|function| function.dma_buf(bar, offset, size))
                .unwrap_or_else(|| Err(io::ErrorKind::Unsupported.into()))
        }),
    }
}

fn key(region: &BarRegion) -> Key {
    (region.kind == BarKind::Io, region.address)
}

impl BarMapper for Bars {
    fn map(
        &self,
        segment: Segment,
        function: &Arc<dyn PciFunction>,
        region: &BarRegion,
    ) -> io::Result<()> {
        self.check_place(segment, region)?;
        let bar = Bar {
            function: function.clone(),
            index: region.index,
        };
        self.bus(region)
            .insert(
                &format!("{} of {}", region.index, function.name()),
                region.address,
                region.size,
                Arc::new(bar),
            )
            .map_err(|overlap| io::Error::new(io::ErrorKind::AddrInUse, overlap))?;
        let shortcuts = self.shortcuts(function, region);
        let mut mapped = self.mapped();
        mapped.insert(key(region), shortcuts);
        self.share_page(&mut mapped, region);
        Ok(())
    }

    fn unmap(&self, _function: &Arc<dyn PciFunction>, region: &BarRegion) {
        let mut mapped = self.mapped();
        let shortcuts = mapped.remove(&key(region)).unwrap_or_default();
        drop(shortcuts.doorbells);
        let page = shortcuts.page.filter(|page| page.listed);
        let page = page.map(|page| page.region);
        for region in shortcuts.regions.iter().chain(&page).rev() {
            self.regions.remove(region);
        }
        self.bus(region).remove(region.address);
        self.share_page(&mut mapped, region);
    }
}

#[cfg(test)]
mod tests {
    use busway_pci::HostAddress;
    use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::config::MemoryConfig;
    use crate::kvm::Vm;
    use crate::memory::{Ram, RegionsError};

    const WINDOW: Range<u64> = 0xc000_0000..0xc100_0000;
    /// That of segment 1.
    const OTHER: Range<u64> = 0xc100_0000..0xc200_0000;

    fn windows(memory32: Range<u64>) -> Windows {
        Windows {
            io: 0..0,
            memory32: vec![memory32, 0..0],
            memory64: Vec::new(),
        }
    }

    /// A function whose BAR 0 has a page that needs no exit, the second or the one that begins with it,
    /// and that answers the rest with sevens.
    #[derive(Debug)]
    struct Function(Ram, u64);

    impl PciFunction for Function {
        fn name(&self) -> String {
            format!("the function with page {:#x}", self.1)
        }
        fn config_read(&self, _offset: u16, _data: &mut [u8]) {}
        fn config_write(&self, _offset: u16, _data: &[u8]) {}
        fn bars(&self) -> Vec<BarRegion> {
            Vec::new()
        }
        fn decoded(&self) -> Vec<BarRegion> {
            Vec::new()
        }
        fn parts(&self, _bar: BarIndex) -> Vec<BarPart> {
            let host = self.0.guest().memory().get_host_address(GuestAddress(0));
            vec![BarPart::Memory {
                offset: self.1,
                size: 0x1000,
                host: HostAddress(host.unwrap() as usize),
            }]
        }
        fn bar_read(&self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
            data.fill(7);
        }
        fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
        fn reset(&self) {}
    }

    struct Fixture {
        _vm: Vm,
        regions: Arc<Regions>,
        buses: Buses,
        bars: Bars,
        function: Arc<dyn PciFunction>,
        small: Arc<dyn PciFunction>,
    }

    /// Nothing, said on standard error, where there is no KVM.
    fn fixture() -> Option<Fixture> {
        let vm = Vm::new()
            .inspect_err(|error| eprintln!("skipped: {error}"))
            .ok()?;
        let (regions, buses) = (Arc::new(Regions::default()), Buses::default());
        regions.listen(Arc::new(vm.memslots())).unwrap();
        let page = MemoryConfig {
            size: 0x1000,
            ..Default::default()
        };
        Some(Fixture {
            bars: Bars::new(
                buses.clone(),
                regions.clone(),
                vm.doorbells(),
                [WINDOW, OTHER].map(windows).to_vec(),
            ),
            function: Arc::new(Function(Ram::new(&page, false).unwrap(), 0x1000)),
            small: Arc::new(Function(Ram::new(&page, false).unwrap(), 0)),
            _vm: vm,
            regions,
            buses,
        })
    }

    fn at(address: u64, size: u64) -> BarRegion {
        BarRegion {
            index: BarIndex::Bar(0),
            kind: BarKind::Memory32 {
                prefetchable: false,
            },
            address,
            size,
        }
    }

    fn read(buses: &Buses, address: u64) -> u8 {
        let mut data = [0];
        buses.mmio.read(address, &mut data);
        data[0]
    }

    /// Whether something is on the list of regions there.
    fn is_memory(regions: &Regions, guest: u64) -> bool {
        // SAFETY: it is removed again before anything could reach it.
        let probe = Arc::new(unsafe { Region::device("probe", guest, 0x1000, 0x1000, ()) });
        match regions.add(probe.clone()) {
            Err(RegionsError::Overlap { .. }) => true,
            _ => {
                regions.remove(&probe);
                false
            }
        }
    }

    #[test]
    fn a_bar_is_reachable_where_it_was_mapped_and_nowhere_after() {
        let Some(f) = fixture() else { return };
        for start in [WINDOW.start, WINDOW.end - 0x4000] {
            let region = at(start, 0x4000);
            f.bars.map(Segment(0), &f.function, &region).unwrap();
            assert_eq!(
                [read(&f.buses, start), read(&f.buses, start + 0x4000)],
                [7, 0xff]
            );
            assert!(is_memory(&f.regions, start + 0x1000));
            assert!(!is_memory(&f.regions, start + 0x2000));
            f.bars.unmap(&f.function, &region);
            assert_eq!(read(&f.buses, start), 0xff);
            assert!(!is_memory(&f.regions, start + 0x1000));
        }
    }

    #[test]
    fn a_bar_outside_of_the_windows_or_over_another_is_refused_and_harms_nobody() {
        let Some(f) = fixture() else { return };
        let there = at(WINDOW.start, 0x4000);
        f.bars.map(Segment(0), &f.function, &there).unwrap();
        for (address, size) in [
            (0, 0x4000),
            (WINDOW.start - 0x4000, 0x4000),
            (WINDOW.end, 0x4000),
            (WINDOW.start, 1 << 32),
            (u64::MAX - 0xfff, 0x4000),
        ] {
            f.bars
                .map(Segment(0), &f.function, &at(address, size))
                .unwrap_err();
        }
        let error = f
            .bars
            .map(Segment(0), &f.small, &at(WINDOW.start + 0x2000, 0x2000));
        assert_eq!(
            error.unwrap_err().to_string(),
            "BAR 0 of the function with page 0x0 at 0xc0002000..=0xc0003fff overlaps BAR 0 of the \
             function with page 0x1000 at 0xc0000000..=0xc0003fff"
        );
        assert_eq!(read(&f.buses, WINDOW.start), 7);
        assert!(is_memory(&f.regions, WINDOW.start + 0x1000));
    }

    #[test]
    fn a_bar_is_nowhere_in_another_segments_window() {
        let Some(f) = fixture() else { return };
        let (here, there) = (at(WINDOW.start, 0x4000), at(OTHER.start, 0x4000));
        for (segment, region, fits) in [
            (0, &here, true),
            (0, &there, false),
            (1, &here, false),
            (1, &there, true),
            (2, &here, false),
        ] {
            let mapped = f.bars.map(Segment(segment), &f.function, region);
            assert_eq!(mapped.is_ok(), fits, "{segment}: {mapped:?}");
            let expected = if fits { 7 } else { 0xff };
            assert_eq!(read(&f.buses, region.address), expected);
            if fits {
                f.bars.unmap(&f.function, region);
            }
        }
        // No port but its own segment's, of which there are none here.
        let ports = BarRegion {
            kind: BarKind::Io,
            ..at(0xc000, 0x20)
        };
        f.bars.map(Segment(0), &f.function, &ports).unwrap();
        f.bars.unmap(&f.function, &ports);
        f.bars.map(Segment(1), &f.function, &ports).unwrap_err();
    }

    #[test]
    fn a_part_that_cannot_be_memory_is_reached_by_exit() {
        let Some(f) = fixture() else { return };
        // SAFETY: nothing runs that could reach it.
        let other = unsafe { Region::device("other", WINDOW.start + 0x1000, 0x1000, 0x1000, ()) };
        let other = Arc::new(other);
        // The address is no memory of this process's, which KVM finds out only at an access.
        f.regions.add(other).unwrap();
        let (bar, part) = (at(WINDOW.start, 0x4000), WINDOW.start + 0x1000);
        f.bars.map(Segment(0), &f.function, &bar).unwrap();
        assert_eq!(read(&f.buses, part), 7);
        f.bars.unmap(&f.function, &bar);
        assert_eq!(read(&f.buses, part), 0xff);
        assert!(is_memory(&f.regions, part), "the other's is the other's");
    }

    #[test]
    fn a_part_that_cannot_be_memory_is_told_of_a_few_times() {
        let Some(f) = fixture() else { return };
        // SAFETY: nothing runs that could reach it.
        let other = unsafe { Region::device("other", WINDOW.start + 0x1000, 0x1000, 0x1000, ()) };
        f.regions.add(Arc::new(other)).unwrap();
        let bar = at(WINDOW.start, 0x4000);
        for round in 1..=LOUD_COMPLAINTS {
            f.bars.map(Segment(0), &f.function, &bar).unwrap();
            assert_eq!(f.bars.complaints.made(), round);
            f.bars.unmap(&f.function, &bar);
        }
        let next = f.bars.complaints.next(log::Level::Warn);
        assert_eq!(next, log::Level::Debug);
    }

    #[test]
    fn a_bar_of_less_than_a_page_is_memory_while_it_has_the_page_to_itself() {
        let Some(f) = fixture() else { return };
        let page = WINDOW.start + 0x1000;
        let (first, second) = (at(page, 0x100), at(page + 0x800, 0x100));
        f.bars.map(Segment(0), &f.small, &first).unwrap();
        assert!(is_memory(&f.regions, page));
        f.bars.map(Segment(0), &f.small, &second).unwrap();
        assert!(!is_memory(&f.regions, page));
        assert_eq!([read(&f.buses, page), read(&f.buses, page + 0x800)], [7, 7]);
        f.bars.unmap(&f.small, &second);
        assert!(is_memory(&f.regions, page));
        f.bars.unmap(&f.small, &first);
        assert!(!is_memory(&f.regions, page));
        // Not at the page's start: what the guest would find there is not what the host has.
        f.bars.map(Segment(0), &f.small, &second).unwrap();
        assert!(!is_memory(&f.regions, page));
        f.bars.map(Segment(0), &f.small, &first).unwrap();
        f.bars.unmap(&f.small, &second);
        assert!(is_memory(&f.regions, page));
    }
}
