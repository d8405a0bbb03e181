//! The benchmark: Busway and QEMU given the same drive and guest, in turns, on one emulated host.
//!
//! The machine below is slow and noisy, so figures stand side by side from one run, as medians with
//! their spread; ratios and counts carry over to real hosts, absolute speed does not.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::{fmt, fs};

use anyhow::{Context, Result};
use busway_lab::{
    Device, GuestKernel, GuestResult, GuestRun, Host, HostConfig, Kernel, Profile, Snapshot, Vmm,
    build_busway, may_be_the_emulators,
};
use clap::Args;
use serde::Serialize;

use crate::mapping;

const MEMORY_MIB: u64 = 512;
/// Reads under way, for each of the guest's processors.
const DEPTH: u32 = 16;

/// How to measure.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Turns of each VMM with the drive; 0 leaves it out.
    #[arg(long, default_value_t = 5)]
    turns: u32,
    /// Seconds of random reads a turn.
    #[arg(long, default_value_t = 8)]
    seconds: u32,
    /// Processors of the guest, each with a queue of the drive's.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Leave QEMU its HPET, for which its main thread works beside the guest.
    #[arg(long)]
    hpet: bool,
    /// Print each of KVM's counters, too: what the exits were.
    #[arg(long)]
    counters: bool,
    /// Turns of each VMM for the time to map memory; 0 leaves it out.
    #[arg(long, default_value_t = 3)]
    mapping_turns: u32,
    /// Write every figure to a file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What one turn of one VMM gave.
#[derive(Debug, Clone, Serialize)]
struct Turn {
    vmm: &'static str,
    reads_per_second: f64,
    /// Exits a read meanwhile.
    exits_per_read: f64,
    /// Interrupts of the drive's a read meanwhile: how many reads it tells of with one.
    interrupts_per_read: f64,
    /// Exits a second of the vCPUs' time where the guest does nothing but spin: timers'. They are taken off the next three.
    exits_per_second: f64,
    /// Exits for each interrupt that the drive sent during the reads.
    exits_per_interrupt: f64,
    /// Exits a read where [`DEPTH`] are asked for at once, and the next when all are there.
    exits_per_read_of_many: f64,
    /// Exits a read with one read under way at a time: as many interrupts as reads.
    exits_per_lone_read: f64,
    mmio_exits_per_read: f64,
    boot_ms: f64,
    own_pss_kib: f64,
    own_dirty_kib: f64,
    /// KVM's counters during the reads, each divided by their number.
    counters_per_read: BTreeMap<String, f64>,
}

