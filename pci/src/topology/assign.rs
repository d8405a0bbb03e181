//! What firmware does before the guest's kernel starts: bus numbers, bridge windows and addresses.
//!
//! Within a bus the most aligned comes first, so that nothing is wasted between powers of two; a
//! bridge's window is as large as what is behind it. One with a slot has 2 MiB at least: an operating
//! system that finds a window closed, because nothing behind it needs one, would place it anew at each
//! boot. Functions are left with decoding off, for the guest's drivers to turn on; bridges are left
//! open.

use std::cmp::Reverse;
use std::ops::Range;

use super::Topology;
use super::tree::{FunctionId, Tree};
use crate::address::Bdf;
use crate::function::{BarIndex, BarKind, PAGE_SIZE, PciFunction};
use crate::spec;

/// The guest addresses and ports that PCI has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// I/O ports, such as 0xC000 up.
    pub io: Range<u64>,
    /// Memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Memory above 4 GiB.
    pub memory64: Range<u64>,
}

/// The functions do not fit into the machine's windows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// {function}: {bar} of {size:#x} bytes finds no room in the {window} window, {start:#x}..{end:#x}, beside the other devices: remove devices, or make the window larger
    #[error(
        "{function}: {bar} of {size:#x} bytes finds no room in the {window} window, {start:#x}..{end:#x}, beside the other devices: remove devices, or make the window larger"
    )]
    NoRoom {
        /// Whose.
        function: Bdf,
        /// Which BAR.
        bar: BarIndex,
        /// Its size.
        size: u64,
        /// Which window.
        window: &'static str,
        /// Where that begins.
        start: u64,
        /// Where that ends.
        end: u64,
    },
    /// there are more than 255 buses behind bridges: use fewer root ports
    #[error("there are more than 255 buses behind bridges: use fewer root ports")]
    TooManyBuses,
}

/// The kinds of room, as bridges have windows for them. PCIe 6.0 §7.5.1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Io,
    /// Below 4 GiB. A bridge's window for what is not prefetchable ends there.
    Memory32,
    /// Above 4 GiB. Behind a bridge only prefetchable BARs can be there.
    Memory64,
}

impl Space {
    fn of(kind: BarKind, on_root_bus: bool) -> Self {
        match kind {
            BarKind::Io => Self::Io,
            BarKind::Memory64 { prefetchable } if prefetchable || on_root_bus => Self::Memory64,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => Self::Memory32,
        }
    }

    fn granule(self) -> u64 {
        match self {
            Self::Io => spec::IO_WINDOW_GRANULE,
            Self::Memory32 | Self::Memory64 => spec::MEMORY_WINDOW_GRANULE,
        }
    }

    /// What a BAR is aligned to, though it be smaller: memory comes in pages, and one that has a page
    /// to itself can be reached without an exit.
    fn bar_alignment(self) -> u64 {
        match self {
            Self::Io => spec::BAR_IO_MIN,
            Self::Memory32 | Self::Memory64 => PAGE_SIZE,
        }
    }

    fn window(self, windows: &Windows) -> (&'static str, &Range<u64>) {
        match self {
            Self::Io => ("I/O port", &windows.io),
            Self::Memory32 => ("32-bit memory", &windows.memory32),
            Self::Memory64 => ("64-bit memory", &windows.memory64),
        }
    }
}

/// The least that each memory window of a bridge with a slot has, needed or not: what Linux gives a
/// bridge that it sets up itself (`pci=hpmmiosize=`).
const HOT_PLUG_ROOM: u64 = 2 << 20;

/// Something that needs room. Sizes are wide so that a sum of hostile BARs cannot overflow.
#[derive(Debug)]
struct Request {
    function: FunctionId,
    size: u128,
    align: u128,
    what: What,
}

#[derive(Debug)]
enum What {
    Bar(BarIndex, BarKind),
    Window(Vec<Request>),
}

