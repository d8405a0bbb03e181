//! Disks: the host's own drive, the same by virtio-blk of Busway's and of QEMU's, raw and as qcow2, and passed through.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestRun, Host, HostConfig, Kernel, Vmm};
use clap::Args;

use super::fio::{self, AREA_MIB, Load, Pattern};
use super::result::{Reading, Results, SetUp, Workload};
use super::{Bench, IoArgs, Turn, interrupts, marked, table};

/// Disks by virtio-blk, and a drive passed through, on one host in turns.
#[derive(Debug, Args)]
pub(crate) struct DisksArgs {
    #[command(flatten)]
    io: IoArgs,
    /// Queues of the disk, each with a processor of the guest's; of several numbers, each in its turns [1, and 4 with --all].
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=16))]
    queues: Vec<u32>,
}

/// The set-up by which all are divided.
const REFERENCE: &str = "qemu-direct";

const SET_UPS: &[SetUp] = &[
    SetUp {
        name: "host",
        title: "the host's own drive",
        counterpart: None,
    },
    SetUp {
        name: "busway-direct",
        title: "Busway: raw, direct",
        counterpart: Some("qemu-direct"),
    },
    SetUp {
        name: "busway-cached",
        title: "Busway: raw, host's cache",
        counterpart: Some("qemu-cached"),
    },
    SetUp {
        name: "busway-qcow2",
        title: "Busway: qcow2, direct",
        counterpart: Some("qemu-qcow2"),
    },
    SetUp {
        name: "busway-assigned",
        title: "Busway: passed through",
        counterpart: Some("qemu-assigned"),
    },
    SetUp {
        name: REFERENCE,
        title: "QEMU: raw, direct, iothread",
        counterpart: None,
    },
    SetUp {
        name: "qemu-cached",
        title: "QEMU: raw, host's cache",
        counterpart: None,
    },
    SetUp {
        name: "qemu-qcow2",
        title: "QEMU: qcow2, direct",
        counterpart: None,
    },
    SetUp {
        name: "qemu-assigned",
        title: "QEMU: passed through",
        counterpart: None,
    },
];

/// What is measured only with `--all`.
const RARE: &[&str] = &["qemu-cached", "qemu-qcow2", "qemu-assigned"];

/// The qcow2 image, on a file system of a drive of its own.
const IMAGE: &str = "/run/bench/disk.qcow2";

/// Measures, and prints a table.
pub(crate) fn run(arguments: &DisksArgs) -> Result<()> {
    let io = &arguments.io;
    let mut results = Results {
        workloads: Vec::new(),
        set_ups: io.chosen(SET_UPS, RARE, REFERENCE),
        reference: REFERENCE,
        readings: Vec::new(),
    };
    let queues: &[u32] = match (arguments.queues.as_slice(), io.all) {
        ([], false) => &[1],
        ([], true) => &[1, 4],
        (queues, _) => queues,
    };
    for &queues in queues {
        let loads = loads(queues, io.all);
        let bench = Bench {
            what: "disks",
            arguments: io,
            cpus: queues,
            host: HostConfig::new(Kernel::Iommufd)
                .cpus(queues + 2)
                .device(Device::nvme("nv0", 192))
                .device(Device::nvme("nv1", 256)),
            prepare: &prepare,
            measure: &|turn, set_up| measure(turn, set_up, &loads),
        };
        let workloads = loads.iter().map(|load| Workload {
            name: load.name(),
            title: load.title(),
            operation: "request",
            decimals: 0,
        });
        bench.run(workloads.collect(), &mut results, "A guest's disk")?;
    }
    print!("{}", table::render(&results));
    Ok(())
}

fn loads(queues: u32, all: bool) -> Vec<Load> {
    let load = |pattern, writes, depth| Load {
        pattern,
        writes,
        depth,
        queues,
    };
    use Pattern::{Random, Sequential};
    if !all {
        return vec![
            load(Random, false, 1),
            load(Random, false, 16),
            load(Random, true, 16),
            load(Sequential, false, 16),
        ];
    }
    let mut loads = Vec::new();
    for pattern in [Random, Sequential] {
        for writes in [false, true] {
            loads.extend([1, 16, 64].map(|depth| load(pattern, writes, depth)));
        }
    }
    loads
}

/// Data on the drive, as much as loads read, and the same as qcow2.
fn prepare(host: &Host) -> Result<()> {
    let [raw, other] = [drive(host, "NV0")?, drive(host, "NV1")?];
    host.run(&format!(
        "set -e; dd if=/dev/zero of={raw} bs=1M count={AREA_MIB} oflag=direct status=none\n\
         mkfs.ext4 -q {other}; mkdir -p /run/bench; mount {other} /run/bench\n\
         qemu-img create -q -f qcow2 -o preallocation=full {IMAGE} {AREA_MIB}M"
    ))
    .map(drop)
}

/// The host's node of a drive, by its serial number: its number is another each time that it comes back.
fn drive(host: &Host, serial: &str) -> Result<String> {
    let node = host.run(&format!(
        "set -e; udevadm settle; for each in /sys/class/nvme/nvme*; do\n\
         ! grep -qw {serial} $each/serial || {{ each=/dev/${{each##*/}}n1; [ -b $each ]; echo $each; }}; done"
    ))?;
    ensure!(
        !node.is_empty(),
        "the host has no drive with the serial number {serial}"
    );
    Ok(node.trim().to_owned())
}

