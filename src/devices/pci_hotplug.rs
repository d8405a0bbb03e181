//! What tells a guest of devices that come to bus 0 and leave it: the registers behind the methods of the
//! DSDT's slots, and the interrupt of the generic event device (ACPI 6.5 §5.6.9).
//!
//! | offset | register | |
//! |---|---|---|
//! | 0 | added | read: slots whose device has come since. Written: bits that the guest has seen |
//! | 4 | wanted back | read: slots that the guest is asked to release. Written: bits that the guest has seen |
//! | 8 | eject | written: slots that the guest has released |
//! | 12 | present | read: slots with a device |
//! | 16 | outcome | written: what became of a notification: slot in bits 0 to 4, status in 8 to 15, notification in 16 to 31 |
//!
//! Bit n is of slot n. The interrupt is held for as long as something is unseen, so that a guest whose driver
//! comes later misses nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::InterruptLevel;

use crate::kvm::BusDevice;

/// Offset of the slots with devices that have come.
pub const ADDED: u64 = 0;
/// Offset of the slots that are wanted back.
pub const WANTED: u64 = 4;
/// Offset of what the guest releases.
pub const EJECT: u64 = 8;
/// Offset of the slots that have a device.
pub const PRESENT: u64 = 12;
/// Offset of what became of a notification.
pub const OUTCOME: u64 = 16;
/// Bytes of all of them.
pub const SIZE: u64 = 20;

/// The notification that asks for a device. ACPI 6.5 §5.6.6, table 5.173.
pub const EJECT_REQUEST: u8 = 3;

/// A slot's bits of the outcome register.
const OUTCOME_SLOT: u32 = 0x1f;
/// Status 0 of `_OST` is success, and 0x84 that the ejection is under way. ACPI 6.5 §6.3.5, tables 6.52 and
/// 6.53.
const STATUS_SUCCESS: u8 = 0;
const STATUS_IN_PROGRESS: u8 = 0x84;

/// Who hears what a guest does with its slots. Called on a vCPU's thread, without any lock of the
/// registers'.
pub trait SlotKeeper: Send + Sync + std::fmt::Debug {
    /// The guest has released the device in `slot`: when this returns, nothing answers there.
    fn eject(&self, slot: u8);

    /// The guest does not release the device in `slot`, for the reason that `status` is of `_OST`.
    fn refused(&self, slot: u8, status: u8);
}

/// The registers.
#[derive(Debug)]
pub struct PciHotplug {
    state: Mutex<Slots>,
    line: Arc<dyn InterruptLevel>,
    keeper: Arc<dyn SlotKeeper>,
}

/// What the registers hold, a bit for each slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// Those with a device.
    pub present: u32,
    /// Those whose device has come, of which the guest does not know.
    pub added: u32,
    /// Those that are wanted back, of which the guest does not know.
    pub wanted: u32,
    /// Those that are wanted back, until the guest says what becomes of it.
    pub asked: u32,
}

impl PciHotplug {
    /// Slots without devices.
    #[must_use]
    pub fn new(line: Arc<dyn InterruptLevel>, keeper: Arc<dyn SlotKeeper>) -> Self {
        Self {
            state: Mutex::default(),
            line,
            keeper,
        }
    }

    /// A device is in `slot` from the guest's start on.
    pub fn prepare(&self, slot: u8) {
        self.lock().present |= bit(slot);
    }

    /// A device has come into `slot`: the guest is told.
    pub fn plugged(&self, slot: u8) {
        self.change(|slots| {
            slots.present |= bit(slot);
            slots.added |= bit(slot);
        });
    }

    /// Asks the guest for the device in `slot`.
    pub fn ask(&self, slot: u8) {
        self.change(|slots| {
            let there = slots.present & bit(slot);
            slots.wanted |= there;
            slots.asked |= there;
        });
    }

    /// Takes back what was asked. Whether the guest had not seen it yet; else it may still release it.
    pub fn withdraw(&self, slot: u8) -> bool {
        let mut unseen = false;
        self.change(|slots| {
            unseen = slots.wanted & bit(slot) != 0;
            slots.wanted &= !bit(slot);
            slots.asked &= !bit(slot);
        });
        unseen
    }

    /// The device in `slot` is gone without the guest's doing.
    pub fn gone(&self, slot: u8) {
        self.change(|slots| slots.empty(bit(slot)));
    }

    /// The guest starts anew, and finds what is there: it is to be told of nothing.
    pub fn reset(&self) {
        self.change(|slots| {
            *slots = Slots {
                present: slots.present,
                ..Slots::default()
            };
        });
    }

    /// What the registers hold.
    #[must_use]
    pub fn slots(&self) -> Slots {
        *self.lock()
    }

    fn change(&self, change: impl FnOnce(&mut Slots)) {
        let mut slots = self.lock();
        change(&mut slots);
        // With the lock held, so that the line says what the registers do.
        self.line.set(slots.added | slots.wanted != 0);
    }

