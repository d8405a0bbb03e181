//! Guests that do as they please with what firmware uses: [`firmware`] takes any bytes as accesses to the ports of
//! [`fw_cfg`](super::fw_cfg), transfers by DMA among them, and to a [flash chip](super::pflash), and panics where
//! something does not hold that always has to.
//!
//! The tests at the end of this file play random bytes; `tests/fuzz` what reaches new code.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::fw_cfg::{Content, FwCfg, Items};
use super::pflash::{Backing, Pflash, rom};
use crate::kvm::BusDevice;
use crate::memory::{GuestRam, RamMap, Region, RegionError, RegionListener, Regions};

/// Bytes of the guest's RAM.
const RAM: usize = 128 << 10;
/// Where it keeps the descriptor of a transfer.
const DESCRIPTOR: u64 = 0x1000;
const DESCRIPTOR_SIZE: u64 = 16;
/// What a transfer can be larger than what is left of its item.
const MOST_ZEROS: u64 = 1 << 20;

// Control words of transfers. QEMU docs/specs/fw_cfg.rst, "Guest-side DMA Interface"
const ERROR: u32 = 1 << 0;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

/// The bits of a selector that name an item.
const ITEM_MASK: u16 = 0xbfff;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Bytes of an item that is read from a file.
const FILE_SIZE: u64 = 0x1_8000;

const FLASH: u64 = 0xffc0_0000;
const FLASH_SIZE: usize = 0x4000;
/// The command that has a chip show its array.
const READ_ARRAY: u8 = 0xff;

/// Plays one story. Its first byte says whether the file of the variables can be written.
///
/// # Panics
/// An item reads as something else than it holds, a transfer ends otherwise than its descriptor says, the file of the
/// variables is not what the chip holds, or the guest reaches the chip's memory while the chip shows something else.
pub fn firmware(story: &[u8]) {
    let mut story = Story(story);
    let mut told = Told::new();
    let chip = Chip::new(story.byte() % 4 == 3);
    while !story.0.is_empty() {
        match story.byte() % 10 {
            0 => told.select(story.word()),
            1 => told.read_on(story.byte()),
            2 => told.skip_far(story.dword()),
            3..6 => {
                let (control, item) = (story.byte(), story.word());
                let length = match story.byte() % 4 {
                    0 => story.dword(),
                    _ => story.word().into(),
                };
                let address = match story.byte() % 4 {
                    0 => story.quadword(),
                    _ => story.dword().into(),
                };
                let control = u32::from(item) << 16 | u32::from(control);
                told.transfer(control, length, address);
            }
            6 => told.poke(story.byte(), story.byte(), story.quadword()),
            7 => chip.write(story.word(), &[story.byte()]),
            8 => {
                let (at, data, width) = (story.word(), story.quadword(), story.byte());
                let data = data.to_le_bytes();
                chip.write(at, data.get(..width_of(width)).unwrap_or_default());
            }
            _ => chip.reset(),
        }
    }
    told.check();
    chip.reset();
}

/// Bytes of an access.
pub(crate) fn width_of(byte: u8) -> usize {
    [1, 2, 4, 8].get(usize::from(byte % 4)).map_or(1, |&w| w)
}

/// What is left of the bytes; behind their end are zeros.
pub(crate) struct Story<'a>(pub(crate) &'a [u8]);

