//! A PCIe slot that takes hot-plug operations: its three registers, and what they do to one another.
//! PCIe 6.0 §6.7 and §7.5.3.9 to §7.5.3.11.
//!
//! The slot has what an operating system needs to release a device in order: an attention button,
//! a power controller and a power indicator. A device may also leave without notice. A command takes
//! effect with the write that gives it, which the slot says, so that no driver waits for completions.

use crate::spec;

/// Is told what the guest does with slots. The machine implements it.
///
/// Called on the thread of the vCPU that did it, while its access is under way: it must not call the
/// topology.
pub trait SlotListener: Send + Sync + std::fmt::Debug {
    /// The guest switched the power of the slot with this number. Without power, what is in the slot
    /// is in reset and out of reach, and the guest's driver has released it.
    fn power_switched(&self, slot: u16, on: bool);

    /// The guest is done with what it was at with the slot of this number, whose indicator now says what
    /// its power is: [`HotPlug::steady`](crate::HotPlug::steady). Told after the power.
    fn steadied(&self, slot: u16);
}

/// What the guest can turn on to be told of, by control bit and by the event's status bit.
const EVENTS: [(u16, u16); 3] = [
    (spec::EXP_SLOT_CONTROL_BUTTON, spec::EXP_SLOT_STATUS_BUTTON),
    (
        spec::EXP_SLOT_CONTROL_PRESENCE,
        spec::EXP_SLOT_STATUS_PRESENCE,
    ),
    (spec::EXP_SLOT_CONTROL_LINK, spec::EXP_SLOT_STATUS_LINK),
];

const CONTROL_WRITABLE: u16 = spec::EXP_SLOT_CONTROL_BUTTON
    | spec::EXP_SLOT_CONTROL_POWER_FAULT
    | spec::EXP_SLOT_CONTROL_PRESENCE
    | spec::EXP_SLOT_CONTROL_INTERRUPT
    | spec::EXP_SLOT_CONTROL_INDICATOR
    | spec::EXP_SLOT_CONTROL_POWER_OFF
    | spec::EXP_SLOT_CONTROL_LINK;

/// What the guest has to be told by an interrupt, and the machine by the port, after a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// The port interrupts the guest.
    pub(crate) interrupt: bool,
    /// Power was switched, to this.
    pub(crate) power: Option<bool>,
    /// The slot is steady, and was not.
    pub(crate) steadied: bool,
}

/// The state of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    number: u16,
    present: bool,
    control: u16,
    /// Events that the guest has not cleared.
    events: u16,
    /// An event that the guest wants to hear of was there before: no further interrupt until all of
    /// them are cleared. §6.7.3.4.
    interrupting: bool,
    /// The button was pressed, and the indicator has not blinked since.
    unheard: bool,
}

impl Slot {
    /// The slot with this number (13 bits), empty.
    pub(crate) fn new(number: u16) -> Self {
        let mut slot = Self {
            number: number & spec::EXP_SLOT_NUMBER_MAX,
            present: false,
            control: 0,
            events: 0,
            interrupting: false,
            unheard: false,
        };
        slot.reset();
        slot
    }

    /// Whether it has power.
    pub(crate) fn powered(&self) -> bool {
        self.control & spec::EXP_SLOT_CONTROL_POWER_OFF == 0
    }

    /// Whether the link is up.
    pub(crate) fn link_up(&self) -> bool {
        self.present && self.powered()
    }

    /// Whether an event is pending that the guest wants to hear of, and has not cleared.
    pub(crate) fn pending(&self) -> bool {
        self.interrupting
    }

    /// Whether the guest is not in the middle of an operation on the slot: its indicator does not blink, and
    /// says what the power is. §6.7.1.2. Linux's driver, which blinks from the button to the end of each
    /// operation and sets the indicator last, does not hear of a change in between: it forgets what
    /// came within a second of switching power off, and takes a button for one that takes back the one before
    /// (drivers/pci/hotplug/pciehp_ctrl.c, remove_board and pciehp_handle_button_press). Nor is it steady
    /// while a button was not answered by blinking: the button is not that of what comes next.
    pub(crate) fn steady(&self) -> bool {
        !self.unheard && self.shows_power()
    }

    fn shows_power(&self) -> bool {
        match self.control & spec::EXP_SLOT_CONTROL_INDICATOR {
            spec::EXP_SLOT_CONTROL_INDICATOR_ON => self.powered(),
            spec::EXP_SLOT_CONTROL_INDICATOR_OFF => !self.powered(),
            spec::EXP_SLOT_CONTROL_INDICATOR_BLINK => false,
            // Reserved.
            _ => true,
        }
    }

    /// Whether the guest has a driver that hears of the button.
    pub(crate) fn attended(&self) -> bool {
        let heard = spec::EXP_SLOT_CONTROL_BUTTON | spec::EXP_SLOT_CONTROL_INTERRUPT;
        self.control & heard == heard
    }

