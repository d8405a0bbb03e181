//! What `/metrics` says of virtio disks, balloons and NICs.

use super::{Family, Number, device, totals};
use crate::machine::DeviceSeen;
use crate::virtio::balloon::BalloonTotals;
use crate::virtio::{DiskTotals, NetTotals, Totals};

/// By the names that the host's own disks have them by, in the exporter of nodes.
pub(super) fn of_disks(devices: &[&DeviceSeen]) -> Vec<Family> {
    let disks: Vec<_> = totals(devices)
        .filter_map(|(id, totals)| match totals {
            Totals::Disk(disk) => Some((id, disk)),
            _ => None,
        })
        .collect();
    let whole = |family: Family, of: fn(&DiskTotals) -> u64| {
        family.of(&disks, |(id, disk)| {
            (vec![device(id)], Number::Whole(of(disk)))
        })
    };
    let micros = |family: Family, of: fn(&DiskTotals) -> u64| {
        family.in_seconds().of(&disks, |(id, disk)| {
            (vec![device(id)], Number::Micros(of(disk)))
        })
    };
    let counter = Family::counter;
    vec![
        whole(
            counter("busway_disk_reads_completed", "Reads that went well"),
            |disk| disk.reads.ops,
        ),
        whole(
            counter("busway_disk_read", "Bytes that were read").in_bytes(),
            |disk| disk.reads.bytes,
        ),
        micros(
            counter("busway_disk_read_time", "Time that reads took, together"),
            |disk| disk.reads.micros,
        ),
        whole(
            counter("busway_disk_writes_completed", "Writes that went well"),
            |disk| disk.writes.ops,
        ),
        whole(
            counter("busway_disk_written", "Bytes that were written").in_bytes(),
            |disk| disk.writes.bytes,
        ),
        micros(
            counter("busway_disk_write_time", "Time that writes took, together"),
            |disk| disk.writes.micros,
        ),
        whole(
            counter(
                "busway_disk_others_completed",
                "Flushes, discards and writes of zeroes that went well",
            ),
            |disk| disk.others,
        ),
        whole(
            counter("busway_disk_errors", "Requests that the host refused"),
            |disk| disk.errors,
        ),
    ]
}

/// A guest's balloon, and what the guest says of its memory.
pub(super) fn of_balloons(devices: &[&DeviceSeen]) -> Vec<Family> {
    let balloons: Vec<_> = totals(devices)
        .filter_map(|(id, totals)| match totals {
            Totals::Balloon(balloon) => Some((id, balloon)),
            _ => None,
        })
        .collect();
    let whole = |family: Family, of: fn(&BalloonTotals) -> u64| {
        family.of(&balloons, |(id, balloon)| {
            (vec![device(id)], Number::Whole(of(balloon)))
        })
    };
    let stat = |family: Family, name: &str| {
        let said: Vec<_> = balloons
            .iter()
            .filter_map(|(id, balloon)| {
                let (_, value) = balloon.stats().find(|(stat, _)| *stat == name)?;
                Some((*id, value))
            })
            .collect();
        family.of(&said, |(id, value)| {
            (vec![device(id)], Number::Whole(*value))
        })
    };
    let (counter, gauge) = (Family::counter, Family::gauge);
    vec![
        whole(
            gauge("busway_balloon_target", "Bytes that the balloon is to have").in_bytes(),
            |balloon| balloon.target,
        ),
        whole(
            gauge("busway_balloon_actual", "Bytes that the balloon has").in_bytes(),
            |balloon| balloon.actual,
        ),
        whole(
            gauge(
                "busway_balloon_given",
                "Bytes of the balloon that the host has back",
            )
            .in_bytes(),
            |balloon| balloon.given,
        ),
        whole(
            gauge(
                "busway_balloon_unmapped",
                "Bytes of the balloon that devices do not reach (vfio=remap)",
            )
            .in_bytes(),
            |balloon| balloon.unmapped,
        ),
        whole(
            counter(
                "busway_balloon_remap_failures",
                "Blocks of the balloon that could not be unmapped, given back or mapped again",
            ),
            |balloon| balloon.failures,
        ),
        whole(
            gauge(
                "busway_balloon_inhibited",
                "Whether assigned devices keep the guest's memory from going back",
            ),
            |balloon| balloon.inhibited.into(),
        ),
        whole(
            counter(
                "busway_balloon_reported",
                "Bytes of free memory that went back to the host",
            )
            .in_bytes(),
            |balloon| balloon.reported,
        ),
        stat(
            gauge(
                "busway_guest_memory_free",
                "Bytes that the guest says are free",
            )
            .in_bytes(),
            "free_bytes",
        ),
        stat(
            gauge(
                "busway_guest_memory_available",
                "Bytes that the guest says it could have without swapping",
            )
            .in_bytes(),
            "available_bytes",
        ),
    ]
}

/// By the names that the host's own interfaces have them by. Receiving is the guest's.
pub(super) fn of_nics(devices: &[&DeviceSeen]) -> Vec<Family> {
    let nics: Vec<_> = totals(devices)
        .filter_map(|(id, totals)| match totals {
            Totals::Net(net) => Some((id, net)),
            _ => None,
        })
        .collect();
    let whole = |family: Family, of: fn(&NetTotals) -> u64| {
        family.of(&nics, |(id, nic)| {
            (vec![device(id)], Number::Whole(of(nic)))
        })
    };
    let counter = Family::counter;
    vec![
        whole(
            counter("busway_network_receive", "Bytes that the guest received").in_bytes(),
            |nic| nic.rx_bytes,
        ),
        whole(
            counter(
                "busway_network_receive_packets",
                "Packets that the guest received",
            ),
            |nic| nic.rx_frames,
        ),
        whole(
            counter(
                "busway_network_receive_drop",
                "Packets that the guest had no room for",
            ),
            |nic| nic.rx_dropped,
        ),
        whole(
            counter("busway_network_transmit", "Bytes that the guest sent").in_bytes(),
            |nic| nic.tx_bytes,
        ),
        whole(
            counter(
                "busway_network_transmit_packets",
                "Packets that the guest sent",
            ),
            |nic| nic.tx_frames,
        ),
        whole(
            counter(
                "busway_network_transmit_drop",
                "Packets of the guest's that the host did not take",
            ),
            |nic| nic.tx_dropped,
        ),
        whole(
            counter(
                "busway_network_transmit_spoofed",
                "Packets of the guest's that were dropped for they were from another address than the NIC's",
            ),
            |nic| nic.tx_spoofed,
        ),
    ]
}
