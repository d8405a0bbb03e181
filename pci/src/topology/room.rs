//! Room for BARs and bridge windows: pure arithmetic on what functions need and what the machine has.
//!
//! It serves twice: before there is a machine, to find out where its windows have to begin
//! ([`find_room`]), and when addresses are assigned.
//!
//! Within a bus the most aligned comes first, and each takes the lowest place that is free. A bridge's
//! window is as large as what is behind it, and lies in one of the machine's ranges as a whole: so no
//! address that a bridge forwards is one that the machine keeps clear.

use std::cmp::Reverse;
use std::ops::Range;

use crate::bar::{BarIndex, BarKind};
use crate::windows::{Reserve, WindowKind, Windows};

/// What a function needs of the guest's addresses.
#[derive(Clone, Debug)]
pub struct Needs<F> {
    /// Which function it is.
    pub function: F,
    /// Its BARs: which, of what kind, and bytes.
    pub bars: Vec<(BarIndex, BarKind, u64)>,
    /// What is behind it, where it is a bridge.
    pub bridge: Option<Behind<F>>,
}

/// What is behind a bridge.
#[derive(Clone, Debug)]
pub struct Behind<F> {
    /// What its windows have at least.
    pub reserve: Reserve,
    /// The functions on the bus behind it.
    pub functions: Vec<Needs<F>>,
}

/// A BAR for which there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom<F> {
    /// Whose it is.
    pub function: F,
    /// Which BAR.
    pub bar: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Its bytes.
    pub size: u64,
    /// Which of the machine's windows is too small.
    pub window: WindowKind,
}

/// That everything on bus 0 finds room in one kind of window, with all behind its bridges.
///
/// # Errors
/// [`NoRoom`], for the largest BAR of what found none first
pub fn find_room<F: Copy>(
    bus_0: &[Needs<F>],
    window: WindowKind,
    windows: &Windows,
) -> Result<(), NoRoom<F>> {
    let missing = place(bus_0, window, windows, |_, _| {});
    missing.into_iter().next().map_or(Ok(()), Err)
}

/// The end of what everything on bus 0 takes of one kind of window, laid out as addresses are assigned: the address behind
/// the last BAR or bridge window, 0 where nothing needs any.
///
/// # Errors
/// [`NoRoom`], for the largest BAR of what found none first
pub fn end_of_room<F: Copy>(
    bus_0: &[Needs<F>],
    window: WindowKind,
    windows: &Windows,
) -> Result<u64, NoRoom<F>> {
    let mut end = 0;
    let missing = place(bus_0, window, windows, |request, at| {
        end = end.max(at + request.size);
    });
    match missing.into_iter().next() {
        Some(missing) => Err(missing),
        None => Ok(u64::try_from(end).unwrap_or(u64::MAX)),
    }
}

/// Something that needs room. Sizes are wide so that a sum of hostile BARs cannot overflow.
#[derive(Debug)]
pub(super) struct Request<F> {
    pub(super) function: F,
    pub(super) size: u128,
    align: u128,
    pub(super) what: What<F>,
}

#[derive(Debug)]
pub(super) enum What<F> {
    Bar(BarIndex, BarKind),
    /// A bridge's window, with what is in it.
    Window(Vec<Request<F>>),
}

impl<F: Copy> Request<F> {
    /// The largest BAR in it, to be named where there is no room.
    fn largest_bar(&self, window: WindowKind) -> Option<NoRoom<F>> {
        match &self.what {
            &What::Bar(bar, kind) => Some(NoRoom {
                function: self.function,
                bar,
                kind,
                size: u64::try_from(self.size).unwrap_or(u64::MAX),
                window,
            }),
            What::Window(inner) => inner
                .iter()
                .filter_map(|request| request.largest_bar(window))
                .max_by_key(|bar| bar.size),
        }
    }
}

/// Finds places for what bus 0 needs of one kind of window, and gives each to `placed`. Returns the
/// largest BAR of each request that found none.
pub(super) fn place<F: Copy>(
    bus_0: &[Needs<F>],
    window: WindowKind,
    windows: &Windows,
    mut placed: impl FnMut(&Request<F>, u128),
) -> Vec<NoRoom<F>> {
    let mut free = Free::new(windows.ranges(window));
    let mut missing = Vec::new();
    for request in requests(bus_0, true, window) {
        match free.take(request.size, request.align) {
            Some(place) => placed(&request, place),
            None => missing.extend(request.largest_bar(window)),
        }
    }
    missing
}

/// Where each request of a bridge's window comes to lie, from `start` on.
pub(super) fn places<F>(requests: &[Request<F>], start: u128) -> Vec<u128> {
    offsets(requests, start).0
}

