//! Where the guest's RAM and windows lie, found out from the BARs' sizes before any of it is taken.
//!
//! Devices are opened while RAM is populated, so what they need below 4 GiB has to be known before
//! from what sysfs says of them.

mod plugged;

use std::ops::Range;
use std::path::PathBuf;

use busway_host::{Resource, resources_in};
use busway_iommu::{IovaRange, keep_clear};
use busway_pci::{
    BarIndex, BarKind, Behind, Needs, NoRoom, Reserve, WindowKind, Windows, find_room, spec,
};
use busway_vfio::{AssignOptions, RomChoice};

use super::passthrough::placement::{HostIdentity, behind_ports};
use crate::arch::layout;
use crate::config::MemoryConfig;
use crate::memory::Amount;
pub(super) use plugged::PluggedRoom;

/// Huge pages that RAM is aligned for where it is made of ordinary ones.
const TRANSPARENT_HUGE_PAGE: u64 = 2 << 20;
/// How many devices a refusal names as those that need most.
const NAMED: usize = 3;

/// A host function that the guest is to have, as sysfs shows it.
#[derive(Clone, Debug)]
pub(super) struct PlannedFunction {
    host: HostIdentity,
    bars: Vec<(BarIndex, BarKind, u64)>,
    /// It sits on bus 0 by itself.
    on_root_bus: bool,
}

impl PlannedFunction {
    /// The function that `host` is, given with `options`. Of a mediated device sysfs says nothing, and only
    /// VFIO once it is open: it has the room that is reserved for what is plugged in.
    pub(super) fn new(host: &HostIdentity, options: &AssignOptions, reserve: Reserve) -> Self {
        if host.is_mediated() {
            return Self {
                host: host.clone(),
                bars: reserved(reserve),
                on_root_bus: false,
            };
        }
        let mut bars: Vec<_> = resources_in(&host.folder)
            .iter()
            .filter_map(|resource| match (bar_of(resource)?, &options.rom) {
                ((BarIndex::Rom, ..), RomChoice::None | RomChoice::Image(_)) => None,
                (bar, _) => Some(bar),
            })
            .collect();
        if let RomChoice::Image(image) = &options.rom {
            bars.push((BarIndex::Rom, ROM, image.size()));
        }
        Self {
            host: host.clone(),
            bars,
            on_root_bus: false,
        }
    }

    /// The same where it sits on bus 0 by itself, or does not.
    pub(super) fn on_root_bus(self, on_root_bus: bool) -> Self {
        Self {
            on_root_bus,
            ..self
        }
    }

    /// An empty slot, which reserves room.
    pub(super) fn empty_slot(reserve: Reserve) -> Self {
        Self {
            host: HostIdentity {
                folder: PathBuf::from("an empty slot (--platform hotplug_slots=)"),
                host: None,
                is_virtual: false,
            },
            bars: reserved(reserve),
            on_root_bus: false,
        }
    }

    /// What of its BARs is below 4 GiB where it sits, in bytes.
    fn below_4_gib(&self) -> u64 {
        let below = |kind| WindowKind::of(kind, self.on_root_bus) == WindowKind::Memory32;
        self.bars
            .iter()
            .filter(|(_, kind, _)| below(*kind))
            .fold(0, |sum, (_, _, size)| sum.saturating_add(*size))
    }
}

const ROM: BarKind = BarKind::Memory32 {
    prefetchable: false,
};

/// The BARs that room is reserved for.
fn reserved(reserve: Reserve) -> Vec<(BarIndex, BarKind, u64)> {
    let prefetchable = BarKind::Memory64 { prefetchable: true };
    vec![
        (BarIndex::Bar(0), ROM, reserve.memory32),
        (BarIndex::Bar(2), prefetchable, reserve.memory64),
    ]
}

/// What VFIO will show: BARs by their register, with the host's sizes. A size that no BAR can have is
/// refused when the device is opened.
fn bar_of(resource: &Resource) -> Option<(BarIndex, BarKind, u64)> {
    let prefetchable = resource.is_prefetchable();
    let (index, kind) = match resource.index {
        bar if bar >= spec::BAR_COUNT => (BarIndex::Rom, ROM),
        bar if resource.is_io() => (BarIndex::Bar(bar), BarKind::Io),
        bar if resource.is_64bit() => (BarIndex::Bar(bar), BarKind::Memory64 { prefetchable }),
        bar => (BarIndex::Bar(bar), BarKind::Memory32 { prefetchable }),
    };
    resource
        .size
        .is_power_of_two()
        .then_some((index, kind, resource.size))
}

