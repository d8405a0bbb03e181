//! RAM that comes and goes while a machine runs: where it can be, whether devices could reach all of it, and how much of
//! it the guest is to have.

use std::ops::Range;

use busway_iommu::{DmaSpace, IovaRange};

use super::assembly::Machine;
use super::requests::{Answer, Asker, RequestError};
use super::virtio::ComingMemory;
use crate::config::VmConfig;
use crate::memory::{Amount, Blocks};
use crate::monitor::{self, Source};

/// Mappings that are kept for other things than blocks of RAM: RAM that the guest starts with, and BARs.
const OTHER_MAPPINGS: u64 = 256;

/// RAM that is to come cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PluggableError {
    /// it lies beyond what the host's processors address
    #[error(
        "hotplug_size=: RAM that is to come would end at {end:#x}, and the host's processors address {} ({bits} \
         bits): ask for less",
        Amount(1_u64.checked_shl((*bits).into()).unwrap_or(u64::MAX))
    )]
    Place {
        /// The first address behind it.
        end: u64,
        /// Bits of an address.
        bits: u8,
    },
    /// it lies where devices' IOMMUs do not map
    #[error(
        "hotplug_size=: RAM that is to come lies at {:#x}..{:#x}, and the IOMMU of the assigned devices maps none \
         of it from {gap:#x} on: ask for less",
        range.start, range.end
    )]
    Reach {
        /// Where it lies.
        range: Range<u64>,
        /// The first address that is not mapped.
        gap: u64,
    },
    /// it takes more mappings than there are
    #[error(
        "hotplug_size= takes {needed} mappings for the assigned devices, one for each block of {}, and the VFIO \
         container takes {left} more, of which {OTHER_MAPPINGS} are for other things: ask for less, or raise its limit \
         before Busway starts: `echo {} > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit`",
        Amount(*block), needed.saturating_add(OTHER_MAPPINGS).next_multiple_of(65535)
    )]
    Mappings {
        /// How many it takes.
        needed: u64,
        /// How many there are.
        left: u64,
        /// Bytes of a block.
        block: u64,
    },
}

/// That devices in `space` will reach each of the blocks of RAM that can come: `pieces` of the guest's addresses. Known is
/// what the kernel says when a device is attached.
///
/// # Errors
/// [`PluggableError`]
pub(super) fn check_reach(
    pieces: &[(Range<u64>, Blocks)],
    space: &dyn DmaSpace,
) -> Result<(), PluggableError> {
    let Some(block) = pieces.iter().map(|(_, blocks)| blocks.block_size()).min() else {
        return Ok(());
    };
    // What is plugged is mapped by now.
    let needed = pieces.iter().map(|(_, blocks)| {
        let plugged = blocks.plugged_bytes().checked_div(blocks.block_size());
        blocks.count().saturating_sub(plugged.unwrap_or(0))
    });
    let needed = needed.fold(0, u64::saturating_add);
    if let Some(left) = space.room()
        && left < needed.saturating_add(OTHER_MAPPINGS)
    {
        return Err(PluggableError::Mappings {
            needed,
            left,
            block,
        });
    }
    let usable = space.usable_ranges().unwrap_or_default();
    for (range, _) in pieces {
        if let Some(gap) = first_gap(range, &usable) {
            return Err(PluggableError::Reach {
                range: range.clone(),
                gap,
            });
        }
    }
    Ok(())
}

/// The first address of `range` that is in none of the `usable` ranges, which are ascending; nothing where none is known.
fn first_gap(range: &Range<u64>, usable: &[IovaRange]) -> Option<u64> {
    let mut next = range.start;
    for part in usable {
        if part.start <= next && part.last >= next {
            next = part.last.checked_add(1)?;
        }
    }
    (!usable.is_empty() && next < range.end).then_some(next)
}

impl Machine {
    /// Has the guest have `bytes` bytes of RAM, with those that it started with. It is told; nobody waits for what it makes
    /// of it.
    pub(super) fn resize_memory(&self, bytes: u64, asker: Asker) {
        match &self.memory_devices {
            Some(devices) => devices.resize(self.ram.size(), bytes, asker),
            None => asker.answer(self.resize_by_virtio(bytes)),
        }
    }

