//! The board's devices, as far as any architecture can have them: serial port, flash chips, what tells firmware of the
//! board, the TPM, and hot-plug of bus 0, of processors and of RAM; and, on PCI, the watchdog and the device that tells of a panic. Those of one architecture are in [`arch`](crate::arch),
//! which also says where on its board each of these is.
//!
//! Those that are not on PCI are [`BusDevice`](crate::kvm::BusDevice)s. None knows KVM: an edge-triggered interrupt leaves by an
//! eventfd, a level-triggered one by an [`InterruptLevel`](busway_pci::InterruptLevel), and a wish to reset or to turn off by a [`PowerSink`].

pub mod console;
pub mod cpu_hotplug;
pub mod fw_cfg;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
pub mod memory_hotplug;
pub mod pci_hotplug;
pub mod pflash;
pub mod pvpanic;
pub mod serial;
pub(crate) mod terminal;
pub mod tpm;
pub mod watchdog;

use std::fmt::Debug;
use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Whoever decides on the machine's life. Called on a vCPU thread, so it must only take note.
pub trait PowerSink: Send + Sync + Debug {
    /// The guest asked for a reset.
    fn reset(&self);

    /// The guest turned itself off.
    fn power_off(&self);
}

/// Starts or stops watching `fd` for being readable; its events carry its number.
fn watch(events: &Epoll, operation: ControlOperation, fd: &impl AsRawFd) -> io::Result<()> {
    let fd = fd.as_raw_fd();
    events.ctl(
        operation,
        fd,
        EpollEvent::new(EventSet::IN, fd.unsigned_abs().into()),
    )
}
