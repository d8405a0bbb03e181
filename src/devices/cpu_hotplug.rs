//! What tells a guest of processors that come and leave: the registers behind the methods of the DSDT's processor
//! devices, and the interrupt of a generic event device (ACPI 6.5 §5.6.9).
//!
//! | offset | register | |
//! |---|---|---|
//! | 0 | event | read: the first that the guest has not seen, a processor in bits 0 to 15 and a notification in 16 to 31; 0 where there is none. Written: the same, which the guest has seen |
//! | 4 | eject | written: a processor that the guest has released |
//! | 8 | select | written: the processor that `present` is about |
//! | 12 | present | read: 1 where the selected processor is there |
//! | 16 | outcome | written: what became of a notification: processor in bits 0 to 7, status in 8 to 15, notification in 16 to 31 |
//!
//! The interrupt is held for as long as something is unseen, so that a guest whose driver comes later misses nothing.
//! The first processor starts the guest and never leaves it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::InterruptLevel;

use super::pci_hotplug::EJECT_REQUEST;
use crate::kvm::BusDevice;

/// Offset of the events.
pub const EVENT: u64 = 0;
/// Offset of what the guest releases.
pub const EJECT: u64 = 4;
/// Offset of the processor that the next is about.
pub const SELECT: u64 = 8;
/// Offset of whether it is there.
pub const PRESENT: u64 = 12;
/// Offset of what became of a notification.
pub const OUTCOME: u64 = 16;
/// Bytes of all of them.
pub const SIZE: u64 = 20;

/// The notification that a device may have come. ACPI 6.5 §5.6.6, table 5.173.
pub const DEVICE_CHECK: u8 = 1;

/// Status 0 of `_OST` is success, and 0x84 that the ejection is under way. ACPI 6.5 §6.3.5, tables 6.52 and 6.53.
const STATUS_SUCCESS: u8 = 0;
const STATUS_IN_PROGRESS: u8 = 0x84;

/// Who hears what a guest does with its processors. Called on a vCPU's thread, without any lock of the registers'.
pub trait CpuKeeper: Send + Sync + std::fmt::Debug {
    /// The guest has released a processor, which may still be executing.
    fn ejected(&self, cpu: u8);

    /// The guest does not release a processor, for the reason that `status` is of `_OST`.
    fn refused(&self, cpu: u8, status: u8);
}

/// Some of a VM's processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSet([u64; 4]);

impl CpuSet {
    /// The first `count` of them.
    #[must_use]
    pub fn first(count: u8) -> Self {
        (0..count).collect()
    }

    /// Whether `cpu` is among them.
    #[must_use]
    pub fn has(&self, cpu: u8) -> bool {
        let (word, bit) = Self::place(cpu);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Puts `cpu` among them.
    pub fn insert(&mut self, cpu: u8) {
        let (word, bit) = Self::place(cpu);
        if let Some(word) = self.0.get_mut(word) {
            *word |= bit;
        }
    }

    /// Takes `cpu` from them, and says whether it was among them.
    pub fn remove(&mut self, cpu: u8) -> bool {
        let had = self.has(cpu);
        let (word, bit) = Self::place(cpu);
        if let Some(word) = self.0.get_mut(word) {
            *word &= !bit;
        }
        had
    }

    /// Their numbers, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u8> {
        let set = *self;
        (0..=u8::MAX).filter(move |cpu| set.has(*cpu))
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u16 {
        let bits: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        // 256 at most.
        bits as u16
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    const fn place(cpu: u8) -> (usize, u64) {
        (cpu as usize / 64, 1 << (cpu % 64))
    }
}

impl FromIterator<u8> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u8>>(cpus: I) -> Self {
        let mut set = Self::default();
        cpus.into_iter().for_each(|cpu| set.insert(cpu));
        set
    }
}

/// The registers.
#[derive(Debug)]
pub struct CpuHotplug {
    state: Mutex<Processors>,
    line: Arc<dyn InterruptLevel>,
    keeper: Arc<dyn CpuKeeper>,
}

/// What the registers hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processors {
    /// Those that are there.
    pub present: CpuSet,
    /// Those that have come, of which the guest does not know.
    pub added: CpuSet,
    /// Those that are wanted back, of which the guest does not know.
    pub wanted: CpuSet,
    /// Those that are wanted back, until the guest says what becomes of it.
    pub asked: CpuSet,
    selected: u8,
}

impl Processors {
    /// The first event that the guest has not seen.
    fn event(&self) -> u32 {
        let first = |set: &CpuSet, notification: u8| {
            let cpu = set.iter().next()?;
            Some(u32::from(cpu) | u32::from(notification) << 16)
        };
        first(&self.added, DEVICE_CHECK)
            .or_else(|| first(&self.wanted, EJECT_REQUEST))
            .unwrap_or(0)
    }

