//! The four interrupt pins, and how they are told apart behind bridges.
//!
//! What a pin on bus 0 is wired to is the machine's to say.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::address::Device;

/// One of a device's four interrupt pins. PCIe 6.0 §6.1.2 and §7.5.1.1.13.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InterruptPin {
    /// INTA, the one that a single-function device has.
    A = 1,
    /// INTB.
    B = 2,
    /// INTC.
    C = 3,
    /// INTD.
    D = 4,
}

impl InterruptPin {
    /// All four.
    pub const ALL: [Self; 4] = [Self::A, Self::B, Self::C, Self::D];

    /// What the interrupt pin register holds.
    #[must_use]
    pub fn register(self) -> u8 {
        self as u8
    }

    /// The pin that the interrupt pin register says; none at 0 and beyond 4.
    #[must_use]
    pub fn from_register(register: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|pin| pin.register() == register)
    }

    /// The pin on the primary side of a bridge that this pin of `device` behind it comes out at.
    /// Which line a pin on bus 0 is wired to is the machine's to say. PCIe 6.0 §2.2.8.1.
    #[must_use]
    pub fn swizzle(self, device: Device) -> Self {
        match (self.register() - 1 + device.number() % 4) % 4 {
            0 => Self::A,
            1 => Self::B,
            2 => Self::C,
            _ => Self::D,
        }
    }
}

impl fmt::Display for InterruptPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "INT{self:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_round_trip_through_the_register() {
        for pin in InterruptPin::ALL {
            assert_eq!(InterruptPin::from_register(pin.register()), Some(pin));
        }
        assert_eq!(InterruptPin::from_register(0), None);
        assert_eq!(InterruptPin::from_register(5), None);
    }

    #[test]
    fn neighbouring_devices_take_different_pins() {
        let pins = |device| InterruptPin::ALL.map(|pin| pin.swizzle(Device::new(device).unwrap()));
        assert_eq!(pins(0), InterruptPin::ALL);
        let [a, b, c, d] = InterruptPin::ALL;
        assert_eq!(pins(1), [b, c, d, a]);
        assert_eq!(pins(31), [d, a, b, c]);
    }
}