/// A BAR of a host device's finds no room among the guest's addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bar} of {device} ({}{kind}) finds no room in the guest: {why}; {remedy}", Amount(*size))]
pub struct NoRoomError {
    device: String,
    bar: BarIndex,
    size: u64,
    kind: &'static str,
    why: String,
    remedy: String,
}

/// Where the guest's RAM and windows lie.
#[derive(Clone, Debug)]
pub(super) struct AddressPlan {
    /// Where RAM below 4 GiB ends and the 32-bit window starts.
    pub(super) mmio32_start: u64,
    /// The addresses, first and last, where the devices let no memory be; ascending.
    pub(super) reserved: Vec<(u64, u64)>,
    /// The width of a guest-physical address.
    address_bits: u8,
    /// Firmware assigns the addresses.
    firmware: bool,
    /// Bytes above RAM that are kept for memory which comes and goes while the guest runs.
    plugged: u64,
}

impl AddressPlan {
    /// Finds room for all BARs of `functions`, which come in the order in which they were given.
    /// The 32-bit window starts at 3 GiB unless they need a larger one.
    ///
    /// # Errors
    /// [`NoRoomError`], which names a BAR and what helps
    pub(super) fn new(
        memory: &MemoryConfig,
        functions: &[PlannedFunction],
        reserved: Vec<(u64, u64)>,
        address_bits: u8,
        firmware: bool,
        room: PluggedRoom,
    ) -> Result<Self, NoRoomError> {
        let mut plan = Self {
            mmio32_start: layout::MMIO32_START,
            reserved,
            address_bits,
            firmware,
            plugged: room.first.saturating_add(room.later),
        };
        let starts = match firmware {
            true => &layout::FIRMWARE_MMIO32_STARTS[..],
            false => &layout::MMIO32_STARTS,
        };
        let needs = needs(functions);
        let mut below = Ok(());
        for start in starts {
            plan.mmio32_start = *start;
            let windows = plan.windows(&[], &[]);
            below = find_room(&needs, WindowKind::Memory32, &windows);
            if below.is_ok() {
                break;
            }
        }
        if firmware {
            // It takes all below the end of RAM for RAM, but for what a PC has below 1 MiB.
            let holes = plan.holes(&[]);
            let first = holes.first().map_or(u64::MAX, |hole| hole.start);
            plan.mmio32_start = plan.mmio32_start.min(first);
        }
        if let Err(missing) = below {
            return Err(plan.refuse_below_4_gib(functions, &missing));
        }
        let mut above = plan.find_room_above(&needs, memory, memory.size);
        if above.is_err() || plan.plugged_area(plan.top_of_ram(memory), &[]).is_empty() {
            plan.plugged = room.first;
            above = plan.find_room_above(&needs, memory, memory.size);
        }
        match above {
            Ok(()) => Ok(plan),
            Err(missing) => Err(plan.refuse_above_ram(functions, memory, &missing)),
        }
    }

    /// The windows of a machine with RAM at `ram`, whose devices' IOMMUs map at `usable` (all
    /// ascending; empty where nothing is known). They keep clear of RAM, and of what is reserved or lies
    /// between the usable ranges.
    pub(super) fn windows(&self, ram: &[Range<u64>], usable: &[IovaRange]) -> Windows {
        let holes = self.holes(usable);
        let top_of_ram = ram.last().map_or(0, |range| range.end);
        let top_of_ram = top_of_ram.max(self.plugged_area(top_of_ram, usable).end);
        Windows {
            io: layout::PCI_IO,
            memory32: layout::mmio32(self.mmio32_start, &holes),
            memory64: layout::mmio64(top_of_ram, self.address_bits, &holes),
        }
    }

    /// The addresses for memory that comes and goes while the guest runs, above RAM that ends at `top_of_ram`.
    pub(super) fn plugged_area(&self, top_of_ram: u64, usable: &[IovaRange]) -> Range<u64> {
        let holes = self.holes(usable);
        layout::plugged(top_of_ram, self.plugged, self.address_bits, &holes)
    }

    fn top_of_ram(&self, memory: &MemoryConfig) -> u64 {
        let ram = self.ram_ranges(memory, memory.size);
        ram.last().map_or(0, |range| range.end)
    }

    /// Where BARs may be: in the windows, and where firmware assigns addresses also elsewhere below 4 GiB.
    pub(super) fn bar_windows(&self, windows: &Windows, usable: &[IovaRange]) -> Windows {
        match self.firmware {
            true => Windows {
                memory32: layout::firmware_mmio32(self.mmio32_start, &self.holes(usable)),
                ..windows.clone()
            },
            false => windows.clone(),
        }
    }