/// What one bus needs of one kind of window, the most aligned first.
fn requests<F: Copy>(bus: &[Needs<F>], on_root_bus: bool, window: WindowKind) -> Vec<Request<F>> {
    let mut found = Vec::new();
    for needs in bus {
        for &(index, kind, size) in &needs.bars {
            if size != 0 && WindowKind::of(kind, on_root_bus) == window {
                found.push(Request {
                    function: needs.function,
                    size: size.into(),
                    align: size.max(window.bar_alignment()).into(),
                    what: What::Bar(index, kind),
                });
            }
        }
        if let Some(bridge) = &needs.bridge {
            let inner = requests(&bridge.functions, false, window);
            let granule = u128::from(window.granule());
            let least = u128::from(bridge.reserve.bytes(window));
            let aligned = u128::from(bridge.reserve.alignment(window)).max(granule);
            let size = offsets(&inner, 0).1.next_multiple_of(granule).max(least);
            if size != 0 {
                found.push(Request {
                    function: needs.function,
                    size,
                    align: inner
                        .first()
                        .map_or(aligned, |most| most.align.max(aligned)),
                    what: What::Window(inner),
                });
            }
        }
    }
    found.sort_by_key(|request| Reverse((request.align, request.size)));
    found
}

/// Where each request comes to lie from `start` on, and where the last one ends.
fn offsets<F>(requests: &[Request<F>], start: u128) -> (Vec<u128>, u128) {
    let mut end = start;
    let places = requests
        .iter()
        .map(|request| {
            let place = end.next_multiple_of(request.align);
            end = place + request.size;
            place
        })
        .collect();
    (places, end)
}

/// What is left of a window: ascending, disjoint.
struct Free(Vec<Range<u128>>);

impl Free {
    fn new(ranges: &[Range<u64>]) -> Self {
        let wide = |range: &Range<u64>| range.start.into()..range.end.into();
        Self(ranges.iter().map(wide).collect())
    }

