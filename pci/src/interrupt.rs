//! How a function's interrupts leave it: the traits that the machine and the device implement.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::pin::InterruptPin;

/// The write that a message-signalled interrupt is. PCIe 6.0 §6.1.4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Where it goes; on x86 within 0xFEE0_0000..0xFEF0_0000.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

/// A route to the guest could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// no interrupt route is free: all {limit} of KVM's GSIs are in use: let the guest's drivers have fewer queues, or give the VM fewer devices
    #[error(
        "no interrupt route is free: all {limit} of KVM's GSIs are in use: let the guest's drivers have fewer queues, or give the VM fewer devices"
    )]
    Exhausted {
        /// How many there are.
        limit: u32,
    },
    /// too many files are open: raise the limit (`ulimit -n`, LimitNOFILE= in a systemd unit)
    #[error(
        "too many files are open: raise the limit (`ulimit -n`, LimitNOFILE= in a systemd unit)"
    )]
    TooManyFiles,
    /// {what} failed: {source}
    #[error("{what} failed: {source}")]
    Kernel {
        /// The ioctl or system call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Makes routes from a device's vectors to the guest. The machine's interrupt router implements it.
pub trait InterruptRoutes: Send + Sync + Debug {
    /// Makes an eventfd whose signal delivers `message`, of the function's vector with this number, to the guest,
    /// unmasked from the start.
    ///
    /// This is what a vector costs; it is called when the guest first unmasks it, not before.
    ///
    /// # Errors
    /// [`RouteError`]
    fn connect(
        &self,
        vector: u16,
        message: MsiMessage,
    ) -> Result<Arc<dyn InterruptRoute>, RouteError>;
}

/// One vector's way to the guest. Dropping the last reference takes it down.
pub trait InterruptRoute: Send + Sync + Debug {
    /// Changes the message, as the guest does to move an interrupt to another CPU: one update of
    /// the routing table.
    ///
    /// # Errors
    /// [`RouteError::Kernel`]
    fn update(&self, message: MsiMessage) -> Result<(), RouteError>;

    /// Holds back the interrupt (`true`) or lets it through. A signal that comes while masked is
    /// kept, as one, and delivered when the mask goes.
    ///
    /// # Errors
    /// [`RouteError::Kernel`]
    fn set_masked(&self, masked: bool) -> Result<(), RouteError>;

    /// Whether a signal is kept back by the mask.
    fn pending(&self) -> bool;

    /// The eventfd: what a kernel driver (VFIO) or a worker signals.
    fn event(&self) -> BorrowedFd<'_>;

    /// Signals it from this process.
    fn trigger(&self);
}

/// Makes the ways from a function's interrupt pins to the guest, as its place is wired. The machine
/// implements it.
pub trait InterruptLines: Send + Sync + Debug {
    /// Connects `pin`: the line that it leads to is level-triggered, and other pins may share it.
    ///
    /// # Errors
    /// [`RouteError`]
    fn connect(&self, pin: InterruptPin) -> Result<Arc<dyn InterruptLine>, RouteError>;
}

/// A pin's way to the guest, for a source that masks itself when it has signalled, as VFIO does.
/// Dropping the last reference takes it down, and the line goes down unless another pin holds it up.
pub trait InterruptLine: Send + Sync + Debug {
    /// The eventfd whose signal puts the line up.
    fn event(&self) -> BorrowedFd<'_>;

    /// The eventfd that is signalled when the guest is done with the interrupt and the line went
    /// down: the source unmasks itself, and signals again where it still wants something.
    fn resample(&self) -> BorrowedFd<'_>;
}

/// A pin's way to the guest, for a source in this process that holds it up for as long as it wants
/// something. Other pins may share the line. Dropping it lets it down.
pub trait InterruptLevel: Send + Sync + Debug {
    /// Holds the pin up or lets it down. Repeating a level is harmless.
    fn set(&self, asserted: bool);
}

/// The source of a function's wired interrupt: told when its pin has a way to the guest.
pub trait PinOwner {
    /// From now on the pin signals `event` and masks itself then, and unmasks itself whenever
    /// `resample` is signalled.
    ///
    /// # Errors
    /// The device could not be told; the pin signals nothing.
    fn connect(&mut self, event: BorrowedFd<'_>, resample: BorrowedFd<'_>) -> io::Result<()>;

    /// The pin signals nothing any more. The eventfds close after this.
    fn disconnect(&mut self);
}

/// The source of a function's message-signalled interrupts: told when a vector gets its eventfd.
pub trait VectorOwner {
    /// The guest enabled MSI-X, and no vector is connected yet. The device is to be in that mode
    /// from now on, for firmware and drivers of it may look; what it sends on a vector that is not
    /// connected stays pending in it.
    ///
    /// # Errors
    /// The device could not be told; the error is logged, and it is tried again with the first
    /// vector.
    fn enable(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// From now on vector `first + i` signals `events[i]`. MSI connects all its vectors in one call;
    /// MSI-X one at a time, when the guest first unmasks it, and the other vectors must not be
    /// disturbed by that. The eventfds stay open until [`disconnect_all`](Self::disconnect_all), or
    /// until [`has_lost_all`](Self::has_lost_all).
    ///
    /// # Errors
    /// The device could not be told; the vectors stay unconnected and the error is logged.
    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// After a [`connect`](Self::connect) that failed: whether it cost the vectors that were connected
    /// before, which signal nothing any more. Their eventfds close, and each is connected again when
    /// the guest next unmasks it.
    fn has_lost_all(&self) -> bool {
        false
    }

    /// All vectors are off: the guest disabled MSI or MSI-X, or the function was reset. The eventfds
    /// close after this.
    fn disconnect_all(&mut self);
}

/// The owner for a device in this process, which signals by [`Msix::trigger`](crate::Msix::trigger)
/// or [`Msi::trigger`](crate::Msi::trigger) and needs no eventfd.
impl VectorOwner for () {
    fn connect(&mut self, _first: u16, _events: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn disconnect_all(&mut self) {}
}
