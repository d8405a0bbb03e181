//! The guest's RAM: its stretches, where each lies to the guest, and what each is made of.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::backing::{Backing, map_error};
use super::error::RamError;
use super::host::{check_host_memory, check_host_nodes};
use super::huge_pages::{check_pool, huge_page_size, reserved_huge_pages};
use super::mapped::unmap_unused;
use super::pieces::PluggableRam;
use super::{Ballooned, GuestRam, RamMap, Region, Regions};
use crate::arch::layout;
use crate::config::{MemoryConfig, MemoryZoneConfig};

/// Pages of this size and its multiples are what a guest can be made of.
const PAGE: u64 = busway_pci::PAGE_SIZE;
const MIB: u64 = 1 << 20;

/// Whether the host makes transparent huge pages of shared memory, which it decides apart from other memory.
/// Linux, Documentation/admin-guide/mm/transhuge.rst
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The RAM of one VM.
#[derive(Clone, Debug)]
pub struct Ram {
    map: GuestRam,
    /// In ascending order.
    stretches: Vec<Stretch>,
    /// Their regions, where these can go and come back by blocks.
    in_blocks: Vec<Arc<Region>>,
    /// What is plugged and unplugged by blocks, behind all other RAM, in ascending order.
    pub(super) pluggable: Vec<PluggableRam>,
}

/// A stretch of RAM, of one kind.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    pub(super) memory: Arc<GuestRegionMmap>,
    pub(super) backing: Backing,
    /// The zone that it is of, by its place among the zones; 0 where there are none.
    zone: usize,
}

impl Stretch {
    fn range(&self) -> Range<u64> {
        let start = self.memory.start_addr().0;
        start..start.saturating_add(self.memory.len())
    }
}

impl Ram {
    /// As [`around`](Self::around), without zones and where nothing is reserved.
    ///
    /// # Errors
    /// [`RamError`]
    pub fn new(config: &MemoryConfig, whole: bool) -> Result<Self, RamError> {
        Self::around(config, &[], whole, layout::MMIO32_START, &[])
    }

