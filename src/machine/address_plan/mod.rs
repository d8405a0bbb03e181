//! Where the guest's RAM and windows lie, found out from the BARs' sizes before any of it is taken.
//!
//! Devices are opened while RAM is populated, so what they need below 4 GiB has to be known before
//! from what sysfs says of them.

mod planned;
mod plugged;
mod shares;

use std::ops::Range;

use busway_iommu::{IovaRange, keep_clear};
use busway_pci::{BarIndex, BarKind, Needs, NoRoom, WindowKind, Windows, find_room};

use super::pluggable::PluggableError;
use crate::arch::layout;
use crate::config::MemoryToPlan;
use crate::memory::Amount;
pub(super) use planned::PlannedFunction;
use planned::{needing_most, needs, needs_of_segments, port_of};
pub(super) use plugged::PluggedRoom;
use shares::{share, share_memory};

/// Huge pages that RAM is aligned for where it is made of ordinary ones.
const TRANSPARENT_HUGE_PAGE: u64 = 2 << 20;

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

/// What a PCI segment has of the guest's addresses.
#[derive(Clone, Debug)]
pub(super) struct SegmentAddresses {
    /// Where its BARs may be.
    pub(super) windows: Windows,
    /// Where its configuration space is.
    pub(super) ecam: Range<u64>,
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
    functions: Vec<PlannedFunction>,
    /// What they need of bus 0 of each PCI segment.
    needs: Vec<Vec<Needs<Option<usize>>>>,
}

impl AddressPlan {
    /// Finds room for all BARs of `functions`, which come in the order in which they were given, in so many `segments`.
    /// The 32-bit window starts at 3 GiB unless they need a larger one.
    ///
    /// # Errors
    /// [`NoRoomError`], which names a BAR and what helps
    pub(super) fn new(
        memory: &MemoryToPlan,
        functions: &[PlannedFunction],
        reserved: Vec<(u64, u64)>,
        address_bits: u8,
        firmware: bool,
        room: PluggedRoom,
        segments: u16,
    ) -> Result<Self, NoRoomError> {
        let needs = needs_of_segments(functions, segments);
        let mut plan = Self {
            mmio32_start: layout::MMIO32_START,
            reserved,
            address_bits,
            firmware,
            plugged: room.first.saturating_add(room.later),
            functions: functions.to_vec(),
            needs: needs.clone(),
        };
        let starts = match firmware {
            true => &layout::FIRMWARE_MMIO32_STARTS[..],
            false => &layout::MMIO32_STARTS,
        };
        let mut below = Ok(());
        for start in starts {
            plan.mmio32_start = *start;
            let windows = plan.windows(&[], &[]);
            let kind = WindowKind::Memory32;
            below = share_memory(&windows.memory32, kind, &needs).map(drop);
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
        if above.is_err()
            || plan
                .plugged_area(plan.top_of_memory(memory), &[])
                .is_empty()
        {
            plan.plugged = room.first;
            above = plan.find_room_above(&needs, memory, memory.size);
        }
        match above {
            Ok(()) => Ok(plan),
            Err(missing) => Err(plan.refuse_above_ram(functions, memory, &missing)),
        }
    }

    /// That RAM which can be plugged finds its place, where there is any.
    ///
    /// # Errors
    /// [`PluggableError::Place`]: it finds no place.
    pub(super) fn pluggable(
        &self,
        memory: &MemoryToPlan,
    ) -> Result<Vec<Range<u64>>, PluggableError> {
        let ranges = self.pluggable_beside(memory, memory.size);
        let end = ranges.last().map_or(0, |range| range.end);
        let bits = self.address_bits;
        let reach = 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX);
        match end > reach {
            true => Err(PluggableError::Place { end, bits }),
            false => Ok(ranges),
        }
    }

    /// Where it can be plugged beside RAM of `size` bytes, wherever that is.
    fn pluggable_beside(&self, memory: &MemoryToPlan, size: u64) -> Vec<Range<u64>> {
        let holes = self.holes_of(memory);
        let ram = layout::ram_ranges(size, self.mmio32_start, &holes);
        let top = ram.last().map_or(0, |range| range.end);
        layout::pluggable_ranges(memory.pluggable.iter().copied(), top, &holes)
    }

    /// The holes that RAM goes round.
    fn holes_of(&self, memory: &MemoryToPlan) -> Vec<Range<u64>> {
        layout::holes(
            self.reserved.iter().copied(),
            memory.page.unwrap_or(TRANSPARENT_HUGE_PAGE).max(1),
        )
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

    fn top_of_memory(&self, memory: &MemoryToPlan) -> u64 {
        let ram = self.memory_ranges(memory, memory.size);
        ram.last().map_or(0, |range| range.end)
    }

    /// What each PCI segment has of the `windows`.
    ///
    /// # Errors
    /// [`NoRoomError`]: what the devices reach leaves less room than was planned for.
    pub(super) fn share(&self, windows: &Windows) -> Result<Vec<Windows>, NoRoomError> {
        if self.needs.len() == 1 {
            return Ok(vec![windows.clone()]);
        }
        share(windows, &self.needs).map_err(|missing| {
            let why = format!(
                "each PCI segment has a part of the {} alone",
                missing.window
            );
            let remedy = "have fewer segments, or fewer empty slots in them".to_owned();
            refusal(&self.functions, &missing, why, remedy)
        })
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
        needs: &[Vec<Needs<F>>],
        memory: &MemoryToPlan,
        size: u64,
    ) -> Result<(), NoRoom<F>> {
        let ram = self.memory_ranges(memory, size);
        let windows = self.windows(&ram, &[]);
        share_memory(&windows.memory64, WindowKind::Memory64, needs).map(drop)
    }

    /// Where RAM of `size` bytes would lie, and what can be plugged beside it.
    fn memory_ranges(&self, memory: &MemoryToPlan, size: u64) -> Vec<Range<u64>> {
        let mut ram = layout::ram_ranges(size, self.mmio32_start, &self.holes_of(memory));
        ram.extend(self.pluggable_beside(memory, size));
        ram
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
        memory: &MemoryToPlan,
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
        let fixed = MemoryToPlan {
            pluggable: Vec::new(),
            ..memory.clone()
        };
        let all = &self.needs;
        let mut remedy = match self.most_memory(all, memory) {
            _ if !memory.pluggable.is_empty()
                && self.find_room_above(all, &fixed, memory.size).is_ok() =>
            {
                "have less RAM come while the guest runs (hotplug_size=)".to_owned()
            }
            Some(size) => format!(
                "it fits beside {} of RAM (--memory size={}G)",
                Amount(size),
                size >> 30
            ),
            None if self
                .most_memory(&[port_of(functions, missing.function)], memory)
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
    fn most_memory<F: Copy>(&self, needs: &[Vec<Needs<F>>], memory: &MemoryToPlan) -> Option<u64> {
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

fn function_of<'a>(
    functions: &'a [PlannedFunction],
    missing: &NoRoom<Option<usize>>,
) -> Option<&'a PlannedFunction> {
    functions.get(missing.function?)
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
