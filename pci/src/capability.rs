//! Walking a function's two lists of capabilities.
//!
//! A list is the device's word and may loop, point into the header, or be all ones because the
//! device is gone; a walk always ends and never reports one place twice.

use crate::spec;

/// Something whose configuration space can be read, for a walk.
///
/// Any `Fn(u16) -> u32` is one.
pub trait ConfigRead {
    /// The doubleword at `offset`, a multiple of four below 4096; all ones where nothing answers.
    fn read_dword(&self, offset: u16) -> u32;
}

impl<F: Fn(u16) -> u32> ConfigRead for F {
    fn read_dword(&self, offset: u16) -> u32 {
        self(offset)
    }
}

/// A capability in the list that starts in the header. PCIe 6.0 §7.5.1.1.11.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its identifier, such as [`spec::CAP_MSIX`].
    pub id: u8,
    /// Where it starts.
    pub offset: u16,
}

/// A capability in the list that starts at 0x100. PCIe 6.0 §7.6.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// Its identifier, such as [`spec::EXT_CAP_AER`].
    pub id: u16,
    /// Its version.
    pub version: u8,
    /// Where it starts.
    pub offset: u16,
}

/// The capabilities of the header's list, in its order: at most 48.
///
/// The list ends at a null pointer, at one into the header, at all ones, and where it comes to a
/// place for the second time. The two lowest bits of a pointer are no address and are ignored.
#[must_use]
pub fn capabilities(config: &(impl ConfigRead + ?Sized)) -> Vec<Capability> {
    let mut found = Vec::new();
    let status = (config.read_dword(spec::COMMAND) >> 16) as u16;
    if status & spec::STATUS_CAPABILITIES == 0 || status == u16::MAX {
        return found;
    }
    let mut seen = Seen::default();
    let mut pointer = config.read_dword(spec::CAPABILITIES_POINTER) as u8;
    loop {
        let offset = u16::from(pointer & !3);
        if offset < spec::HEADER_SIZE || !seen.first_time(offset) {
            return found;
        }
        let [id, next, ..] = config.read_dword(offset).to_le_bytes();
        if id == u8::MAX {
            return found;
        }
        found.push(Capability { id, offset });
        pointer = next;
    }
}

/// The extended capabilities, in their list's order: at most 960.
///
/// The list ends at a null pointer, at one below 0x100, at a header of zeros or all ones, and where
/// it comes to a place for the second time.
#[must_use]
pub fn extended_capabilities(config: &(impl ConfigRead + ?Sized)) -> Vec<ExtendedCapability> {
    let mut found = Vec::new();
    let mut seen = Seen::default();
    let mut offset = spec::EXTENDED_CONFIG_START;
    while offset >= spec::EXTENDED_CONFIG_START && seen.first_time(offset) {
        let header = config.read_dword(offset);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push(ExtendedCapability {
            id: header as u16,
            version: (header >> 16) as u8 & 0xf,
            offset,
        });
        offset = (header >> 20) as u16 & !3;
    }
    found
}

/// Which doublewords of configuration space a walk has been at: the cycle guard.
#[derive(Default)]
struct Seen([u64; 16]);

