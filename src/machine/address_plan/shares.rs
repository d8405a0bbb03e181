//! What each PCI segment has of the guest's addresses: stretches of the machine's windows that no other has.
//!
//! Segment 0 has the lowest part of each memory window, as much as its devices need and some beside, then the others
//! follow one after another, and all behind the last is segment 0's again. So a device of segment 0 has the same place
//! however many segments there are. Ports are few: another segment has as many as its devices need, from the top.

use std::ops::Range;

use busway_pci::{Needs, NoRoom, WindowKind, Windows, end_of_room, find_room};

/// What is left to a segment for devices that come to its bus 0, and what its stretch is aligned to, in bytes: the first
/// that there is room for.
const SPARE_32: [(u64, u64); 4] = [
    (64 << 20, 1 << 20),
    (16 << 20, 1 << 20),
    (1 << 20, 1 << 20),
    (0, 1 << 20),
];
const SPARE_64: [(u64, u64); 5] = [
    (64 << 30, 1 << 30),
    (16 << 30, 1 << 30),
    (4 << 30, 1 << 30),
    (1 << 30, 1 << 30),
    (0, 1 << 20),
];

/// What segments' shares of ports are multiples of: a bridge's window for ports. PCIe 6.0 §7.5.1.3.6
const PORTS_STEP: u64 = 0x1000;

/// The windows of each segment, where `needs` has what is on bus 0 of each, out of the machine's.
///
/// # Errors
/// [`NoRoom`], for the largest BAR of what found none
pub(super) fn share<F: Copy>(
    whole: &Windows,
    needs: &[Vec<Needs<F>>],
) -> Result<Vec<Windows>, NoRoom<F>> {
    let ports = share_ports(&whole.io, needs);
    let below = share_memory(&whole.memory32, WindowKind::Memory32, needs)?;
    let above = share_memory(&whole.memory64, WindowKind::Memory64, needs)?;
    let shares = ports.into_iter().zip(below).zip(above);
    Ok(shares
        .map(|((io, memory32), memory64)| Windows {
            io,
            memory32,
            memory64,
        })
        .collect())
}

/// The same of one kind of memory window, which is `whole`.
pub(super) fn share_memory<F: Copy>(
    whole: &[Range<u64>],
    kind: WindowKind,
    needs: &[Vec<Needs<F>>],
) -> Result<Vec<Vec<Range<u64>>>, NoRoom<F>> {
    if let [only] = needs {
        find_room(only, kind, &alone(kind, whole))?;
        return Ok(vec![whole.to_vec()]);
    }
    let spares: &[_] = match kind {
        WindowKind::Memory64 => &SPARE_64,
        _ => &SPARE_32,
    };
    let mut failed = None;
    for &(spare, step) in spares {
        match stretches(whole, kind, needs, spare, step) {
            Ok(Some(shares)) => return Ok(shares),
            Ok(None) => {}
            Err(missing) => failed = Some(missing),
        }
    }
    match failed {
        Some(missing) => Err(missing),
        // Nothing needs a place, and there is none.
        None => Ok(vec![Vec::new(); needs.len()]),
    }
}

/// The same with so many bytes to spare for each segment; nothing where these find no room.
fn stretches<F: Copy>(
    whole: &[Range<u64>],
    kind: WindowKind,
    needs: &[Vec<Needs<F>>],
    spare: u64,
    step: u64,
) -> Result<Option<Vec<Vec<Range<u64>>>>, NoRoom<F>> {
    let Some((first, others)) = needs.split_first() else {
        return Ok(None);
    };
    let Some(end) = stretch(whole, kind, first, 0, (spare, step))? else {
        return Ok(None);
    };
    let (mut from, mut shares) = (end, Vec::new());
    for needs in others {
        let rest = within(whole, from..u64::MAX);
        let Some(end) = stretch(&rest, kind, needs, from, (spare, step))? else {
            return Ok(None);
        };
        shares.push(within(&rest, 0..end));
        from = end;
    }
    let mut own = within(whole, 0..end);
    own.extend(within(whole, from..u64::MAX));
    shares.insert(0, join(own));
    Ok(Some(shares))
}

