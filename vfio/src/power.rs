//! A device's power state: which there is, and which the guest asked for.
//!
//! VFIO carries a change out. It saves what a device forgets on its way to D3hot, where its
//! No_Soft_Reset is zero, and restores it in D0 (`vfio_pci_set_power_state` in Linux,
//! drivers/vfio/pci/vfio_pci_core.c), so that a guest finds the device as it left it. What is mapped of
//! a sleeping device faults there, and the fault ends the guest: so the BARs go first, and a device
//! is put to sleep only when nothing is mapped.

use crate::DeviceIo;
use crate::access::{read_byte, write_aligned};
use crate::policy::{PM_CONTROL, PM_STATE};

/// The power management capability's state. PCIe 6.0 §7.5.2.2
#[derive(Debug)]
pub(crate) struct Power {
    /// Where its control register is.
    control: u16,
    /// The device is not in D0, and decodes nothing. §5.3.1
    asleep: bool,
    /// The state that it is to go to, once nothing of it is mapped.
    wanted: Option<u8>,
}

impl Power {
    /// That of the capability at `start`; the device is in D0.
    pub(crate) fn new(start: u16) -> Self {
        Self {
            control: start.saturating_add(PM_CONTROL),
            asleep: false,
            wanted: None,
        }
    }

    /// Whether BARs decode.
    pub(crate) fn is_awake(&self) -> bool {
        !self.asleep && self.wanted.is_none()
    }

    /// Whether it is not in D0.
    pub(crate) fn is_asleep(&self) -> bool {
        self.asleep
    }

    /// The guest wrote `data` at `offset` of configuration space. Waking is done at once.
    pub(crate) fn written(&mut self, io: &dyn DeviceIo, offset: u16, data: &[u8]) {
        let at = self.control.checked_sub(offset).map(usize::from);
        let Some(state) = at.and_then(|at| data.get(at)).map(|byte| byte & PM_STATE) else {
            return;
        };
        if self.asleep {
            self.go(io, state);
        } else {
            self.wanted = Some(state).filter(|&state| state != 0);
        }
    }

    /// Puts the device to sleep where that was asked for, and says whether it stayed awake: it does
    /// not have every state. Nothing of it may be mapped.
    pub(crate) fn run_deferred(&mut self, io: &dyn DeviceIo) -> bool {
        let Some(state) = self.wanted.take() else {
            return false;
        };
        self.go(io, state);
        !self.asleep
    }

    /// Wakes the device, so that it can be reset.
    pub(crate) fn reset(&mut self, io: &dyn DeviceIo) {
        if self.asleep {
            self.go(io, 0);
        }
        self.asleep = false;
        self.wanted = None;
    }

    fn go(&mut self, io: &dyn DeviceIo, state: u8) {
        let now = read_byte(io, self.control);
        write_aligned(io, self.control, &[(now & !PM_STATE) | state]);
        self.asleep = read_byte(io, self.control) & PM_STATE != 0;
    }
}
