//! The chip set that stock firmware knows: as much of Intel's Q35 as OVMF and SeaBIOS look at.
//!
//! On bus 0 it is the host bridge, which says where configuration space lies in memory, and the LPC bridge,
//! which says where the power management ports are. Both are shown to guests that begin with firmware only.

mod lpc;
mod mch;

pub use lpc::Lpc;
pub use mch::{EcamListener, Mch};

/// The slot of the LPC bridge on bus 0, function 0. Intel ICH9 datasheet, §13.
pub const LPC_SLOT: u8 = 31;

/// Who made the subsystem: what QEMU's boards have, by which SeaBIOS knows that it runs on one like it.
const SUBSYSTEM_VENDOR: u16 = 0x1af4;
const SUBSYSTEM: u16 = 0x1100;
