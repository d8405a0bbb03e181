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
    #[error(
        "BAR {bar} would have its pending bit array at {pba:#x}, over the start of its table at \
         {table:#x}: what is there are other registers of the device's"
    )]
    NoTable { bar: u8, table: u64, pba: u64 },
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
        let mut table = locate("table", table, table_size)?;
        let pba = locate("pending bit array", pba, pba_size)?;
        let vectors = believable(vectors, table, pba)?;
        table.area.size = u64::from(vectors) * spec::MSIX_ENTRY_SIZE;
        Ok(Self {
            vectors,
            device: [table, pba],
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

/// How many of a table's entries there are in the device, where its pending bits lie over some of them.
/// PCIe 6.0 §7.7.2.4 forbids that, and devices do it in three ways:
///
/// - Over the table's start: the registers of the capability were never given their values, and zero
///   says offset 0 of BAR 0. Atheros' AR928X has its own registers there, and no table.
/// - In the last entry: the place was computed with the register's value, which is the number of
///   entries less one, as Linux did for endpoints until 6.16
///   (drivers/pci/controller/dwc/pcie-designware-ep.c, dw_pcie_ep_set_msix). The table is whole.
/// - In between: the number of entries is too large. Silicon Motion's SM2262 can say 22 and has the 16
///   that there is room for (bugzilla.kernel.org, 202055).
fn believable(
    vectors: u16,
    table: DeviceLocation,
    pba: DeviceLocation,
) -> Result<u16, LayoutError> {
    let end = |area: Area| area.offset.saturating_add(area.size);
    let apart = table.bar != pba.bar
        || end(table.area) <= pba.area.offset
        || end(pba.area) <= table.area.offset;
    if apart {
        return Ok(vectors);
    }
    let before = pba.area.offset.checked_sub(table.area.offset);
    let entries = before.map_or(0, |bytes| bytes / spec::MSIX_ENTRY_SIZE);
    match u16::try_from(entries) {
        Ok(entries) if before > Some(0) && entries + 1 >= vectors => Ok(vectors),
        Ok(entries @ 1..) => Ok(entries),
        _ => Err(LayoutError::NoTable {
            bar: table.bar,
            table: table.area.offset,
            pba: pba.area.offset,
        }),
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

    /// A capability of `vectors` entries in BAR 0, with table and pending bits at these offsets.
    fn in_bar_0(vectors: u16, table: u32, pba: u32) -> Result<MsixLayout, LayoutError> {
        let header = u32::from(vectors - 1) << 16 | 0x11;
        MsixLayout::read([header, table, pba], |bar| (bar == 0).then_some(0x1_0000))
    }

    #[test]
    fn pending_bits_over_the_start_of_the_table_mean_that_there_is_no_table() {
        // Atheros' AR928X, and what else was never filled in.
        for vectors in [1, 2, 64, 65, 2048] {
            let error = in_bar_0(vectors, 0, 0).unwrap_err();
            let none = LayoutError::NoTable {
                bar: 0,
                table: 0,
                pba: 0,
            };
            assert_eq!(error, none);
            assert!(in_bar_0(vectors, 0x800, 0x800).is_err());
        }
        // The first of several entries, and pending bits that begin before the table.
        assert!(in_bar_0(4, 0x100, 0x108).is_err());
        assert!(in_bar_0(65, 0x108, 0x100).is_err());
        assert!(
            in_bar_0(1, 0, 0)
                .unwrap_err()
                .to_string()
                .starts_with("BAR 0 would have its pending bit array at 0x0, over the start")
        );
    }

    #[test]
    fn pending_bits_in_the_last_entry_leave_the_whole_table() {
        for (vectors, table) in [(2, 0), (8, 0x100), (65, 0x2000), (2048, 0)] {
            let last = table + (u32::from(vectors) - 1) * 16;
            for pba in [last, last + 8] {
                let layout = in_bar_0(vectors, table, pba).unwrap();
                assert_eq!(layout.vectors, vectors);
                assert_eq!(layout.table().area.size, u64::from(vectors) * 16);
                assert_eq!(layout.pba().register(), pba);
            }
        }
        assert_eq!(in_bar_0(1, 0x40, 0x48).unwrap().vectors, 1);
        // Beside it they are nobody's concern.
        assert_eq!(in_bar_0(8, 0x100, 0x180).unwrap().vectors, 8);
        assert_eq!(in_bar_0(8, 0x108, 0x100).unwrap().vectors, 8);
        let other_bar = MsixLayout::read([0x11, 0, 2], |_| Some(0x1000)).unwrap();
        assert_eq!(other_bar.vectors, 1);
    }

    #[test]
    fn a_table_with_more_entries_than_fit_before_its_pending_bits_has_those_that_fit() {
        // Silicon Motion's SM2262.
        let layout = in_bar_0(22, 0x2000, 0x2100).unwrap();
        assert_eq!((layout.vectors, layout.table().area.size), (16, 0x100));
        assert_eq!(in_bar_0(8, 0, 0x10).unwrap().vectors, 1);
    }

    #[test]
    fn a_table_in_what_is_no_memory_bar_is_told() {
        let error = MsixLayout::read([0x11, 0x2007, 0], |bar| (bar == 0).then_some(0x4000));
        let text = error.unwrap_err().to_string();
        assert_eq!(text, "its table is in BAR 7, which is not there");
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
                let (table, pba) = (layout.table(), layout.pba());
                let first = table.area.offset..table.area.offset + 8;
                let pba_end = pba.area.offset + pba.area.size;
                prop_assert!(
                    table.bar != pba.bar
                        || pba_end <= first.start
                        || first.end <= pba.area.offset
                );
            }
        }
    }
}
