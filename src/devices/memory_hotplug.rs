//! What tells a guest of RAM that comes by ACPI: the registers behind the methods of the DSDT's memory devices (ACPI 6.5
//! §9.11), and the interrupt of a generic event device (§5.6.9).
//!
//! | offset | register | |
//! |---|---|---|
//! | 0 | added | read: devices whose RAM has come since. Written: bits that the guest has seen |
//! | 4 | present | read: devices that have RAM |
//! | 8 | select | written: the device that the next four are about |
//! | 12, 16 | start | read: the first address of its RAM, the lower half first |
//! | 20, 24 | size | read: bytes of its RAM, the lower half first; 0 where it has none |
//! | 28 | outcome | written: what became of a notification: device in bits 0 to 4, status in 8 to 15, notification in 16 to 31 |
//!
//! Bit n is of device n. The interrupt is held for as long as something is unseen, so that a guest whose driver comes later
//! misses nothing. RAM that has come stays: no register gives it back.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::InterruptLevel;

use super::cpu_hotplug::DEVICE_CHECK;
use crate::kvm::BusDevice;

/// Offset of the devices whose RAM has come.
pub const ADDED: u64 = 0;
/// Offset of the devices that have RAM.
pub const PRESENT: u64 = 4;
/// Offset of the device that the next are about.
pub const SELECT: u64 = 8;
/// Offset of where its RAM begins.
pub const START: u64 = 12;
/// Offset of how much RAM it has.
pub const LENGTH: u64 = 20;
/// Offset of what became of a notification.
pub const OUTCOME: u64 = 28;
/// Bytes of all of them.
pub const SIZE: u64 = 32;

/// How many memory devices there are: how often RAM can come between two starts of a guest.
pub const DEVICES: u8 = 32;

/// A device's bits of the registers.
const DEVICE_BITS: u32 = 0x1f;
/// Status 0x80 of `_OST` is that the insertion is under way. ACPI 6.5 §6.3.5, table 6.54.
const STATUS_IN_PROGRESS: u8 = 0x80;

/// Who hears what a guest makes of RAM that has come. Called on a vCPU's thread, without any lock of the registers'.
pub trait MemoryKeeper: Send + Sync + std::fmt::Debug {
    /// The guest says of the RAM of memory device `device` what it made of it: 0 that it uses it, and else why it does not,
    /// by the status of `_OST`.
    fn reported(&self, device: u8, status: u8);
}

/// The registers.
#[derive(Debug)]
pub struct MemoryHotplug {
    state: Mutex<MemoryDevices>,
    line: Arc<dyn InterruptLevel>,
    keeper: Arc<dyn MemoryKeeper>,
}

/// What the registers hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct MemoryDevices {
    /// The guest's addresses that the RAM of each is at: as many as have some.
    ranges: Vec<Range<u64>>,
    /// Bit n: the RAM of device n has come, and the guest does not know of it.
    added: u32,
    /// Bit n: the guest was told of it, until it says what it made of it.
    told: u32,
    selected: u8,
}

impl MemoryDevices {
    fn present(&self) -> u32 {
        let count = u32::try_from(self.ranges.len()).unwrap_or(u32::MAX);
        let beyond = u32::MAX.checked_shl(count).unwrap_or(0);
        !beyond
    }

    /// Where the RAM of the selected device is.
    fn selected(&self) -> Range<u64> {
        let range = self.ranges.get(usize::from(self.selected));
        range.cloned().unwrap_or(0..0)
    }
}

impl MemoryHotplug {
    /// Devices without RAM.
    #[must_use]
    pub fn new(line: Arc<dyn InterruptLevel>, keeper: Arc<dyn MemoryKeeper>) -> Self {
        Self {
            state: Mutex::default(),
            line,
            keeper,
        }
    }

