//! Which AtomicOps a completer carries out. PCIe 6.0 §6.15

use std::ops::BitOr;

use crate::spec;

/// The sizes of the AtomicOps that somebody carries out for others: what the bits of the device
/// capabilities 2 register say of a completer. PCIe 6.0 §7.5.3.15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AtomicOps(u32);

impl AtomicOps {
    /// None.
    pub const NONE: Self = Self(0);

    /// Those of a device capabilities 2 register, whose other bits are ignored.
    #[must_use]
    pub const fn from_capabilities(register: u32) -> Self {
        Self(register & spec::EXP_ATOMIC_COMPLETER)
    }

    /// The bits of the device capabilities 2 register.
    #[must_use]
    pub const fn register(self) -> u32 {
        self.0
    }

    /// Those that both have.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for AtomicOps {
    type Output = Self;

    /// Those that either has.
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}
