//! The configuration space of an emulated function: what each bit holds, and which of them the
//! guest can change.
//!
//! A register that does something when it is written is its function's to watch: let
//! [`ConfigSpace::write`] take the write, then look at what the register holds.

use crate::bar::BarRegion;
use crate::bars::Bars;
use crate::capability::ConfigRead;
use crate::spec;

/// What a function is, for the driver that looks for it. PCIe 6.0 §7.5.1.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and interface, as Linux writes them: 0x01_08_02 is NVMe.
    pub class: u32,
    /// Subsystem vendor ID. Only endpoints have one in their header.
    pub subsystem_vendor: u16,
    /// Subsystem ID. Only endpoints have one in their header.
    pub subsystem: u16,
}

/// A little-endian register of one, two, four or eight bytes: an unsigned integer.
pub trait Register: Copy + Into<u64> + sealed::Sealed {
    /// How many bytes it has.
    #[doc(hidden)]
    const BYTES: usize;

    /// The register that holds the low bytes of `value`.
    #[doc(hidden)]
    fn truncate(value: u64) -> Self;
}

mod sealed {
    /// Keeps `Register` to the unsigned integers.
    pub trait Sealed {}
}

macro_rules! registers {
    ($($integer:ty),*) => {$(
        impl sealed::Sealed for $integer {}
        impl Register for $integer {
            const BYTES: usize = size_of::<Self>();

            fn truncate(value: u64) -> Self {
                value as Self
            }
        }
    )*};
}
registers!(u8, u16, u32, u64);

/// One byte of configuration space.
#[derive(Clone, Copy, Debug, Default)]
struct Byte {
    value: u8,
    /// What the writable bits hold after reset.
    initial: u8,
    /// Bits that the guest sets and clears.
    writable: u8,
    /// Bits that the guest clears by writing one.
    clearable: u8,
}

/// 4096 bytes of configuration space, with the BARs of a type 0 header.
///
/// Anything may be read or written at any offset and width: what is not there reads zero (beyond
/// 4095, all ones) and takes no writes.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    /// As far as registers are defined; the rest is zeros.
    bytes: Vec<Byte>,
    /// A type 0 header's.
    bars: Option<Bars>,
    last_capability: Option<u16>,
    last_extended: Option<u16>,
    capabilities_end: u16,
    extended_end: u16,
}

impl ConfigSpace {
    /// The configuration space of an endpoint: a type 0 header.
    #[must_use]
    pub fn type0(identity: &Identity, bars: Bars) -> Self {
        let mut space = Self::header(identity, 0);
        space.bars = Some(bars);
        space.define(spec::SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor, 0);
        space.define(spec::SUBSYSTEM_ID, identity.subsystem, 0);
        space
    }

    /// The configuration space of a bridge: a type 1 header, whose bus numbers and windows are not
    /// writable yet.
    #[must_use]
    pub fn type1(identity: &Identity) -> Self {
        Self::header(identity, 1)
    }

    fn header(identity: &Identity, layout: u8) -> Self {
        let mut space = Self {
            bytes: vec![Byte::default(); usize::from(spec::EXTENDED_CONFIG_START)],
            bars: None,
            last_capability: None,
            last_extended: None,
            capabilities_end: spec::HEADER_SIZE,
            extended_end: spec::EXTENDED_CONFIG_START,
        };
        space.define(spec::VENDOR_ID, identity.vendor, 0);
        space.define(spec::DEVICE_ID, identity.device, 0);
        let command = spec::COMMAND_IO
            | spec::COMMAND_MEMORY
            | spec::COMMAND_BUS_MASTER
            | spec::COMMAND_PARITY
            | spec::COMMAND_SERR
            | spec::COMMAND_INTX_DISABLE;
        space.define(spec::COMMAND, 0u16, command);
        space.clear_by_one(spec::STATUS, spec::STATUS_ERRORS);
        space.define(spec::REVISION_ID, identity.revision, 0);
        let [interface, sub, base, _] = identity.class.to_le_bytes();
        for (offset, part) in (spec::CLASS_CODE..).zip([interface, sub, base]) {
            space.define(offset, part, 0);
        }
        space.define(spec::CACHE_LINE_SIZE, 0u8, u8::MAX);
        space.define(spec::HEADER_TYPE, layout, 0);
        space.define(spec::INTERRUPT_LINE, 0u8, u8::MAX);
        space
    }

    /// Gives a register its value at reset and the bits of it that the guest can change.
    pub fn define<R: Register>(&mut self, offset: u16, value: R, writable: R) {
        for ((at, value), writable) in register_bytes(offset, value).zip(low_bytes(writable)) {
            if let Some(byte) = self.byte_mut(at) {
                *byte = Byte {
                    value,
                    initial: value,
                    writable,
                    clearable: 0,
                };
            }
        }
    }