    /// Maps RAM as configured: below `low_end`, where the 32-bit MMIO window starts, and from 4 GiB on;
    /// round the addresses in `reserved` (first and last, ascending), where assigned devices let none
    /// be. Its `zones`, where there are any, follow one another there, each of what it says. No page is touched yet;
    /// `whole` says that all of them will be, so that the host has to have them now.
    ///
    /// # Errors
    /// [`RamError`]; what the host cannot give is refused before anything is taken.
    pub fn around(
        config: &MemoryConfig,
        zones: &[MemoryZoneConfig],
        whole: bool,
        low_end: u64,
        reserved: &[(u64, u64)],
    ) -> Result<Self, RamError> {
        let size = config.size;
        if size == 0 {
            return Err(RamError::Empty);
        }
        if !size.is_multiple_of(PAGE) {
            return Err(RamError::Unaligned(size));
        }
        unmap_unused();
        let backings = backings(config, zones, whole)?;
        let small =
            |backing: &Backing| backing.shared && backing.thp && backing.huge_page.is_none();
        if backings.iter().any(small) {
            tell_of_small_pages(Path::new(SHMEM_HUGE_PAGES));
        }
        let pages = backings.iter().filter_map(|backing| backing.huge_page);
        let holes = layout::holes(reserved.iter().copied(), pages.max().unwrap_or(2 * MIB));
        let ranges = layout::ram_ranges(size, low_end, &holes);
        let sizes = zones.iter().map(|zone| zone.size);
        let parts = match zones.is_empty() {
            true => ranges.into_iter().map(|range| (0, range)).collect(),
            false => layout::split(&ranges, sizes),
        };
        let mut stretches = Vec::new();
        for (index, range) in parts {
            let Some(backing) = backings.get(index) else {
                continue;
            };
            if let Some((zone, page)) = zones.get(index).zip(backing.huge_page) {
                check_place(zone, page, &range)?;
            }
            stretches.push(Stretch {
                memory: backing.map(&range)?,
                backing: *backing,
                zone: index,
            });
        }
        let mut all: Vec<_> = stretches.iter().map(|one| one.memory.clone()).collect();
        let top = stretches.last().map_or(0, |last| last.range().end);
        let pluggable = PluggableRam::map_all(config, zones, &backings, top, &holes)?;
        all.extend(pluggable.iter().map(|piece| piece.memory.clone()));
        let map = RamMap::from_arc_regions(all).map_err(|error| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
            map_error("mapping", size)(source)
        })?;
        Ok(Self {
            map: GuestRam::new(map),
            stretches,
            in_blocks: Vec::new(),
            pluggable,
        })
    }

    /// The handle that devices and the boot loader use.
    #[must_use]
    pub fn guest(&self) -> &GuestRam {
        &self.map
    }

    /// Has RAM that the guest starts with be such that blocks of `block` bytes can go and come back
    /// ([`ballooned`](Self::ballooned)). Called before it is put on the list.
    pub fn split(&mut self, block: u64) {
        let region = |stretch: &Stretch| {
            let memory = stretch.memory.clone();
            Arc::new(Region::in_blocks(name_of(&memory), memory, block))
        };
        self.in_blocks = self.stretches.iter().map(region).collect();
    }

    /// RAM as regions for the list.
    pub fn regions(&self) -> impl Iterator<Item = Arc<Region>> {
        let pluggable = self.pluggable.iter();
        let pluggable = pluggable.map(|piece| piece.region.clone());
        let whole = self.stretches.iter().enumerate().map(|(at, stretch)| {
            let in_blocks = self.in_blocks.get(at).cloned();
            in_blocks.unwrap_or_else(|| {
                let memory = stretch.memory.clone();
                Arc::new(Region::ram(name_of(&memory), memory))
            })
        });
        whole.chain(pluggable)
    }

    /// The pages that are in the guest's balloon, where RAM was [split](Self::split), for the list that it is on.
    #[must_use]
    pub fn ballooned(&self, regions: &Arc<Regions>) -> Option<Ballooned> {
        let memory = self.stretches.iter().map(|stretch| stretch.memory.clone());
        let parts = memory.zip(self.in_blocks.iter().cloned());
        (!self.in_blocks.is_empty()).then(|| Ballooned::new(regions, parts))
    }

    /// Where RAM is, to the guest, in ascending order, without what can be plugged. Zones that touch are one range.
    #[must_use]
    pub fn guest_ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for next in self.stretches.iter().map(Stretch::range) {
            match ranges.last_mut() {
                Some(last) if last.end == next.start => last.end = next.end,
                _ => ranges.push(next),
            }
        }
        ranges
    }

    /// Where each zone is, by its place among the zones, to the guest, in ascending order; all of zone 0 where there are
    /// none.
    pub fn zone_ranges(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        self.stretches.iter().map(|one| (one.zone, one.range()))
    }

    /// Where RAM is mapped in this process, with what can be plugged.
    #[must_use]
    pub fn host_ranges(&self) -> Vec<Range<usize>> {
        let pluggable = self.pluggable.iter().map(|piece| &piece.memory);
        let stretches = self.stretches.iter().map(|one| &one.memory);
        stretches
            .chain(pluggable)
            .map(|region| {
                let start = region.as_ptr() as usize;
                start..start + region.size()
            })
            .collect()
    }

    /// The stretches, in ascending order.
    pub(super) fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// Bytes, without what can be plugged.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.stretches.iter().map(|one| one.memory.len()).sum()
    }
}

fn name_of(memory: &GuestRegionMmap) -> &'static str {
    match memory.start_addr().0 {
        layout::HIGH_RAM_START.. => "guest RAM above 4 GiB",
        _ => "guest RAM below 4 GiB",
    }
}

