//! Interrupt pins of assigned devices: level-triggered irqfds with a resample eventfd.
//!
//! KVM puts the line up when the pin's eventfd is signalled. When the guest ends the interrupt, KVM
//! lets the line down and signals the resample eventfd, and with it VFIO unmasks the device, which
//! signals again where it still wants something. None of this needs a thread of Busway's. Devices
//! that share a line each have a pair of their own: KVM resamples all of them at each end of
//! interrupt.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use busway_pci::{InterruptLine, InterruptLines, InterruptPin, RouteError};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::irq::{IrqRouter, borrow, eventfd, kernel};

/// The four pins of a device, by the GSIs that they are wired to.
#[derive(Debug)]
pub struct Pins {
    fd: Arc<VmFd>,
    gsis: [u32; 4],
}

impl IrqRouter {
    /// The pins of a device whose INTA to INTD are wired to `gsis`.
    #[must_use]
    pub fn pins(&self, gsis: [u32; 4]) -> Pins {
        Pins {
            fd: self.vm().clone(),
            gsis,
        }
    }
}

impl InterruptLines for Pins {
    fn connect(&self, pin: InterruptPin) -> Result<Arc<dyn InterruptLine>, RouteError> {
        let [a, b, c, d] = self.gsis;
        let gsi = match pin {
            InterruptPin::A => a,
            InterruptPin::B => b,
            InterruptPin::C => c,
            InterruptPin::D => d,
        };
        let (event, resample) = (eventfd()?, eventfd()?);
        self.fd
            .register_irqfd_with_resample(&event, &resample, gsi)
            .map_err(|error| kernel("KVM_IRQFD", error))?;
        Ok(Arc::new(Line {
            fd: self.fd.clone(),
            gsi,
            event,
            resample,
        }))
    }
}

/// One pin's way to its line.
#[derive(Debug)]
struct Line {
    fd: Arc<VmFd>,
    gsi: u32,
    event: EventFd,
    resample: EventFd,
}

impl InterruptLine for Line {
    fn event(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }

    fn resample(&self) -> BorrowedFd<'_> {
        borrow(&self.resample)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Err(error) = self.fd.unregister_irqfd(&self.event, self.gsi) {
            log::error!("the irqfd of GSI {} stays: {error}", self.gsi);
        }
    }
}
