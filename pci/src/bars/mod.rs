//! The base address registers of a type 0 header: what they hold, and what decodes by that.
//!
//! This is register state only. Nothing is mapped here; the topology looks at what decodes and asks
//! the machine to map it.

use crate::bar::{BarIndex, BarKind, BarRegion};
use crate::spec;

/// A BAR cannot be as described.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// there is no BAR {0}: a function has BARs 0 to 5
    #[error("there is no BAR {0}: a function has BARs 0 to 5")]
    NoSuchBar(u8),
    /// {0} is taken: it is described twice, or it is the upper half of a 64-bit BAR
    #[error("{0} is taken: it is described twice, or it is the upper half of a 64-bit BAR")]
    Taken(BarIndex),
    /// {index} of {size:#x} bytes is impossible: its kind takes powers of two from {smallest:#x} to {largest:#x}
    #[error(
        "{index} of {size:#x} bytes is impossible: its kind takes powers of two from {smallest:#x} to {largest:#x}"
    )]
    Size {
        /// The BAR.
        index: BarIndex,
        /// Its size as described.
        size: u64,
        /// The least that its kind allows.
        smallest: u64,
        /// The most that its kind allows.
        largest: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    /// A power of two.
    size: u64,
    /// What the register holds: always a multiple of `size`.
    address: u64,
}

impl Bar {
    /// The bits that say what it is; they are not address bits and never change.
    fn flags(&self) -> u32 {
        let prefetch = |yes| if yes { spec::BAR_PREFETCHABLE } else { 0 };
        match self.kind {
            BarKind::Io => spec::BAR_IO,
            BarKind::Memory32 { prefetchable } => prefetch(prefetchable),
            BarKind::Memory64 { prefetchable } => spec::BAR_MEMORY_64 | prefetch(prefetchable),
        }
    }

    fn is_64(&self) -> bool {
        matches!(self.kind, BarKind::Memory64 { .. })
    }

    fn set_low(&mut self, value: u32) {
        self.set((self.address & !u64::from(u32::MAX)) | u64::from(value));
    }

    fn set_high(&mut self, value: u32) {
        self.set((self.address & u64::from(u32::MAX)) | u64::from(value) << 32);
    }

    fn set(&mut self, address: u64) {
        let reach = if self.is_64() {
            u64::MAX
        } else {
            u32::MAX.into()
        };
        self.address = address & reach & !(self.size - 1);
    }

    fn region(&self, index: BarIndex) -> BarRegion {
        BarRegion {
            index,
            kind: self.kind,
            address: self.address,
            size: self.size,
        }
    }
}

/// The state of BAR 0 to 5 and the expansion ROM's register.
///
/// An address is always a multiple of its BAR's size, so that `address + (size - 1)` never
/// overflows.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    bars: [Option<Bar>; spec::BAR_COUNT as usize],
    rom: Option<Bar>,
    rom_enabled: bool,
}

impl Bars {
    /// No BARs: every register reads zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a BAR of `size` bytes at address 0. A size of zero means that there is none, and adds
    /// nothing. A ROM's `kind` is always 32-bit memory, whatever is given.
    ///
    /// # Errors
    /// [`BarError`], where such a BAR cannot be.
    pub fn add(&mut self, index: BarIndex, kind: BarKind, size: u64) -> Result<(), BarError> {
        if size == 0 {
            return Ok(());
        }
        let kind = match index {
            BarIndex::Bar(_) => kind,
            BarIndex::Rom => BarKind::Memory32 {
                prefetchable: false,
            },
        };
        let (smallest, largest) = match (index, kind) {
            (BarIndex::Rom, _) => (spec::ROM_MIN, 1 << 31),
            (_, BarKind::Io) => (spec::BAR_IO_MIN, 1 << 31),
            (_, BarKind::Memory32 { .. }) => (spec::BAR_MEMORY_MIN, 1 << 31),
            (_, BarKind::Memory64 { .. }) => (spec::BAR_MEMORY_MIN, 1 << 63),
        };
        if !size.is_power_of_two() || size < smallest || size > largest {
            return Err(BarError::Size {
                index,
                size,
                smallest,
                largest,
            });
        }
        let bar = Bar {
            kind,
            size,
            address: 0,
        };
        let BarIndex::Bar(number) = index else {
            if self.rom.is_some() {
                return Err(BarError::Taken(index));
            }
            self.rom = Some(bar);
            return Ok(());
        };
        let last = if bar.is_64() {
            number.saturating_add(1)
        } else {
            number
        };
        if last >= spec::BAR_COUNT {
            return Err(BarError::NoSuchBar(last));
        }
        for register in number..=last {
            if self.low(register).is_some() || self.high(register).is_some() {
                return Err(BarError::Taken(BarIndex::Bar(register)));
            }
        }
        if let Some(slot) = self.bars.get_mut(usize::from(number)) {
            *slot = Some(bar);
        }
        Ok(())
    }