    /// Makes bits of a register such that the guest clears them by writing one (RW1C).
    pub fn clear_by_one<R: Register>(&mut self, offset: u16, bits: R) {
        for (at, bits) in register_bytes(offset, bits) {
            if let Some(byte) = self.byte_mut(at) {
                byte.clearable |= bits;
                byte.writable &= !bits;
            }
        }
    }

    /// What a register holds. Not for BARs: those are in [`bars`](Self::bars).
    #[must_use]
    pub fn get<R: Register>(&self, offset: u16) -> R {
        let mut value = [0; 8];
        for (to, at) in value.iter_mut().zip(offset..=u16::MAX).take(R::BYTES) {
            *to = self.byte(at).value;
        }
        R::truncate(u64::from_le_bytes(value))
    }

    /// Changes a register as the device does: all of its bits. A reset leaves bits that the guest
    /// cannot change as they are.
    pub fn set<R: Register>(&mut self, offset: u16, value: R) {
        for (at, value) in register_bytes(offset, value) {
            if let Some(byte) = self.byte_mut(at) {
                byte.value = value;
            }
        }
    }

    /// Reads as the guest does.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(u8::MAX);
        for (at, byte) in (offset..spec::CONFIG_SPACE_SIZE).zip(data.iter_mut()) {
            *byte = self.byte(at).value;
        }
        if let Some(bars) = &self.bars {
            bars.read(offset, data);
        }
    }

    /// Writes as the guest does: only the bits that it can change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, new) in (offset..spec::CONFIG_SPACE_SIZE).zip(data) {
            if let Some(byte) = self.bytes.get_mut(usize::from(at)) {
                let kept = byte.value & !byte.writable & !(byte.clearable & new);
                byte.value = kept | (new & byte.writable);
            }
        }
        if let Some(bars) = &mut self.bars {
            bars.write(offset, data);
        }
    }

    /// Appends a capability to the header's list and gives its offset. `body` is what follows the
    /// identifier and the next pointer; `writable` the bits of it that the guest can change, short
    /// where the rest is read-only.
    ///
    /// # Panics
    /// The capability does not fit below 0x100: the caller's mistake, never the guest's.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let offset = self.capabilities_end;
        let end = usize::from(offset) + (2 + body.len()).next_multiple_of(4);
        assert!(
            end <= usize::from(spec::EXTENDED_CONFIG_START),
            "capability {id:#x} of {} bytes does not fit at {offset:#x}",
            body.len()
        );
        self.define(offset, id, 0);
        self.define(offset + 1, 0u8, 0);
        self.define_bytes(offset + 2, body, writable);
        match self.last_capability.replace(offset) {
            Some(last) => self.define(last + 1, offset as u8, 0),
            None => {
                self.define(spec::CAPABILITIES_POINTER, offset as u8, 0);
                let status: u16 = self.get(spec::STATUS);
                self.set(spec::STATUS, status | spec::STATUS_CAPABILITIES);
            }
        }
        self.capabilities_end = end as u16;
        offset
    }

    /// Appends an extended capability and gives its offset. `body` is what follows the four bytes of
    /// its header; `writable` as for [`add_capability`](Self::add_capability).
    ///
    /// # Panics
    /// The capability does not fit below 0x1000: the caller's mistake, never the guest's.
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> u16 {
        let offset = self.extended_end;
        let end = usize::from(offset) + (4 + body.len()).next_multiple_of(4);
        assert!(
            end <= usize::from(spec::CONFIG_SPACE_SIZE),
            "extended capability {id:#x} of {} bytes does not fit at {offset:#x}",
            body.len()
        );
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        self.define(offset, header, 0);
        self.define_bytes(offset + 4, body, writable);
        if let Some(last) = self.last_extended.replace(offset) {
            let header: u32 = self.get(last);
            self.define(last, header | u32::from(offset) << 20, 0);
        }
        self.extended_end = end as u16;
        offset
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.get(spec::COMMAND)
    }

    /// The BARs, where the header is of type 0.
    #[must_use]
    pub fn bars(&self) -> Option<&Bars> {
        self.bars.as_ref()
    }

    /// Every BAR, decoding or not: what [`PciFunction::bars`](crate::PciFunction::bars) asks for.
    #[must_use]
    pub fn regions(&self) -> Vec<BarRegion> {
        self.bars.as_ref().map(Bars::regions).unwrap_or_default()
    }

    /// The BARs that decode now: what [`PciFunction::decoded`](crate::PciFunction::decoded) asks
    /// for.
    #[must_use]
    pub fn decoded(&self) -> Vec<BarRegion> {
        let bars = self.bars.as_ref();
        bars.map(|bars| bars.decoded(self.command()))
            .unwrap_or_default()
    }

    /// Puts all that the guest can change back to its value at reset.
    pub fn reset(&mut self) {
        for byte in &mut self.bytes {
            let kept = byte.value & !byte.writable & !byte.clearable;
            byte.value = kept | (byte.initial & byte.writable);
        }
        if let Some(bars) = &mut self.bars {
            bars.reset();
        }
    }

    fn define_bytes(&mut self, offset: u16, body: &[u8], writable: &[u8]) {
        let writable = writable.iter().copied().chain(std::iter::repeat(0));
        for ((at, value), writable) in (offset..).zip(body).zip(writable) {
            self.define(at, *value, writable);
        }
    }

    fn byte(&self, offset: u16) -> Byte {
        self.bytes
            .get(usize::from(offset))
            .copied()
            .unwrap_or_default()
    }

    fn byte_mut(&mut self, offset: u16) -> Option<&mut Byte> {
        if offset >= spec::CONFIG_SPACE_SIZE {
            return None;
        }
        let offset = usize::from(offset);
        if offset >= self.bytes.len() {
            self.bytes.resize(offset + 1, Byte::default());
        }
        self.bytes.get_mut(offset)
    }
}

