//! The walk along a descriptor chain: bounded, whatever the tables say. Virtio 1.3 §2.7.5.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::QueueError;
use super::segments::{MAX_SEGMENTS, Segments};
use super::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use crate::memory::RamMap;

/// What the driver made available in one go.
#[derive(Debug)]
pub(crate) struct Chain<'m> {
    head: u16,
    /// What the device reads.
    pub(crate) readable: Segments<'m>,
    /// What the device writes.
    pub(crate) writable: Segments<'m>,
}

impl Chain<'_> {
    /// A chain without buffers.
    fn empty(head: u16) -> Self {
        Self {
            head,
            readable: Segments::default(),
            writable: Segments::default(),
        }
    }

    /// The name under which it is completed.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// The error that says what is wrong with this chain.
    pub(crate) fn malformed(&self, what: &'static str) -> QueueError {
        QueueError::Chain {
            head: self.head,
            what,
        }
    }
}

/// `struct virtq_desc`. Virtio 1.3 §2.7.5.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    address: U64,
    len: U32,
    flags: U16,
    next: U16,
}

impl Descriptor {
    fn has(&self, flag: u16) -> bool {
        self.flags.get() & flag != 0
    }
}

/// A table of descriptors: the queue's own, or an indirect one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Descriptors in it.
    pub(super) size: u32,
}

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: u32 = size_of::<Descriptor>() as u32;
/// Most bytes of a chain. Virtio 1.3 §2.7.5.2.
const MAX_BYTES: usize = 1 << 32;

impl Table {
    fn read(self, memory: &RamMap, index: u32) -> Result<Descriptor, &'static str> {
        if index >= self.size {
            return Err("a descriptor beyond its table");
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        let at = self.address.checked_add(offset);
        let bytes: Option<[u8; DESCRIPTOR_SIZE as usize]> =
            at.and_then(|at| memory.read_obj(GuestAddress(at)).ok());
        let bytes = bytes.ok_or("a descriptor outside of RAM")?;
        Descriptor::read_from_bytes(&bytes).map_err(|_size| "a descriptor outside of RAM")
    }

    /// The table that `descriptor` refers to. The flag that says that it is written is ignored. §2.7.5.3.2
    fn indirect(descriptor: &Descriptor) -> Result<Self, &'static str> {
        let len = descriptor.len.get();
        if descriptor.has(DESC_F_NEXT) {
            return Err("an indirect table that is not the chain's end");
        }
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err("an indirect table of no whole number of descriptors");
        }
        Ok(Self {
            address: descriptor.address.get(),
            size: len / DESCRIPTOR_SIZE,
        })
    }
}

/// The chain that begins with descriptor `head` of `table`, the queue's own. No more than
/// [`MAX_SEGMENTS`] descriptors are looked at.
///
/// # Errors
/// What is wrong with it.
pub(super) fn walk<'m>(
    memory: &'m RamMap,
    mut table: Table,
    head: u16,
) -> Result<Chain<'m>, &'static str> {
    let mut chain = Chain::empty(head);
    let mut within_indirect = false;
    let mut index = u32::from(head);
    for _ in 0..=MAX_SEGMENTS {
        let descriptor = table.read(memory, index)?;
        if descriptor.has(DESC_F_INDIRECT) {
            if within_indirect {
                return Err("an indirect table within another");
            }
            within_indirect = true;
            table = Table::indirect(&descriptor)?;
            index = 0;
            continue;
        }
        add(memory, &mut chain, &descriptor)?;
        if !descriptor.has(DESC_F_NEXT) {
            return Ok(chain);
        }
        index = descriptor.next.get().into();
    }
    Err("a loop, or more descriptors than a request may have")
}

/// Adds what `descriptor` describes, which lies in RAM.
fn add<'m>(
    memory: &'m RamMap,
    chain: &mut Chain<'m>,
    descriptor: &Descriptor,
) -> Result<(), &'static str> {
    let len = usize::try_from(descriptor.len.get()).unwrap_or(usize::MAX);
    let all = chain.readable.len().saturating_add(chain.writable.len());
    if all.saturating_add(len) > MAX_BYTES {
        return Err("more bytes than a chain may have");
    }
    let side = if descriptor.has(DESC_F_WRITE) {
        &mut chain.writable
    } else if chain.writable.is_empty() {
        &mut chain.readable
    } else {
        return Err("a device-readable buffer after a device-writable one");
    };
    for slice in memory.get_slices(GuestAddress(descriptor.address.get()), len) {
        let slice = slice.map_err(|_outside| "a buffer outside of RAM")?;
        if !side.push(slice) {
            return Err("more buffers than a request may have");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
