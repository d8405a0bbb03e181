//! What turns the machine off or resets it: ACPI's PM1 registers with power button and timer, the reset
//! control register, and the keyboard controller's reset line.

mod reset;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use busway_pci::InterruptLevel;
use serde::{Deserialize, Serialize};

pub use reset::{
    CONFIG_PORTS, CONFIG_PORTS_SIZE, KEYBOARD_COMMAND, KeyboardReset, RESET_CONTROL, RESET_VALUE,
    ResetControl,
};

use crate::devices::PowerSink;
use crate::kvm::BusDevice;

/// First of the power management ports.
pub const PM_BASE: u16 = 0x600;
/// How many they are.
pub const PM_SIZE: u16 = 0x10;
/// PM1 status and enable. ACPI 6.5 §4.8.3.1.
pub const PM1_EVENT: u16 = PM_BASE;
/// PM1 control. ACPI 6.5 §4.8.3.2.
pub const PM1_CONTROL: u16 = PM_BASE + 4;
/// The power management timer. ACPI 6.5 §4.8.3.3.
pub const PM_TIMER: u16 = PM_BASE + 8;

/// SLP_TYP that turns the machine off; `_S5` says so.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What firmware for QEMU's boards writes, which has not read `_S5`. EDK II
/// OvmfPkg/Library/ResetSystemLib/ResetSystemShutdown.c
const SLEEP_TYPE_FIRMWARE: u8 = 0;

const TIMER_STATUS: u16 = 1 << 0;
const GLOBAL_STATUS: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_BUTTON: u16 = 1 << 9;
const RTC_STATUS: u16 = 1 << 10;
const WAKE_STATUS: u16 = 1 << 15;
/// The events that can be enabled, whether the machine has them or not: ACPICA tests that enabling
/// takes.
const ENABLES: u16 = TIMER_STATUS | GLOBAL_STATUS | POWER_BUTTON | SLEEP_BUTTON | RTC_STATUS;
/// The status bits that writing 1 clears.
const STATUSES: u16 = ENABLES | WAKE_STATUS;

const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0b111;

/// The timer's frequency in Hz.
const PM_TIMER_HZ: u128 = 3_579_545;

/// The version of [`PowerState`] that is written and read. It changes with the meaning of a field.
const VERSION: u16 = 1;

/// What the power management hardware remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerState {
    /// The version of this structure.
    pub version: u16,
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control, without the bits that are fixed or only written.
    pub control: u16,
    /// Nanoseconds that the timer had run for when the state was taken.
    pub timer: u64,
    /// The timer's highest bit when it was last looked at; a change of it sets its status.
    pub timer_high: bool,
}

/// A saved state is none that power management can go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PowerStateError {
    /// the power management registers were saved in version {0} of the format, and this Busway knows 1: restore them with the Busway that saved them
    #[error(
        "the power management registers were saved in version {0} of the format, and this Busway knows \
         {VERSION}: restore them with the Busway that saved them"
    )]
    Version(u16),
}

impl PowerState {
    /// As after power-on, with a timer that has run for `timer` nanoseconds.
    fn at_reset(timer: u64) -> Self {
        Self {
            version: VERSION,
            status: 0,
            enable: 0,
            control: 0,
            timer,
            timer_high: timer_high(Duration::from_nanos(timer)),
        }
    }

    /// What the SCI is by these registers.
    fn sci(&self) -> bool {
        self.status & self.enable != 0
    }
}

/// The state, and when its timer was where it says.
#[derive(Debug)]
struct Running {
    state: PowerState,
    since: Instant,
}

impl Running {
    fn new(state: PowerState) -> Self {
        Self {
            state,
            since: Instant::now(),
        }
    }

    /// How long the timer has run for.
    fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.state.timer).saturating_add(self.since.elapsed())
    }

    /// The state as it is now.
    fn now(&self) -> PowerState {
        PowerState {
            timer: u64::try_from(self.elapsed().as_nanos()).unwrap_or(u64::MAX),
            ..self.state
        }
    }

    /// The registers as bytes in their places.
    fn registers(&mut self) -> [u8; PM_SIZE as usize] {
        let elapsed = self.elapsed();
        let state = &mut self.state;
        if timer_high(elapsed) != state.timer_high {
            state.timer_high = !state.timer_high;
            state.status |= TIMER_STATUS;
        }
        let mut bytes = [0; PM_SIZE as usize];
        bytes[0..2].copy_from_slice(&state.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&state.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&(state.control | SCI_ENABLED).to_le_bytes());
        bytes[8..12].copy_from_slice(&timer(elapsed).to_le_bytes());
        bytes
    }
}

