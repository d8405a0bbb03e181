//! ioeventfds: registers whose write signals an eventfd in the kernel, without an exit.

use std::io;
use std::os::fd::OwnedFd;

use kvm_ioctls::IoEventAddress;

use super::irq::lend;
use super::wires::Wires;

/// Makes doorbells.
#[derive(Clone, Debug)]
pub struct Doorbells {
    fd: Wires,
}

/// A register that rings, until this is dropped.
#[derive(Debug)]
pub struct Doorbell {
    fd: Wires,
    event: OwnedFd,
    at: u64,
}

impl Doorbells {
    pub(super) fn new(fd: impl Into<Wires>) -> Self {
        Self { fd: fd.into() }
    }

    /// Those that signal nothing.
    #[cfg(any(test, feature = "hostile"))]
    pub(crate) fn loose() -> Self {
        Self::new(Wires::Loose)
    }

    /// From now on a write of any width and value at guest-physical address `at` signals `event`
    /// and goes nowhere else.
    ///
    /// # Errors
    /// The kernel's; `EEXIST` where something rings there already.
    pub fn ring(&self, at: u64, event: &OwnedFd) -> io::Result<Doorbell> {
        let event = event.try_clone()?;
        let address = IoEventAddress::Mmio(at);
        lend(&event, |event| self.fd.register_ioevent(event, &address))?;
        Ok(Doorbell {
            fd: self.fd.clone(),
            event,
            at,
        })
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        let at = IoEventAddress::Mmio(self.at);
        let silenced = lend(&self.event, |event| self.fd.unregister_ioevent(event, &at));
        if let Err(error) = silenced {
            log::error!("the doorbell at {:#x} stays: {error}", self.at);
        }
    }
}
