//! What single devices need that the general rules do not give them, by vendor and device.
//!
//! A row has to say what goes wrong without it. Where a device works by the rules, it has none.

use std::ops::RangeInclusive;

use busway_pci::spec;

use crate::DeviceIo;
use crate::access::read_dword;

/// What is different.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quirk {
    /// The guest gets the device's ROM only if it is asked for.
    HideRom,
    /// The pending bits are at this offset, where the device says one that is beyond its BAR.
    PbaAt(u32),
    /// Drivers write these bytes of the extended configuration space, which are of no capability.
    Registers {
        /// The first.
        start: u16,
        /// Behind the last.
        end: u16,
    },
}

/// One quirk.
#[derive(Clone, Debug)]
struct Row {
    vendor: u16,
    devices: RangeInclusive<u16>,
    quirk: Quirk,
    why: &'static str,
}

static QUIRKS: &[Row] = &[
    Row {
        vendor: 0x14e4, // Broadcom
        devices: 0x168e..=0x168e,
        quirk: Quirk::HideRom,
        why: "NetXtreme II BCM57810: its ROM hangs when it is run by a guest, and a reset after that \
              leaves the device dead until the power is cut",
    },
    Row {
        vendor: 0x1425, // Chelsio
        devices: 0x5800..=0x58ff,
        quirk: Quirk::PbaAt(0x1000),
        why: "virtual functions of the T5 say 0x8000, and have a BAR of 8 KiB",
    },
    Row {
        vendor: 0x1d22, // Baidu
        devices: 0x3685..=0x3685,
        quirk: Quirk::PbaAt(0xb400),
        why: "virtual functions of the Kunlun say 0x460000, and have a BAR of 64 KiB",
    },
    quickdata(0x3710..=0x3719), // Jasper Forest
    quickdata(0x3c20..=0x3c2f), // Sandy Bridge, and so on to Ice Lake
    quickdata(0x0e20..=0x0e2f),
    quickdata(0x0c50..=0x0c53),
    quickdata(0x2f20..=0x2f2f),
    quickdata(0x6f20..=0x6f2f),
    quickdata(0x6f50..=0x6f53),
    quickdata(0x2021..=0x2021),
    quickdata(0x0b00..=0x0b00),
];

/// Intel's QuickData (I/OAT) from version 3 on: `CHANERR_INT` and `CHANERRMSK_INT`. Linux,
/// drivers/dma/ioat/registers.h
const fn quickdata(devices: RangeInclusive<u16>) -> Row {
    Row {
        vendor: 0x8086,
        devices,
        quirk: Quirk::Registers {
            start: 0x180,
            end: 0x188,
        },
        why: "QuickData: its driver clears errors of a channel there, and masks those that stop it \
              without need",
    }
}

/// The rows of one device.
#[derive(Debug)]
pub(crate) struct Quirks(Vec<&'static Row>);

impl Quirks {
    /// Those of the device behind `io`.
    pub(crate) fn of(io: &dyn DeviceIo) -> Self {
        let identity = read_dword(io, spec::VENDOR_ID);
        Self::find(identity as u16, (identity >> 16) as u16)
    }

    fn find(vendor: u16, device: u16) -> Self {
        let rows = QUIRKS.iter();
        Self(
            rows.filter(|row| row.vendor == vendor && row.devices.contains(&device))
                .collect(),
        )
    }

    /// Why the ROM is better not given, if that is so.
    pub(crate) fn hides_rom(&self) -> Option<&'static str> {
        let row = self.0.iter().find(|row| row.quirk == Quirk::HideRom);
        row.map(|row| row.why)
    }

    /// Where the pending bits are.
    pub(crate) fn pba_offset(&self) -> Option<u32> {
        self.0.iter().find_map(|row| match row.quirk {
            Quirk::PbaAt(offset) => Some(offset),
            Quirk::HideRom | Quirk::Registers { .. } => None,
        })
    }

    /// Registers that the guest may write though they are of no capability: where they begin, and where
    /// what is behind them does.
    pub(crate) fn registers(&self) -> impl Iterator<Item = (u16, u16)> {
        self.0.iter().filter_map(|row| match row.quirk {
            Quirk::Registers { start, end } => Some((start, end)),
            Quirk::HideRom | Quirk::PbaAt(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_vendor_and_device_and_say_why() {
        assert_eq!(Quirks::find(0x1425, 0x5812).pba_offset(), Some(0x1000));
        assert_eq!(Quirks::find(0x1425, 0x5900).pba_offset(), None);
        assert!(Quirks::find(0x14e4, 0x168e).hides_rom().is_some());
        assert!(Quirks::find(0x8086, 0x168e).hides_rom().is_none());
        let registers = |device| Quirks::find(0x8086, device).registers().next();
        assert_eq!(registers(0x2f21), Some((0x180, 0x188)));
        assert_eq!(registers(0x2f30), None);
        assert!(QUIRKS.iter().all(|row| !row.why.is_empty()));
    }
}
