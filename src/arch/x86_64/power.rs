//! What turns the machine off or resets it: ACPI's PM1 registers with power button and timer, the reset
//! control register, and the keyboard controller's reset line.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::devices::{InterruptLine, PowerSink};
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

const RESET_SYSTEM: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;
/// The keyboard controller's command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;

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
    sci: Arc<dyn InterruptLine>,
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
    pub fn new(sci: Arc<dyn InterruptLine>, sink: Arc<dyn PowerSink>) -> Self {
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
        self.sci.set_level(running.state.sci());
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
const RESET_OFFSET: u64 = (RESET_CONTROL - CONFIG_PORTS) as u64;

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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default)]
    struct Board {
        sci: AtomicBool,
        resets: AtomicU32,
        power_offs: AtomicU32,
    }

    impl InterruptLine for Board {
        fn set_level(&self, asserted: bool) {
            self.sci.store(asserted, Ordering::Relaxed);
        }
    }

    impl PowerSink for Board {
        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::Relaxed);
        }

        fn power_off(&self) {
            self.power_offs.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Board {
        fn sci(&self) -> bool {
            self.sci.load(Ordering::Relaxed)
        }

        fn resets(&self) -> u32 {
            self.resets.load(Ordering::Relaxed)
        }

        fn power_offs(&self) -> u32 {
            self.power_offs.load(Ordering::Relaxed)
        }
    }

    fn power() -> (Arc<Board>, AcpiPower) {
        let board = Arc::new(Board::default());
        (board.clone(), AcpiPower::new(board.clone(), board))
    }

    fn read16(device: &dyn BusDevice, offset: u64) -> u16 {
        let mut data = [0; 2];
        device.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn write16(device: &dyn BusDevice, offset: u64, value: u16) {
        device.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn the_power_button_holds_the_sci_from_its_press_until_the_guest_clears_it() {
        let (board, power) = power();
        power.press_button();
        assert!(!board.sci(), "not enabled");
        write16(&power, 2, POWER_BUTTON);
        assert!(board.sci());
        assert_eq!(read16(&power, 0), POWER_BUTTON);
        write16(&power, 0, GLOBAL_STATUS);
        assert!(board.sci(), "another event's bit clears nothing");
        write16(&power, 0, POWER_BUTTON);
        assert!(!board.sci());
        assert_eq!((read16(&power, 0), read16(&power, 2)), (0, POWER_BUTTON));
        power.press_button();
        power.reset();
        assert!(!board.sci());
        assert_eq!(power.state().status, 0);
    }

    #[test]
    fn sleep_type_5_with_sleep_enable_turns_off_and_nothing_else_does() {
        let (board, power) = power();
        let s5 = u16::from(SLEEP_TYPE_S5) << SLEEP_TYPE_SHIFT;
        write16(&power, 4, s5);
        write16(&power, 4, SLEEP_ENABLE | 1 << SLEEP_TYPE_SHIFT);
        assert_eq!(board.power_offs(), 0);
        assert_eq!(read16(&power, 4), SCI_ENABLED | 1 << SLEEP_TYPE_SHIFT);
        write16(&power, 4, SLEEP_ENABLE | s5);
        assert_eq!(board.power_offs(), 1);
        assert_eq!(read16(&power, 4), SCI_ENABLED | s5, "SLP_EN reads 0");
        power.write(5, &[((SLEEP_ENABLE | s5) >> 8) as u8]);
        assert_eq!(board.power_offs(), 2, "by a byte access too");
    }

    #[test]
    fn firmware_turns_off_by_a_type_of_its_own_where_there_is_firmware() {
        let (board, power) = power();
        write16(&power, 4, SLEEP_ENABLE);
        assert_eq!(board.power_offs(), 0);
        let power = power.for_firmware();
        write16(&power, 4, SLEEP_ENABLE);
        assert_eq!(board.power_offs(), 1);
    }

    #[test]
    fn the_timer_counts_at_its_frequency_and_wraps_after_32_bits() {
        assert_eq!(timer(Duration::from_secs(1)), 3_579_545);
        assert_eq!(
            timer(Duration::from_secs(1 << 20)),
            ((3_579_545_u64 << 20) & 0xffff_ffff) as u32
        );
        assert!(!timer_high(Duration::from_secs(599)) && timer_high(Duration::from_secs(600)));
    }

    #[test]
    fn a_saved_state_goes_on_with_its_sci_and_its_timer_and_is_checked() {
        let (_, saved) = power();
        saved
            .restore(&PowerState::at_reset(700_000_000_000))
            .unwrap();
        write16(&saved, 2, POWER_BUTTON);
        write16(&saved, 4, 1 << SLEEP_TYPE_SHIFT);
        saved.press_button();
        let json = serde_json::to_string(&saved.state()).unwrap();

        let (board, power) = power();
        let state: PowerState = serde_json::from_str(&json).unwrap();
        power.restore(&state).unwrap();
        assert!(board.sci());
        for register in [0, 2, 4] {
            assert_eq!(read16(&power, register), read16(&saved, register));
        }
        let ran = timer(Duration::from_secs(700));
        let timer = |power: &AcpiPower| {
            let mut data = [0; 4];
            power.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        // It stood still between being saved and restored, and no longer.
        let (now, meanwhile) = (timer(&power), timer(&saved));
        assert!(ran <= now && now <= meanwhile, "{ran} {now} {meanwhile}");

        let newer = PowerState {
            version: 2,
            ..state
        };
        assert_eq!(power.restore(&newer), Err(PowerStateError::Version(2)));
        let wild = PowerState {
            status: u16::MAX,
            enable: u16::MAX,
            control: u16::MAX,
            timer: u64::MAX,
            ..state
        };
        power.restore(&wild).unwrap();
        assert_eq!(power.state().enable, ENABLES);
        assert_eq!(power.state().timer, u64::MAX);
        assert_eq!(read16(&power, 4) & SLEEP_ENABLE, 0);
        power.reset();
        assert!(!board.sci());
    }

    #[test]
    fn the_reset_register_resets_and_leaves_configuration_accesses_alone() {
        struct Config;
        impl BusDevice for Config {
            fn read(&self, offset: u64, data: &mut [u8]) {
                data.fill(0xc0 + offset as u8);
            }
            fn write(&self, _offset: u64, _data: &[u8]) {}
        }
        let board = Arc::new(Board::default());
        let reset = ResetControl::new(board.clone(), Arc::new(Config));
        reset.write(RESET_OFFSET, &[RESET_SYSTEM]);
        assert_eq!(board.resets(), 0);
        let mut byte = [0];
        reset.read(RESET_OFFSET, &mut byte);
        assert_eq!(byte, [RESET_SYSTEM]);
        let mut word = [0; 4];
        reset.read(0, &mut word);
        assert_eq!(word, [0xc0; 4]);
        reset.write(0, &0x8000_0000_u32.to_le_bytes());
        reset.write(4, &[0xff]);
        assert_eq!(board.resets(), 0);
        reset.write(RESET_OFFSET, &[RESET_VALUE]);
        assert_eq!(board.resets(), 1);
    }

    #[test]
    fn the_keyboard_controller_takes_one_command_only() {
        let board = Arc::new(Board::default());
        let keyboard = KeyboardReset::new(board.clone());
        let mut status = [0xff];
        keyboard.read(0, &mut status);
        assert_eq!(status, [0]);
        keyboard.write(0, &[0xaa]);
        assert_eq!(board.resets(), 0);
        keyboard.write(0, &[PULSE_RESET]);
        assert_eq!(board.resets(), 1);
        let none = keyboard.without_controller();
        none.read(0, &mut status);
        assert_eq!(status, [0xff]);
        none.write(0, &[PULSE_RESET]);
        assert_eq!(board.resets(), 2);
    }

    proptest! {
        #[test]
        fn any_access_is_answered_and_the_sci_is_what_status_and_enable_say(
            accesses in proptest::collection::vec(
                (0_u64..0x20, proptest::collection::vec(any::<u8>(), 0..9)), 0..40
            )
        ) {
            let (board, power) = power();
            for (offset, mut data) in accesses {
                power.write(offset, &data);
                power.read(offset, &mut data);
                let state = power.state();
                let other = self::power();
                other.1.restore(&state).unwrap();
                prop_assert_eq!(other.0.sci(), board.sci());
                prop_assert_eq!(board.sci(), state.sci());
                prop_assert_eq!(state.enable & !ENABLES, 0);
            }
        }
    }
}