/// Where what `needs` need of `rest`, which is the windows from `from` on, ends, with bytes to spare behind it; nothing
/// where these find no room.
fn stretch<F: Copy>(
    rest: &[Range<u64>],
    kind: WindowKind,
    needs: &[Needs<F>],
    from: u64,
    (spare, step): (u64, u64),
) -> Result<Option<u64>, NoRoom<F>> {
    let used = end_of_room(needs, kind, &alone(kind, rest))?;
    let Some(start) = rest.first().map(|range| range.start) else {
        return Ok((spare == 0).then_some(from));
    };
    let used = used.max(start);
    let free = within(rest, used..u64::MAX);
    let mut missing = spare;
    for range in &free {
        let size = range.end - range.start;
        if size >= missing {
            let end = range.start + missing;
            let aligned = end.checked_next_multiple_of(step).unwrap_or(u64::MAX);
            return Ok(Some(aligned.min(range.end)));
        }
        missing -= size;
    }
    Ok((missing == 0).then_some(used))
}

/// Ports for each segment. One whose devices find none does without, as others whose ports are used up.
fn share_ports<F: Copy>(whole: &Range<u64>, needs: &[Vec<Needs<F>>]) -> Vec<Range<u64>> {
    let Some((first, others)) = needs.split_first() else {
        return Vec::new();
    };
    let ports = |io: Range<u64>| Windows {
        io,
        memory32: Vec::new(),
        memory64: Vec::new(),
    };
    let mut end = whole.end;
    let mut shares = Vec::new();
    for needs in others {
        let used = end_of_room(needs, WindowKind::Io, &ports(0..whole.end)).unwrap_or(0);
        let start = end.checked_sub(used.next_multiple_of(PORTS_STEP));
        let left = |start: &u64| {
            let left = ports(whole.start..*start);
            *start > whole.start && find_room(first, WindowKind::Io, &left).is_ok()
        };
        match start.filter(|start| *start < end).filter(left) {
            Some(start) => {
                shares.push(start..end);
                end = start;
            }
            None => shares.push(0..0),
        }
    }
    shares.insert(0, whole.start..end);
    shares
}

fn alone(kind: WindowKind, ranges: &[Range<u64>]) -> Windows {
    let of = |other| match kind == other {
        true => ranges.to_vec(),
        false => Vec::new(),
    };
    Windows {
        io: 0..0,
        memory32: of(WindowKind::Memory32),
        memory64: of(WindowKind::Memory64),
    }
}

/// What of `ranges` lies in `part`.
fn within(ranges: &[Range<u64>], part: Range<u64>) -> Vec<Range<u64>> {
    let clipped = ranges
        .iter()
        .map(|range| range.start.max(part.start)..range.end.min(part.end));
    clipped.filter(|range| range.start < range.end).collect()
}

