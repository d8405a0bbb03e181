//! Makes BARs reachable: by exit where nothing better is known, by memory slots and doorbells where
//! the function names parts that need none.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{BarKind, BarMapper, BarPart, BarRegion, PciFunction};

use super::bus::Bar;
use crate::kvm::{AddressMap, Buses, Doorbell, Doorbells};
use crate::memory::{Region, Regions};

/// End of the I/O ports.
const PORTS_END: u64 = 0x1_0000;

/// The machine's [`BarMapper`].
pub(super) struct Bars {
    buses: Buses,
    regions: Arc<Regions>,
    doorbells: Doorbells,
    /// Where memory BARs may be. Elsewhere is RAM or something of the platform's, which would win.
    windows: [Range<u64>; 2],
    mapped: Mutex<BTreeMap<Key, Shortcuts>>,
}

/// Whether it is ports, and the first address.
type Key = (bool, u64);

/// What a mapped BAR has beside its place on the address map.
#[derive(Default)]
struct Shortcuts {
    regions: Vec<Arc<Region>>,
    doorbells: Vec<Doorbell>,
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
        windows: [Range<u64>; 2],
    ) -> Self {
        Self {
            buses,
            regions,
            doorbells,
            windows,
            mapped: Mutex::default(),
        }
    }

    fn bus(&self, region: &BarRegion) -> &AddressMap {
        match region.kind {
            BarKind::Io => &self.buses.ports,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => &self.buses.mmio,
        }
    }

    fn check_place(&self, region: &BarRegion) -> io::Result<()> {
        let end = region.address.checked_add(region.size);
        let fits = |window: &Range<u64>| {
            end.is_some_and(|end| window.start <= region.address && end <= window.end)
        };
        let free = match region.kind {
            BarKind::Io => fits(&(0..PORTS_END)),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => self.windows.iter().any(fits),
        };
        if free {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is outside of the windows for PCI devices",
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
                    if !inside {
                        continue;
                    }
                    // SAFETY: a function answers for the memory that its parts name for as long as
                    // it lives, and the region holds it; device memory has no Rust reference to it.
                    let part = Arc::new(unsafe {
                        Region::device(
                            &format!("{} of an assigned device", region.index),
                            region.address.saturating_add(offset),
                            size,
                            host.0,
                            function.clone(),
                        )
                    });
                    self.regions
                        .add(part.clone())
                        .map(|()| shortcuts.regions.push(part))
                        .map_err(|error| error.to_string())
                }
                BarPart::Doorbell { offset, event } => self
                    .doorbells
                    .ring(region.address.saturating_add(offset), &event)
                    .map(|doorbell| shortcuts.doorbells.push(doorbell))
                    .map_err(|error| error.to_string()),
            };
            if let Err(error) = taken {
                log::warn!(
                    "{} at {:#x} is slower than it could be, for each access to a part of it \
                     leaves the guest: {error}",
                    region.index,
                    region.address
                );
            }
        }
        shortcuts
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<Key, Shortcuts>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(region: &BarRegion) -> Key {
    (region.kind == BarKind::Io, region.address)
}

impl BarMapper for Bars {
    fn map(&self, function: &Arc<dyn PciFunction>, region: &BarRegion) -> io::Result<()> {
        self.check_place(region)?;
        let bar = Bar {
            function: function.clone(),
            index: region.index,
        };
        self.bus(region)
            .insert(
                &region.index.to_string(),
                region.address,
                region.size,
                Arc::new(bar),
            )
            .map_err(|overlap| io::Error::new(io::ErrorKind::AddrInUse, overlap))?;
        let shortcuts = self.shortcuts(function, region);
        self.mapped().insert(key(region), shortcuts);
        Ok(())
    }

    fn unmap(&self, _function: &Arc<dyn PciFunction>, region: &BarRegion) {
        let shortcuts = self.mapped().remove(&key(region)).unwrap_or_default();
        drop(shortcuts.doorbells);
        for region in shortcuts.regions.iter().rev() {
            self.regions.remove(region);
        }
        self.bus(region).remove(region.address);
    }
}
