//! The firmware configuration device of QEMU's machines, by which a VMM tells firmware what the board is.
//!
//! Firmware selects an item by its number and reads it, byte by byte from the data port or by DMA. Items
//! are read-only; a file is an item that the directory lists with its name. References are to QEMU's
//! docs/specs/fw_cfg.rst.

mod items;
mod transfer;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use items::{Content, Items, ItemsError};

use crate::kvm::BusDevice;
use crate::memory::GuestRam;
use transfer::Descriptor;

/// Ports, those for DMA included: the selector port, two bytes wide, is the first; the data port is the one behind
/// its first byte. "Register Locations".
pub const SIZE: u16 = 12;

/// Offset of the data port.
const DATA: u64 = 1;
/// Offset of the DMA address register: eight bytes, big-endian; a write of the low half starts the transfer.
const DMA: u64 = 4;
/// What the DMA address register reads, so that a driver knows that it is there.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// The device, which takes [`SIZE`] ports.
pub struct FwCfg {
    items: Items,
    ram: GuestRam,
    state: Mutex<State>,
}

/// What is being read.
#[derive(Debug, Default)]
struct State {
    selected: u16,
    /// Bytes of the selected item that have been read.
    offset: u64,
    /// The selected item's bytes, where they are made when it is selected.
    made: Option<Vec<u8>>,
    /// The high half of the DMA address register.
    dma_high: u32,
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FwCfg")
            .field("items", &self.items)
            .field("selected", &self.lock().selected)
            .finish_non_exhaustive()
    }
}

impl FwCfg {
    /// The device with these items; DMA goes to `ram`.
    #[must_use]
    pub fn new(items: Items, ram: GuestRam) -> Self {
        Self {
            items,
            ram,
            state: Mutex::default(),
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }

    fn select(&self, state: &mut State, item: u16) {
        state.selected = item;
        state.offset = 0;
        state.made = self.items.make(item);
    }

    /// Reads on in the selected item. Behind its end, and where there is no such item, are zeros.
    fn read_on(&self, state: &mut State, data: &mut [u8]) {
        data.fill(0);
        match &state.made {
            Some(bytes) => {
                let rest = usize::try_from(state.offset)
                    .ok()
                    .and_then(|offset| bytes.get(offset..))
                    .unwrap_or_default();
                for (to, from) in data.iter_mut().zip(rest) {
                    *to = *from;
                }
            }
            None => self.items.read(state.selected, state.offset, data),
        }
        state.offset = state.offset.saturating_add(data.len() as u64);
    }

    /// Bytes of the selected item that are left to read.
    fn left(&self, state: &State) -> u64 {
        let size = match &state.made {
            Some(bytes) => bytes.len() as u64,
            None => self.items.size(state.selected),
        };
        size.saturating_sub(state.offset)
    }

    /// Carries out the transfer whose descriptor is at `address`, and says there how it went.
    fn transfer(&self, state: &mut State, address: u64) {
        use vm_memory::GuestAddressSpace;

        let ram = self.ram.memory();
        let Some(descriptor) = Descriptor::read(&*ram, address) else {
            log::debug!("fw_cfg: no DMA descriptor at {address:#x}: that is no RAM");
            return;
        };
        if let Some(item) = descriptor.select() {
            self.select(state, item);
        }
        let done = if descriptor.reads() {
            let left = self.left(state);
            descriptor.fill(&*ram, left, |data| self.read_on(state, data))
        } else if descriptor.writes() {
            // Nothing that firmware could write to is offered.
            false
        } else {
            if descriptor.skips() {
                state.offset = state.offset.saturating_add(descriptor.length());
            }
            true
        };
        descriptor.finish(&*ram, done);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (DATA, 1) => self.read_on(&mut self.lock(), data),
            (DMA.., _) => {
                let from = (offset - DMA) as usize;
                let signature = DMA_SIGNATURE.iter().skip(from).chain(&[0; 8]);
                for (to, from) in data.iter_mut().zip(signature) {
                    *to = *from;
                }
            }
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (0, &[low, high]) => self.select(&mut state, u16::from_le_bytes([low, high])),
            (DMA, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (8, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                // The address register is cleared by the transfer.
                let high = std::mem::take(&mut state.dma_high);
                let address = u64::from(high) << 32 | u64::from(low);
                self.transfer(&mut state, address);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
