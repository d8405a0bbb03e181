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