impl Request {
    /// The largest BAR in it, to be named where there is no room.
    fn largest_bar(&self) -> Option<(FunctionId, BarIndex, u128)> {
        match &self.what {
            What::Bar(index, _) => Some((self.function, *index, self.size)),
            What::Window(inner) => inner
                .iter()
                .filter_map(Self::largest_bar)
                .max_by_key(|(_, _, size)| *size),
        }
    }
}

impl Topology {
    /// Numbers the buses and gives every BAR an address, as firmware does. No vCPU may run.
    ///
    /// I/O BARs for which no ports are left stay at 0, with a warning, as few devices need theirs:
    /// behind bridges each takes 4 KiB of 64.
    ///
    /// # Errors
    /// [`AssignError`], naming the BAR that found no room.
    pub fn assign(&self, windows: &Windows) -> Result<(), AssignError> {
        let mut mappings = self.mappings();
        let tree = self.snapshot();
        let outcome = assign(&tree, windows);
        let ids: Vec<_> = tree.nodes().iter().map(|node| node.id).collect();
        self.remap(&mut mappings, &ids);
        outcome
    }
}

fn assign(tree: &Tree, windows: &Windows) -> Result<(), AssignError> {
    let bridges = || {
        tree.nodes()
            .iter()
            .filter(|node| node.pci.bridge().is_some())
    };
    let decode = spec::COMMAND_IO | spec::COMMAND_MEMORY;
    for node in tree.nodes() {
        let command = read16(&*node.pci, spec::COMMAND);
        write16(&*node.pci, spec::COMMAND, command & !decode);
    }
    number_buses(tree, None, 0, &mut 1)?;
    for space in [Space::Io, Space::Memory32, Space::Memory64] {
        for node in bridges() {
            close_window(&*node.pci, space);
        }
        place_in_root(tree, space, windows)?;
    }
    for node in bridges() {
        let command = read16(&*node.pci, spec::COMMAND);
        let open = command | decode | spec::COMMAND_BUS_MASTER;
        write16(&*node.pci, spec::COMMAND, open);
    }
    Ok(())
}

/// Numbers the buses behind the bridges of one bus, depth first, from `next` on.
fn number_buses(
    tree: &Tree,
    bus: Option<FunctionId>,
    number: u8,
    next: &mut u16,
) -> Result<(), AssignError> {
    for node in tree
        .children(bus)
        .filter(|node| node.pci.bridge().is_some())
    {
        let secondary = u8::try_from(*next).map_err(|_| AssignError::TooManyBuses)?;
        *next += 1;
        number_buses(tree, Some(node.id), secondary, next)?;
        let subordinate = (*next - 1) as u8;
        node.pci.config_write(spec::PRIMARY_BUS, &[number]);
        node.pci.config_write(spec::SECONDARY_BUS, &[secondary]);
        node.pci.config_write(spec::SUBORDINATE_BUS, &[subordinate]);
    }
    Ok(())
}

/// What one bus needs of one kind of room, the most aligned first.
fn requests(tree: &Tree, bus: Option<FunctionId>, space: Space) -> Vec<Request> {
    let mut requests = Vec::new();
    for node in tree.children(bus) {
        for region in node.pci.bars() {
            if region.size != 0 && Space::of(region.kind, bus.is_none()) == space {
                requests.push(Request {
                    function: node.id,
                    size: region.size.into(),
                    align: region.size.max(space.bar_alignment()).into(),
                    what: What::Bar(region.index, region.kind),
                });
            }
        }
        if let Some(bridge) = node.pci.bridge() {
            let inner = self::requests(tree, Some(node.id), space);
            let granule = u128::from(space.granule());
            let least = match bridge.hot_plug() {
                Some(_) if space != Space::Io => u128::from(HOT_PLUG_ROOM),
                _ => 0,
            };
            let size = offsets(&inner, 0).1.next_multiple_of(granule).max(least);
            if size != 0 {
                requests.push(Request {
                    function: node.id,
                    size,
                    align: inner
                        .first()
                        .map_or(granule, |most| most.align.max(granule)),
                    what: What::Window(inner),
                });
            }
        }
    }
    requests.sort_by_key(|request| Reverse((request.align, request.size)));
    requests
}

