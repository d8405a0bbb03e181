//! How much of the addresses above RAM is kept for files that are memory, and that come and go while the guest runs.

use crate::config::{PmemConfig, VmConfig};

/// Bytes of addresses that are kept for persistent memory that comes later.
const LATER: u64 = 64 << 30;

/// What is kept above RAM for memory that comes and goes while the guest runs, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::machine) struct PluggedRoom {
    /// For what the guest begins with.
    pub(super) first: u64,
    /// For what may come, where all BARs find room beside it.
    pub(super) later: u64,
}

impl PluggedRoom {
    /// For what the VM begins with, and where it can be asked for more, 64 GiB of them, or an eighth of the guest's
    /// addresses, which have `address_bits`, where these are few.
    pub(in crate::machine) fn of(config: &VmConfig, can_be_asked: bool, address_bits: u8) -> Self {
        let first = config.pmem.iter().map(PmemConfig::likely_size);
        let eighth = 1_u64.checked_shl(u32::from(address_bits).saturating_sub(3));
        Self {
            first: first.fold(0, u64::saturating_add),
            later: match can_be_asked {
                true => eighth.unwrap_or(u64::MAX).min(LATER),
                false => 0,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_what_the_guest_begins_with_and_for_more_where_that_can_be_asked_for() {
        let pmem = |size| PmemConfig {
            size: Some(size),
            ..PmemConfig::new("/nobody")
        };
        let config = VmConfig {
            pmem: vec![pmem(2 << 20), pmem(3 << 20)],
            ..VmConfig::default()
        };
        let rooms = [(false, 46), (true, 46), (true, 36)].map(|(can_be_asked, bits)| {
            let room = PluggedRoom::of(&config, can_be_asked, bits);
            (room.first, room.later)
        });
        assert_eq!(
            rooms,
            [(6 << 20, 0), (6 << 20, 64 << 30), (6 << 20, 8 << 30)]
        );
    }
}