    fn holes(&self, usable: &[IovaRange]) -> Vec<Range<u64>> {
        let reserved = self.reserved.iter();
        let reserved: Vec<_> = reserved
            .map(|&(start, last)| IovaRange { start, last })
            .collect();
        let clear = keep_clear(&reserved, usable).into_iter();
        layout::holes(
            clear.map(|range| (range.start, range.last)),
            TRANSPARENT_HUGE_PAGE,
        )
    }

    /// Whether there is room above RAM of `size` bytes.
    fn find_room_above<F: Copy>(
        &self,
        needs: &[Needs<F>],
        memory: &MemoryConfig,
        size: u64,
    ) -> Result<(), NoRoom<F>> {
        let ram = self.ram_ranges(memory, size);
        find_room(needs, WindowKind::Memory64, &self.windows(&ram, &[]))
    }

    /// Where RAM of `size` bytes would lie.
    fn ram_ranges(&self, memory: &MemoryConfig, size: u64) -> Vec<Range<u64>> {
        let page = memory.hugepage_size.filter(|_| memory.hugepages);
        let holes = layout::holes(
            self.reserved.iter().copied(),
            page.unwrap_or(TRANSPARENT_HUGE_PAGE).max(1),
        );
        layout::ram_ranges(size, self.mmio32_start, &holes)
    }

    fn refuse_below_4_gib(
        &self,
        functions: &[PlannedFunction],
        missing: &NoRoom<Option<usize>>,
    ) -> NoRoomError {
        let windows = self.windows(&[], &[]);
        let room: u64 = windows.memory32.iter().map(|r| r.end - r.start).sum();
        let alone = port_of(functions, missing.function);
        let fits_alone = find_room(&alone, WindowKind::Memory32, &windows).is_ok();
        let whose = match missing.bar {
            BarIndex::Rom => "an expansion ROM",
            BarIndex::Bar(_) if is_64_bit(missing.kind) => {
                "behind a PCIe port a BAR that is not prefetchable"
            }
            BarIndex::Bar(_) => "a 32-bit BAR",
        };
        let why = format!(
            "{whose} is below 4 GiB, where a guest has {} at most for all its PCI devices",
            Amount(room)
        );
        let remedy = match (missing.bar, fits_alone) {
            (BarIndex::Rom, _) => "leave the ROM out: rom=off beside its --device".to_owned(),
            (BarIndex::Bar(_), false) if Self::fits_bus_0(functions, &alone, &windows) => {
                "have it on bus 0: root_port=off beside its --device".to_owned()
            }
            (BarIndex::Bar(_), false) => "no guest can have this device".to_owned(),
            (BarIndex::Bar(_), true) => format!(
                "give the VM fewer of these devices: most is needed by {}",
                needing_most(functions)
            ),
        };
        refusal(functions, missing, why, remedy)
    }

    /// Whether all that a device needs below 4 GiB would find room if it were on bus 0, where one function can be.
    fn fits_bus_0(
        functions: &[PlannedFunction],
        alone: &[Needs<Option<usize>>],
        windows: &Windows,
    ) -> bool {
        let behind = alone.iter().filter_map(|port| port.bridge.as_ref());
        let mut behind = behind.flat_map(|bridge| &bridge.functions);
        let (Some(only), None) = (behind.next(), behind.next()) else {
            return false;
        };
        let only = only.function.and_then(|index| functions.get(index));
        only.is_some_and(|only| {
            let moved = [only.clone().on_root_bus(true)];
            find_room(&needs(&moved), WindowKind::Memory32, windows).is_ok()
        })
    }

    fn refuse_above_ram(
        &self,
        functions: &[PlannedFunction],
        memory: &MemoryConfig,
        missing: &NoRoom<Option<usize>>,
    ) -> NoRoomError {
        let reach = 1_u64
            .checked_shl(self.address_bits.into())
            .unwrap_or(u64::MAX);
        let mut why = format!(
            "it is above the guest's RAM, and the host's processors address {} ({} bits)",
            Amount(reach),
            self.address_bits
        );
        let reserved = self
            .reserved
            .iter()
            .filter(|(start, last)| *start >= layout::HIGH_RAM_START && *last < reach)
            .fold(0_u64, |sum, (start, last)| {
                sum.saturating_add((last - start).saturating_add(1))
            });
        if reserved > 0 {
            why += &format!(
                ", of which the host's IOMMU keeps {} clear",
                Amount(reserved)
            );
        }
        let mut remedy = match self.most_memory(&needs(functions), memory) {
            Some(size) => format!(
                "it fits beside {} of RAM (--memory size={}G)",
                Amount(size),
                size >> 30
            ),
            None if self
                .most_memory(&port_of(functions, missing.function), memory)
                .is_some() =>
            {
                "give the VM fewer such devices".to_owned()
            }
            None => "no guest of this host can have this device".to_owned(),
        };
        if let (Some(function), BarIndex::Bar(bar)) = (function_of(functions, missing), missing.bar)
        {
            let resize = function.host.folder.join(format!("resource{bar}_resize"));
            if resize.exists() {
                remedy += &format!(
                    "; or make the BAR smaller on the host, while no driver has the device: {} \
                     lists the sizes that it can have, and takes one",
                    resize.display()
                );
            }
        }
        refusal(functions, missing, why, remedy)
    }

