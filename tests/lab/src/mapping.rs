//! The second part of the benchmark: how long it takes until an assigned device reaches 2 GiB of cold
//! guest memory, under Busway and under QEMU, in turns on one emulated host.
//!
//! Both are watched from outside in the same way, by `strace` on their ioctls only: from `exec` to the
//! end of the last mapping call, and within the mapping calls. QEMU builds its machine, does not start
//! it (`-S`) and quits; Busway is killed when its guest begins. Both map by a type1 container: QEMU maps
//! huge pages into an iommufd by their file, which Linux 6.12 does not know yet.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Parts};
use serde::Serialize;

/// Bytes of guest memory, in MiB.
const MEMORY_MIB: u64 = 2048;
/// `IOMMU_IOAS_MAP` and `VFIO_IOMMU_MAP_DMA`. linux/iommufd.h, linux/vfio.h
const MAP_CALLS: [&str; 2] = ["0x3b85", "0x3b71"];

/// What the memory is made of, and whether it is populated before it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Case {
    huge_pages: bool,
    prefault: bool,
}

const CASES: [Case; 4] = [
    Case {
        huge_pages: false,
        prefault: false,
    },
    Case {
        huge_pages: false,
        prefault: true,
    },
    Case {
        huge_pages: true,
        prefault: false,
    },
    Case {
        huge_pages: true,
        prefault: true,
    },
];

/// One start of a VMM.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Mapped {
    vmm: &'static str,
    case: Case,
    /// From exec to the end of the last mapping call.
    ready_ms: f64,
    /// Within the mapping calls.
    in_calls_ms: f64,
}

/// Measures, and prints both side by side. The device at `address` is with VFIO.
pub(crate) fn run(host: &Host, address: &str, turns: u32) -> Result<Vec<Mapped>> {
    // Memory that the emulated host itself never had would be slow to the first VMM only.
    host.run(
        "mount -o remount,size=100% /dev/shm && head -c 5G /dev/zero >/dev/shm/touched && rm /dev/shm/touched",
    )?;
    // Nor does the first of each read its program from the disk in the time that counts.
    for vmm in ["busway", "qemu"] {
        start(host, address, CASES[0], vmm)?;
    }
    let mut all = Vec::new();
    for turn in 1..=turns {
        eprintln!("mapping {MEMORY_MIB} MiB, turn {turn} of {turns}");
        for (number, case) in (0..).zip(CASES) {
            let pages = if case.huge_pages { MEMORY_MIB / 2 } else { 0 };
            host.run(&format!(
                "echo 1 >/proc/sys/vm/compact_memory 2>/dev/null\n\
                 pool=/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages\n\
                 echo {pages} >$pool; [ $(cat $pool) = {pages} ]"
            ))
            .context("the host has no huge pages to give")?;
            // Neither is always first.
            let both = match (turn + number) % 2 {
                0 => ["qemu", "busway"],
                _ => ["busway", "qemu"],
            };
            for vmm in both {
                all.push(start(host, address, case, vmm)?);
            }
        }
    }
    host.run("echo 0 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")?;
    print(&all, turns);
    Ok(all)
}

fn start(host: &Host, address: &str, case: Case, vmm: &'static str) -> Result<Mapped> {
    let kernel = Parts::inside("bzImage");
    let switch = |on| if on { "on" } else { "off" };
    let strace = "strace -f --seccomp-bpf -ttt -T -e trace=execve,ioctl -e raw=ioctl -o /lab/trace";
    let prefault = switch(case.prefault);
    let script = if vmm == "busway" {
        format!(
            "rm -f /lab/started\n\
             {strace} busway run --kernel {kernel} --serial off --device {address} \
             --platform iommufd=off --report /lab/started \
             --memory size={MEMORY_MIB}M,prefault={prefault},hugepages={} &\n\
             until [ -s /lab/started ]; do kill -0 $! || exit 1; sleep 0.2; done\n\
             kill -KILL $(pidof busway); wait $!; true\n",
            switch(case.huge_pages)
        )
    } else {
        let backend = match case.huge_pages {
            true => "memory-backend-memfd,hugetlb=on,hugetlbsize=2M",
            false => "memory-backend-ram",
        };
        format!(
            "echo quit | {strace} qemu-system-x86_64 -machine q35,accel=kvm,memory-backend=ram0 \
             -cpu host -nodefaults -no-user-config -display none -S -monitor stdio \
             -m {MEMORY_MIB} -smp 1 \
             -object {backend},id=ram0,size={MEMORY_MIB}M,prealloc={prefault},prealloc-threads=$(nproc) \
             -device pcie-root-port,id=port0,chassis=0 \
             -device vfio-pci,host={address},bus=port0\n"
        )
    };
    host.output(&script, Duration::from_secs(300))?.success()?;
    let trace = fs::read_to_string(host.share().join("trace"))?;
    let (ready, in_calls) = measure(&trace).with_context(|| format!("{vmm} mapped nothing"))?;
    ensure!(ready > 0.0, "time went backwards");
    Ok(Mapped {
        vmm,
        case,
        ready_ms: ready * 1e3,
        in_calls_ms: in_calls * 1e3,
    })
}

