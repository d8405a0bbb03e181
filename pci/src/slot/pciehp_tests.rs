//! The slot under Linux's hot-plug driver: what that makes of each change, however the two get in each
//! other's way. The driver is modelled after drivers/pci/hotplug/pciehp_ctrl.c and pciehp_hpc.c of Linux 6.12,
//! whose functions are named below; between two of its steps anything can happen to the slot.

use std::collections::VecDeque;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const STATUS: u16 = spec::EXP_SLOT_STATUS - spec::EXP_SLOT_CAPABILITIES;
const CONTROL: u16 = spec::EXP_SLOT_CONTROL - spec::EXP_SLOT_CAPABILITIES;
const BUTTON: u16 = spec::EXP_SLOT_STATUS_BUTTON;
/// Presence and link.
const CHANGES: u16 = spec::EXP_SLOT_STATUS_PRESENCE | spec::EXP_SLOT_STATUS_LINK;
/// What a driver turns on of a slot that has a button: `pcie_enable_notification`.
const NOTIFICATION: u16 =
    spec::EXP_SLOT_CONTROL_BUTTON | spec::EXP_SLOT_CONTROL_INTERRUPT | spec::EXP_SLOT_CONTROL_LINK;
const ON: u16 = spec::EXP_SLOT_CONTROL_INDICATOR_ON;
const BLINK: u16 = spec::EXP_SLOT_CONTROL_INDICATOR_BLINK;
const OFF: u16 = spec::EXP_SLOT_CONTROL_INDICATOR_OFF;

/// `ctrl->state`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Off,
    BlinkingOn,
    BlinkingOff,
    PowerOn,
    PowerOff,
    On,
}

/// What the interrupt's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// `remove_board`: the device's driver releases it.
    Unconfigure,
    Power(bool),
    /// `remove_board`, a second after power is off: changes until then are forgotten.
    Forget,
    Indicator(u16),
    Become(State),
    /// `pciehp_handle_presence_or_link_change`, its second half: what is there is turned on.
    Look,
    /// `pciehp_check_link_status`: changes until the link is up are forgotten.
    CheckLink,
    /// `pciehp_configure_device`
    Configure,
}

const REMOVE: [Op; 5] = [
    Op::Unconfigure,
    Op::Power(false),
    Op::Forget,
    Op::Indicator(OFF),
    Op::Become(State::Off),
];

/// A device, by a number that no other has.
type Id = u32;

/// The slot, Linux's driver on one side and the machine on the other.
struct World {
    slot: Slot,
    state: State,
    /// `ctrl->pending_events`
    pending: u16,
    /// `DISABLE_SLOT` is among them.
    disable: bool,
    /// The button was pressed, and its five seconds are not over.
    button_work: bool,
    thread: VecDeque<Op>,
    /// The device that has a driver in the guest.
    has: Option<Id>,
    /// The device that is in the slot.
    plugged: Option<Id>,
    /// A device on its way into the slot.
    comes: Option<Id>,
    /// Somebody wants the device back.
    wanted: bool,
    /// The button is to be pressed for that.
    press: bool,
    /// How often it was.
    presses: u8,
    /// The machine makes its changes while the slot is steady only.
    waits: bool,
    next: Id,
}

impl World {
    /// An empty slot whose driver has begun.
    fn new(waits: bool) -> Self {
        let mut world = Self {
            slot: Slot::new(1),
            state: State::Off,
            pending: 0,
            disable: false,
            button_work: false,
            thread: VecDeque::new(),
            has: None,
            plugged: None,
            comes: None,
            wanted: false,
            press: false,
            presses: 0,
            waits,
            next: 1,
        };
        let control = world.control() | NOTIFICATION;
        world.write(CONTROL, control);
        world
    }

    fn control(&self) -> u16 {
        let [.., low, high, _, _] = self.slot.registers();
        u16::from_le_bytes([low, high])
    }

    fn status(&self) -> u16 {
        let [.., low, high] = self.slot.registers();
        u16::from_le_bytes([low, high])
    }

    fn write(&mut self, at: u16, bits: u16) {
        let change = self.slot.write(at, &bits.to_le_bytes());
        if self.waits && change.steadied && self.slot.powered() && (1..=2).contains(&self.presses) {
            // The guest took it back, or took the button for that of a device that was there before.
            self.press = self.wanted;
        }
        self.interrupted(change);
    }

    fn set(&mut self, mask: u16, bits: u16) {
        self.write(CONTROL, self.control() & !mask | bits);
    }