impl Story<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (given, rest) = self.0.split_at(N.min(self.0.len()));
        for (to, from) in bytes.iter_mut().zip(given) {
            *to = *from;
        }
        self.0 = rest;
        bytes
    }

    pub(crate) fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    pub(crate) fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn dword(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn quadword(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// The device with items of each kind, and what a guest has to read there.
struct Told {
    device: FwCfg,
    ram: GuestRam,
    known: BTreeMap<u16, Vec<u8>>,
    selected: u16,
    offset: u64,
}

impl Told {
    fn new() -> Self {
        let mut items = Items::default();
        items.item(5, 3_u16);
        let zeros = File::open("/dev/zero").expect("/dev/zero");
        let made = Content::Made {
            size: 600,
            make: Box::new(|| b"made".repeat(100)),
        };
        let contents = [
            ("etc/bytes", Content::Bytes((0..=u8::MAX).collect())),
            ("etc/made", made),
            (
                "etc/file",
                Content::File {
                    file: zeros,
                    offset: 0,
                    size: FILE_SIZE,
                },
            ),
        ];
        for (name, content) in contents {
            items.file(name, content).expect("three short names");
        }
        let map = RamMap::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory");
        let ram = GuestRam::new(map);
        let mut told = Self {
            device: FwCfg::new(items, ram.clone()),
            ram,
            known: BTreeMap::new(),
            selected: 0,
            offset: 0,
        };
        let mut made = b"made".repeat(100);
        made.resize(600, 0);
        told.known = BTreeMap::from([
            (0, b"QEMU".to_vec()),
            (1, 3_u32.to_le_bytes().to_vec()),
            (5, 3_u16.to_le_bytes().to_vec()),
            (FIRST_FILE, (0..=u8::MAX).collect()),
            (FIRST_FILE + 1, made),
            (FIRST_FILE + 2, vec![0; FILE_SIZE as usize]),
        ]);
        // A count, and 64 bytes for each file.
        told.device.write(0, &DIRECTORY.to_le_bytes());
        let directory = (0..4 + 3 * 64).map(|_| told.next()).collect();
        told.known.insert(DIRECTORY, directory);
        told.device.reset();
        told
    }

    fn next(&self) -> u8 {
        let mut data = [0xaa];
        self.device.read(1, &mut data);
        let [byte] = data;
        byte
    }

    fn item(&self) -> &[u8] {
        self.known
            .get(&(self.selected & ITEM_MASK))
            .map_or(&[], Vec::as_slice)
    }

    /// What the selected item holds at `offset`: zero behind its end.
    fn holds(&self, offset: u64) -> u8 {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        self.item().get(at).copied().unwrap_or(0)
    }

    fn select(&mut self, item: u16) {
        self.device.write(0, &item.to_le_bytes());
        (self.selected, self.offset) = (item, 0);
    }

    fn read_on(&mut self, count: u8) {
        for _ in 0..count {
            let byte = self.next();
            assert_eq!(
                byte,
                self.holds(self.offset),
                "item {:#x} at {:#x}",
                self.selected,
                self.offset
            );
            self.offset = self.offset.saturating_add(1);
        }
    }

    /// Skips by DMA, to the end of all numbers if the guest does so often enough.
    fn skip_far(&mut self, length: u32) {
        self.transfer(SKIP, length, u64::MAX);
    }

    /// A transfer, and all that is to come of it.
    fn transfer(&mut self, control: u32, length: u32, address: u64) {
        let mut descriptor = control.to_be_bytes().to_vec();
        descriptor.extend(length.to_be_bytes());
        descriptor.extend(address.to_be_bytes());
        let ram = self.ram.memory();
        let place = GuestAddress(DESCRIPTOR);
        ram.write_slice(&descriptor, place).expect("RAM");
        self.device.write(4, &0_u32.to_be_bytes());
        let low = u32::try_from(DESCRIPTOR).unwrap_or(0);
        self.device.write(8, &low.to_be_bytes());
        let mut word = [0; 4];
        ram.read_slice(&mut word, place).expect("RAM");
        let result = u32::from_be_bytes(word);

        if control & SELECT != 0 {
            (self.selected, self.offset) = ((control >> 16) as u16, 0);
        }
        let length = u64::from(length);
        let left = (self.item().len() as u64).saturating_sub(self.offset);
        let end = address.checked_add(length);
        let in_ram = length == 0 || end.is_some_and(|end| end <= RAM as u64);
        let done = match control {
            _ if control & READ != 0 => length <= left + MOST_ZEROS && in_ram,
            _ => control & WRITE == 0,
        };
        assert_eq!(result, if done { 0 } else { ERROR }, "control {control:#x}");
        if control & READ == 0 {
            if done && control & SKIP != 0 {
                self.offset = self.offset.saturating_add(length);
            }
            return;
        }
        if !done {
            // How far it came is not told.
            self.select(self.selected);
            return;
        }
        let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
        if !buffer.is_empty() {
            let read = ram.read_slice(&mut buffer, GuestAddress(address));
            read.expect("RAM");
        }
        let said = DESCRIPTOR..DESCRIPTOR + DESCRIPTOR_SIZE;
        for (within, byte) in (0_u64..).zip(buffer) {
            let at = address + within;
            let expected = self.holds(self.offset.saturating_add(within));
            assert!(
                byte == expected || said.contains(&at),
                "{byte:#x} at {at:#x}, not {expected:#x}"
            );
        }
        self.offset = self.offset.saturating_add(length);
    }

    /// An access of any kind, after which the guest begins anew.
    fn poke(&mut self, offset: u8, width: u8, data: u64) {
        let (offset, mut data) = (u64::from(offset % 12), data.to_le_bytes());
        if let Some(data) = data.get_mut(..width_of(width)) {
            self.device.write(offset, data);
            self.device.read(offset, data);
        }
        self.select(self.selected);
    }

    /// Every item still holds what it held.
    fn check(&mut self) {
        let items: Vec<u16> = self.known.keys().copied().collect();
        for item in items {
            self.select(item);
            self.read_on(u8::MAX);
        }
    }
}

/// The file of the variables.
#[derive(Debug)]
struct Kept {
    bytes: Mutex<Vec<u8>>,
    full: bool,
}

impl Backing for Kept {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let place = bytes
            .get_mut(at..)
            .and_then(|rest| rest.get_mut(..data.len()));
        place.expect("within the file").copy_from_slice(data);
        Ok(())
    }

    fn sync(&self) {}
}

/// How many of the chip's regions the guest reaches.
#[derive(Debug, Default)]
struct Reached(AtomicI32);

impl RegionListener for Reached {
    fn name(&self) -> &str {
        "a guest"
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        assert!(region.read_only());
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn removed(&self, _region: &Arc<Region>) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Chip {
    flash: Pflash,
    kept: Arc<Kept>,
    reached: Arc<Reached>,
}

impl Chip {
    fn new(full: bool) -> Self {
        let initial = vec![0x5a; FLASH_SIZE];
        let memory = rom(FLASH, &initial).expect("memory");
        let kept = Arc::new(Kept {
            bytes: Mutex::new(initial),
            full,
        });
        let reached = Arc::new(Reached::default());
        let regions = Arc::new(Regions::default());
        regions.listen(reached.clone()).expect("no region yet");
        let flash = Pflash::new(memory, Some(kept.clone()), regions).expect("one region");
        Self {
            flash,
            kept,
            reached,
        }
    }

    fn shows_array(&self) -> bool {
        let regions = self.reached.0.load(Ordering::Relaxed);
        assert!((0..=1).contains(&regions), "{regions} regions");
        regions == 1
    }

    /// A write within the chip or across its end, as the guest may do while it shows the array or not.
    fn write(&self, at: u16, data: &[u8]) {
        let offset = u64::from(at) % (FLASH_SIZE as u64 + 8);
        self.flash.write(offset, data);
        self.flash.read(offset, &mut vec![0; data.len()]);
        if data == [READ_ARRAY] && self.shows_array() {
            self.check();
        }
    }

    /// As after power-on, the array is shown.
    fn reset(&self) {
        self.flash.reset();
        assert!(self.shows_array());
        self.check();
    }

    /// The file is what the chip holds.
    fn check(&self) {
        if self.kept.full {
            return;
        }
        let mut array = vec![0; FLASH_SIZE];
        self.flash.read(0, &mut array);
        let bytes = self.kept.bytes.lock();
        let bytes = bytes.unwrap_or_else(PoisonError::into_inner);
        assert!(array == *bytes, "the file is not what the chip holds");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_guest_finds_fw_cfg_or_the_flash_chip_otherwise_than_they_are(
            story in proptest::collection::vec(any::<u8>(), 0..1500)
        ) {
            firmware(&story);
        }
    }

    #[test]
    fn transfers_over_their_own_descriptor_and_of_nothing_are_done() {
        let mut told = Told::new();
        told.select(FIRST_FILE);
        told.transfer(READ, 256, DESCRIPTOR - 8);
        told.transfer(READ | SELECT | u32::from(FIRST_FILE + 2) << 16, 0x1_8000, 0);
        told.transfer(READ, 1 << 20, 0);
        told.transfer(WRITE, 4, 0);
        told.transfer(READ, 0, u64::MAX);
        told.check();
    }
}
