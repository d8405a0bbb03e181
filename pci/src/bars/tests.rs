use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fake::{MEMORY_32, MEMORY_64, PREFETCHABLE_64};

fn dword(bars: &Bars, offset: u16) -> u32 {
    let mut data = [0xee; 4];
    bars.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn with(bars: &[(BarIndex, BarKind, u64)]) -> Bars {
    let mut state = Bars::new();
    for &(index, kind, size) in bars {
        state.add(index, kind, size).unwrap();
    }
    state
}

#[test]
fn all_ones_read_back_as_size_and_kind() {
    let mut bars = with(&[
        (BarIndex::Bar(0), MEMORY_32, 0x1000),
        (BarIndex::Bar(1), BarKind::Io, 0x20),
        (BarIndex::Bar(2), PREFETCHABLE_64, 1 << 36),
        (BarIndex::Rom, MEMORY_32, 0x1_0000),
    ]);
    for offset in (0x10..0x34).step_by(4) {
        bars.write(offset, &[0xff; 4]);
    }
    let found: Vec<_> = (0x10..0x28).step_by(4).map(|at| dword(&bars, at)).collect();
    assert_eq!(
        found,
        [0xffff_f000, 0xffff_ffe1, 0x0000_000c, 0xffff_fff0, 0, 0]
    );
    assert_eq!(dword(&bars, 0x30), 0xffff_0001);
    assert_eq!(dword(&bars, 0x28), 0xeeee_eeee, "not a BAR's register");
}

#[test]
fn the_largest_bar_sizes_without_overflow() {
    let mut bars = with(&[(BarIndex::Bar(4), MEMORY_64, 1 << 63)]);
    bars.write(0x20, &[0xff; 8]);
    assert_eq!((dword(&bars, 0x20), dword(&bars, 0x24)), (4, 0x8000_0000));
    let [region] = bars.regions()[..] else {
        panic!("one region")
    };
    assert_eq!(region.address.checked_add(region.size - 1), Some(u64::MAX));
}

#[test]
fn what_decodes_is_what_its_enable_bits_say() {
    let mut bars = with(&[
        (BarIndex::Bar(0), BarKind::Io, 0x20),
        (BarIndex::Bar(1), MEMORY_32, 0x1000),
        (BarIndex::Rom, MEMORY_32, 0x800),
    ]);
    let decoded = |bars: &Bars, command| -> Vec<_> {
        let regions = bars.decoded(command).into_iter();
        regions.map(|region| region.index).collect()
    };
    assert_eq!(decoded(&bars, 0), []);
    assert_eq!(decoded(&bars, spec::COMMAND_IO), [BarIndex::Bar(0)]);
    assert_eq!(decoded(&bars, spec::COMMAND_MEMORY), [BarIndex::Bar(1)]);
    bars.write(0x30, &[1]);
    assert_eq!(
        decoded(&bars, spec::COMMAND_MEMORY),
        [BarIndex::Bar(1), BarIndex::Rom]
    );
    bars.reset();
    assert_eq!(decoded(&bars, spec::COMMAND_MEMORY), [BarIndex::Bar(1)]);
}

#[test]
fn what_cannot_be_is_refused_and_a_size_of_zero_is_no_bar() {
    let mut bars = with(&[
        (BarIndex::Bar(0), MEMORY_64, 0x1000),
        (BarIndex::Bar(3), MEMORY_32, 0),
        (BarIndex::Bar(3), MEMORY_32, 0x10),
    ]);
    let one = BarIndex::Bar(1);
    assert_eq!(bars.add(one, MEMORY_32, 0x10), Err(BarError::Taken(one)));
    assert_eq!(
        bars.add(BarIndex::Bar(2), MEMORY_64, 0x10),
        Err(BarError::Taken(BarIndex::Bar(3)))
    );
    assert_eq!(
        bars.add(BarIndex::Bar(5), MEMORY_64, 0x10),
        Err(BarError::NoSuchBar(6))
    );
    assert_eq!(
        bars.add(BarIndex::Bar(255), MEMORY_64, 0x10),
        Err(BarError::NoSuchBar(255))
    );
    for (kind, size) in [
        (MEMORY_32, 8),
        (MEMORY_32, 0x1800),
        (MEMORY_32, 1 << 32),
        (BarKind::Io, 2),
    ] {
        let refused = bars.add(BarIndex::Bar(4), kind, size);
        assert!(matches!(refused, Err(BarError::Size { .. })), "{size:#x}");
    }
    assert_eq!(bars.regions().len(), 2);
}

fn kind() -> impl Strategy<Value = BarKind> {
    (0..3u8, any::<bool>()).prop_map(|(kind, prefetchable)| match kind {
        0 => BarKind::Io,
        1 => BarKind::Memory32 { prefetchable },
        _ => BarKind::Memory64 { prefetchable },
    })
}

proptest! {
    /// The model: a register is its old bytes with the new ones laid over, less the bits that a BAR
    /// of this size and kind does not have, and its flags.
    #[test]
    fn registers_hold_what_was_written_in_the_bits_they_have(
        kind in kind(),
        log2 in 4..64u32,
        writes in vec((0x0e..0x1au16, vec(any::<u8>(), 0..9)), 0..30),
    ) {
        let is_64 = matches!(kind, BarKind::Memory64 { .. });
        let size = 1u64 << if is_64 { log2 } else { log2.min(31) };
        let mut bars = with(&[(BarIndex::Bar(0), kind, size)]);
        let bits = !(size - 1) & if is_64 { u64::MAX } else { u32::MAX.into() };
        let mut model = 0u64;
        for (offset, data) in writes {
            bars.write(offset, &data);
            let mut bytes = model.to_le_bytes();
            for (at, byte) in (usize::from(offset)..).zip(data) {
                if let Some(model) = at.checked_sub(0x10).and_then(|at| bytes.get_mut(at)) {
                    *model = byte;
                }
            }
            model = u64::from_le_bytes(bytes) & bits;
            let mut found = [0; 8];
            bars.read(0x10, &mut found);
            let flags = u64::from_le_bytes(found) & !bits & if is_64 { u64::MAX } else { u32::MAX.into() };
            prop_assert_eq!(u64::from_le_bytes(found) & bits, model);
            prop_assert_eq!(flags, match kind {
                BarKind::Io => 1,
                BarKind::Memory32 { prefetchable } => u64::from(prefetchable) << 3,
                BarKind::Memory64 { prefetchable } => 4 | u64::from(prefetchable) << 3,
            });
            let regions = bars.regions();
            prop_assert_eq!(regions.len(), 1);
            prop_assert_eq!(regions[0], BarRegion { index: BarIndex::Bar(0), kind, address: model, size });
            prop_assert!(model.checked_add(size - 1).is_some());
        }
    }

    #[test]
    fn an_address_that_is_set_reads_back_rounded_down(log2 in 4..64u32, address: u64) {
        let mut bars = with(&[(BarIndex::Bar(2), MEMORY_64, 1 << log2)]);
        bars.set_address(BarIndex::Bar(2), address);
        bars.set_address(BarIndex::Bar(3), 0);
        bars.set_address(BarIndex::Bar(9), 0);
        bars.set_address(BarIndex::Rom, 0);
        prop_assert_eq!(bars.regions()[0].address, address >> log2 << log2);
    }

    #[test]
    fn no_access_of_any_offset_and_width_panics(offset: u16, data in vec(any::<u8>(), 0..80)) {
        let mut bars = with(&[(BarIndex::Bar(0), MEMORY_64, 0x1000), (BarIndex::Rom, MEMORY_32, 0x800)]);
        let mut data = data;
        bars.write(offset, &data);
        bars.read(offset, &mut data);
    }
}