    fn resize_by_virtio(&self, bytes: u64) -> Result<Answer, RequestError> {
        let first = self.ram.size();
        let memory = self.virtio.memory();
        let Some(memory) = memory.iter().find(|memory| memory.zone.is_none()) else {
            return match bytes == first {
                true => Ok(Answer::Done),
                false => Err(no_room(self.virtio.memory().is_empty())),
            };
        };
        let Some(more) = bytes.checked_sub(first) else {
            return Err(RequestError::Invalid(format!(
                "{bytes} bytes of RAM are less than the {first} that the guest started with, which stay"
            )));
        };
        set(memory, more)?;
        log::info!(
            "the guest is to have {bytes} bytes of RAM, {more} of them plugged, as the control socket asks"
        );
        Ok(Answer::Done)
    }

    /// Has the guest have `bytes` bytes of RAM of the zone called `id`, with those that it started with. It is told; nobody
    /// waits for what it makes of it.
    pub(super) fn resize_zone(&self, id: &str, bytes: u64) -> Result<Answer, RequestError> {
        let more = to_plug(self.started_as(), id, bytes)?;
        let mut memory = self.virtio.memory().iter();
        let Some(memory) = memory.find(|memory| memory.zone.as_deref() == Some(id)) else {
            return match more {
                0 => Ok(Answer::Done),
                _ => Err(RequestError::Invalid(format!(
                    "less can come to memory zone `{id}` than one of the host's huge pages, which it is made of: start the \
                     VM with a larger hotplug_size= of its --memory-zone"
                ))),
            };
        };
        set(memory, more)?;
        log::info!(
            "the guest is to have {bytes} bytes of RAM of zone `{id}`, {more} of them plugged, as the control socket asks"
        );
        Ok(Answer::Done)
    }

    /// The guest starts anew: without what it had plugged by virtio, whose driver finds that it is to have as much, and with
    /// what has come by ACPI. No vCPU may run and no device.
    pub(super) fn unplug_memory(&self) {
        if let Some(devices) = &self.memory_devices {
            devices.on_restart();
        }
        for memory in self.virtio.memory() {
            if let Err(error) = memory.target.on_restart() {
                log::warn!("the guest starts anew with memory that was plugged: {error}");
            }
        }
    }
}

/// Bytes that are to be plugged for a VM of this configuration to have `bytes` bytes of RAM of the zone called `id`.
///
/// # Errors
/// [`RequestError`]: there is no such zone, or it cannot have so many.
pub(super) fn to_plug(config: &VmConfig, id: &str, bytes: u64) -> Result<u64, RequestError> {
    let zone = config.zone(id).map_err(RequestError::NoZone)?;
    let more = zone.to_plug(bytes);
    more.map_err(|error| RequestError::Invalid(error.to_string()))
}

/// Why a VM has no other amount of RAM. `fixed`: none can come to its zones either.
pub(super) fn no_room(fixed: bool) -> RequestError {
    let why = match fixed {
        true => {
            "the VM was started without room for another amount of RAM: start it with --memory hotplug_size=SIZE \
             (memory.hotplug_size)"
        }
        false => {
            "RAM comes to each of the VM's memory zones by itself: ask for a zone's (vm.resize-zone, busway ctl \
             resize-zone)"
        }
    };
    RequestError::Invalid(why.to_owned())
}

/// Has a device's driver plug and unplug until the guest has `bytes` bytes plugged.
fn set(memory: &ComingMemory, bytes: u64) -> Result<(), RequestError> {
    let set = memory.target.set(bytes);
    set.map_err(|error| RequestError::Invalid(error.to_string()))?;
    monitor::tell(Source::Vm, "resizing", &[]);
    monitor::tell(Source::Vm, "resized", &[]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_out_of_reach_is_found() {
        let usable = |ranges: &[(u64, u64)]| -> Vec<IovaRange> {
            let range = |&(start, last)| IovaRange { start, last };
            ranges.iter().map(range).collect()
        };
        let range = 0x4000..0x8000;
        for (ranges, gap) in [
            (&[(0, 0xffff)][..], None),
            (&[(0, 0x5fff), (0x6000, 0x7fff)], None),
            (&[(0, 0x5fff)], Some(0x6000)),
            (&[(0, 0x5fff), (0x7000, 0xffff)], Some(0x6000)),
            (&[(0x5000, 0xffff)], Some(0x4000)),
            (&[(0, 0xfff)], Some(0x4000)),
            (&[(0, u64::MAX)], None),
            (&[], None),
        ] {
            assert_eq!(first_gap(&range, &usable(ranges)), gap, "{ranges:x?}");
        }
    }
}
