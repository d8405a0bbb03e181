//! What resets the machine: the reset control register, and the keyboard controller's reset line.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::devices::PowerSink;
use crate::kvm::BusDevice;

/// The reset control register of PC chipsets (Intel ICH9 datasheet §13.7.5), which lies among the
/// PCI configuration ports.
pub const RESET_CONTROL: u16 = 0xcf9;
/// What resets when it is written there: "system reset" and "reset CPU".
pub const RESET_VALUE: u8 = RESET_SYSTEM | RESET_CPU;

/// First of the PCI configuration ports.
pub const CONFIG_PORTS: u16 = 0xcf8;
/// How many they are.
pub const CONFIG_PORTS_SIZE: u16 = 8;

/// The keyboard controller's command and status port.
pub const KEYBOARD_COMMAND: u16 = 0x64;

pub(super) const RESET_SYSTEM: u8 = 1 << 1;
pub(super) const RESET_CPU: u8 = 1 << 2;
/// The keyboard controller's command that pulses the reset line.
pub(super) const PULSE_RESET: u8 = 0xfe;

/// The reset control register, in front of the PCI configuration ports among which it lies.
///
/// Byte accesses to 0xCF9 are the register's; all others are the configuration mechanism's.
pub struct ResetControl {
    value: Mutex<u8>,
    sink: Arc<dyn PowerSink>,
    config: Arc<dyn BusDevice>,
}

impl fmt::Debug for ResetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetControl")
            .field("value", &self.value)
            .finish_non_exhaustive()
    }
}

impl ResetControl {
    /// The register before `config`, which answers at [`CONFIG_PORTS`]; belongs there in its place.
    #[must_use]
    pub fn new(sink: Arc<dyn PowerSink>, config: Arc<dyn BusDevice>) -> Self {
        Self {
            value: Mutex::new(0),
            sink,
            config,
        }
    }
}

/// Offset of the reset control register from the first configuration port.
pub(super) const RESET_OFFSET: u64 = (RESET_CONTROL - CONFIG_PORTS) as u64;

impl BusDevice for ResetControl {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == RESET_OFFSET && data.len() == 1 {
            data.fill(*self.value.lock().unwrap_or_else(PoisonError::into_inner));
        } else {
            self.config.read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match data {
            &[value] if offset == RESET_OFFSET => {
                // The CPU reset bit is never seen set: with it the machine starts anew.
                *self.value.lock().unwrap_or_else(PoisonError::into_inner) = value & RESET_SYSTEM;
                if value & RESET_CPU != 0 {
                    self.sink.reset();
                }
            }
            _ => self.config.write(offset, data),
        }
    }
}

/// The keyboard controller's command port, of which only the reset line is there. Status always says
/// that a command would be taken and that no key waits; or, where firmware looks for a keyboard, that there is
/// no controller.
#[derive(Debug)]
pub struct KeyboardReset {
    sink: Arc<dyn PowerSink>,
    status: u8,
}

impl KeyboardReset {
    /// The port; belongs at [`KEYBOARD_COMMAND`], one byte.
    #[must_use]
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self { sink, status: 0 }
    }

    /// Reads as a port where nothing is, by which firmware knows that there is no keyboard: it would wait for
    /// one, again and again. EDK II MdeModulePkg/Bus/Isa/Ps2KeyboardDxe/Ps2Keyboard.c
    #[must_use]
    pub fn without_controller(mut self) -> Self {
        self.status = u8::MAX;
        self
    }
}

impl BusDevice for KeyboardReset {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.status);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&PULSE_RESET) {
            self.sink.reset();
        }
    }
}
