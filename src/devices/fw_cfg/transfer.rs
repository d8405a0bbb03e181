//! A transfer by DMA: its descriptor in guest memory. fw_cfg.rst, "Guest-side DMA Interface".

use vm_memory::{Bytes, GuestAddress, GuestMemory};

// Bits of the control word; its upper half is an item's number.
const ERROR: u32 = 1 << 0;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

/// Bytes copied at once.
const CHUNK: usize = 64 << 10;
/// Bytes behind an item's end that are filled with zeros; firmware asks for a structure's size at most.
const MOST_ZEROS: u64 = 1 << 20;

/// A descriptor: control, length and address, big-endian.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    at: GuestAddress,
    control: u32,
    length: u32,
    address: u64,
}

impl Descriptor {
    /// The descriptor at `at`; `None` where that is no RAM.
    pub(super) fn read(ram: &impl GuestMemory, at: u64) -> Option<Self> {
        let at = GuestAddress(at);
        let mut bytes = [0; 16];
        ram.read_slice(&mut bytes, at).ok()?;
        let [a, b, c, d, e, f, g, h, address @ ..] = bytes;
        Some(Self {
            at,
            control: u32::from_be_bytes([a, b, c, d]),
            length: u32::from_be_bytes([e, f, g, h]),
            address: u64::from_be_bytes(address),
        })
    }

    /// The item that is to be selected first.
    pub(super) fn select(&self) -> Option<u16> {
        (self.control & SELECT != 0).then_some((self.control >> 16) as u16)
    }

    pub(super) fn reads(&self) -> bool {
        self.control & READ != 0
    }

    pub(super) fn writes(&self) -> bool {
        self.control & WRITE != 0
    }

    pub(super) fn skips(&self) -> bool {
        self.control & SKIP != 0
    }

    pub(super) fn length(&self) -> u64 {
        self.length.into()
    }

    /// Fills the guest's buffer with what `next` gives, of an item that has `left` more bytes. Says whether
    /// all of it could be.
    pub(super) fn fill(
        &self,
        ram: &impl GuestMemory,
        left: u64,
        mut next: impl FnMut(&mut [u8]),
    ) -> bool {
        let mut rest = self.length();
        if rest > left.saturating_add(MOST_ZEROS) {
            return false;
        }
        let mut buffer = vec![0; CHUNK.min(self.length as usize)];
        let mut address = self.address;
        while rest > 0 {
            let length = rest.min(buffer.len() as u64);
            let Some(data) = buffer.get_mut(..length as usize) else {
                return false;
            };
            next(data);
            if ram.write_slice(data, GuestAddress(address)).is_err() {
                return false;
            }
            rest -= length;
            let Some(further) = address.checked_add(length) else {
                return rest == 0;
            };
            address = further;
        }
        true
    }

    /// Tells the guest that the transfer is over. A descriptor that is gone is the guest's own doing.
    pub(super) fn finish(&self, ram: &impl GuestMemory, done: bool) {
        let control = if done { 0 } else { ERROR };
        let _told = ram.write_slice(&control.to_be_bytes(), self.at);
    }
}