    /// `pciehp_isr`
    fn interrupted(&mut self, change: Change) {
        if !change.interrupt {
            return;
        }
        let events = self.status() & (BUTTON | CHANGES);
        self.pending |= events;
        self.write(STATUS, events);
    }

    /// `pciehp_ist`, one step of it. `false` where it has nothing to do.
    fn guest(&mut self) -> bool {
        let Some(op) = self.thread.pop_front() else {
            return self.take();
        };
        match op {
            Op::Unconfigure => self.has = None,
            Op::Power(true) => self.set(spec::EXP_SLOT_CONTROL_POWER_OFF, 0),
            Op::Power(false) => self.set(
                spec::EXP_SLOT_CONTROL_POWER_OFF,
                spec::EXP_SLOT_CONTROL_POWER_OFF,
            ),
            Op::Forget => self.pending &= !CHANGES,
            Op::Indicator(shows) => self.set(spec::EXP_SLOT_CONTROL_INDICATOR, shows),
            Op::Become(state) => self.state = state,
            Op::Look => self.look(),
            Op::CheckLink if self.slot.link_up() => self.pending &= !CHANGES,
            Op::Configure if self.slot.link_up() => {
                assert_eq!(self.has, None, "the driver of the device before");
                self.has = self.plugged;
            }
            // `set_slot_off`
            Op::CheckLink | Op::Configure => self.thread = REMOVE.into(),
        }
        true
    }

    fn take(&mut self) -> bool {
        let events = std::mem::take(&mut self.pending);
        let disable = std::mem::take(&mut self.disable);
        if events & BUTTON != 0 {
            self.button();
        }
        if disable {
            // `pciehp_handle_disable_request`
            self.button_work = false;
            self.state = State::PowerOff;
            self.thread.extend(REMOVE);
        } else if events & CHANGES != 0 {
            if matches!(self.state, State::BlinkingOff | State::On) {
                self.button_work = false;
                self.state = State::PowerOff;
                self.thread.extend(REMOVE);
            }
            self.thread.push_back(Op::Look);
        }
        events != 0 || disable
    }

    /// `pciehp_handle_button_press`
    fn button(&mut self) {
        match self.state {
            State::On => (self.state, self.button_work) = (State::BlinkingOff, true),
            State::Off => (self.state, self.button_work) = (State::BlinkingOn, true),
            State::BlinkingOff => {
                (self.state, self.button_work) = (State::On, false);
                self.set(spec::EXP_SLOT_CONTROL_INDICATOR, ON);
                return;
            }
            State::BlinkingOn => {
                (self.state, self.button_work) = (State::Off, false);
                self.set(spec::EXP_SLOT_CONTROL_INDICATOR, OFF);
                return;
            }
            // "Ignoring invalid state"
            State::PowerOn | State::PowerOff => return,
        }
        self.set(spec::EXP_SLOT_CONTROL_INDICATOR, BLINK);
    }

    fn look(&mut self) {
        let present = self.status() & spec::EXP_SLOT_STATUS_PRESENT != 0 || self.slot.link_up();
        match self.state {
            State::BlinkingOn if !present => {
                (self.state, self.button_work) = (State::Off, false);
                self.set(spec::EXP_SLOT_CONTROL_INDICATOR, OFF);
            }
            State::BlinkingOn | State::Off if present => {
                (self.state, self.button_work) = (State::PowerOn, false);
                self.thread.extend([
                    Op::Power(true),
                    Op::Indicator(BLINK),
                    Op::CheckLink,
                    Op::Configure,
                    Op::Indicator(ON),
                    Op::Become(State::On),
                ]);
            }
            _ => {}
        }
    }

    /// `pciehp_queue_pushbutton_work`: the five seconds are over.
    fn time(&mut self) -> bool {
        if !std::mem::take(&mut self.button_work) {
            return false;
        }
        match self.state {
            State::BlinkingOff => self.disable = true,
            State::BlinkingOn => self.pending |= spec::EXP_SLOT_STATUS_PRESENCE,
            _ => {}
        }
        true
    }

    /// What the machine does when it may. `false` where it has nothing to do.
    fn machine(&mut self) -> bool {
        if self.wanted && self.plugged.is_some() && !self.slot.powered() {
            self.pull();
            return true;
        }
        if self.waits && !self.slot.steady() {
            return false;
        }
        if std::mem::take(&mut self.press) {
            self.presses += 1;
            let change = self.slot.press_button();
            self.interrupted(change);
            return true;
        }
        if self.plugged.is_none() && self.comes.is_some() {
            self.plugged = self.comes.take();
            let change = self.slot.set_present(true);
            self.interrupted(change);
            return true;
        }
        false
    }

