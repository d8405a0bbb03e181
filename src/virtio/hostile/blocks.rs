//! RAM whose blocks go while they are in a balloon, before devices that do not always follow.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::config::MemoryConfig;
use crate::memory::{Ballooned, Ram, Region, RegionError, RegionListener, Regions};

/// Bytes of it, from address 0.
const SIZE: u64 = 1 << 20;
/// Bytes of a block: so few that a request's pages fill one.
const BLOCK: u64 = 16 << 10;

/// Devices: of every five blocks that go or come one is not unmapped, or not mapped.
#[derive(Debug, Default)]
struct Devices(AtomicU32);

impl Devices {
    fn step(&self) -> Result<(), RegionError> {
        match self.0.fetch_add(1, Relaxed) % 5 {
            4 => Err("not now".into()),
            _ => Ok(()),
        }
    }
}

impl RegionListener for Devices {
    fn name(&self) -> &str {
        "devices"
    }

    fn added(&self, _: &Arc<Region>) -> Result<(), RegionError> {
        Ok(())
    }

    fn removed(&self, _: &Arc<Region>) {}

    fn plugged(&self, _: &Arc<Region>, _: &Range<u64>) -> Result<(), RegionError> {
        self.step()
    }

    fn unplugged(&self, _: &Arc<Region>, _: &Range<u64>) -> Result<(), RegionError> {
        self.step()
    }

    fn pins(&self) -> bool {
        true
    }
}

/// Such RAM, and the list that it is on. It is not the story's guest's, whose addresses it has.
pub(super) fn ballooned() -> io::Result<(Arc<Regions>, Ballooned)> {
    let config = MemoryConfig {
        size: SIZE,
        thp: false,
        ..MemoryConfig::default()
    };
    let mut ram = Ram::new(&config, false).map_err(io::Error::other)?;
    ram.split(BLOCK);
    let regions = Arc::<Regions>::default();
    for region in ram.regions() {
        regions.add(region).map_err(io::Error::other)?;
    }
    let devices = Arc::new(Devices::default());
    regions.listen(devices).map_err(io::Error::other)?;
    let ballooned = ram.ballooned(&regions).ok_or(io::ErrorKind::NotFound)?;
    Ok((regions, ballooned))
}