    /// Takes `size` bytes at the lowest place that is free and aligned.
    fn take(&mut self, size: u128, align: u128) -> Option<u128> {
        let (index, place) = self.0.iter().enumerate().find_map(|(index, range)| {
            let place = range.start.next_multiple_of(align);
            (place + size <= range.end).then_some((index, place))
        })?;
        let range = self.0.remove(index);
        let left = [place + size..range.end, range.start..place];
        for piece in left.into_iter().filter(|piece| !piece.is_empty()) {
            self.0.insert(index, piece);
        }
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::bar::PAGE_SIZE;
    use crate::fake::{MEMORY_32, MEMORY_64, PREFETCHABLE_64};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// One range of addresses.
    fn one(range: Range<u64>) -> Vec<Range<u64>> {
        vec![range]
    }

    fn windows(memory32: &[Range<u64>], memory64: &[Range<u64>]) -> Windows {
        Windows {
            io: 0xc000..0x1_0000,
            memory32: memory32.to_vec(),
            memory64: memory64.to_vec(),
        }
    }

    /// Ports with a slot each, numbered, with a function of these BARs behind each.
    fn ports(devices: &[Vec<(BarIndex, BarKind, u64)>]) -> Vec<Needs<usize>> {
        let port = |(function, bars): (usize, &Vec<_>)| Needs {
            function: usize::MAX,
            bars: Vec::new(),
            bridge: Some(Behind {
                reserve: Reserve::SMALL,
                functions: vec![Needs {
                    function,
                    bars: bars.clone(),
                    bridge: None,
                }],
            }),
        };
        devices.iter().enumerate().map(port).collect()
    }

    /// Where each BAR comes to lie: function, first address, bytes.
    fn placed(
        needs: &[Needs<usize>],
        window: WindowKind,
        windows: &Windows,
    ) -> Vec<(usize, u64, u64)> {
        fn walk(request: &Request<usize>, place: u128, all: &mut Vec<(usize, u64, u64)>) {
            match &request.what {
                What::Bar(..) => all.push((request.function, place as u64, request.size as u64)),
                What::Window(inner) => {
                    for (request, place) in inner.iter().zip(places(inner, place)) {
                        walk(request, place, all);
                    }
                }
            }
        }
        let mut all = Vec::new();
        place(needs, window, windows, |request, place| {
            walk(request, place, &mut all);
        });
        all.sort_unstable();
        all
    }

    #[test]
    fn four_bars_of_128_gib_go_round_what_the_iommu_reserves_below_1_tib() {
        let bar = vec![(BarIndex::Bar(0), PREFETCHABLE_64, 128 * GIB)];
        let needs = ports(&vec![bar; 4]);
        let windows = windows(&[], &[513 * GIB..1012 * GIB, 1024 * GIB..1 << 48]);
        let starts: Vec<_> = placed(&needs, WindowKind::Memory64, &windows)
            .into_iter()
            .map(|(_, start, _)| start / GIB)
            .collect();
        assert_eq!(starts, [640, 768, 1024, 1152]);
    }

    #[test]
    fn large_64_bit_bars_that_are_not_prefetchable_are_below_4_gib_behind_a_port() {
        let card = vec![
            (BarIndex::Bar(0), MEMORY_64, 512 * MIB),
            (BarIndex::Bar(2), MEMORY_64, 64 * MIB),
            (BarIndex::Bar(4), MEMORY_64, 2 * MIB),
        ];
        let needs = ports(std::slice::from_ref(&card));
        let below = WindowKind::Memory32;
        let above = one(4 * GIB..512 * GIB);
        let no_room = find_room(&needs, below, &windows(&one(3 * GIB..7 * GIB / 2), &above));
        assert_eq!(
            no_room,
            Err(NoRoom {
                function: 0,
                bar: BarIndex::Bar(0),
                kind: MEMORY_64,
                size: 512 * MIB,
                window: WindowKind::Memory32
            })
        );
        let larger = windows(&one(2 * GIB..7 * GIB / 2), &above);
        assert_eq!(find_room(&needs, below, &larger), Ok(()));
        let all = placed(&needs, WindowKind::Memory32, &larger);
        assert_eq!(
            all,
            [
                (0, 2 * GIB, 512 * MIB),
                (0, 2 * GIB + 512 * MIB, 64 * MIB),
                (0, 2 * GIB + 576 * MIB, 2 * MIB)
            ]
        );
        // On bus 0 no bridge is in the way.
        let on_bus_0 = [Needs {
            function: 0,
            bars: card,
            bridge: None,
        }];
        assert_eq!(find_room(&on_bus_0, below, &windows(&[], &above)), Ok(()));
    }

    #[test]
    fn what_alignment_leaves_free_is_used() {
        let bars = |size| vec![(BarIndex::Bar(0), PREFETCHABLE_64, size)];
        let needs = ports(&[bars(8 * GIB), bars(4 * GIB), bars(GIB)]);
        let windows = windows(&[], &one(5 * GIB..17 * GIB));
        assert_eq!(
            placed(&needs, WindowKind::Memory64, &windows),
            [
                (0, 8 * GIB, 8 * GIB),
                // 5 to 8 GiB are too small and the end is, too: nothing of it is placed.
                (2, 5 * GIB, GIB)
            ]
        );
    }

    fn bars() -> impl Strategy<Value = Vec<(BarIndex, BarKind, u64)>> {
        let bar = |number| {
            (0..4_u8, 12..42_u32).prop_map(move |(kind, log2)| {
                let (kind, size) = match kind {
                    0 => (MEMORY_32, 1 << log2.min(30)),
                    1 => (MEMORY_64, 1 << log2.min(30)),
                    2 => (BarKind::Io, 32),
                    _ => (PREFETCHABLE_64, 1 << log2),
                };
                (BarIndex::Bar(number), kind, size)
            })
        };
        (bar(0), bar(2), bar(4)).prop_map(|(a, b, c)| vec![a, b, c])
    }

    /// Ranges with holes between them, from `start` on.
    fn ranges(start: u64, unit: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
        vec((1..64_u64, 0..64_u64), 1..5).prop_map(move |pieces| {
            let mut at = start;
            let mut ranges = Vec::new();
            for (hole, size) in pieces {
                at += hole * unit;
                if size > 0 {
                    ranges.push(at..at + size * unit);
                }
                at += size * unit;
            }
            ranges
        })
    }

    proptest! {
        #[test]
        fn no_bar_overlaps_another_or_what_lies_between_the_ranges(
            devices in vec(bars(), 0..8),
            memory32 in ranges(GIB, 16 * MIB),
            memory64 in ranges(4 * GIB, 32 * GIB),
        ) {
            let needs = ports(&devices);
            let windows = windows(&memory32, &memory64);
            for (kind, ranges) in [
                (WindowKind::Memory32, &memory32),
                (WindowKind::Memory64, &memory64),
            ] {
                let mut all = placed(&needs, kind, &windows);
                for &(_, start, size) in &all {
                    prop_assert_eq!(start % size.max(PAGE_SIZE), 0);
                    let inside = |range: &Range<u64>| range.start <= start && start + size <= range.end;
                    prop_assert!(ranges.iter().any(inside), "{:#x} of {:#x} bytes", start, size);
                }
                let wanted = devices.iter().flatten().filter(|(_, bar, _)| WindowKind::of(*bar, false) == kind);
                if find_room(&needs, kind, &windows).is_ok() {
                    prop_assert_eq!(all.len(), wanted.count());
                }
                all.sort_by_key(|&(_, start, _)| start);
                prop_assert!(all.windows(2).all(|pair| pair[0].1 + pair[0].2 <= pair[1].1));
            }
        }
    }
}