/// Seconds from the first line of a trace to the end of its last mapping call, and within these calls.
fn measure(trace: &str) -> Option<(f64, f64)> {
    let mut began = None;
    let mut last = None;
    let mut within = 0.0;
    // The calls that another process's line interrupted, by process.
    let mut open: BTreeMap<&str, bool> = BTreeMap::new();
    for line in trace.lines() {
        let Some((process, rest)) = line.split_once(' ') else {
            continue;
        };
        let mut words = rest.trim_start().splitn(2, ' ');
        let (Some(Ok(at)), Some(call)) = (words.next().map(str::parse::<f64>), words.next()) else {
            continue;
        };
        began.get_or_insert(at);
        let resumed = call.starts_with("<... ioctl resumed>");
        let maps = match resumed {
            true => open.remove(process).unwrap_or(false),
            false => call
                .split(", ")
                .nth(1)
                .is_some_and(|word| MAP_CALLS.contains(&word)),
        };
        if call.ends_with("<unfinished ...>") {
            open.insert(process, maps);
        } else if maps {
            let lasted: f64 = call
                .rsplit_once('<')?
                .1
                .trim_end_matches('>')
                .parse()
                .ok()?;
            within += lasted;
            last = Some(if resumed { at } else { at + lasted });
        }
    }
    Some((last? - began?, within))
}

fn print(all: &[Mapped], turns: u32) {
    println!(
        "\n{MEMORY_MIB} MiB of cold guest memory until a device reaches it, ms; \
         median (least..most) of {turns} turns"
    );
    println!("{:<44} {:>20} {:>20} {:>7}", "", "Busway", "QEMU", "ratio");
    for case in CASES {
        let what = format!(
            "{}, {}",
            if case.huge_pages {
                "hugetlb 2 MiB"
            } else {
                "THP"
            },
            if case.prefault {
                "prefault"
            } else {
                "no prefault"
            },
        );
        for (name, of) in [
            (
                "exec to mapped",
                (|mapped| mapped.ready_ms) as fn(&Mapped) -> f64,
            ),
            ("in map calls", |mapped| mapped.in_calls_ms),
        ] {
            let figures = |vmm| spread(all, vmm, case, of);
            let (ours, theirs) = (figures("busway"), figures("qemu"));
            let cell = |(median, least, most): (f64, f64, f64)| {
                format!("{median:.0} ({least:.0}..{most:.0})")
            };
            println!(
                "{:<44} {:>20} {:>20} {:>7.2}",
                format!("{what}: {name}"),
                cell(ours),
                cell(theirs),
                ours.0 / theirs.0
            );
        }
    }
}

/// Median, least and most.
fn spread(all: &[Mapped], vmm: &str, case: Case, of: fn(&Mapped) -> f64) -> (f64, f64, f64) {
    let figures = all.iter().filter(|one| one.vmm == vmm && one.case == case);
    crate::figures::median_and_spread(figures.map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_timed_to_their_end_also_where_another_thread_comes_between() {
        let trace = "\
100 10.000000 execve(\"/x\", 0x1 /* 2 vars */) = 0 <0.001>\n\
100 10.500000 ioctl(0x5, 0xae01, 0) = 6 <0.001>\n\
101 11.000000 ioctl(0x7, 0x3b85, 0x7ffc <unfinished ...>\n\
100 11.100000 ioctl(0x5, 0xae03, 0) = 6 <0.002>\n\
101 12.000000 <... ioctl resumed>)   = 0 <1.000>\n\
100 12.500000 ioctl(0x7, 0x3b85, 0x7ffc) = 0 <0.250>\n\
100 13.000000 ioctl(0x5, 0xae80, 0 <unfinished ...>\n\
100 14.000000 +++ killed by SIGKILL +++\n";
        assert_eq!(measure(trace), Some((2.75, 1.25)));
        assert_eq!(measure("100 10.0 execve(\"/x\") = 0 <0.1>\n"), None);
    }
}