    /// Whether there is a device for RAM that is to come.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.lock().ranges.len() < usize::from(DEVICES)
    }

    /// RAM has come at the guest's addresses in `range`: the guest is told. Nothing happens where no device is left
    /// ([`has_room`](Self::has_room)).
    pub fn plugged(&self, range: Range<u64>) {
        self.change(|state| {
            if state.ranges.len() < usize::from(DEVICES) {
                let before = state.present();
                state.ranges.push(range);
                let new = state.present() & !before;
                state.added |= new;
                state.told |= new;
            }
        });
    }

    /// The guest starts anew with all RAM that has come, at `range`, as one device's: it is to be told of nothing. Where
    /// the range is empty no device has any.
    pub fn reset(&self, range: Range<u64>) {
        self.change(|state| {
            *state = MemoryDevices {
                ranges: Some(range)
                    .filter(|range| !range.is_empty())
                    .into_iter()
                    .collect(),
                ..MemoryDevices::default()
            };
        });
    }

    fn change(&self, change: impl FnOnce(&mut MemoryDevices)) {
        let mut state = self.lock();
        change(&mut state);
        // With the lock held, so that the line says what the registers do.
        self.line.set(state.added != 0);
    }

    /// The guest says what became of a notification, by `_OST`.
    fn outcome(&self, value: u32) {
        let [_, status, notification, beyond] = value.to_le_bytes();
        let device = (value & DEVICE_BITS) as u8;
        if (notification, beyond) != (DEVICE_CHECK, 0) || status == STATUS_IN_PROGRESS {
            return;
        }
        let bit = 1 << device;
        let mut told = false;
        self.change(|state| {
            told = state.told & bit != 0;
            state.told &= !bit;
        });
        // Once for each time that it was told.
        if told {
            self.keeper.reported(device, status);
        }
    }

    fn lock(&self) -> MutexGuard<'_, MemoryDevices> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for MemoryHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (added, present, selected, range) = {
            let state = self.lock();
            let range = state.selected();
            (state.added, state.present(), state.selected, range)
        };
        let first = [added, present, selected.into()];
        let numbers = [range.start, range.end.saturating_sub(range.start)];
        let bytes = first.into_iter().flat_map(u32::to_le_bytes);
        let bytes = bytes.chain(numbers.into_iter().flat_map(u64::to_le_bytes));
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
            ADDED => self.change(|state| state.added &= !value),
            SELECT => self.lock().selected = (value & DEVICE_BITS) as u8,
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

    const GIB: u64 = 1 << 30;

    /// The line, and what the keeper was told.
    #[derive(Debug, Default)]
    struct Board {
        line: AtomicBool,
        reported: Mutex<Vec<(u8, u8)>>,
    }

    impl InterruptLevel for Board {
        fn set(&self, asserted: bool) {
            self.line.store(asserted, Ordering::Relaxed);
        }
    }

    impl MemoryKeeper for Board {
        fn reported(&self, device: u8, status: u8) {
            self.reported.lock().unwrap().push((device, status));
        }
    }

    impl Board {
        fn is_held(&self) -> bool {
            self.line.load(Ordering::Relaxed)
        }

        fn reported(&self) -> Vec<(u8, u8)> {
            std::mem::take(&mut self.reported.lock().unwrap())
        }
    }

    fn registers() -> (Arc<Board>, MemoryHotplug) {
        let board = Arc::new(Board::default());
        (board.clone(), MemoryHotplug::new(board.clone(), board))
    }

    fn read(registers: &MemoryHotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(registers: &MemoryHotplug, offset: u64, value: u32) {
        registers.write(offset, &value.to_le_bytes());
    }

    /// What the DSDT's method does at an interrupt.
    fn look(registers: &MemoryHotplug) -> u32 {
        let added = read(registers, ADDED);
        write(registers, ADDED, added);
        added
    }

    /// What `_CRS` of a device says, as its start and its size.
    fn resources(registers: &MemoryHotplug, device: u32) -> (u64, u64) {
        write(registers, SELECT, device);
        let half = |offset| u64::from(read(registers, offset));
        let pair = |offset| half(offset) | half(offset + 4) << 32;
        (pair(START), pair(LENGTH))
    }

    #[test]
    fn ram_that_comes_holds_the_interrupt_until_the_guest_has_seen_it_and_says_where_it_is() {
        let (board, registers) = registers();
        assert_eq!((read(&registers, PRESENT), board.is_held()), (0, false));
        registers.plugged(6 * GIB..7 * GIB);
        assert!(board.is_held());
        // What comes between reading and writing is not lost.
        let added = read(&registers, ADDED);
        registers.plugged(7 * GIB..12 * GIB);
        write(&registers, ADDED, added);
        assert!(board.is_held());
        assert_eq!((look(&registers), board.is_held()), (2, false));
        assert_eq!(read(&registers, PRESENT), 3);
        assert_eq!(resources(&registers, 0), (6 * GIB, GIB));
        assert_eq!(resources(&registers, 1), (7 * GIB, 5 * GIB));
        assert_eq!(resources(&registers, 2), (0, 0));
    }

    #[test]
    fn a_guest_says_once_what_it_made_of_what_it_was_told_of() {
        let (board, registers) = registers();
        let outcome = |device: u32, notification: u32, status: u32| {
            write(
                &registers,
                OUTCOME,
                device | status << 8 | notification << 16,
            );
            board.reported()
        };
        assert_eq!(outcome(0, 1, 0), [], "nothing has come");
        registers.plugged(GIB..2 * GIB);
        registers.plugged(2 * GIB..3 * GIB);
        assert_eq!(outcome(0, 3, 0), [], "of an ejection");
        assert_eq!(outcome(0, 1, 0x80), [], "under way");
        assert_eq!(outcome(0, 1, 0), [(0, 0)]);
        assert_eq!(outcome(1, 1, 0x81), [(1, 0x81)]);
        for device in 0..3 {
            assert_eq!(outcome(device, 1, 0x81), [], "once");
        }
    }

    #[test]
    fn a_guest_that_starts_anew_finds_all_of_it_in_one_device_and_the_others_free() {
        let (board, registers) = registers();
        for device in 0..u64::from(DEVICES) {
            assert!(registers.has_room());
            registers.plugged(device * GIB..(device + 1) * GIB);
        }
        assert!(!registers.has_room());
        registers.plugged(40 * GIB..41 * GIB);
        assert_eq!(read(&registers, PRESENT), u32::MAX);
        assert_eq!(resources(&registers, 31), (31 * GIB, GIB));
        registers.reset(0..32 * GIB);
        assert!(!board.is_held() && registers.has_room());
        assert_eq!((look(&registers), read(&registers, PRESENT)), (0, 1));
        assert_eq!(resources(&registers, 0), (0, 32 * GIB));
        registers.reset(0..0);
        assert_eq!(read(&registers, PRESENT), 0);
    }

    proptest! {
        #[test]
        fn whatever_is_done_ram_stays_where_it_came_and_a_guest_that_looks_settles_all(
            steps in proptest::collection::vec((0_u8..6, any::<u8>(), any::<u32>(), 0_u64..40), 0..64)
        ) {
            let (board, registers) = registers();
            let mut model: Vec<(u64, u64)> = Vec::new();
            let mut told = 0_u32;
            for (step, byte, value, offset) in steps {
                match step {
                    0 => {
                        let start = u64::from(value) << 27;
                        let size = (1 + u64::from(byte)) << 27;
                        registers.plugged(start..start + size);
                        if model.len() < usize::from(DEVICES) {
                            told |= 1 << model.len();
                            model.push((start, size));
                        }
                    }
                    1 if byte < 16 => {
                        registers.reset(GIB..2 * GIB);
                        (model, told) = (vec![(GIB, GIB)], 0);
                    }
                    2 => write(&registers, offset, value),
                    3 => write(&registers, OUTCOME, u32::from(byte & 0x1f) | 1 << 16 | (value & 0xff00)),
                    4 => {
                        let mut data = [0; 8];
                        registers.read(u64::from(value), &mut data[..usize::from(byte % 9)]);
                    }
                    _ => registers.write(offset, &value.to_le_bytes()[..usize::from(byte % 5)]),
                }
                for (device, _) in board.reported() {
                    prop_assert!(told >> device & 1 != 0, "nobody was told of {}", device);
                    told &= !(1 << device);
                }
                let present = read(&registers, PRESENT);
                prop_assert_eq!(present.count_ones() as usize, model.len());
                prop_assert_eq!(read(&registers, ADDED) & !present, 0);
                prop_assert_eq!(board.is_held(), read(&registers, ADDED) != 0);
                for (device, range) in (0..).zip(&model) {
                    prop_assert_eq!(resources(&registers, device), *range);
                }
            }
            look(&registers);
            prop_assert!(!board.is_held());
        }
    }
}