    fn add(&mut self) {
        if self.comes.is_none() {
            self.comes = Some(self.next);
            self.next += 1;
        }
    }

    fn ask(&mut self) {
        if self.plugged.is_some() && !self.wanted {
            (self.wanted, self.press, self.presses) = (true, true, 0);
        }
    }

    fn pull(&mut self) {
        if self.plugged.take().is_some() {
            (self.wanted, self.press, self.presses) = (false, false, 0);
            let change = self.slot.set_present(false);
            self.interrupted(change);
        }
    }

    /// Goes on until nobody has anything to do.
    fn run_until_idle(&mut self) {
        for _ in 0..1000 {
            if !(self.guest() || self.machine() || self.time()) {
                return;
            }
        }
        panic!("it never ends");
    }
}

#[test]
fn a_device_comes_and_goes_by_presence_and_button() {
    let mut world = World::new(true);
    for round in 1..4 {
        world.add();
        world.run_until_idle();
        assert_eq!((world.has, world.state), (Some(round), State::On));
        world.ask();
        world.run_until_idle();
        assert_eq!((world.has, world.plugged), (None, None));
        assert_eq!((world.state, world.slot.steady()), (State::Off, true));
    }
}

/// Takes the first device out by the button, up to the step before which power is off and the driver waits.
fn without_power(waits: bool) -> World {
    let mut world = World::new(waits);
    world.add();
    world.run_until_idle();
    world.ask();
    assert!(world.machine());
    while world.state != State::BlinkingOff {
        assert!(world.guest());
    }
    assert!(world.time());
    while world.slot.powered() {
        assert!(world.guest());
    }
    assert_eq!(world.thread.front(), Some(&Op::Forget));
    assert!(world.machine(), "it takes the device out");
    world.add();
    world
}

#[test]
fn what_comes_within_a_second_of_power_off_is_forgotten_unless_it_waits_for_the_indicator() {
    let mut world = without_power(false);
    world.machine();
    world.run_until_idle();
    assert_eq!((world.has, world.plugged), (None, Some(2)));
    let mut world = without_power(true);
    assert!(!world.machine(), "the indicator blinks");
    world.run_until_idle();
    assert_eq!((world.has, world.plugged), (Some(2), Some(2)));
}

#[test]
fn a_button_that_is_pressed_while_the_indicator_blinks_takes_back_what_was_asked_unless_it_waits() {
    for waits in [false, true] {
        let mut world = World::new(waits);
        world.add();
        world.run_until_idle();
        world.ask();
        assert!(world.machine() && world.guest());
        assert_eq!(world.state, State::BlinkingOff);
        // Who asked wants it no more, and somebody else does.
        world.wanted = false;
        world.ask();
        assert_ne!(world.machine(), waits);
        world.run_until_idle();
        let left = if waits { None } else { Some(1) };
        assert_eq!((world.has, world.plugged), (left, left));
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Guest,
    Time,
    Machine,
    Add,
    Ask,
    Pull,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Guest),
        1 => Just(Step::Time),
        3 => Just(Step::Machine),
        2 => Just(Step::Add),
        1 => Just(Step::Ask),
        1 => Just(Step::Pull),
    ];
    vec(step, 0..120)
}

proptest! {
    /// In the end the guest has what is in the slot, and what was asked for is out.
    #[test]
    fn however_a_driver_and_the_machine_get_in_each_others_way_the_guest_has_what_is_plugged(
        steps in steps(),
    ) {
        let mut world = World::new(true);
        for step in steps {
            match step {
                Step::Guest => drop(world.guest()),
                Step::Time => drop(world.time()),
                Step::Machine => drop(world.machine()),
                Step::Add => world.add(),
                Step::Ask => world.ask(),
                Step::Pull => world.pull(),
            }
        }
        world.run_until_idle();
        prop_assert_eq!(world.has, world.plugged);
        prop_assert_eq!(world.comes.filter(|_| world.plugged.is_none()), None);
        prop_assert!(!world.wanted, "what was asked for is still there");
        let state = if world.plugged.is_some() { State::On } else { State::Off };
        prop_assert_eq!(world.state, state);
        prop_assert!(world.slot.steady());
    }
}
