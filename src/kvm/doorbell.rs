//! ioeventfds: registers whose write signals an eventfd in the kernel, without an exit.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use super::irq::lend;

/// Makes doorbells.
#[derive(Clone, Debug)]
pub struct Doorbells {
    fd: Arc<VmFd>,
}

/// A register that rings, until this is dropped.
#[derive(Debug)]
pub struct Doorbell {
    fd: Arc<VmFd>,
    event: OwnedFd,
    at: u64,
}

impl Doorbells {
    pub(super) fn new(fd: Arc<VmFd>) -> Self {
        Self { fd }
    }

    /// From now on a write of any width and value at guest-physical address `at` signals `event`
    /// and goes nowhere else.
    ///
    /// # Errors
    /// The kernel's; `EEXIST` where something rings there already.
    pub fn ring(&self, at: u64, event: &OwnedFd) -> io::Result<Doorbell> {
        let event = event.try_clone()?;
        let address = IoEventAddress::Mmio(at);
        lend(&event, |event| {
            self.fd.register_ioevent(event, &address, NoDatamatch)
        })?;
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
        let silenced = lend(&self.event, |event| {
            self.fd.unregister_ioevent(event, &at, NoDatamatch)
        });
        if let Err(error) = silenced {
            log::error!("the doorbell at {:#x} stays: {error}", self.at);
        }
    }
}