    fn forget(&mut self, cpu: u8) {
        for set in [&mut self.added, &mut self.wanted, &mut self.asked] {
            set.remove(cpu);
        }
    }
}

impl CpuHotplug {
    /// A guest that starts with the first `count` processors.
    #[must_use]
    pub fn new(count: u8, line: Arc<dyn InterruptLevel>, keeper: Arc<dyn CpuKeeper>) -> Self {
        Self {
            state: Mutex::new(Processors {
                present: CpuSet::first(count),
                ..Processors::default()
            }),
            line,
            keeper,
        }
    }

    /// A processor has come: the guest is told.
    pub fn plugged(&self, cpu: u8) {
        self.change(|state| {
            state.present.insert(cpu);
            state.added.insert(cpu);
        });
    }

    /// Asks the guest for a processor.
    pub fn ask(&self, cpu: u8) {
        self.change(|state| {
            if cpu != 0 && state.present.has(cpu) {
                state.wanted.insert(cpu);
                state.asked.insert(cpu);
            }
        });
    }

    /// Takes back what was asked. A guest that has seen it may still release the processor.
    pub fn withdraw(&self, cpu: u8) {
        self.change(|state| {
            state.wanted.remove(cpu);
            state.asked.remove(cpu);
        });
    }

    /// A processor is gone without the guest's doing.
    pub fn gone(&self, cpu: u8) {
        self.change(|state| {
            state.present.remove(cpu);
            state.forget(cpu);
        });
    }

    /// The guest starts anew, and finds what is there: it is to be told of nothing.
    pub fn reset(&self) {
        self.change(|state| {
            *state = Processors {
                present: state.present,
                ..Processors::default()
            };
        });
    }

    /// What the registers hold.
    #[must_use]
    pub fn processors(&self) -> Processors {
        *self.lock()
    }

    fn change(&self, change: impl FnOnce(&mut Processors)) {
        let mut state = self.lock();
        change(&mut state);
        // With the lock held, so that the line says what the registers do.
        self.line.set(state.event() != 0);
    }

    /// The guest has seen an event.
    fn seen(&self, value: u32) {
        let [cpu, 0, notification, 0] = value.to_le_bytes() else {
            return;
        };
        self.change(|state| {
            match notification {
                DEVICE_CHECK => state.added.remove(cpu),
                EJECT_REQUEST => state.wanted.remove(cpu),
                _ => false,
            };
        });
    }

    /// The guest says that it has released a processor. One that is not there, and the first, say nothing.
    fn eject(&self, value: u32) {
        let Ok(cpu @ 1..) = u8::try_from(value) else {
            return;
        };
        let mut ejected = false;
        self.change(|state| {
            ejected = state.present.remove(cpu);
            state.forget(cpu);
        });
        if ejected {
            self.keeper.ejected(cpu);
        }
    }

