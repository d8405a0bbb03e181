//! Interrupt pins of assigned devices: level-triggered irqfds with a resample eventfd.
//!
//! KVM puts the line up when the pin's eventfd is signalled. When the guest ends the interrupt, KVM
//! lets the line down and signals the resample eventfd, and with it VFIO unmasks the device, which
//! signals again where it still wants something. None of this needs a thread of Busway's. Devices
//! that share a line each have a pair of their own: KVM resamples all of them at each end of
//! interrupt.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use busway_pci::{InterruptLine, InterruptLines, InterruptPin, RouteError};
use busway_vfio::EventFd;

use super::irq::{IrqRouter, eventfd, kernel, lend};
use super::wires::Wires;

/// The four pins of a device, by the GSIs that they are wired to.
#[derive(Debug)]
pub struct Pins {
    fd: Wires,
    gsis: [u32; 4],
}

impl IrqRouter {
    /// The pins of a device whose INTA to INTD are wired to `gsis`.
    #[must_use]
    pub fn pins(&self, gsis: [u32; 4]) -> Pins {
        Pins {
            fd: self.wires().clone(),
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
        lend(&event, |event| {
            lend(&resample, |resample| {
                self.fd.register_irqfd_with_resample(event, resample, gsi)
            })
        })
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
    fd: Wires,
    gsi: u32,
    event: EventFd,
    resample: EventFd,
}

impl InterruptLine for Line {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn resample(&self) -> BorrowedFd<'_> {
        self.resample.as_fd()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Err(error) = lend(&self.event, |event| {
            self.fd.unregister_irqfd(event, self.gsi)
        }) {
            log::error!("the irqfd of GSI {} stays: {error}", self.gsi);
        }
    }
}