/// What each zone is made of, or all RAM where there are none, once it is known that the host has that.
fn backings(
    config: &MemoryConfig,
    zones: &[MemoryZoneConfig],
    whole: bool,
) -> Result<Vec<Backing>, RamError> {
    if zones.is_empty() {
        let huge_page = match config.hugepages {
            true => Some(reserved_huge_pages(config)?),
            false => {
                check_host_memory(config.size, whole)?;
                None
            }
        };
        return Ok(vec![Backing::of_all(config, huge_page)]);
    }
    let mut made = Vec::new();
    for zone in zones {
        let page = match zone.hugepages {
            true => Some(huge_page_size(zone.hugepage_size)?),
            false => None,
        };
        made.push((zone, page));
    }
    let ordinary = made.iter().filter(|(_, page)| page.is_none());
    let ordinary = ordinary.fold(0, |sum: u64, (zone, _)| sum.saturating_add(zone.size));
    check_host_memory(ordinary, whole)?;
    let mut pages: Vec<u64> = made.iter().filter_map(|(_, page)| *page).collect();
    pages.sort_unstable();
    pages.dedup();
    for page in pages {
        let of_page = made.iter().filter(|(_, of)| *of == Some(page));
        let sizes = of_page.map(|(zone, _)| zone.size);
        check_pool(page, sizes)?;
    }
    check_host_nodes(&made, whole)?;
    let backing = |(zone, page): (&MemoryZoneConfig, _)| Backing::of_zone(config, zone, page);
    Ok(made.into_iter().map(backing).collect())
}

/// That a stretch of a zone is made of whole huge pages.
fn check_place(zone: &MemoryZoneConfig, page: u64, range: &Range<u64>) -> Result<(), RamError> {
    if (range.start | range.end).is_multiple_of(page) {
        return Ok(());
    }
    Err(RamError::ZonePlace {
        zone: zone.id.clone(),
        page,
        start: range.start,
    })
}

/// Says where the host makes no transparent huge pages of shared memory, and what would have it do so.
fn tell_of_small_pages(setting: &Path) -> bool {
    let text = fs::read_to_string(setting).unwrap_or_default();
    let small = text.contains("[never]") || text.contains("[deny]");
    if small {
        log::info!(
            "guest RAM is shared with other processes, and this host makes no huge pages of such memory: \
             `echo advise | sudo tee {}` has it do so, and --memory hugepages=on takes reserved ones",
            setting.display()
        );
    }
    small
}

#[cfg(test)]
mod tests {
    use rustix::fs::SealFlags;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::memory::pieces::policy;

    #[test]
    fn ram_of_every_kind_is_mapped_where_the_layout_says() {
        for shared in [false, true] {
            let config = MemoryConfig {
                size: 16 << 20,
                shared,
                ..Default::default()
            };
            let ram = Ram::new(&config, false).unwrap();
            assert_eq!(ram.size(), config.size);
            let memory = ram.guest().memory();
            memory
                .write_obj(7_u64, GuestAddress((16 << 20) - 8))
                .unwrap();
            memory.write_obj(7_u8, GuestAddress(16 << 20)).unwrap_err();
            let region = ram.regions().next().unwrap();
            assert_eq!(region.file().map(FileOffset::start), shared.then_some(0));
            assert!(!region.read_only());
        }
    }

