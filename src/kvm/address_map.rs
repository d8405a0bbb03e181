//! Which device answers at a guest-physical address or an I/O port.
//!
//! Read on every exit and written almost never: readers take a snapshot and no lock, so a device may
//! change the map from within an access.

use std::fmt;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;

/// A device as vCPU exits see it. Accesses are 1, 2, 4 or 8 bytes wide, or longer for string I/O.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes, `offset` from the range's start.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data`, `offset` from the range's start.
    fn write(&self, offset: u64, data: &[u8]);
}

#[derive(Clone)]
struct Entry {
    start: u64,
    last: u64,
    name: Arc<str>,
    device: Arc<dyn BusDevice>,
}

/// {name} at {start:#x}..={last:#x} overlaps {other} at {other_start:#x}..={other_last:#x}
#[derive(Debug, thiserror::Error)]
#[error("{name} at {start:#x}..={last:#x} overlaps {other} at {other_start:#x}..={other_last:#x}")]
pub struct Overlap {
    /// Who asked.
    pub name: String,
    /// First address asked for.
    pub start: u64,
    /// Last address asked for.
    pub last: u64,
    /// Who is there.
    pub other: String,
    /// Its first address.
    pub other_start: u64,
    /// Its last address.
    pub other_last: u64,
}

/// A map from ranges of addresses to devices.
#[derive(Default)]
pub struct AddressMap {
    entries: ArcSwap<Vec<Entry>>,
    writer: Mutex<()>,
}

impl fmt::Debug for AddressMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries.load();
        f.debug_map()
            .entries(
                entries
                    .iter()
                    .map(|e| (format!("{:#x}..={:#x}", e.start, e.last), &e.name)),
            )
            .finish()
    }
}

impl AddressMap {
    /// Puts `device` at `start..start + size`.
    ///
    /// # Errors
    /// [`Overlap`], naming both.
    pub fn insert(
        &self,
        name: &str,
        start: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let last = start.saturating_add(size.max(1) - 1);
        let _writer = self
            .writer
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut entries = Vec::clone(&self.entries.load());
        let at = entries.partition_point(|entry| entry.last < start);
        if let Some(other) = entries.get(at).filter(|other| other.start <= last) {
            return Err(Overlap {
                name: name.to_owned(),
                start,
                last,
                other: other.name.to_string(),
                other_start: other.start,
                other_last: other.last,
            });
        }
        entries.insert(
            at,
            Entry {
                start,
                last,
                name: name.into(),
                device,
            },
        );
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// Removes the range that starts at `start`; says whether there was one.
    pub fn remove(&self, start: u64) -> bool {
        let _writer = self
            .writer
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut entries = Vec::clone(&self.entries.load());
        let before = entries.len();
        entries.retain(|entry| entry.start != start);
        let removed = entries.len() != before;
        self.entries.store(Arc::new(entries));
        removed
    }

    /// Removes every range.
    pub fn clear(&self) {
        let _writer = self
            .writer
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        self.entries.store(Arc::default());
    }

    /// Reads from whatever is at `address`; all ones where nothing is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to whatever is at `address`; dropped where nothing is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, Arc<dyn BusDevice>)> {
        let entries = self.entries.load();
        let at = entries.partition_point(|entry| entry.last < address);
        let entry = entries.get(at).filter(|entry| entry.start <= address)?;
        Some((address - entry.start, entry.device.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_holds_it_and_nothing_reads_ones() {
        let map = AddressMap::default();
        map.insert("high", 0x200, 0x10, Arc::new(Echo(0x20)))
            .unwrap();
        map.insert("low", 0x100, 0x10, Arc::new(Echo(0x10)))
            .unwrap();
        let read = |address| {
            let mut data = [0];
            map.read(address, &mut data);
            data[0]
        };
        assert_eq!([read(0xff), read(0x100), read(0x10f)], [0xff, 0x10, 0x1f]);
        assert_eq!([read(0x110), read(0x20f), read(0x210)], [0xff, 0x2f, 0xff]);
        assert!(map.remove(0x100) && !map.remove(0x100));
        assert_eq!(read(0x100), 0xff);
    }

    #[test]
    fn an_overlap_is_refused_and_names_both() {
        let map = AddressMap::default();
        map.insert("serial", 0x3f8, 8, Arc::new(Echo(0))).unwrap();
        let error = map.insert("bar", 0x3f0, 9, Arc::new(Echo(0))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "bar at 0x3f0..=0x3f8 overlaps serial at 0x3f8..=0x3ff"
        );
        map.insert("fits", 0x3f0, 8, Arc::new(Echo(0))).unwrap();
    }
}
