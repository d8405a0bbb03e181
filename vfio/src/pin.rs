//! A device's interrupt pin over VFIO, and that the kernel has one kind of interrupt at a time.
//!
//! VFIO masks the device when its pin signals (by the interrupt disable bit, or the whole line for a
//! device that has none) and unmasks it when the resample eventfd is signalled; where a mediated device's
//! driver does not, a thread does ([`Unmasker`]). The guest's interrupt
//! disable bit goes to VFIO's virtual command register, which does the rest.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use busway_pci::pace::{self, Pace};
use busway_pci::{InterruptLines, InterruptPin, Intx, PinError, PinOwner, VectorOwner, spec};

use crate::access::read_dword;
use crate::config::GuestConfig;
use crate::unmask::Unmasker;
use crate::vectors::disable;
use crate::{DeviceIo, IrqIndex};

/// The pin as VFIO has it.
#[derive(Debug)]
struct PinIrq {
    name: String,
    io: Arc<dyn DeviceIo>,
    /// Unmasks it, where its driver does not.
    unmasker: Option<Unmasker>,
}

impl PinIrq {
    fn unmask_on(&mut self, resample: BorrowedFd<'_>) -> io::Result<()> {
        match self.io.unmask_on(IrqIndex::Intx, resample) {
            Err(error) if Unmasker::is_wanted(&error) => {
                let unmasker = Unmasker::start(&self.name, self.io.clone(), resample)?;
                self.unmasker = Some(unmasker);
                Ok(())
            }
            result => result.map_err(io::Error::other),
        }
    }
}

impl PinOwner for PinIrq {
    fn connect(&mut self, event: BorrowedFd<'_>, resample: BorrowedFd<'_>) -> io::Result<()> {
        self.io
            .set_irqs(IrqIndex::Intx, 0, &[Some(event)])
            .map_err(io::Error::other)?;
        // A signal of `resample` in between is not lost: VFIO looks when it takes the eventfd.
        let result = self.unmask_on(resample);
        if result.is_err() {
            self.disconnect();
        }
        result
    }

    fn disconnect(&mut self) {
        self.unmasker = None;
        disable(&self.name, &*self.io, IrqIndex::Intx);
    }
}

/// A device's pin, and what of its configuration space follows whether it is connected.
#[derive(Debug)]
pub(crate) struct Pin {
    intx: Intx,
    irq: PinIrq,
}

impl Pin {
    /// The device's pin, where it has one that the host can use.
    pub(crate) fn find(
        name: &str,
        io: &Arc<dyn DeviceIo>,
        lines: Arc<dyn InterruptLines>,
    ) -> Option<Self> {
        let [_, register, _, _] = read_dword(&**io, spec::INTERRUPT_LINE).to_le_bytes();
        let pin = InterruptPin::from_register(register)?;
        (io.irq(IrqIndex::Intx).count > 0).then(|| Self {
            intx: Intx::new(pin, lines, name),
            irq: PinIrq {
                name: name.to_owned(),
                io: io.clone(),
                unmasker: None,
            },
        })
    }

    /// Which it is.
    pub(crate) fn pin(&self) -> InterruptPin {
        self.intx.pin()
    }

    /// Connects it for the first time.
    pub(crate) fn connect(&mut self, config: &mut GuestConfig) -> Result<(), PinError> {
        let result = self.intx.connect(&mut self.irq);
        self.tell(config);
        result
    }

    /// Disconnects it, before something else is.
    pub(crate) fn disconnect(&mut self, config: &mut GuestConfig) {
        self.intx.disconnect(&mut self.irq);
        self.tell(config);
    }

    /// Brings it in line with whether MSI or MSI-X is enabled.
    pub(crate) fn update(&mut self, messages: bool, config: &mut GuestConfig) {
        self.intx.update(messages, &mut self.irq);
        self.tell(config);
    }

    fn tell(&self, config: &mut GuestConfig) {
        config.set_pin_connected(&*self.irq.io, self.intx.connected());
    }
}

/// A kind of messages, for which the pin makes room: the kernel has one kind of interrupt at a time. What
/// the guest changes of them is charged to `pace`.
#[derive(Debug)]
pub(crate) struct InPlaceOfPin<'a, V> {
    pub(crate) vectors: &'a mut V,
    pub(crate) pin: Option<&'a mut Pin>,
    pub(crate) config: &'a mut GuestConfig,
    pub(crate) pace: &'a Pace,
}

impl<V> InPlaceOfPin<'_, V> {
    fn make_room(&mut self) {
        if let Some(pin) = &mut self.pin {
            pin.disconnect(self.config);
        }
    }
}

impl<V: VectorOwner> VectorOwner for InPlaceOfPin<'_, V> {
    fn enable(&mut self) -> io::Result<()> {
        self.pace.charge(pace::INTERRUPTS, 1);
        self.make_room();
        self.vectors.enable()
    }

    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.pace.charge(pace::INTERRUPTS, 1);
        self.make_room();
        self.vectors.connect(first, events)
    }

    fn has_lost_all(&self) -> bool {
        self.vectors.has_lost_all()
    }

    fn disconnect_all(&mut self) {
        self.pace.charge(pace::INTERRUPTS, 1);
        self.vectors.disconnect_all();
    }
}

/// Why a pin's host line cannot be had for itself: who else is on it, for a person. `sys` is sysfs,
/// `name` the device's address.
pub(crate) fn line_users(sys: &Path, name: &str) -> String {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let irq = read(&sys.join("bus/pci/devices").join(name).join("irq"));
    let irq = irq.trim();
    let users = read(&sys.join("kernel/irq").join(irq).join("actions"));
    let users: Vec<_> = users
        .trim()
        .split(',')
        .filter(|user| !user.is_empty())
        .collect();
    match users[..] {
        [] => format!("host interrupt line {irq} is shared with another device"),
        _ => format!(
            "host interrupt line {irq} is also used by {}",
            users.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_of_a_host_line_are_named() {
        let sys = std::env::temp_dir().join(format!("busway-line-{}", std::process::id()));
        let device = sys.join("bus/pci/devices/0000:03:01.0");
        let irq = sys.join("kernel/irq/23");
        for folder in [&device, &irq] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(device.join("irq"), "23\n").unwrap();
        assert_eq!(
            line_users(&sys, "0000:03:01.0"),
            "host interrupt line 23 is shared with another device"
        );
        fs::write(irq.join("actions"), "ehci_hcd:usb1,snd_hda\n").unwrap();
        assert_eq!(
            line_users(&sys, "0000:03:01.0"),
            "host interrupt line 23 is also used by ehci_hcd:usb1, snd_hda"
        );
        fs::remove_dir_all(&sys).unwrap();
    }
}
