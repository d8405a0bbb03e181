//! What `/metrics` says of RAM that comes and goes.

use super::{Family, Number, device, totals};
use crate::machine::DeviceSeen;
use crate::virtio::Totals;
use crate::virtio::mem::MemTotals;

/// RAM that comes and goes by a memory device.
pub(super) fn of_memory(devices: &[&DeviceSeen]) -> Vec<Family> {
    let memory: Vec<_> = totals(devices)
        .filter_map(|(id, totals)| match totals {
            Totals::Mem(memory) => Some((id, memory)),
            _ => None,
        })
        .collect();
    let whole = |family: Family, of: fn(&MemTotals) -> u64| {
        family.of(&memory, |(id, memory)| {
            (vec![device(id)], Number::Whole(of(memory)))
        })
    };
    let gauge = Family::gauge;
    vec![
        whole(
            gauge(
                "busway_memory_requested",
                "Bytes of RAM that the guest is to have plugged",
            )
            .in_bytes(),
            |memory| memory.requested,
        ),
        whole(
            gauge(
                "busway_memory_plugged",
                "Bytes of RAM that the guest has plugged",
            )
            .in_bytes(),
            |memory| memory.plugged,
        ),
    ]
}
