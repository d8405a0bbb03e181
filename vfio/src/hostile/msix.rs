//! A guest at the MSI-X table, beside a table of our own that says what it has to read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use busway_pci::{BarIndex, MsixLocation, PciFunction, spec};

use crate::fake::FakeDevice;
use crate::{DeviceIo, RegionIndex};

use super::configuration::{check_vectors, messages};
use super::world::{Routes, Story, assign, blank, seen, write};

/// Where [`blank`] has the capability.
const AT: u16 = 0x40;

/// The table as the guest wrote it.
struct Model {
    entries: Vec<[u32; 4]>,
    /// Where it is in the BAR.
    start: u64,
}

impl Model {
    fn at_reset(vectors: u64, start: u64) -> Self {
        Self {
            entries: (0..vectors).map(|_| [0, 0, 0, 1]).collect(),
            start,
        }
    }

    /// PCIe 6.0 §6.1.4: aligned doublewords and quadwords; the address's low two bits are zero, and of
    /// the last doubleword only the mask is there.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = self.start + self.entries.len() as u64 * spec::MSIX_ENTRY_SIZE;
        if !offset.is_multiple_of(4) || data.len() < 4 || offset < self.start {
            return;
        }
        for (at, bytes) in (offset..end).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes(bytes.try_into().unwrap());
            let word = (at - self.start) / 4;
            let entry = &mut self.entries[(word / 4) as usize];
            entry[(word % 4) as usize] = match word % 4 {
                0 => value & !3,
                3 => value & 1,
                _ => value,
            };
        }
    }

    fn check(&self, function: &dyn PciFunction, bar: BarIndex) {
        for (entry, at) in self.entries.iter().zip((self.start..).step_by(16)) {
            for (&expected, at) in entry.iter().zip((at..).step_by(4)) {
                let mut data = [0; 4];
                function.bar_read(bar, at, &mut data);
                assert_eq!(u32::from_le_bytes(data), expected, "the table at {at:#x}");
            }
        }
    }
}

/// Plays one story of the table, the pending bits and the control register.
pub fn msix(bytes: &[u8]) {
    let mut story = Story::new(bytes);
    let mut fake = blank();
    let vectors = match story.byte() {
        0xff => 2048,
        few => u64::from(few % 67) + 1,
    };
    let table = story.dword() & 0x7fff;
    let pba = story.dword() & 0x7fff;
    let size = 1 << (12 + story.byte() % 6);
    fake.set_bar(0, size);
    fake.set_config(usize::from(AT) + 2, &(vectors as u16 - 1).to_le_bytes());
    fake.set_config(usize::from(AT) + 4, &table.to_le_bytes());
    fake.set_config(usize::from(AT) + 8, &pba.to_le_bytes());
    fake.msix.resizable = story.byte() & 1 == 0;
    let most = story.word();
    fake.most_vectors = if most < 256 { most.into() } else { u32::MAX };
    let fake = Arc::new(fake);
    let routes = Routes::new();
    let Some(function) = assign(&fake, &routes) else {
        return;
    };
    if seen(&*function, AT) as u8 != spec::CAP_MSIX
        || seen(&*function, spec::CAPABILITIES_POINTER) as u8 != AT as u8
    {
        // The table or the pending bits were not within a BAR.
        return;
    }
    let location = MsixLocation::from_register(table);
    let bar = BarIndex::Bar(location.bar);
    let start = u64::from(location.offset);
    let pba_location = MsixLocation::from_register(pba);
    let pba_start = u64::from(pba_location.offset);
    let overlap = pba_start < start + vectors * 16 && start < pba_start + vectors.div_ceil(64) * 8;
    // Of a table that its pending bits lie over, the guest sees what can be true.
    let said = vectors;
    let vectors = u64::from(seen(&*function, AT + 2) as u16 & spec::MSIX_CONTROL_SIZE) + 1;
    if overlap && pba_location.bar == location.bar {
        assert!(vectors <= said, "{vectors} vectors of {said}");
    } else {
        assert_eq!(vectors, said);
    }
    let mut model = Model::at_reset(vectors, start);
    while !story.is_over() {
        match story.byte() % 8 {
            0..3 => {
                let within = u64::from(story.word()) % (vectors * 16 + 8);
                let data = story.quadword().to_le_bytes();
                let data = &data[..story.width()];
                // What begins before the table goes to the device or nowhere.
                let offset = model.start + within;
                function.bar_write(bar, offset, data);
                model.write(offset, data);
            }
            3 => {
                // Unmasks, as a driver does.
                let offset = model.start + u64::from(story.word()) % vectors * 16 + 12;
                let mask = u32::from(story.byte() & 1).to_le_bytes();
                function.bar_write(bar, offset, &mask);
                model.write(offset, &mask);
            }
            4 => {
                let control = story.word();
                write(&*function, AT + 2, &control.to_le_bytes());
            }
            5 => {
                let mut data = [0; 8];
                let width = story.width();
                function.bar_read(bar, story.word().into(), &mut data[..width]);
                function.bar_write(bar, pba_start + u64::from(story.byte()), &data[..width]);
                // A write to the pending bits does nothing, but it may reach the table behind them.
                model = reread(model, &*function, bar);
            }
            6 => {
                let change = story.byte();
                routes.exhausted.store(change & 1 == 1, Ordering::Relaxed);
                // Other devices take vectors of the host's, or give them back.
                let taken = u32::from(change >> 1);
                fake.taken_vectors.store(taken, Ordering::Relaxed);
            }
            _ => {
                function.reset();
                model = Model::at_reset(vectors, model.start);
            }
        }
        model.check(&*function, bar);
        check_vectors(&function, &fake);
        let connected = function.summary().vectors_connected;
        let reported = messages(&fake);
        assert_eq!(
            connected, reported,
            "what we connected and what the device was told"
        );
        if !overlap && connected == 0 {
            check_nothing_pending(&*function, &fake, pba, pba_start, vectors);
        }
    }
}

/// Takes over what a write beside the table left in it, where the two overlap.
fn reread(mut model: Model, function: &dyn PciFunction, bar: BarIndex) -> Model {
    for (entry, at) in model.entries.iter_mut().zip((model.start..).step_by(16)) {
        for (word, at) in entry.iter_mut().zip((at..).step_by(4)) {
            let mut data = [0; 4];
            function.bar_read(bar, at, &mut data);
            *word = u32::from_le_bytes(data);
        }
    }
    model
}

/// A device whose vectors have no way to the guest has nothing held back but what it holds back itself,
/// which its own bits say, where its capability has `pba`.
fn check_nothing_pending(
    function: &dyn PciFunction,
    fake: &FakeDevice,
    pba: u32,
    start: u64,
    vectors: u64,
) {
    let table = seen(function, AT + 8);
    let bar = BarIndex::Bar(MsixLocation::from_register(table).bar);
    let device = MsixLocation::from_register(pba);
    for first in (0..vectors).step_by(64) {
        let mut own = [0; 8];
        let region = RegionIndex::bar(device.bar);
        let read = region.map(|region| {
            let at = u64::from(device.offset) + first / 8;
            fake.region_read(region, at, &mut own)
        });
        let own = match read {
            Some(Ok(())) => u64::from_le_bytes(own),
            _ => 0,
        };
        let some = u64::MAX >> (64 - (vectors - first).min(64));
        let mut data = [0; 8];
        function.bar_read(bar, start + first / 8, &mut data);
        let data = u64::from_le_bytes(data);
        assert_eq!(data & !(own & some), 0, "pending bits from vector {first}");
    }
}