/// Where each request comes to lie from `start` on, and where the last one ends.
fn offsets(requests: &[Request], start: u128) -> (Vec<u128>, u128) {
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

/// Places what bus 0 needs into the machine's window.
fn place_in_root(tree: &Tree, space: Space, windows: &Windows) -> Result<(), AssignError> {
    let (name, window) = space.window(windows);
    let mut at = u128::from(window.start);
    for request in requests(tree, None, space) {
        let place = at.next_multiple_of(request.align);
        if place + request.size <= u128::from(window.end) {
            at = place + request.size;
            settle(tree, &request, place, space);
            continue;
        }
        let Some((function, bar, size)) = request.largest_bar() else {
            continue;
        };
        let error = AssignError::NoRoom {
            function: tree.bdf(function).unwrap_or_default(),
            bar,
            size: size as u64,
            window: name,
            start: window.start,
            end: window.end,
        };
        if space != Space::Io {
            return Err(error);
        }
        log::warn!("{error}; it is left without");
    }
    Ok(())
}

/// Writes the address of a BAR, or a window and what is in it, into the registers.
fn settle(tree: &Tree, request: &Request, place: u128, space: Space) {
    let Some(node) = tree.get(request.function) else {
        return;
    };
    match &request.what {
        What::Bar(index, kind) => set_bar(&*node.pci, *index, *kind, place as u64),
        What::Window(inner) => {
            open_window(
                &*node.pci,
                space,
                place as u64,
                (place + request.size - 1) as u64,
            );
            for (request, place) in inner.iter().zip(offsets(inner, place).0) {
                settle(tree, request, place, space);
            }
        }
    }
}

fn set_bar(pci: &dyn PciFunction, index: BarIndex, kind: BarKind, address: u64) {
    let register = match index {
        BarIndex::Bar(number) => spec::BAR0 + 4 * u16::from(number.min(spec::BAR_COUNT - 1)),
        BarIndex::Rom => spec::ROM_ADDRESS,
    };
    pci.config_write(register, &(address as u32).to_le_bytes());
    if matches!(kind, BarKind::Memory64 { .. }) {
        pci.config_write(register + 4, &((address >> 32) as u32).to_le_bytes());
    }
}

fn open_window(bridge: &dyn PciFunction, space: Space, first: u64, last: u64) {
    match space {
        Space::Io => {
            bridge.config_write(spec::IO_BASE, &[(first >> 8) as u8]);
            bridge.config_write(spec::IO_LIMIT, &[(last >> 8) as u8]);
        }
        Space::Memory32 => {
            write16(bridge, spec::MEMORY_BASE, (first >> 16) as u16);
            write16(bridge, spec::MEMORY_LIMIT, (last >> 16) as u16);
        }
        Space::Memory64 => {
            let high = |address: u64| ((address >> 32) as u32).to_le_bytes();
            write16(bridge, spec::PREFETCHABLE_BASE, (first >> 16) as u16);
            write16(bridge, spec::PREFETCHABLE_LIMIT, (last >> 16) as u16);
            bridge.config_write(spec::PREFETCHABLE_BASE_UPPER, &high(first));
            bridge.config_write(spec::PREFETCHABLE_LIMIT_UPPER, &high(last));
        }
    }
}

/// A window is closed where its base is above its limit.
fn close_window(bridge: &dyn PciFunction, space: Space) {
    let highest = match space {
        Space::Io => 0xf000,
        Space::Memory32 | Space::Memory64 => 0xfff0_0000,
    };
    open_window(bridge, space, highest, 0);
}

fn read16(pci: &dyn PciFunction, offset: u16) -> u16 {
    let mut data = [0; 2];
    pci.config_read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn write16(pci: &dyn PciFunction, offset: u16, value: u16) {
    pci.config_write(offset, &value.to_le_bytes());
}

#[cfg(test)]
mod tests;