    /// The most RAM, in whole GiB, beside which all of `needs` finds room. Windows begin above RAM, so
    /// less never leaves less room.
    fn most_memory<F: Copy>(&self, needs: &[Needs<F>], memory: &MemoryConfig) -> Option<u64> {
        let fits = |gib: u64| self.find_room_above(needs, memory, gib << 30).is_ok();
        let (mut fitting, mut too_much) = (0, memory.size >> 30);
        if too_much > 0 && fits(too_much) {
            return Some(too_much << 30);
        }
        while too_much - fitting > 1 {
            let middle = fitting + (too_much - fitting) / 2;
            match fits(middle) {
                true => fitting = middle,
                false => too_much = middle,
            }
        }
        (fitting > 0).then_some(fitting << 30)
    }
}

/// What bus 0 needs: a port for each device, with its functions behind it, or the device itself.
fn needs(functions: &[PlannedFunction]) -> Vec<Needs<Option<usize>>> {
    behind_ports(functions.iter().map(|function| &function.host))
        .into_iter()
        .map(|behind| {
            let given = |index: usize| functions.get(index);
            let needs = behind.iter().filter_map(|behind| {
                Some(Needs {
                    function: Some(behind.index),
                    bars: given(behind.index)?.bars.clone(),
                    bridge: None,
                })
            });
            let mut needs: Vec<_> = needs.collect();
            let mut behind = behind.iter().filter_map(|behind| given(behind.index));
            if needs.len() == 1
                && behind.all(|one| one.on_root_bus)
                && let Some(alone) = needs.pop()
            {
                return alone;
            }
            Needs {
                function: None,
                bars: Vec::new(),
                bridge: Some(Behind {
                    reserve: Reserve::SMALL,
                    functions: needs,
                }),
            }
        })
        .collect()
}

/// What a function has of bus 0: itself, or the port alone that it is behind.
fn port_of(functions: &[PlannedFunction], function: Option<usize>) -> Vec<Needs<Option<usize>>> {
    let mut ports = needs(functions);
    ports.retain(|port| {
        let behind = port.bridge.iter().flat_map(|bridge| &bridge.functions);
        let mut all = behind.chain(port.bridge.is_none().then_some(port));
        all.any(|needs| needs.function == function)
    });
    ports
}

fn function_of<'a>(
    functions: &'a [PlannedFunction],
    missing: &NoRoom<Option<usize>>,
) -> Option<&'a PlannedFunction> {
    functions.get(missing.function?)
}

/// The devices that need most below 4 GiB, as a person says them.
fn needing_most(functions: &[PlannedFunction]) -> String {
    let mut most: Vec<_> = functions
        .iter()
        .map(|function| (function.below_4_gib(), function.host.name()))
        .collect();
    most.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
    let most = most.iter().take(NAMED);
    let most: Vec<_> = most
        .map(|(size, name)| format!("{name} ({})", Amount(*size)))
        .collect();
    most.join(", ")
}

const fn is_64_bit(kind: BarKind) -> bool {
    matches!(kind, BarKind::Memory64 { .. })
}

fn refusal(
    functions: &[PlannedFunction],
    missing: &NoRoom<Option<usize>>,
    why: String,
    remedy: String,
) -> NoRoomError {
    NoRoomError {
        device: function_of(functions, missing)
            .map_or_else(|| "a device".to_owned(), |function| function.host.name()),
        bar: missing.bar,
        size: missing.size,
        kind: match (missing.bar, missing.kind) {
            (BarIndex::Rom, _) | (_, BarKind::Io) => "",
            (_, BarKind::Memory32 { .. }) => ", 32-bit",
            (_, BarKind::Memory64 { prefetchable: true }) => ", 64-bit, prefetchable",
            (_, BarKind::Memory64 { .. }) => ", 64-bit, not prefetchable",
        },
        why,
        remedy,
    }
}

#[cfg(test)]
mod tests;