fn measure(turn: &Turn<'_>, set_up: &SetUp, loads: &[Load]) -> Result<Vec<Reading>> {
    match set_up.name {
        "host" if turn.counts_calls => Ok(Vec::new()),
        "host" => loads
            .iter()
            .map(|load| of_the_host(turn, set_up, load))
            .collect(),
        name if name.ends_with("-assigned") => {
            let address = turn.host.address("nv0")?;
            turn.host.run(&format!("busway device bind {address}"))?;
            let vmm = if name.starts_with("busway") {
                Vmm::Busway
            } else {
                Vmm::Qemu
            };
            let readings = in_a_guest(
                turn,
                set_up,
                loads,
                turn.guest(vmm).device(&address),
                "/dev/nvme0n1",
            );
            // It goes back to the host in either case, for the turn may begin anew.
            turn.host.run(&format!("busway device unbind {address}"))?;
            readings
        }
        name => {
            let raw = drive(turn.host, "NV0")?;
            let run = virtio(turn, name, &raw)?;
            in_a_guest(turn, set_up, loads, run, "/dev/vda")
        }
    }
}

/// A guest with a virtio disk.
fn virtio(turn: &Turn<'_>, name: &str, raw: &str) -> Result<GuestRun> {
    let queues = turn.cpus;
    let (vmm, kind) = name.split_once('-').context("a set-up has two words")?;
    if vmm == "busway" {
        let disk = match kind {
            "direct" => format!("path={raw},direct=on"),
            "cached" => format!("path={raw}"),
            _ => format!("path={IMAGE},image_type=qcow2,direct=on"),
        };
        let disk = format!("{disk},num_queues={queues},queue_size=256");
        return Ok(turn.guest(Vmm::Busway).args(&["--disk", &disk]));
    }
    let drive = match kind {
        "direct" => format!("file={raw},format=raw,cache=none"),
        "cached" => format!("file={raw},format=raw,cache=writeback"),
        _ => format!("file={IMAGE},format=qcow2,cache=none"),
    };
    Ok(turn.guest(Vmm::Qemu).args(&[
        "-object",
        "iothread,id=io",
        "-drive",
        &format!("{drive},if=none,id=disk,aio=io_uring"),
        "-device",
        &format!("virtio-blk-pci,drive=disk,iothread=io,num-queues={queues},queue-size=256"),
    ]))
}

const REPORT: &str = "/tmp/fio";

fn of_the_host(turn: &Turn<'_>, set_up: &SetUp, load: &Load) -> Result<Reading> {
    let raw = drive(turn.host, "NV0")?;
    let said = turn.host.run(&format!(
        "set -e; {}before=$(interrupts)\ntaskset -c 1-{} {}\necho $(($(interrupts) - before)); cat {REPORT}",
        interrupts("nvme[0-9]+q"),
        turn.cpus + 1,
        load.command(&raw, turn.seconds, REPORT)
    ))?;
    let (interrupts, report) = said.split_once('\n').context("fio's report is not there")?;
    let done = fio::parse(report, load)?;
    let interrupts: f64 = interrupts.parse()?;
    Ok(Reading {
        turn: turn.number,
        set_up: set_up.name,
        workload: load.name(),
        rate: Some(done.per_second),
        p99_us: done.p99_us,
        exits: None,
        interrupts: Some(interrupts / done.requests),
        calls: None,
    })
}

fn in_a_guest(
    turn: &Turn<'_>,
    set_up: &SetUp,
    loads: &[Load],
    run: GuestRun,
    disk: &str,
) -> Result<Vec<Reading>> {
    let each = loads.iter().map(|load| {
        let command = load.command(disk, turn.seconds, REPORT);
        marked(&load.name(), &command, REPORT)
    });
    let script = interrupts("virtio[0-9]+-req|nvme[0-9]+q") + &each.collect::<String>();
    let seconds = 120 + loads.len() as u64 * (u64::from(turn.seconds) * 2 + 15);
    let run = run
        .programs()
        .limit(Duration::from_secs(seconds))
        .script(&script);
    let guest = turn.host.guest(&run)?.success()?;
    let reading = |load: &Load| {
        let done = fio::parse(guest.block(&load.name())?, load)?;
        let rate = (done.requests, done.per_second);
        let reading = turn.reading(set_up, &load.name(), rate, &guest)?;
        let p99_us = done.p99_us.filter(|_| !turn.counts_calls);
        Ok(Reading { p99_us, ..reading })
    };
    loads.iter().map(reading).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_there_are_few_loads_and_with_all_each_of_them_once() {
        assert_eq!(loads(1, false).len(), 4);
        let mut names: Vec<_> = loads(4, true).iter().map(Load::name).collect();
        assert_eq!(names.len(), 12);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 12);
    }

    #[test]
    fn every_counterpart_is_a_set_up_of_qemus() {
        for set_up in SET_UPS {
            let Some(counterpart) = set_up.counterpart else {
                continue;
            };
            assert!(counterpart.starts_with("qemu-"), "{counterpart}");
            assert!(SET_UPS.iter().any(|each| each.name == counterpart));
        }
        assert!(
            RARE.iter()
                .all(|rare| SET_UPS.iter().any(|each| each.name == *rare))
        );
    }
}
