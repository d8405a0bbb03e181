//! Whom a message-signalled interrupt is for.

use busway_pci::MsiMessage;

/// Messages are written to 0xFEE0_0000..0xFEF0_0000. Intel SDM vol. 3A §11.11.1
const BASE: u64 = 0xfee;

/// Bit 2 of the address: the destination is a logical one. Intel SDM vol. 3A §11.11.1
const LOGICAL: u64 = 1 << 2;

/// The physical destination that is every processor. Intel SDM vol. 3A §11.6.2.1
const EVERY: u32 = 0xff;

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The processor with this APIC id.
    Apic(u32),
    /// One of the processors with these logical ids of the flat model: bit n. A guest chooses them by itself. Linux gives
    /// its processor n bit n, and has no more than eight then. Intel SDM vol. 3A §11.6.2.2
    Logical(u8),
    /// All of them, or nobody.
    Nobody,
}

impl Target {
    /// Of a message that a guest has set, which can be anything.
    #[must_use]
    pub fn of(message: MsiMessage) -> Self {
        if message.address >> 20 != BASE {
            return Self::Nobody;
        }
        let low = (message.address >> 12 & 0xff) as u32;
        if message.address & LOGICAL != 0 {
            return Self::Logical(low as u8);
        }
        // Bits 8 to 14 of the id, of which KVM tells its guests. KVM CPUID, KVM_FEATURE_MSI_EXT_DEST_ID
        let high = (message.address >> 5 & 0x7f) as u32;
        match high << 8 | low {
            EVERY => Self::Nobody,
            id => Self::Apic(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_whom_it_is_for() {
        let of = |address| {
            Target::of(MsiMessage {
                address,
                data: 0x41,
            })
        };
        assert_eq!(of(0xfee0_3000), Target::Apic(3));
        assert_eq!(of(0xfee0_3020), Target::Apic(0x103));
        assert_eq!(of(0xfee0_600c), Target::Logical(6));
        assert_eq!(of(0xfeef_f000), Target::Nobody);
        assert_eq!(of(0xfef0_0000), Target::Nobody);
        assert_eq!(of(0x1_fee0_3000), Target::Nobody);
        assert_eq!(of(0), Target::Nobody);
    }
}