/// Neighbours as one.
fn join(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use busway_pci::{BarIndex, BarKind, Behind, Reserve};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const LOW: BarKind = BarKind::Memory32 {
        prefetchable: false,
    };
    const HIGH: BarKind = BarKind::Memory64 { prefetchable: true };

    fn whole() -> Windows {
        Windows {
            io: 0x1000..0x1_0000,
            memory32: std::iter::once(3 * GIB..7 * GIB / 2).collect(),
            memory64: vec![8 * GIB..1012 * GIB, 1024 * GIB..1 << 46],
        }
    }

    fn port(bars: &[(BarIndex, BarKind, u64)]) -> Needs<usize> {
        let function = Needs {
            function: 1,
            bars: bars.to_vec(),
            bridge: None,
        };
        Needs {
            function: 0,
            bars: Vec::new(),
            bridge: Some(Behind {
                reserve: Reserve::SMALL,
                functions: vec![function],
            }),
        }
    }

    fn slot() -> Needs<usize> {
        port(&[
            (BarIndex::Bar(0), LOW, 32 * MIB),
            (BarIndex::Bar(2), HIGH, 4 * GIB),
        ])
    }

    #[test]
    fn one_segment_has_all_there_is() {
        let needs = [vec![slot(); 8]];
        assert_eq!(share(&whole(), &needs), Ok(vec![whole()]));
    }

    #[test]
    fn others_follow_what_segment_0_needs_and_the_rest_is_that_ones_again() {
        let nic = port(&[
            (BarIndex::Bar(0), LOW, 2 * MIB),
            (BarIndex::Bar(2), BarKind::Io, 0x20),
        ]);
        let needs = [vec![slot(); 8], vec![slot(), nic]];
        let shares = share(&whole(), &needs).unwrap();
        let [zero, one] = &shares[..] else {
            panic!("{shares:x?}");
        };
        assert_eq!(
            (&zero.io, &one.io),
            (&(0x1000..0xf000), &(0xf000..0x1_0000))
        );
        // 256 MiB of slots with 64 to spare, then 34 and 64.
        let start = 3 * GIB + 320 * MIB;
        assert_eq!(one.memory32, [start..start + 98 * MIB]);
        assert_eq!(
            zero.memory32,
            [3 * GIB..start, start + 98 * MIB..7 * GIB / 2]
        );
        // 32 GiB of slots.
        assert_eq!(one.memory64, [104 * GIB..173 * GIB]);
        assert_eq!(
            zero.memory64,
            [
                8 * GIB..104 * GIB,
                173 * GIB..1012 * GIB,
                1024 * GIB..1 << 46
            ]
        );
    }

    #[test]
    fn sixteen_segments_with_a_slot_each_find_room_where_addresses_are_few() {
        let mut needs = vec![vec![slot(); 8]];
        needs.resize(16, vec![slot()]);
        let small = Windows {
            memory32: std::iter::once(2 * GIB..7 * GIB / 2).collect(),
            memory64: std::iter::once(8 * GIB..1 << 38).collect(),
            ..whole()
        };
        let shares = share(&small, &needs).unwrap();
        assert_eq!(shares.len(), 16);
        let less = Windows {
            memory32: std::iter::once(3 * GIB..7 * GIB / 2).collect(),
            ..small
        };
        let missing = share(&less, &needs).unwrap_err();
        assert_eq!(missing.window, WindowKind::Memory32);
    }

    #[test]
    fn ports_that_are_used_up_leave_a_segment_without() {
        let nic = port(&[(BarIndex::Bar(2), BarKind::Io, 0x20)]);
        let needs = [vec![nic.clone(); 13], vec![nic.clone()], vec![nic; 2]];
        let shares = share(&whole(), &needs).unwrap();
        let ports: Vec<_> = shares.into_iter().map(|share| share.io).collect();
        assert_eq!(ports, [0x1000..0xf000, 0xf000..0x1_0000, 0..0]);
    }

    fn bars() -> impl Strategy<Value = Needs<usize>> {
        (0..3_u8, 12..34_u32, any::<bool>()).prop_map(|(kind, log2, behind)| {
            let bar = match kind {
                0 => (BarIndex::Bar(0), LOW, 1 << log2.min(27)),
                1 => (BarIndex::Bar(0), BarKind::Io, 32),
                _ => (BarIndex::Bar(0), HIGH, 1 << log2),
            };
            match behind {
                true => port(&[bar]),
                false => Needs {
                    function: 1,
                    bars: vec![bar],
                    bridge: None,
                },
            }
        })
    }

    fn ranges(start: u64, unit: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
        vec((1..64_u64, 1..64_u64), 0..4).prop_map(move |pieces| {
            let mut at = start;
            let piece = |(hole, size): (u64, u64)| {
                let start = at + hole * unit;
                at = start + size * unit;
                start..at
            };
            pieces.into_iter().map(piece).collect()
        })
    }

    proptest! {
        #[test]
        fn shares_are_disjoint_within_the_whole_and_large_enough(
            needs in vec(vec(bars(), 0..6), 1..17),
            memory32 in ranges(GIB, 16 * MIB),
            memory64 in ranges(4 * GIB, 16 * GIB),
        ) {
            let whole = Windows { io: 0x1000..0x1_0000, memory32, memory64 };
            let Ok(shares) = share(&whole, &needs) else { return Ok(()) };
            prop_assert_eq!(shares.len(), needs.len());
            for kind in [WindowKind::Memory32, WindowKind::Memory64] {
                let of = |windows: &Windows| match kind {
                    WindowKind::Memory32 => windows.memory32.clone(),
                    _ => windows.memory64.clone(),
                };
                let mut all = Vec::new();
                for (share, needs) in shares.iter().zip(&needs) {
                    prop_assert!(find_room(needs, kind, share).is_ok());
                    all.extend(of(share));
                }
                all.sort_by_key(|range| range.start);
                prop_assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
                for range in &all {
                    let inside = of(&whole).iter().any(|part| part.start <= range.start && range.end <= part.end);
                    prop_assert!(range.start < range.end && inside, "{:x?}", range);
                }
                // Nothing of the whole is nobody's, unless nobody can have any.
                let bytes = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
                prop_assert!(bytes(&all) == bytes(&of(&whole)) || all.is_empty());
            }
            let mut ports: Vec<_> = shares.iter().map(|share| share.io.clone()).collect();
            ports.retain(|range| !range.is_empty());
            ports.sort_by_key(|range| range.start);
            prop_assert!(ports.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }
}
