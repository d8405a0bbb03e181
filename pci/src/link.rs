//! How fast and how wide a PCIe link is.

use crate::spec;

/// A link's speed per lane. PCIe 6.0 §7.5.3.6 and §7.5.3.18.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinkSpeed {
    /// 2.5 GT/s: PCIe 1.
    Gt2_5 = 1,
    /// 5 GT/s: PCIe 2.
    Gt5 = 2,
    /// 8 GT/s: PCIe 3.
    Gt8 = 3,
    /// 16 GT/s: PCIe 4.
    Gt16 = 4,
    /// 32 GT/s: PCIe 5.
    Gt32 = 5,
    /// 64 GT/s: PCIe 6.
    Gt64 = 6,
}

impl LinkSpeed {
    /// The speed's number in the link registers.
    #[must_use]
    pub fn register(self) -> u16 {
        self as u16
    }

    /// The speed with this number; that of the fastest known where it is above, the slowest where
    /// it is zero.
    #[must_use]
    pub fn from_register(number: u32) -> Self {
        match number {
            0 | 1 => Self::Gt2_5,
            2 => Self::Gt5,
            3 => Self::Gt8,
            4 => Self::Gt16,
            5 => Self::Gt32,
            _ => Self::Gt64,
        }
    }
}

/// A link: speed and lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Speed of each lane.
    pub speed: LinkSpeed,
    /// Lanes: 1, 2, 4, 8, 12, 16 or 32.
    pub width: u8,
}

impl Default for Link {
    /// 32 GT/s and 16 lanes: as fast as any card's, while PCIe 6 is rare.
    fn default() -> Self {
        Self {
            speed: LinkSpeed::Gt32,
            width: 16,
        }
    }
}

impl Link {
    /// The fastest that a function can do, by its link capabilities register.
    #[must_use]
    pub fn from_capabilities(register: u32) -> Self {
        Self {
            speed: LinkSpeed::from_register(register & spec::EXP_LINK_SPEED),
            width: ((register >> spec::EXP_LINK_WIDTH_SHIFT) & 0x3f).clamp(1, 32) as u8,
        }
    }

    /// The fields that link capabilities and link status have in common.
    pub(crate) fn speed_and_width(self) -> u32 {
        let width = u32::from(self.width.clamp(1, 32));
        u32::from(self.speed.register()) | width << spec::EXP_LINK_WIDTH_SHIFT
    }

    /// Link capabilities 2: a bit for this speed and each slower one, from bit 1.
    pub(crate) fn supported_speeds(self) -> u32 {
        ((1 << self.speed.register()) - 1) << 1
    }
}