    /// The guest says what became of a notification, by `_OST`.
    fn outcome(&self, value: u32) {
        let [cpu, status, notification, beyond] = value.to_le_bytes();
        if (notification, beyond) != (EJECT_REQUEST, 0)
            || matches!(status, STATUS_SUCCESS | STATUS_IN_PROGRESS)
        {
            return;
        }
        let mut asked = false;
        self.change(|state| {
            asked = state.asked.remove(cpu);
            state.wanted.remove(cpu);
        });
        // Once for each time that it was asked.
        if asked {
            self.keeper.refused(cpu, status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Processors> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for CpuHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.processors();
        let present = u32::from(state.present.has(state.selected));
        let registers = [state.event(), 0, state.selected.into(), present, 0];
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
            EVENT => self.seen(value),
            EJECT => self.eject(value),
            SELECT => self.lock().selected = value as u8,
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

    impl CpuKeeper for Board {
        fn ejected(&self, cpu: u8) {
            self.reported.lock().unwrap().push((cpu, None));
        }

        fn refused(&self, cpu: u8, status: u8) {
            self.reported.lock().unwrap().push((cpu, Some(status)));
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

    fn registers(count: u8) -> (Arc<Board>, CpuHotplug) {
        let board = Arc::new(Board::default());
        (board.clone(), CpuHotplug::new(count, board.clone(), board))
    }

    fn read(registers: &CpuHotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(registers: &CpuHotplug, offset: u64, value: u32) {
        registers.write(offset, &value.to_le_bytes());
    }

    /// What the DSDT's method does at an interrupt: it takes what is unseen, one after another.
    fn look(registers: &CpuHotplug) -> Vec<(u32, u32)> {
        let mut seen = Vec::new();
        loop {
            let event = read(registers, EVENT);
            if event == 0 {
                return seen;
            }
            write(registers, EVENT, event);
            seen.push((event & 0xffff, event >> 16));
            assert!(seen.len() <= 512, "each event is seen once");
        }
    }

    fn is_present(registers: &CpuHotplug, cpu: u32) -> bool {
        write(registers, SELECT, cpu);
        read(registers, PRESENT) == 1
    }

    #[test]
    fn a_processor_that_comes_and_is_asked_for_holds_the_interrupt_until_the_guest_has_seen_it() {
        let (board, registers) = registers(2);
        assert!(is_present(&registers, 1) && !is_present(&registers, 2));
        registers.plugged(2);
        registers.plugged(254);
        assert!(board.is_held() && is_present(&registers, 254));
        assert_eq!(look(&registers), [(2, 1), (254, 1)]);
        assert!(!board.is_held());
        registers.ask(2);
        assert!(board.is_held());
        // What comes between reading and writing is not lost.
        let event = read(&registers, EVENT);
        registers.plugged(3);
        write(&registers, EVENT, event);
        assert!(board.is_held());
        assert_eq!(look(&registers), [(3, 1)]);
        write(&registers, EJECT, 2);
        assert_eq!(board.reported(), [(2, None)]);
        assert!(!is_present(&registers, 2));
        // Once; and nothing of what is not there, of the first, or beyond all.
        for cpu in [2, 0, 100, 0x102, u32::MAX] {
            write(&registers, EJECT, cpu);
        }
        assert_eq!(board.reported(), []);
        registers.ask(0);
        assert!(!board.is_held(), "the first is asked for by nobody");
    }

    #[test]
    fn a_guest_that_refuses_says_so_once_for_each_time_it_is_asked() {
        let (board, registers) = registers(3);
        let outcome =
            |cpu: u32, notification: u32, status: u32| cpu | status << 8 | notification << 16;
        let busy = outcome(2, 3, 0x82);
        write(&registers, OUTCOME, busy);
        assert_eq!(board.reported(), [], "nobody has asked");
        registers.ask(2);
        for value in [
            outcome(2, 1, 0x82),
            outcome(2, 3, 0),
            outcome(2, 3, 0x84),
            outcome(1, 3, 0x82),
        ] {
            write(&registers, OUTCOME, value);
            assert_eq!(board.reported(), [], "{value:#x}");
        }
        write(&registers, OUTCOME, busy);
        write(&registers, OUTCOME, busy);
        assert_eq!(board.reported(), [(2, Some(0x82))]);
        assert!(!board.is_held() && is_present(&registers, 2));
        registers.ask(2);
        registers.withdraw(2);
        assert!(!board.is_held());
    }

    #[test]
    fn a_guest_that_starts_anew_is_told_of_nothing_and_finds_what_is_there() {
        let (board, registers) = registers(1);
        registers.plugged(1);
        registers.plugged(2);
        registers.ask(1);
        registers.gone(1);
        registers.reset();
        assert!(!board.is_held());
        assert_eq!(
            registers.processors().present.iter().collect::<Vec<_>>(),
            [0, 2]
        );
    }

    proptest! {
        #[test]
        fn whatever_is_done_no_event_is_of_one_that_is_absent_and_a_guest_that_looks_settles_all(
            steps in proptest::collection::vec((0_u8..8, any::<u8>(), any::<u32>(), 0_u64..24), 0..64)
        ) {
            let (board, registers) = registers(4);
            for (step, cpu, value, offset) in steps {
                let before = registers.processors();
                match step {
                    0 => registers.plugged(cpu),
                    1 => registers.ask(cpu),
                    2 => registers.withdraw(cpu),
                    3 if cpu != 0 => registers.gone(cpu),
                    4 => registers.reset(),
                    5 => write(&registers, offset, value),
                    6 => write(&registers, offset & !3, u32::from(cpu) | 3 << 16 | (value & 0xff00)),
                    _ => registers.write(offset, &value.to_le_bytes()[..usize::from(cpu % 5)]),
                }
                let now = registers.processors();
                prop_assert!(now.present.has(0));
                for set in [now.added, now.wanted, now.asked] {
                    prop_assert!(set.iter().all(|cpu| now.present.has(cpu)));
                }
                prop_assert_eq!(board.is_held(), !(now.added.is_empty() && now.wanted.is_empty()));
                for (cpu, status) in board.reported() {
                    match status {
                        None => prop_assert!(before.present.has(cpu) && !now.present.has(cpu)),
                        Some(_) => prop_assert!(before.asked.has(cpu)),
                    }
                }
            }
            look(&registers);
            prop_assert!(!board.is_held());
        }
    }
}
