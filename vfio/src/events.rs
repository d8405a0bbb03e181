//! What a device's kernel driver tells on its own account: errors, and that somebody wants the device
//! back. VFIO numbers both as interrupts. linux/vfio.h

use std::os::fd::AsFd;

use crate::{DeviceIo, EventFd, IrqIndex};

/// Where a device's events arrive.
///
/// The kernel releases them when the device is closed.
#[derive(Debug)]
pub struct DeviceEvents {
    /// The device had an error that it does not recover from by itself. Absent where it is no PCI
    /// Express device.
    pub error: Option<EventFd>,
    /// The host wants the device back: somebody unbinds it, or it is being removed. The kernel says
    /// so again every ten seconds, and waits.
    pub request: Option<EventFd>,
}

impl DeviceEvents {
    /// Has the device called `name` tell from now on. What it cannot tell is absent, with a warning.
    #[must_use]
    pub fn listen(name: &str, io: &dyn DeviceIo) -> Self {
        Self {
            error: event(name, io, IrqIndex::Error, "its errors go unseen"),
            request: event(
                name,
                io,
                IrqIndex::Request,
                "unbinding it on the host waits until the VM ends",
            ),
        }
    }
}

fn event(name: &str, io: &dyn DeviceIo, index: IrqIndex, loss: &str) -> Option<EventFd> {
    if io.irq(index).count == 0 {
        log::debug!("{name} has no {index:?} event");
        return None;
    }
    let event = EventFd::new()
        .map_err(|error| format!("eventfd: {error}"))
        .and_then(
            |event| match io.set_irqs(index, 0, &[Some(event.as_fd())]) {
                Ok(()) => Ok(event),
                Err(error) => Err(error.to_string()),
            },
        );
    event
        .inspect_err(|error| log::warn!("{name}: {error}; {loss}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;

    #[test]
    fn a_device_tells_what_it_can() {
        let device = FakeDevice::default();
        let events = DeviceEvents::listen("a device", &device);
        assert!(events.error.is_some() && events.request.is_some());
        assert_eq!(
            *device.listened.lock().unwrap(),
            [IrqIndex::Error, IrqIndex::Request]
        );
    }
}