impl Seen {
    fn first_time(&mut self, offset: u16) -> bool {
        let dword = offset / 4;
        let Some(word) = self.0.get_mut(usize::from(dword / 64)) else {
            return false;
        };
        let bit = 1 << (dword % 64);
        let first = *word & bit == 0;
        *word |= bit;
        first
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Configuration space of bytes, as a device might present it.
    struct Raw(Vec<u8>);

    impl Raw {
        fn zeros() -> Self {
            Self(vec![0; 4096])
        }

        fn put(mut self, offset: usize, bytes: &[u8]) -> Self {
            self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
            self
        }

        /// With a list that begins at `first`.
        fn listed(first: u8) -> Self {
            Self::zeros().put(0x06, &[0x10]).put(0x34, &[first])
        }
    }

    impl ConfigRead for Raw {
        fn read_dword(&self, offset: u16) -> u32 {
            assert!(offset.is_multiple_of(4) && offset < 4096);
            let at = usize::from(offset);
            u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
        }
    }

    fn ids(config: &impl ConfigRead) -> Vec<(u8, u16)> {
        let list = capabilities(config).into_iter();
        list.map(|capability| (capability.id, capability.offset))
            .collect()
    }

    fn extended_ids(config: &impl ConfigRead) -> Vec<(u16, u8, u16)> {
        let list = extended_capabilities(config).into_iter();
        list.map(|c| (c.id, c.version, c.offset)).collect()
    }

    #[test]
    fn a_list_is_walked_in_its_order() {
        let config = Raw::listed(0x80)
            .put(0x80, &[0x11, 0x40])
            .put(0x40, &[0x01, 0x53])
            .put(0x50, &[0x10, 0x00]);
        assert_eq!(ids(&config), [(0x11, 0x80), (0x01, 0x40), (0x10, 0x50)]);
    }

    #[test]
    fn a_walk_ends_at_loops_the_header_and_all_ones() {
        let looped = Raw::listed(0x40)
            .put(0x40, &[1, 0x50])
            .put(0x50, &[5, 0x40]);
        assert_eq!(ids(&looped), [(1, 0x40), (5, 0x50)]);
        let own = Raw::listed(0x40).put(0x40, &[1, 0x40]);
        assert_eq!(ids(&own), [(1, 0x40)]);
        let header = Raw::listed(0x40).put(0x40, &[1, 0x3c]);
        assert_eq!(ids(&header), [(1, 0x40)]);
        let ones = Raw::listed(0x40)
            .put(0x40, &[1, 0xfc])
            .put(0xfc, &[0xff; 4]);
        assert_eq!(ids(&ones), [(1, 0x40)]);
        assert_eq!(ids(&Raw::listed(0x40).put(0x06, &[0])), [], "no list");
        assert_eq!(ids(&|_: u16| u32::MAX), [], "the device is gone");
    }

    #[test]
    fn extended_capabilities_are_walked_likewise() {
        let config = Raw::zeros()
            .put(0x100, &0x2001_0001u32.to_le_bytes())
            .put(0x200, &0x1402_000bu32.to_le_bytes())
            .put(0x140, &0x1001_0003u32.to_le_bytes());
        assert_eq!(
            extended_ids(&config),
            [(1, 1, 0x100), (0xb, 2, 0x200), (3, 1, 0x140)]
        );
        let low = Raw::zeros().put(0x100, &0x0401_0001u32.to_le_bytes());
        assert_eq!(extended_ids(&low), [(1, 1, 0x100)]);
        assert_eq!(extended_ids(&Raw::zeros()), []);
        assert_eq!(extended_ids(&|_: u16| u32::MAX), []);
    }

    proptest! {
        /// Pointers from a few places, so that lists are long and cross themselves.
        #[test]
        fn any_list_ends_and_names_no_place_twice(
            first: u8,
            dwords in vec((0x10..0x60usize, prop_oneof![any::<u32>(), Just(u32::MAX)]), 0..60),
        ) {
            let mut config = Raw::listed(first);
            for (dword, mut value) in dwords {
                if dword >= 0x40 {
                    value = (value & 0x17ff_ffff) | 0x1000_0000;
                }
                config = config.put(dword * 4, &value.to_le_bytes());
            }
            let mut places: Vec<_> = ids(&config).into_iter().map(|(_, at)| at).collect();
            let extended = extended_ids(&config).into_iter();
            places.extend(extended.map(|(_, _, at)| at));
            let count = places.len();
            prop_assert!(places.iter().all(|at| at % 4 == 0 && (0x40..0x1000).contains(at)));
            places.sort_unstable();
            places.dedup();
            prop_assert_eq!(places.len(), count);
        }

        #[test]
        fn the_longest_lists_are_walked_whole(step in 0..480u32) {
            // A stride that is odd visits every doubleword before it comes back.
            let stride = 2 * step + 1;
            let list = |offset: u16| match offset {
                0x04 => u32::from(spec::STATUS_CAPABILITIES) << 16,
                0x34 => 0x40,
                0x40..0x100 => {
                    let next = (u32::from(offset) / 4 - 16 + 1) % 48 + 16;
                    1 | (next * 4) << 8
                }
                _ => {
                    let next = (u32::from(offset) / 4 - 64 + stride) % 960 + 64;
                    1 | (next * 4) << 20
                }
            };
            prop_assert_eq!(ids(&list).len(), 48);
            let whole = stride % 3 != 0 && stride % 5 != 0;
            prop_assert!(!whole || extended_ids(&list).len() == 960);
        }
    }
}
