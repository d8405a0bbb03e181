//! Where a device's MSI-X table and PBA are, and where the guest finds them.
//!
//! Two different things of two types: the device's pages may never be mapped, the guest's accesses
//! have to be answered. They lie in the same place today; a quirk may move the guest's.

use busway_pci::{Msix, MsixLocation, spec};

use crate::areas::Area;

/// A place in the host device's BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceLocation {
    pub(crate) bar: u8,
    pub(crate) area: Area,
}

/// A place in the guest's BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestLocation {
    pub(crate) bar: u8,
    pub(crate) area: Area,
}

impl GuestLocation {
    /// How the capability says it.
    pub(crate) fn register(self) -> u32 {
        MsixLocation {
            bar: self.bar,
            offset: self.area.offset as u32,
        }
        .register()
    }
}

/// Why a device's MSI-X cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error("its {what} is in BAR {bar}, which is not there")]
    NoBar { what: &'static str, bar: u8 },
    #[error("its {what} ends at {end:#x}, beyond BAR {bar}'s {size:#x} bytes")]
    Beyond {
        what: &'static str,
        bar: u8,
        end: u64,
        size: u64,
    },
}

/// A device's MSI-X: how many vectors, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MsixLayout {
    pub(crate) vectors: u16,
    device: [DeviceLocation; 2],
}

impl MsixLayout {
    /// Reads the capability's three doublewords. `bar_size` gives the size of a memory BAR.
    pub(crate) fn read(
        capability: [u32; 3],
        bar_size: impl Fn(u8) -> Option<u64>,
    ) -> Result<Self, LayoutError> {
        let [header, table, pba] = capability;
        let vectors = ((header >> 16) as u16 & spec::MSIX_CONTROL_SIZE) + 1;
        let table_size = u64::from(vectors) * spec::MSIX_ENTRY_SIZE;
        let pba_size = u64::from(vectors).div_ceil(64) * 8;
        let locate = |what, register, size| {
            let MsixLocation { bar, offset } = MsixLocation::from_register(register);
            let offset = u64::from(offset);
            let end = offset.saturating_add(size);
            match bar_size(bar) {
                None => Err(LayoutError::NoBar { what, bar }),
                Some(size) if end > size => Err(LayoutError::Beyond {
                    what,
                    bar,
                    end,
                    size,
                }),
                Some(_) => Ok(DeviceLocation {
                    bar,
                    area: Area { offset, size },
                }),
            }
        };
        Ok(Self {
            vectors,
            device: [
                locate("table", table, table_size)?,
                locate("pending bit array", pba, pba_size)?,
            ],
        })
    }

    /// What of a BAR must not be mapped.
    pub(crate) fn in_device(&self, bar: u8) -> Vec<Area> {
        let here = self.device.iter().filter(|location| location.bar == bar);
        here.map(|location| location.area).collect()
    }

    /// Where the device has its pending bits.
    pub(crate) fn device_pba(&self) -> DeviceLocation {
        let [_, pba] = self.device;
        pba
    }

    /// Where the guest finds the table.
    pub(crate) fn table(&self) -> GuestLocation {
        let [DeviceLocation { bar, area }, _] = self.device;
        GuestLocation { bar, area }
    }

    /// Where the guest finds the pending bits.
    pub(crate) fn pba(&self) -> GuestLocation {
        let [_, DeviceLocation { bar, area }] = self.device;
        GuestLocation { bar, area }
    }

    /// The state machine for as many vectors.
    pub(crate) fn state(
        &self,
        name: &str,
        routes: std::sync::Arc<dyn busway_pci::InterruptRoutes>,
    ) -> Msix {
        Msix::new(self.vectors, routes).named(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_table_beyond_its_bar_is_told() {
        let bar = |bar| (bar == 0).then_some(0x4000_u64);
        let header = 64 << 16 | 0x11;
        let good = MsixLayout::read([header, 0x2000, 0x3000], bar).unwrap();
        assert_eq!((good.vectors, good.table().area.size), (65, 65 * 16));
        assert_eq!(good.pba().area.size, 16);
        assert_eq!(good.table().register(), 0x2000);
        let error = MsixLayout::read([header, 0x3f00, 0x3000], bar).unwrap_err();
        assert_eq!(
            error.to_string(),
            "its table ends at 0x4310, beyond BAR 0's 0x4000 bytes"
        );
        let error = MsixLayout::read([header, 0x2000, 0x3002], bar).unwrap_err();
        assert_eq!(
            error.to_string(),
            "its pending bit array is in BAR 2, which is not there"
        );
    }

    proptest! {
        #[test]
        fn what_is_accepted_lies_within_its_bar(
            capability: [u32; 3],
            log2 in prop::collection::vec(0_u32..64, 8),
        ) {
            let size = |bar: u8| log2.get(usize::from(bar)).map(|log2| 1_u64 << log2);
            if let Ok(layout) = MsixLayout::read(capability, size) {
                for bar in 0..8 {
                    for area in layout.in_device(bar) {
                        prop_assert!(area.offset + area.size <= size(bar).unwrap());
                    }
                }
            }
        }
    }
}