    /// The guest says that it has released `slots`. Those without a device say nothing.
    fn eject(&self, slots: u32) {
        let mut ejected = 0;
        self.change(|state| {
            ejected = slots & state.present;
            state.empty(ejected);
        });
        for slot in (0..32).filter(|slot| ejected & bit(*slot) != 0) {
            self.keeper.eject(slot);
        }
    }

    /// The guest says what became of a notification, by `_OST`.
    fn outcome(&self, value: u32) {
        let [_, status, notification, beyond] = value.to_le_bytes();
        let slot = (value & OUTCOME_SLOT) as u8;
        if (notification, beyond) != (EJECT_REQUEST, 0)
            || matches!(status, STATUS_SUCCESS | STATUS_IN_PROGRESS)
        {
            return;
        }
        let mut asked = false;
        self.change(|slots| {
            asked = slots.asked & bit(slot) != 0;
            slots.asked &= !bit(slot);
            slots.wanted &= !bit(slot);
        });
        // Once for each time that it was asked.
        if asked {
            self.keeper.refused(slot, status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    fn empty(&mut self, slots: u32) {
        for bits in [
            &mut self.present,
            &mut self.added,
            &mut self.wanted,
            &mut self.asked,
        ] {
            *bits &= !slots;
        }
    }
}

/// The bit of a slot, of which there are 32.
fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let slots = self.slots();
        let registers = [slots.added, slots.wanted, 0, slots.present, 0];
        let bytes = registers.into_iter().flat_map(u32::to_le_bytes);
        let mut bytes = bytes.skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for byte in data {
            *byte = bytes.next().unwrap_or(0);
        }
    }

    /// A register is written as a whole.
    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            ADDED => self.change(|slots| slots.added &= !value),
            WANTED => self.change(|slots| slots.wanted &= !value),
            EJECT => self.eject(value),
            OUTCOME => self.outcome(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// The line, and what the keeper was told.
    #[derive(Debug, Default)]
    struct Board {
        line: AtomicBool,
        reported: Mutex<Vec<(u8, Option<u8>)>>,
    }

    impl InterruptLevel for Board {
        fn set(&self, asserted: bool) {
            self.line.store(asserted, Ordering::Relaxed);
        }
    }

    impl SlotKeeper for Board {
        fn eject(&self, slot: u8) {
            self.reported.lock().unwrap().push((slot, None));
        }

        fn refused(&self, slot: u8, status: u8) {
            self.reported.lock().unwrap().push((slot, Some(status)));
        }
    }

    impl Board {
        fn is_held(&self) -> bool {
            self.line.load(Ordering::Relaxed)
        }

        fn reported(&self) -> Vec<(u8, Option<u8>)> {
            std::mem::take(&mut self.reported.lock().unwrap())
        }
    }

    fn registers() -> (Arc<Board>, PciHotplug) {
        let board = Arc::new(Board::default());
        (board.clone(), PciHotplug::new(board.clone(), board))
    }

    fn read(registers: &PciHotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(registers: &PciHotplug, offset: u64, value: u32) {
        registers.write(offset, &value.to_le_bytes());
    }

    /// What the DSDT's method does at an interrupt: it takes what is unseen. Added, and wanted back.
    fn look(registers: &PciHotplug) -> (u32, u32) {
        let take = |offset| {
            let slots = read(registers, offset);
            write(registers, offset, slots);
            slots
        };
        (take(ADDED), take(WANTED))
    }

    fn outcome(slot: u8, notification: u16, status: u8) -> u32 {
        u32::from(slot) | u32::from(status) << 8 | u32::from(notification) << 16
    }

    #[test]
    fn a_device_that_comes_and_is_asked_for_holds_the_interrupt_until_the_guest_has_seen_it() {
        let (board, registers) = registers();
        registers.plugged(3);
        assert!(board.is_held());
        assert_eq!(read(&registers, PRESENT), 1 << 3);
        assert_eq!(look(&registers), (1 << 3, 0));
        assert!(!board.is_held());
        registers.ask(3);
        assert!(board.is_held());
        assert_eq!(look(&registers), (0, 1 << 3));
        assert!(!board.is_held());
        // What comes between reading and writing is not lost.
        let seen = read(&registers, ADDED);
        registers.plugged(4);
        write(&registers, ADDED, seen);
        assert!(board.is_held());
        assert_eq!(look(&registers), (1 << 4, 0));
        write(&registers, EJECT, 1 << 3);
        assert_eq!(board.reported(), [(3, None)]);
        assert_eq!(registers.slots().present, 1 << 4);
        // Once.
        write(&registers, EJECT, !(1 << 4));
        assert_eq!(board.reported(), []);
    }

    #[test]
    fn a_guest_that_refuses_says_so_once_for_each_time_it_is_asked() {
        let (board, registers) = registers();
        registers.prepare(1);
        assert!(!board.is_held(), "the guest finds it by itself");
        let busy = outcome(1, EJECT_REQUEST.into(), 0x82);
        write(&registers, OUTCOME, busy);
        assert_eq!(board.reported(), [], "nobody has asked");
        registers.ask(1);
        // Of another notification, a success before the ejection, and one that goes on.
        for value in [
            outcome(1, 1, 0x82),
            outcome(1, 0x103, 0x82),
            outcome(1, EJECT_REQUEST.into(), 0),
            outcome(1, EJECT_REQUEST.into(), 0x84),
            outcome(2, EJECT_REQUEST.into(), 0x82),
        ] {
            write(&registers, OUTCOME, value);
            assert_eq!(board.reported(), [], "{value:#x}");
        }
        write(&registers, OUTCOME, busy);
        write(&registers, OUTCOME, busy);
        assert_eq!(board.reported(), [(1, Some(0x82))]);
        assert!(!board.is_held());
        assert_eq!(registers.slots().present, 1 << 1);
    }

    #[test]
    fn what_was_asked_can_be_taken_back_and_whether_the_guest_saw_it_is_known() {
        let (board, registers) = registers();
        registers.prepare(1);
        registers.ask(1);
        assert!(registers.withdraw(1));
        assert!(!board.is_held());
        registers.ask(1);
        look(&registers);
        assert!(!registers.withdraw(1));
        // It releases it after all.
        write(&registers, EJECT, 1 << 1);
        assert_eq!(board.reported(), [(1, None)]);
        // Of a slot that is empty nothing is asked.
        registers.ask(1);
        assert!(!board.is_held());
    }

    #[test]
    fn a_guest_that_starts_anew_is_told_of_nothing_and_finds_what_is_there() {
        let (board, registers) = registers();
        registers.prepare(1);
        registers.plugged(2);
        registers.ask(1);
        registers.reset();
        assert!(!board.is_held());
        let present = Slots {
            present: 0b110,
            ..Slots::default()
        };
        assert_eq!(registers.slots(), present);
        registers.gone(1);
        assert_eq!(read(&registers, PRESENT), 0b100);
    }

    /// What guests and Busway do.
    #[derive(Clone, Debug)]
    enum Step {
        Plugged(u8),
        Ask(u8),
        Withdraw(u8),
        Gone(u8),
        Reset,
        Write(u64, Vec<u8>),
        Read(u64, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u8..32).prop_map(Step::Plugged),
            (0_u8..=255).prop_map(Step::Ask),
            (0_u8..32).prop_map(Step::Withdraw),
            (0_u8..32).prop_map(Step::Gone),
            Just(Step::Reset),
            (0_u64..24, proptest::collection::vec(any::<u8>(), 0..9))
                .prop_map(|(offset, data)| Step::Write(offset, data)),
            (
                prop_oneof![Just(ADDED), Just(WANTED), Just(EJECT), Just(OUTCOME)],
                any::<u32>()
            )
                .prop_map(|(offset, value)| Step::Write(offset, value.to_le_bytes().into())),
            (any::<u64>(), 0_usize..9).prop_map(|(offset, size)| Step::Read(offset, size)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_done_no_bit_is_of_an_empty_slot_and_a_guest_that_looks_settles_all(
            steps in proptest::collection::vec(step(), 0..64)
        ) {
            let (board, registers) = registers();
            for step in steps {
                let before = registers.slots();
                match step {
                    Step::Plugged(slot) => registers.plugged(slot),
                    Step::Ask(slot) => registers.ask(slot),
                    Step::Withdraw(slot) => drop(registers.withdraw(slot)),
                    Step::Gone(slot) => registers.gone(slot),
                    Step::Reset => registers.reset(),
                    Step::Write(offset, data) => registers.write(offset, &data),
                    Step::Read(offset, size) => registers.read(offset, &mut vec![0; size]),
                }
                let slots = registers.slots();
                let unseen = slots.added | slots.wanted;
                prop_assert_eq!(board.is_held(), unseen != 0);
                prop_assert_eq!((unseen | slots.asked) & !slots.present, 0);
                // Each device that the guest released was there, and is told of once.
                let mut ejected = 0;
                for (slot, status) in board.reported() {
                    match status {
                        None => {
                            prop_assert!(before.present & !slots.present & bit(slot) != 0);
                            prop_assert_eq!(ejected & bit(slot), 0);
                            ejected |= bit(slot);
                        }
                        Some(_) => prop_assert!(before.asked & bit(slot) != 0),
                    }
                }
            }
            let present = registers.slots().present;
            let (_, wanted) = look(&registers);
            write(&registers, EJECT, wanted);
            let left = registers.slots();
            prop_assert!(!board.is_held());
            prop_assert_eq!((left.present, left.added, left.wanted), (present & !wanted, 0, 0));
        }
    }
}