    /// The state at power-on: a slot that holds something has power, as firmware would leave it.
    pub(crate) fn reset(&mut self) {
        self.control = match self.present {
            true => spec::EXP_SLOT_CONTROL_INDICATOR_ON,
            false => spec::EXP_SLOT_CONTROL_INDICATOR_OFF | spec::EXP_SLOT_CONTROL_POWER_OFF,
        };
        self.events = 0;
        self.interrupting = false;
        self.unheard = false;
    }

    /// Something was in the slot when the machine was built, or is gone before the guest could look.
    pub(crate) fn prepare(&mut self, present: bool) {
        self.present = present;
        self.reset();
    }

    /// Something came or left.
    pub(crate) fn set_present(&mut self, present: bool) -> Change {
        let before = self.link_up();
        if self.present != present {
            self.present = present;
            self.events |= spec::EXP_SLOT_STATUS_PRESENCE;
            if present && !self.powered() {
                // The link comes up with the power only, and yet this is what tells Linux to look: where
                // a slot has an attention button, its driver has presence changes off, and takes up what
                // is present at any change of the link (drivers/pci/hotplug/pciehp_hpc.c,
                // pcie_enable_notification; pciehp_ctrl.c, pciehp_handle_presence_or_link_change). The
                // button would cost five seconds, and mean removal where the driver is just at it.
                self.events |= spec::EXP_SLOT_STATUS_LINK;
            }
        }
        self.note_link(before);
        self.update_interrupt()
    }

    /// Somebody pressed the attention button.
    pub(crate) fn press_button(&mut self) -> Change {
        self.events |= spec::EXP_SLOT_STATUS_BUTTON;
        self.unheard = true;
        self.update_interrupt()
    }

    /// The registers, from slot capabilities on.
    pub(crate) fn registers(&self) -> [u8; 8] {
        let [a, b, c, d] = self.capabilities().to_le_bytes();
        let [e, f] = self.control.to_le_bytes();
        let [g, h] = self.status().to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// Writes, `offset` bytes from slot capabilities on; what is beyond the registers is not ours.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) -> Change {
        const CONTROL: u16 = spec::EXP_SLOT_CONTROL - spec::EXP_SLOT_CAPABILITIES;
        const STATUS: u16 = spec::EXP_SLOT_STATUS - spec::EXP_SLOT_CAPABILITIES;
        let mut control = self.control.to_le_bytes();
        let mut cleared = [0; 2];
        for (at, &byte) in (offset..=u16::MAX).zip(data) {
            match at {
                STATUS.. => put(&mut cleared, at - STATUS, byte),
                CONTROL.. => put(&mut control, at - CONTROL, byte),
                _ => {}
            }
        }
        self.events &= !u16::from_le_bytes(cleared);
        let (powered, link_up, steady) = (self.powered(), self.link_up(), self.steady());
        self.control = u16::from_le_bytes(control) & CONTROL_WRITABLE;
        let indicator = self.control & spec::EXP_SLOT_CONTROL_INDICATOR;
        self.unheard &= indicator != spec::EXP_SLOT_CONTROL_INDICATOR_BLINK;
        self.note_link(link_up);
        let change = self.update_interrupt();
        Change {
            power: (self.powered() != powered).then_some(self.powered()),
            steadied: self.steady() && !steady,
            ..change
        }
    }

    fn capabilities(&self) -> u32 {
        spec::EXP_SLOT_ATTENTION_BUTTON
            | spec::EXP_SLOT_POWER_CONTROLLER
            | spec::EXP_SLOT_POWER_INDICATOR
            | spec::EXP_SLOT_SURPRISE
            | spec::EXP_SLOT_HOT_PLUG
            | spec::EXP_SLOT_NO_COMMAND_COMPLETED
            | u32::from(self.number) << spec::EXP_SLOT_NUMBER_SHIFT
    }

    fn status(&self) -> u16 {
        match self.present {
            true => self.events | spec::EXP_SLOT_STATUS_PRESENT,
            false => self.events,
        }
    }

    fn note_link(&mut self, before: bool) {
        if self.link_up() != before {
            self.events |= spec::EXP_SLOT_STATUS_LINK;
        }
    }

    /// An interrupt is sent when the first of the events that the guest wants to hear of comes, or
    /// when it begins to want to.
    fn update_interrupt(&mut self) -> Change {
        let wanted = EVENTS
            .iter()
            .filter(|(enable, _)| self.control & enable != 0)
            .fold(0, |wanted, (_, event)| wanted | event);
        let tell =
            self.control & spec::EXP_SLOT_CONTROL_INTERRUPT != 0 && self.events & wanted != 0;
        let interrupt = tell && !self.interrupting;
        self.interrupting = tell;
        Change {
            interrupt,
            ..Change::default()
        }
    }
}

fn put(register: &mut [u8; 2], at: u16, byte: u8) {
    if let Some(place) = register.get_mut(usize::from(at)) {
        *place = byte;
    }
}

#[cfg(test)]
mod pciehp_tests;
#[cfg(test)]
mod tests;