/// Measures, and prints both side by side.
pub(crate) fn run(arguments: &BenchArgs) -> Result<()> {
    // Room for 2 GiB of huge pages beside 2 GiB of other memory.
    let config = HostConfig::new(Kernel::Small)
        .memory_mib(6144)
        .cpus(arguments.cpus + 2)
        .device(Device::nvme("nv0", 256));
    let host = Host::boot(config)?;
    host.install(&build_busway(Profile::Release)?)?;
    let address = host.address("nv0")?;
    // Interrupts that are asked for from now on come on the first processor; the VMMs run on the others, one for each
    // vCPU and one for the rest of their threads. Where they share one, what exits there are is a matter of who
    // preempts whom: a vCPU that waits for its turn gets many completions by one interrupt.
    host.run(&format!(
        "busway device bind {address}; echo 1 >/proc/irq/default_smp_affinity"
    ))?;
    let version =
        host.run("qemu-system-x86_64 --version | sed -n 's/.*version \\([^ ]*\\).*/\\1/p'")?;

    let mut turns = Vec::new();
    for number in 1..=arguments.turns {
        let mut both = [(Vmm::Busway, "busway"), (Vmm::Qemu, "qemu")];
        // Neither is always first.
        if number.is_multiple_of(2) {
            both.reverse();
        }
        for (vmm, name) in both {
            eprintln!("turn {number} of {}: {name}", arguments.turns);
            let measured = again_if_stalled(|| turn(&host, vmm, name, &address, arguments))?;
            turns.push(measured);
        }
    }
    if !turns.is_empty() {
        print(&turns, version.trim(), arguments);
    }
    if arguments.counters {
        print_counters(&turns);
    }
    let mapped = match arguments.mapping_turns {
        0 => Vec::new(),
        turns => mapping::run(&host, &address, turns)?,
    };
    if let Some(path) = &arguments.json {
        let figures = serde_json::json!({"drive": turns, "mapping": mapped});
        fs::write(path, serde_json::to_string_pretty(&figures)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Measures up to three times, for the emulator loses a guest now and then: see `docs/lab.md`.
fn again_if_stalled(measure: impl Fn() -> Result<Turn>) -> Result<Turn> {
    for _ in 0..2 {
        match measure() {
            Err(error) if may_be_the_emulators(&error) => eprintln!("once more: {error:#}"),
            measured => return measured,
        }
    }
    measure()
}

fn turn(
    host: &Host,
    vmm: Vmm,
    name: &'static str,
    address: &str,
    arguments: &BenchArgs,
) -> Result<Turn> {
    let timers: &[&str] = match vmm {
        Vmm::Qemu if !arguments.hpet => &["-machine", "hpet=off"],
        _ => &[],
    };
    let guest = || {
        GuestRun::new(vmm)
            .args(timers)
            .kernel(GuestKernel::SmallBzImage)
            .cpus(arguments.cpus)
            .memory_mib(MEMORY_MIB)
            .cmdline("console=ttyS0 quiet panic=-1 lab.pv_eoi")
            .device(address)
            .opened_by(&format!("exec taskset -c 1-{} \"$@\"", arguments.cpus + 1))
    };
    let booted = host.guest(&guest())?.success()?;
    let seconds = arguments.seconds;
    let fio = |how: &str, seconds: u32| {
        format!(
            "fio --name=reads --filename=/dev/nvme0n1 --rw=randread --bs=4k {how} --ioengine=libaio --direct=1 \
             --time_based --minimal --numjobs={} --group_reporting --runtime={seconds} >/tmp/fio",
            arguments.cpus
        )
    };
    // Reads between two marks: what they are called, and fio's words.
    let phase = |name: &str, how: &str| {
        format!(
            "mark {name} 2\n{}\nmark {name}-end 2\n\
             value {name}-kib \"$(cut -d ';' -f 6 /tmp/fio)\"\nvalue {name}-rate \"$(cut -d ';' -f 8 /tmp/fio)\"\n",
            fio(how, seconds)
        )
    };
    let deep = format!("--iodepth={DEPTH}");
    let many = format!(
        "{deep} --iodepth_batch_submit={DEPTH} --iodepth_batch_complete_min={DEPTH} \
         --iodepth_batch_complete_max={DEPTH}"
    );
    let read = host
        .guest(&guest().programs().script(&format!(
            "{}\n{}{}{}mark spin\ntimeout {seconds} sh -c 'while :; do :; done' || true\nmark spin-end\n\
             mark memory 5\n",
            fio(&deep, 2),
            phase("deep", &deep),
            phase("many", &many),
            phase("lone", "--iodepth=1"),
        )))?
        .success()?;
    let total = |phase: &str, counter: &str| {
        let marks = ends(&read, phase).context("the host took no snapshot")?;
        grown(marks, counter)
    };
    let reads = |phase: &str| {
        let kib: f64 = read.value(&format!("{phase}-kib"))?.parse()?;
        anyhow::Ok(kib / 4.0)
    };
    let grew = |phase: &str, counter: &str| anyhow::Ok(total(phase, counter)? / reads(phase)?);
    let exits_per_second = total("spin", EXITS)? / total("spin", VCPU_SECONDS)?;
    let without_timers = |phase: &str| {
        anyhow::Ok(total(phase, EXITS)? - exits_per_second * total(phase, VCPU_SECONDS)?)
    };
    let memory = read
        .marks
        .get("memory")
        .context("the host took no snapshot of memory")?;
    Ok(Turn {
        vmm: name,
        reads_per_second: read.value("deep-rate")?.parse()?,
        exits_per_read: grew("deep", EXITS)?,
        interrupts_per_read: grew("deep", INTERRUPTS)?,
        exits_per_second,
        exits_per_interrupt: without_timers("deep")? / total("deep", INTERRUPTS)?,
        exits_per_read_of_many: without_timers("many")? / reads("many")?,
        exits_per_lone_read: without_timers("lone")? / reads("lone")?,
        mmio_exits_per_read: grew("deep", "mmio_exits")?,
        boot_ms: booted.boot_time().context("no boot time")?.as_secs_f64() * 1e3,
        own_pss_kib: memory.own_pss(MEMORY_MIB) as f64,
        own_dirty_kib: memory.own_dirty(MEMORY_MIB) as f64,
        counters_per_read: memory
            .kvm
            .keys()
            .filter_map(|name| Some((name.clone(), grew("deep", name).ok()?)))
            .collect(),
    })
}

/// KVM's counter of all exits.
const EXITS: &str = "exits";
/// What stands in for a counter of KVM's: interrupts that the drive sent, and seconds that the vCPUs' threads ran.
const INTERRUPTS: &str = "interrupts";
const VCPU_SECONDS: &str = "seconds of vCPUs";

/// The snapshots before and after a phase of the guest's.
fn ends<'a>(result: &'a GuestResult, phase: &str) -> Option<[&'a Snapshot; 2]> {
    Some([
        result.marks.get(phase)?,
        result.marks.get(&format!("{phase}-end"))?,
    ])
}

/// How much a counter grew from one snapshot to the other.
fn grown([before, after]: [&Snapshot; 2], counter: &str) -> Result<f64> {
    if counter == VCPU_SECONDS {
        return Ok(after.vcpu_seconds() - before.vcpu_seconds());
    }
    let grown = match counter {
        INTERRUPTS => Some(after.interrupts.saturating_sub(before.interrupts)),
        _ => after.since(before, counter),
    };
    Ok(grown.with_context(|| format!("KVM has no counter {counter}"))? as f64)
}

/// A figure of a turn, how it is printed, and what Busway's median has to be.
struct Figure {
    name: &'static str,
    of: fn(&Turn) -> f64,
    decimals: usize,
    wanted: Wanted,
}

enum Wanted {
    /// It is the drive's affair, not the VMM's.
    Nothing,
    /// At least this much of QEMU's.
    RatioFrom(f64),
    /// At most this much of QEMU's.
    RatioTo(f64),
    /// At most this.
    To(f64),
}

impl Wanted {
    /// By the ratio as it is printed.
    fn holds(&self, ours: f64, theirs: f64) -> bool {
        let ratio = (ours / theirs * 100.0).round() / 100.0;
        match self {
            Self::Nothing => true,
            Self::RatioFrom(limit) => ratio >= *limit,
            Self::RatioTo(limit) => ratio <= *limit,
            Self::To(limit) => ours <= *limit,
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("-"),
            Self::RatioFrom(limit) => write!(f, "ratio >= {limit}"),
            Self::RatioTo(limit) => write!(f, "ratio <= {limit}"),
            Self::To(limit) => write!(f, "<= {limit}"),
        }
    }
}

/// No more than QEMU's. The same KVM makes the exits of both, so equal is what they are at best, and the medians of
/// one VMM differ by some hundredths from run to run.
const NO_MORE: Wanted = Wanted::RatioTo(1.05);

const FIGURES: &[Figure] = &[
    Figure {
        name: "4 KiB random reads a second",
        of: |turn| turn.reads_per_second,
        decimals: 0,
        wanted: Wanted::RatioFrom(0.95),
    },
    Figure {
        name: "  interrupts a read",
        of: |turn| turn.interrupts_per_read,
        decimals: 3,
        wanted: Wanted::Nothing,
    },
    Figure {
        name: "  exits a read",
        of: |turn| turn.exits_per_read,
        decimals: 3,
        wanted: Wanted::RatioTo(1.0),
    },
    Figure {
        name: "exits a second without reads",
        of: |turn| turn.exits_per_second,
        decimals: 0,
        wanted: Wanted::Nothing,
    },
    Figure {
        name: "beyond these, exits an interrupt",
        of: |turn| turn.exits_per_interrupt,
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "  a read, 16 asked for at once",
        of: |turn| turn.exits_per_read_of_many,
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "  a read, one at a time",
        of: |turn| turn.exits_per_lone_read,
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "MMIO exits to user space a read",
        of: |turn| turn.mmio_exits_per_read,
        decimals: 3,
        wanted: Wanted::To(0.0),
    },
    Figure {
        name: "exec to guest user space, ms",
        of: |turn| turn.boot_ms,
        decimals: 0,
        wanted: Wanted::RatioTo(0.6),
    },
    Figure {
        name: "own memory (PSS), KiB",
        of: |turn| turn.own_pss_kib,
        decimals: 0,
        wanted: Wanted::To(5.0 * 1024.0),
    },
    Figure {
        name: "  of that dirty, KiB",
        of: |turn| turn.own_dirty_kib,
        decimals: 0,
        wanted: Wanted::RatioTo(1.0),
    },
];

fn spread(turns: &[Turn], vmm: &str, of: fn(&Turn) -> f64) -> (f64, f64, f64) {
    let turns = turns.iter().filter(|turn| turn.vmm == vmm);
    median_and_spread(turns.map(of).collect())
}

/// Median, least and most.
pub(crate) fn median_and_spread(mut figures: Vec<f64>) -> (f64, f64, f64) {
    figures.sort_by(f64::total_cmp);
    let (least, most) = (figures[0], figures[figures.len() - 1]);
    (median(figures), least, most)
}

fn print(turns: &[Turn], version: &str, arguments: &BenchArgs) {
    println!(
        "\nan NVMe drive assigned to a guest of {} vCPU and {MEMORY_MIB} MiB; median (least..most) of {} turns",
        arguments.cpus, arguments.turns
    );
    let timers = if arguments.hpet { "" } else { ", no HPET" };
    let qemu = format!("QEMU {version} q35{timers}");
    println!(
        "{:<34} {:>24} {qemu:>24} {:>7}  wanted (held in)",
        "", "Busway", "ratio"
    );
    for figure in FIGURES {
        let decimals = figure.decimals;
        let (ours, least, most) = spread(turns, "busway", figure.of);
        let (theirs, their_least, their_most) = spread(turns, "qemu", figure.of);
        let cell = |median: f64, least: f64, most: f64| {
            format!("{median:.decimals$} ({least:.decimals$}..{most:.decimals$})")
        };
        let ratio = ours / theirs;
        let holds = figure.wanted.holds(ours, theirs);
        let held = turns.chunks_exact(2).filter(|both| {
            let of = |vmm| spread(both, vmm, figure.of).0;
            figure.wanted.holds(of("busway"), of("qemu"))
        });
        let ratio = if ratio.is_finite() {
            format!("{ratio:.2}")
        } else {
            "-".to_owned()
        };
        println!(
            "{:<34} {:>24} {:>24} {ratio:>7}  {}{}",
            figure.name,
            cell(ours, least, most),
            cell(theirs, their_least, their_most),
            figure.wanted,
            match (&figure.wanted, holds) {
                (Wanted::Nothing, _) => String::new(),
                (_, true) => format!(" ({} of {} turns)", held.count(), arguments.turns),
                (_, false) => format!(" ({} of {} turns)  MISSED", held.count(), arguments.turns),
            },
        );
    }
}

/// What KVM counted for a read, as medians: of the counters that moved.
fn print_counters(turns: &[Turn]) {
    let names: std::collections::BTreeSet<&String> = turns
        .iter()
        .flat_map(|turn| turn.counters_per_read.keys())
        .collect();
    println!(
        "\n{:<32} {:>12} {:>12}",
        "KVM's counters a read", "Busway", "QEMU"
    );
    for name in names {
        let of = |vmm: &str| {
            median(
                turns
                    .iter()
                    .filter(|turn| turn.vmm == vmm)
                    .filter_map(|turn| turn.counters_per_read.get(name).copied())
                    .collect(),
            )
        };
        let (ours, theirs) = (of("busway"), of("qemu"));
        if ours.max(theirs) >= 0.0005 {
            println!("{name:<32} {ours:>12.3} {theirs:>12.3}");
        }
    }
}

/// The middle one; not a number where there is none.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match (figures.get(middle.wrapping_sub(1)), figures.get(middle)) {
        (Some(below), Some(above)) if figures.len().is_multiple_of(2) => {
            f64::midpoint(*below, *above)
        }
        (_, Some(middle)) => *middle,
        _ => f64::NAN,
    }
}