    #[test]
    fn zones_follow_one_another_and_each_is_bound_to_its_node_before_a_page_is_touched() {
        if !Path::new("/sys/devices/system/node/node0").exists() {
            eprintln!("skipped: this kernel has no NUMA nodes");
            return;
        }
        let zone = |id: &str, mib: u64, node| MemoryZoneConfig {
            host_numa_node: node,
            ..MemoryZoneConfig::new(id, mib * MIB)
        };
        let mut zones = [
            zone("a", 4, Some(0)),
            zone("b", 8, Some(0)),
            zone("c", 4, None),
        ];
        zones[1].shared = true;
        let config = MemoryConfig {
            size: 16 * MIB,
            ..Default::default()
        };
        let ram = Ram::around(&config, &zones, false, layout::MMIO32_START, &[]).unwrap();
        let places: Vec<_> = ram.zone_ranges().collect();
        let expected = [
            (0, 0..4 * MIB),
            (1, 4 * MIB..12 * MIB),
            (2, 12 * MIB..16 * MIB),
        ];
        assert_eq!(places, expected);
        assert_eq!(ram.guest_ranges(), std::slice::from_ref(&(0..16 * MIB)));
        let shared: Vec<_> = ram
            .regions()
            .map(|region| region.file().is_some())
            .collect();
        assert_eq!(shared, [false, true, false]);
        let policies = ram
            .host_ranges()
            .into_iter()
            .map(|range| policy(range.start));
        let policies: Vec<_> = policies.collect::<Option<_>>().unwrap();
        assert_eq!(policies, ["bind:0", "bind:0", "default"]);
        // What is written goes over from one to the next.
        let memory = ram.guest().memory();
        let (at, bytes) = (GuestAddress(4 * MIB - 3), *b"across");
        memory.write_slice(&bytes, at).unwrap();
        let mut read = [0; 6];
        memory.read_slice(&mut read, at).unwrap();
        assert_eq!(read, bytes);
    }

    #[test]
    fn a_zone_of_a_node_that_is_not_there_is_refused_before_anything_is_taken() {
        let zones = [MemoryZoneConfig {
            host_numa_node: Some(1023),
            ..MemoryZoneConfig::new("far", 16 * MIB)
        }];
        let config = MemoryConfig {
            size: 16 * MIB,
            ..Default::default()
        };
        let refused = Ram::around(&config, &zones, false, layout::MMIO32_START, &[]);
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("`far`") && why.contains("node 1023"), "{why}");
    }

    #[test]
    fn a_host_that_makes_no_huge_pages_of_shared_memory_is_told_of() {
        let setting = tempfile::NamedTempFile::new().unwrap();
        for (text, small) in [
            ("always within_size advise [never] deny force", true),
            ("always within_size [advise] never deny force", false),
            ("always within_size advise never [deny] force", true),
            ("", false),
        ] {
            fs::write(setting.path(), text).unwrap();
            assert_eq!(tell_of_small_pages(setting.path()), small, "{text}");
        }
    }

    #[test]
    fn whoever_has_shared_ram_can_neither_cut_it_short_nor_make_it_longer() {
        let config = MemoryConfig {
            size: 16 << 20,
            shared: true,
            ..Default::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let region = ram.regions().next().unwrap();
        let file = region.file().unwrap().file();
        for size in [0, config.size - 4096, config.size + 4096] {
            let error = file.set_len(size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{size}");
        }
        let seals = rustix::fs::fcntl_get_seals(file).unwrap();
        assert!(seals.contains(SealFlags::SEAL), "{seals:?}");
    }

    #[test]
    fn ram_agrees_with_its_place_in_the_guest_modulo_the_huge_page() {
        let config = MemoryConfig {
            size: 3 << 29,
            ..Default::default()
        };
        // A hole moves what follows to an odd place.
        let reserved = [(0x345_6000, 0x345_6fff)];
        let ram = Ram::around(&config, &[], false, layout::MMIO32_START, &reserved).unwrap();
        assert!(ram.stretches().len() > 1);
        for region in ram.stretches().iter().map(|one| &one.memory) {
            let (guest, host) = (region.start_addr().0, region.as_ptr() as u64);
            let page = if region.len() >= 1 << 30 {
                1 << 30
            } else {
                2 * MIB
            };
            assert_eq!(guest % page, host % page, "{guest:#x} at {host:#x}");
        }
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 4095, 4097] {
            let config = MemoryConfig {
                size,
                ..Default::default()
            };
            assert!(Ram::new(&config, false).is_err(), "{size}");
        }
    }
}
