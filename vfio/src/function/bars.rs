//! What an access to a BAR reaches: the device, MSI-X's table or its pending bits.

use busway_pci::{BarIndex, BarPart};

use super::interrupts::MsixPart;
use super::{AssignedFunction, State};
use crate::RegionIndex;
use crate::pin::InPlaceOfPin;

/// Who answers for a part of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// The device itself.
    Device,
    /// The table, from this offset.
    Table(u64),
    /// The pending bits, from this offset.
    Pba(u64),
}

impl AssignedFunction {
    pub(super) fn parts_of(&self, bar: BarIndex) -> Vec<BarPart> {
        let here = self
            .parts
            .iter()
            .filter(|part| BarIndex::Bar(part.bar) == bar);
        here.map(|part| BarPart::Memory {
            offset: part.area.offset,
            size: part.area.size,
            host: part.mapping.address(),
        })
        .collect()
    }

    /// Reads as the guest does. What nobody answers for reads ones, and nobody does while the device sleeps: an access
    /// that began before its BARs were unmapped may come that late.
    pub(super) fn read_bar(&self, bar: BarIndex, mut offset: u64, mut data: &mut [u8]) {
        data.fill(u8::MAX);
        let number = match (bar, &self.rom) {
            (BarIndex::Bar(number), _) => number,
            (BarIndex::Rom, Some(rom)) if self.lock().config.is_awake() => {
                return rom.read(&self.name, &*self.io, offset, data);
            }
            (BarIndex::Rom, _) => return,
        };
        while !data.is_empty() {
            let (reach, size) = self.reach(number, offset, data.len());
            let (piece, rest) = data.split_at_mut(size);
            match reach {
                Reach::Device => self.read_device(number, offset, piece),
                Reach::Table(at) => {
                    let State { config, msix, .. } = &*self.lock();
                    if let Some(state) = msix
                        && config.is_awake()
                    {
                        state.msix.table_read(at, piece);
                    }
                }
                Reach::Pba(at) => {
                    self.read_pending(at, piece);
                }
            }
            data = rest;
            offset = offset.saturating_add(size as u64);
        }
    }

    /// Writes as the guest does. The pending bits and the ROM are read-only.
    pub(super) fn write_bar(&self, bar: BarIndex, mut offset: u64, mut data: &[u8]) {
        let BarIndex::Bar(number) = bar else {
            return;
        };
        while !data.is_empty() {
            let (reach, size) = self.reach(number, offset, data.len());
            let (piece, rest) = data.split_at(size);
            match reach {
                Reach::Device => self.write_device(number, offset, piece),
                Reach::Table(at) => {
                    let mut state = self.lock();
                    let State {
                        config, pin, msix, ..
                    } = &mut *state;
                    // Of a vector that is unmasked the kernel writes the table's entry in the device.
                    if let Some(MsixPart { msix, vectors, .. }) = msix
                        && config.is_awake()
                    {
                        let pin = pin.as_mut();
                        let vectors = &mut InPlaceOfPin {
                            vectors,
                            pin,
                            config,
                            pace: &self.pace,
                        };
                        msix.table_write(at, piece, vectors);
                        self.note_interrupts(&state);
                    }
                }
                Reach::Pba(_) => {}
            }
            data = rest;
            offset = offset.saturating_add(size as u64);
        }
        self.pace.pay();
    }

    /// The pending bits: what is held back here, and for vectors that the guest has not unmasked yet
    /// what the device keeps itself.
    fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let Some(MsixPart { msix, .. }) = state.msix.as_ref().filter(|_| state.config.is_awake())
        else {
            return;
        };
        msix.pba_read(offset, data);
        let Some(place) = self.device_pba else {
            return;
        };
        let Some(region) = RegionIndex::bar(place.bar) else {
            return;
        };
        let mut bits = vec![0; data.len()];
        let at = place.area.offset.saturating_add(offset);
        match self.io.region_read(region, at, &mut bits) {
            Ok(()) => msix.pba_add(offset, data, &bits),
            Err(error) => log::debug!("{}: its pending bits: {error}", self.name),
        }
    }

    fn read_device(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let Some(region) = self.awake_region(bar) else {
            return;
        };
        if let Err(error) = self.io.region_read(region, offset, data) {
            log::debug!("{}: BAR {bar}, reading at {offset:#x}: {error}", self.name);
            data.fill(u8::MAX);
        }
    }

    fn write_device(&self, bar: u8, offset: u64, data: &[u8]) {
        let Some(region) = self.awake_region(bar) else {
            return;
        };
        if let Err(error) = self.io.region_write(region, offset, data) {
            log::debug!("{}: BAR {bar}, writing at {offset:#x}: {error}", self.name);
        }
    }

    fn awake_region(&self, bar: u8) -> Option<RegionIndex> {
        let awake = self.lock().config.is_awake();
        RegionIndex::bar(bar).filter(|_| awake)
    }

    /// Who answers for the first of `size` bytes at `offset`, and for how many of them, at least one.
    /// An access that begins in a register and ends in the table is both's.
    fn reach(&self, bar: u8, offset: u64, size: usize) -> (Reach, usize) {
        let mut reach = Reach::Device;
        let mut ends = Vec::with_capacity(2);
        for (location, make) in [
            (&self.pba, Reach::Pba as fn(u64) -> Reach),
            (&self.table, Reach::Table),
        ] {
            let Some(location) = location.filter(|location| location.bar == bar) else {
                continue;
            };
            let start = location.area.offset;
            let end = start.saturating_add(location.area.size);
            if (start..end).contains(&offset) {
                reach = make(offset - start);
            }
            ends.extend([start, end].into_iter().filter(|&end| end > offset));
        }
        let room = ends.into_iter().map(|end| end - offset).min();
        let room = room.and_then(|room| usize::try_from(room).ok());
        (reach, room.map_or(size, |room| room.min(size)))
    }
}
