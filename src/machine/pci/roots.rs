//! Bus 0 of a segment: its addresses, and which of its slots are whose.

use busway_pci::{Device, RootSlot, Segment, Windows};

use crate::machine::RunError;
use crate::machine::seats::LOW_SLOTS;

/// Bus 0 of one segment.
#[derive(Debug)]
pub(super) struct RootBus {
    pub(super) segment: Segment,
    /// Where BARs of the segment may be.
    pub(super) windows: Windows,
    /// Bit n: slot n is taken.
    taken: u32,
    /// Bit n: slot n is for who asks for it by its number.
    kept: u32,
}

impl RootBus {
    pub(super) const fn new(segment: Segment, windows: Windows) -> Self {
        Self {
            segment,
            windows,
            taken: 0,
            kept: 0,
        }
    }

    pub(super) fn keep(&mut self, device: Device) {
        self.kept |= bit(device);
    }

    pub(super) fn take(&mut self, device: Device) {
        self.taken |= bit(device);
    }

    /// The first slot from `from` on that is free for anybody or, where there is none, at all.
    pub(super) fn free(&self, from: u8) -> Option<Device> {
        let numbers = (from..Device::COUNT).chain(0..from);
        let mut devices = numbers.filter_map(Device::new);
        devices.find(|device| (self.taken | self.kept) & bit(*device) == 0)
    }

    /// Bit n: slot n is one for devices on bus 0, and free for anybody.
    pub(super) fn low_free(&self) -> u32 {
        ((1 << LOW_SLOTS) - 1) & !self.taken & !self.kept
    }

    /// The slot of this number, for a device on bus 0.
    pub(super) fn low(&self, device: Device, name: &str) -> Result<RootSlot, RunError> {
        if device.number() >= LOW_SLOTS {
            return Err(RunError::PortSlot {
                device: name.to_owned(),
                slot: device.number(),
            });
        }
        self.asked(device, name)
    }

    /// The slot of this number.
    pub(super) fn asked(&self, device: Device, name: &str) -> Result<RootSlot, RunError> {
        let slot = RootSlot {
            segment: self.segment,
            device,
        };
        match self.taken & bit(device) == 0 {
            true => Ok(slot),
            false => Err(RunError::SlotTaken {
                device: name.to_owned(),
                slot: slot.to_string(),
            }),
        }
    }
}

const fn bit(device: Device) -> u32 {
    1 << device.number()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u8) -> Device {
        Device::new(number).unwrap()
    }

    #[test]
    fn what_is_kept_is_nobody_elses_and_what_is_taken_nobodys() {
        let windows = Windows {
            io: 0..0,
            memory32: Vec::new(),
            memory64: Vec::new(),
        };
        let mut bus = RootBus::new(Segment(1), windows);
        for number in [1, 16, 31] {
            bus.keep(device(number));
        }
        bus.take(device(0));
        assert_eq!(
            [1, 16, 0].map(|from| bus.free(from).unwrap().number()),
            [2, 17, 2]
        );
        assert_eq!(bus.low_free(), 0xfffc);
        let slot = bus.low(device(1), "a").unwrap();
        assert_eq!(slot.to_string(), "0001:00:01.0");
        bus.take(device(1));
        for (slot, word) in [(1, "0001:00:01.0"), (16, "pci_device_id")] {
            let why = bus.low(device(slot), "a").unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
        bus.asked(device(16), "a").unwrap();
        // Behind the last comes what is left before.
        for number in 16..32 {
            bus.take(device(number));
        }
        assert_eq!(bus.free(16), Some(device(2)));
    }
}