/// ACPI's fixed power management hardware.
///
/// Timer overflows show in the status register, and raise the SCI when a PM1 register is next
/// accessed; no known system waits for them.
pub struct AcpiPower {
    running: Mutex<Running>,
    sci: Arc<dyn InterruptLevel>,
    sink: Arc<dyn PowerSink>,
    /// The values of SLP_TYP that turn the machine off.
    off: &'static [u8],
}

impl fmt::Debug for AcpiPower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiPower")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl AcpiPower {
    /// The hardware with `sci` as its interrupt; belongs at [`PM_BASE`].
    #[must_use]
    pub fn new(sci: Arc<dyn InterruptLevel>, sink: Arc<dyn PowerSink>) -> Self {
        Self {
            running: Mutex::new(Running::new(PowerState::at_reset(0))),
            sci,
            sink,
            off: &[SLEEP_TYPE_S5],
        }
    }

    /// Can be turned off by firmware, which has a value of its own for that.
    #[must_use]
    pub fn for_firmware(mut self) -> Self {
        self.off = &[SLEEP_TYPE_S5, SLEEP_TYPE_FIRMWARE];
        self
    }

    /// Presses the power button: the guest is asked to turn itself off.
    pub fn press_button(&self) {
        let mut running = self.lock();
        running.state.status |= POWER_BUTTON;
        self.update_sci(&running);
    }

    /// As after power-on; the timer runs on.
    pub fn reset(&self) {
        let mut running = self.lock();
        *running = Running::new(PowerState::at_reset(running.now().timer));
        self.update_sci(&running);
    }

    /// What the hardware remembers.
    #[must_use]
    pub fn state(&self) -> PowerState {
        self.lock().now()
    }

    /// Goes on from a state that was saved, without bits that there are not. The timer goes on where it was.
    ///
    /// # Errors
    /// [`PowerStateError`]; the hardware is then as it was.
    pub fn restore(&self, state: &PowerState) -> Result<(), PowerStateError> {
        if state.version != VERSION {
            return Err(PowerStateError::Version(state.version));
        }
        let mut running = self.lock();
        *running = Running::new(PowerState {
            status: state.status & STATUSES,
            enable: state.enable & ENABLES,
            control: state.control & SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT,
            ..*state
        });
        self.update_sci(&running);
        Ok(())
    }

    fn update_sci(&self, running: &Running) {
        self.sci.set(running.state.sci());
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut running = self.lock();
        let registers = running.registers();
        self.update_sci(&running);
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = registers.get(at).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut running = self.lock();
        let mut registers = running.registers();
        // Status bits are cleared by ones: a byte that is not written clears none.
        registers[0..2].fill(0);
        // SLP_EN acts when it is written, and is never kept.
        registers[5] &= !(SLEEP_ENABLE >> 8) as u8;
        for (at, byte) in (offset as usize..).zip(data) {
            if let Some(register) = registers.get_mut(at) {
                *register = *byte;
            }
        }
        let word = |at: usize| u16::from_le_bytes([registers[at], registers[at + 1]]);
        let state = &mut running.state;
        state.status &= !(word(0) & STATUSES);
        state.enable = word(2) & ENABLES;
        let control = word(4);
        state.control = control & SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT;
        self.update_sci(&running);
        drop(running);
        if control & SLEEP_ENABLE != 0 {
            let sleep_type = control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            if self.off.iter().any(|off| u16::from(*off) == sleep_type) {
                self.sink.power_off();
            } else {
                log::debug!("guest asked for sleep type {sleep_type}, which does not exist");
            }
        }
    }
}

fn timer(elapsed: Duration) -> u32 {
    (elapsed.as_nanos() * PM_TIMER_HZ / 1_000_000_000) as u32
}

fn timer_high(elapsed: Duration) -> bool {
    timer(elapsed) >> 31 == 1
}

#[cfg(test)]
mod tests;