/// A register's bytes, each with its offset.
fn register_bytes<R: Register>(offset: u16, value: R) -> impl Iterator<Item = (u16, u8)> {
    (offset..=u16::MAX).zip(low_bytes(value))
}

fn low_bytes<R: Register>(value: R) -> impl Iterator<Item = u8> {
    value.into().to_le_bytes().into_iter().take(R::BYTES)
}

impl ConfigRead for ConfigSpace {
    fn read_dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::capability::{capabilities, extended_capabilities};

    fn endpoint() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        ConfigSpace::type0(&identity, Bars::new())
    }

    #[test]
    fn the_header_says_who_it_is() {
        let space = endpoint();
        assert_eq!(space.read_dword(0x00), 0x1042_1af4);
        assert_eq!(space.read_dword(0x08), 0x0180_0001);
        assert_eq!(space.read_dword(0x2c), 0x1100_1af4);
        assert_eq!(space.get::<u8>(0x0e), 0);
        let bridge = ConfigSpace::type1(&Identity::default());
        assert_eq!(bridge.get::<u8>(0x0e), 1);
    }

    #[test]
    fn the_guest_changes_writable_bits_and_clears_others_by_ones() {
        let mut space = endpoint();
        space.define(0x80, 0x00ff_00ffu32, 0x0000_ffff);
        space.clear_by_one(0x82, 0x0f0fu16);
        space.write(0x80, &[0x12, 0x34, 0x05, 0xff]);
        assert_eq!(space.get::<u32>(0x80), 0x00fa_3412);
        space.set(0x82, 0xffffu16);
        space.reset();
        assert_eq!(space.get::<u32>(0x80), 0xf0f0_00ff);
    }

    #[test]
    fn capabilities_are_linked_as_they_are_added() {
        let mut space = endpoint();
        assert_eq!(capabilities(&space), []);
        let first = space.add_capability(0x09, &[5, 1, 2], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        let found: Vec<_> = capabilities(&space).iter().map(|c| c.offset).collect();
        assert_eq!(found, [first, second]);
        space.write(second, &[0xff; 4]);
        assert_eq!(space.read_dword(second), 0xc000_0011);

        let first = space.add_extended_capability(0x0d, 1, &[1, 2, 3, 4], &[0xff]);
        let second = space.add_extended_capability(0x03, 1, &[0; 8], &[]);
        let found = extended_capabilities(&space);
        let found: Vec<_> = found.iter().map(|c| (c.id, c.offset)).collect();
        assert_eq!(found, [(0x0d, first), (0x03, second)]);
        space.write(first + 4, &[9; 4]);
        assert_eq!(space.read_dword(first + 4), 0x0403_0209);
    }

    #[test]
    fn beyond_what_is_defined_are_zeros_and_beyond_the_end_ones() {
        let mut space = endpoint();
        let mut data = [0; 8];
        space.read(0xffc, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        space.define(0xfff, u32::MAX, u32::MAX);
        assert_eq!(space.get::<u32>(0xfff), 0xff);
    }

    proptest! {
        #[test]
        fn what_is_not_writable_never_changes(
            accesses in vec((any::<u16>(), vec(any::<u8>(), 0..12)), 0..60),
        ) {
            let mut space = endpoint();
            let offset = space.add_capability(0x11, &[7; 10], &[]);
            let before: Vec<_> = (0..4096).step_by(4).map(|at| space.read_dword(at)).collect();
            for (at, mut data) in accesses {
                space.write(at, &data);
                space.write(at % 0x60, &data);
                space.read(at, &mut data);
            }
            for (at, before) in (0..4096).step_by(4).zip(before) {
                let writable = match at {
                    0x04 => 0x0547,
                    0x0c | 0x3c => 0xff,
                    _ => 0,
                };
                prop_assert_eq!(space.read_dword(at) & !writable, before);
            }
            prop_assert_eq!(capabilities(&space).len(), 1);
            prop_assert_eq!(capabilities(&space)[0].offset, offset);
        }
    }
}
