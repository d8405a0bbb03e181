use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use proptest::prelude::*;

use super::reset::*;
use super::*;

#[derive(Debug, Default)]
struct Board {
    sci: AtomicBool,
    resets: AtomicU32,
    power_offs: AtomicU32,
}

impl InterruptLevel for Board {
    fn set(&self, asserted: bool) {
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
