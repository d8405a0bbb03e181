use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const CONTROL: u16 = 4;
const STATUS: u16 = 6;
/// What Linux' driver enables: button, presence, link, and the interrupt.
const DRIVEN: u16 = 0x1029;
const POWER_OFF: u16 = spec::EXP_SLOT_CONTROL_POWER_OFF;

fn occupied() -> Slot {
    let mut slot = Slot::new(16);
    slot.prepare(true);
    slot
}

/// A slot whose driver is there.
fn driven() -> Slot {
    let mut slot = occupied();
    assert_eq!(control(&mut slot, DRIVEN), Change::default());
    slot
}

fn control(slot: &mut Slot, bits: u16) -> Change {
    slot.write(CONTROL, &bits.to_le_bytes())
}

fn clear(slot: &mut Slot, bits: u16) -> Change {
    slot.write(STATUS, &bits.to_le_bytes())
}

fn status(slot: &Slot) -> u16 {
    let [.., low, high] = slot.registers();
    u16::from_le_bytes([low, high])
}

fn interrupted(change: Change) -> bool {
    change.interrupt
}

#[test]
fn it_says_what_it_has_and_that_no_command_has_to_be_waited_for() {
    let [a, b, c, d, ..] = occupied().registers();
    assert_eq!(u32::from_le_bytes([a, b, c, d]), 16 << 19 | 0x4_0073);
}

#[test]
fn at_reset_power_is_where_a_device_is() {
    let occupied = occupied();
    assert!(occupied.link_up() && occupied.powered());
    assert_eq!(status(&occupied), spec::EXP_SLOT_STATUS_PRESENT);
    let empty = Slot::new(1);
    assert!(!empty.powered() && !empty.link_up());
    assert_eq!(status(&empty), 0);
}

#[test]
fn a_button_nobody_attends_to_is_known_for_such() {
    let mut slot = occupied();
    assert!(!slot.attended());
    assert!(!interrupted(slot.press_button()));
    control(&mut slot, spec::EXP_SLOT_CONTROL_INTERRUPT);
    assert!(!slot.attended());
    control(&mut slot, DRIVEN);
    assert!(slot.attended());
}

#[test]
fn a_guest_is_asked_by_one_interrupt_and_answers_by_switching_power_off() {
    let mut slot = driven();
    assert!(interrupted(slot.press_button()));
    assert_eq!(status(&slot) & 0x109, 0x001);
    assert!(!interrupted(clear(&mut slot, 0x001)));
    let off = control(&mut slot, DRIVEN | POWER_OFF);
    assert_eq!(off.power, Some(false));
    assert!(interrupted(off), "the link went down");
    assert!(!slot.link_up() && slot.present);
    assert_eq!(control(&mut slot, DRIVEN | POWER_OFF).power, None);
    assert!(!interrupted(slot.set_present(false)));
    assert_eq!(status(&slot), 0x108);
}

#[test]
fn a_device_that_left_without_notice_is_told_by_presence_and_link() {
    let mut slot = driven();
    assert!(interrupted(slot.set_present(false)));
    assert_eq!(status(&slot), 0x108);
    assert!(slot.powered() && !slot.link_up());
    assert_eq!(slot.set_present(false), Change::default());
}

#[test]
fn a_device_that_comes_is_reached_when_the_guest_gives_it_power() {
    let mut slot = Slot::new(1);
    control(&mut slot, DRIVEN | POWER_OFF);
    assert!(interrupted(slot.set_present(true)));
    assert_eq!(status(&slot), 0x148);
    assert!(!slot.link_up());
    clear(&mut slot, 0x108);
    let on = control(&mut slot, DRIVEN);
    assert_eq!((on.power, on.interrupt), (Some(true), true));
    assert!(slot.link_up());
}

#[test]
fn the_next_interrupt_comes_only_after_all_events_were_cleared() {
    let mut slot = driven();
    assert!(interrupted(slot.set_present(false)));
    assert!(!interrupted(slot.press_button()));
    assert!(!interrupted(clear(&mut slot, 0x008)));
    assert!(!interrupted(slot.press_button()));
    clear(&mut slot, 0xffff);
    assert!(interrupted(slot.press_button()));
}

#[test]
fn an_event_from_before_interrupts_when_it_is_first_asked_for() {
    let mut slot = occupied();
    assert!(!interrupted(slot.press_button()));
    assert!(interrupted(control(&mut slot, DRIVEN)));
}

#[derive(Clone, Debug)]
enum Step {
    Write(u16, Vec<u8>),
    Present(bool),
    Button,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(
        prop_oneof![
            (0..12u16, vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Step::Write(at, data)),
            any::<u16>().prop_map(|bits| Step::Write(CONTROL, bits.to_le_bytes().to_vec())),
            any::<u16>().prop_map(|bits| Step::Write(STATUS, bits.to_le_bytes().to_vec())),
            any::<bool>().prop_map(Step::Present),
            Just(Step::Button),
            Just(Step::Reset),
        ],
        0..60,
    )
}

/// Whether an interrupt is pending by the registers alone. §6.7.3.4.
fn pending(slot: &Slot) -> bool {
    let [.., c, d, _, _] = slot.registers();
    let control = u16::from_le_bytes([c, d]);
    // Of these three events the enable bits have the status bits' places but for the link's.
    let enabled = control & 0x9 | (control >> 4 & 0x100);
    control & spec::EXP_SLOT_CONTROL_INTERRUPT != 0 && status(slot) & enabled != 0
}

proptest! {
    #[test]
    fn whatever_is_written_the_registers_keep_their_promises(steps in steps()) {
        let mut slot = occupied();
        let capabilities = slot.registers()[..4].to_vec();
        for step in steps {
            let before = slot.clone();
            let change = match step {
                Step::Write(at, data) => slot.write(at, &data),
                Step::Present(present) => slot.set_present(present),
                Step::Button => slot.press_button(),
                Step::Reset => {
                    slot.reset();
                    Change::default()
                }
            };
            prop_assert_eq!(&slot.registers()[..4], &capabilities[..]);
            prop_assert_eq!(status(&slot) & !0x149, 0, "bits that it does not have");
            prop_assert_eq!(status(&slot) & 0x40 != 0, slot.present);
            prop_assert_eq!(change.interrupt, pending(&slot) && !pending(&before));
            if let Some(on) = change.power {
                prop_assert_eq!((before.powered(), slot.powered()), (!on, on));
            }
            prop_assert_eq!(slot.link_up(), slot.present && slot.powered());
        }
    }
}