    /// Reads from configuration space at `offset`: fills those bytes of `data` that fall on a BAR's
    /// or the ROM's register and leaves the others as they are.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (offset..=u16::MAX).zip(data) {
            if let Some(register) = register_at(at) {
                let value = self.register(register).to_le_bytes();
                *byte = value[usize::from(at % 4)];
            }
        }
    }

    /// Writes to configuration space at `offset`: takes those bytes of `data` that fall on a BAR's
    /// or the ROM's register and ignores the others.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, byte) in (offset..=u16::MAX).zip(data) {
            if let Some(register) = register_at(at) {
                let mut value = self.register(register).to_le_bytes();
                value[usize::from(at % 4)] = *byte;
                self.set_register(register, u32::from_le_bytes(value));
            }
        }
    }

    /// Puts a BAR at `address`, rounded down to a multiple of its size. Nothing happens where there
    /// is no such BAR.
    pub fn set_address(&mut self, index: BarIndex, address: u64) {
        let bar = match index {
            BarIndex::Bar(number) => self.bars.get_mut(usize::from(number)),
            BarIndex::Rom => Some(&mut self.rom),
        };
        if let Some(bar) = bar.and_then(Option::as_mut) {
            bar.set(address);
        }
    }

    /// Every BAR, decoding or not, where its register says.
    #[must_use]
    pub fn regions(&self) -> Vec<BarRegion> {
        let bars = (0..).zip(&self.bars);
        bars.filter_map(|(number, bar)| Some(bar.as_ref()?.region(BarIndex::Bar(number))))
            .chain(self.rom.as_ref().map(|rom| rom.region(BarIndex::Rom)))
            .collect()
    }

    /// The BARs that decode under this value of the command register.
    #[must_use]
    pub fn decoded(&self, command: u16) -> Vec<BarRegion> {
        let mut regions = self.regions();
        regions.retain(|region| {
            let enable = match region.kind {
                BarKind::Io => spec::COMMAND_IO,
                BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => spec::COMMAND_MEMORY,
            };
            command & enable != 0 && (region.index != BarIndex::Rom || self.rom_enabled)
        });
        regions
    }

    /// Puts every address back to zero and turns the ROM off.
    pub fn reset(&mut self) {
        for bar in self.bars.iter_mut().chain([&mut self.rom]).flatten() {
            bar.address = 0;
        }
        self.rom_enabled = false;
    }

    /// The BAR whose low half is register `number`.
    fn low(&self, number: u8) -> Option<&Bar> {
        self.bars.get(usize::from(number))?.as_ref()
    }

    /// The 64-bit BAR whose high half is register `number`.
    fn high(&self, number: u8) -> Option<&Bar> {
        self.low(number.checked_sub(1)?).filter(|bar| bar.is_64())
    }

    fn register(&self, index: BarIndex) -> u32 {
        match index {
            BarIndex::Bar(number) => match (self.low(number), self.high(number)) {
                (Some(bar), _) => bar.address as u32 | bar.flags(),
                (None, Some(bar)) => (bar.address >> 32) as u32,
                (None, None) => 0,
            },
            BarIndex::Rom => {
                let enable = if self.rom_enabled {
                    spec::ROM_ENABLE
                } else {
                    0
                };
                self.rom
                    .as_ref()
                    .map_or(0, |rom| rom.address as u32 | enable)
            }
        }
    }

    fn set_register(&mut self, index: BarIndex, value: u32) {
        match index {
            BarIndex::Bar(number) => {
                let high = self.high(number).is_some();
                let number = usize::from(number) - usize::from(high);
                if let Some(bar) = self.bars.get_mut(number).and_then(Option::as_mut) {
                    if high {
                        bar.set_high(value)
                    } else {
                        bar.set_low(value)
                    }
                }
            }
            BarIndex::Rom => {
                if let Some(rom) = &mut self.rom {
                    rom.set_low(value);
                    self.rom_enabled = value & spec::ROM_ENABLE != 0;
                }
            }
        }
    }
}

/// Which register the byte at `offset` belongs to.
fn register_at(offset: u16) -> Option<BarIndex> {
    if (spec::BAR0..spec::BARS_END).contains(&offset) {
        Some(BarIndex::Bar(((offset - spec::BAR0) / 4) as u8))
    } else if (spec::ROM_ADDRESS..spec::ROM_ADDRESS + 4).contains(&offset) {
        Some(BarIndex::Rom)
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
