//! The benchmark: Busway and QEMU given the same drive and guest, in turns, each turn on an emulated host of its own.
//!
//! The machine below is slow and noisy, so figures stand side by side from one run, as medians with
//! their spread; ratios and counts carry over to real hosts, absolute speed does not.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result};
use busway_lab::{
    BEFORE_FIRMWARE, Device, GuestKernel, GuestResult, GuestRun, Host, HostConfig, Job, Kernel,
    Profile, Snapshot, Vmm, build_busway, may_be_the_emulators,
};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{figures, mapping, plugging, starting, traffic};

pub(crate) const MEMORY_MIB: u64 = 512;
/// Reads under way, for each of the guest's processors.
const DEPTH: u32 = 16;

/// How to measure.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// Turns of each VMM with the drive; 0 leaves it out. Fewer than 5 cannot tell a miss from noise; under emulation it
    /// takes some 24 to know the ratio of reads to 5 %.
    #[arg(long, default_value_t = 5)]
    turns: u32,
    /// Seconds of random reads a turn.
    #[arg(long, default_value_t = 8)]
    seconds: u32,
    /// Processors of the guest, each with a queue of the drive's; of several numbers, each in its turns.
    #[arg(long, value_delimiter = ',', default_value = "1,4", value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: Vec<u32>,
    /// Measure only the random reads at will, with nothing else in a turn: more turns in the same time.
    #[arg(long)]
    at_will: bool,
    /// Leave QEMU its HPET, for which its main thread works beside the guest.
    #[arg(long)]
    hpet: bool,
    /// Measure another Busway in QEMU's place, such as an earlier one: a static program. What is measured without reads is
    /// left out.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Print each of KVM's counters, too: what the exits were.
    #[arg(long)]
    counters: bool,
    /// Turns of each VMM for the time to map memory; 0 leaves it out.
    #[arg(long, default_value_t = 3)]
    mapping_turns: u32,
    /// Turns of each VMM for the time to add a drive to a guest that runs, and to take it away; 0 leaves it out.
    #[arg(long, default_value_t = 2)]
    plug_turns: u32,
    /// Turns of each VMM for the time to start a VM whose 2 GiB are pinned for its drive; 0 leaves it out.
    #[arg(long, default_value_t = 3)]
    start_turns: u32,
    /// Write every figure to a file, too, after each turn.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is measured instead of an assigned drive.
#[derive(Debug, Subcommand)]
enum What {
    /// Virtio disks of Busway's and of QEMU's, a drive passed through, and the host's own, in turns.
    Disks(traffic::disks::DisksArgs),
    /// Virtio NICs of Busway's and of QEMU's, and a NIC passed through, in turns.
    Nets(traffic::nets::NetsArgs),
}

/// What one turn of one VMM gave.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Turn {
    pub(crate) vmm: &'static str,
    pub(crate) cpus: u32,
    pub(crate) reads_per_second: f64,
    /// Exits a read meanwhile.
    pub(crate) exits_per_read: f64,
    /// Interrupts of the drive's a read meanwhile: how many reads it tells of with one.
    pub(crate) interrupts_per_read: f64,
    pub(crate) mmio_exits_per_read: f64,
    pub(crate) own_pss_kib: f64,
    pub(crate) own_dirty_kib: f64,
    /// KVM's counters during the reads, each divided by their number.
    pub(crate) counters_per_read: BTreeMap<String, f64>,
    /// Nothing where only the reads at will were asked for.
    #[serde(flatten)]
    pub(crate) beyond: Option<Beyond>,
}

/// What a turn gives beyond the reads at will.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Beyond {
    /// Exits a second of the vCPUs' time where the guest does nothing but spin: timers'. They are taken off the next three.
    pub(crate) exits_per_second: f64,
    /// Exits for each interrupt that the drive sent during the reads.
    pub(crate) exits_per_interrupt: f64,
    /// Exits a read where [`DEPTH`] are asked for at once, and the next when all are there.
    pub(crate) exits_per_read_of_many: f64,
    /// Exits a read with one read under way at a time: as many interrupts as reads.
    pub(crate) exits_per_lone_read: f64,
    pub(crate) boot_ms: f64,
    /// The same where the distribution's firmware starts the kernel. Nothing beside another Busway, which may not know it.
    pub(crate) firmware_boot_ms: Option<f64>,
}

/// Measures, and prints both side by side.
pub(crate) fn run(arguments: &BenchArgs) -> Result<()> {
    match &arguments.what {
        Some(What::Disks(disks)) => return traffic::disks::run(disks),
        Some(What::Nets(nets)) => return traffic::nets::run(nets),
        None => {}
    }
    let mut measured = Measured::default();
    for &cpus in &arguments.cpus {
        if arguments.turns > 0 {
            drive(cpus, arguments, &mut measured)?;
        }
    }
    if arguments.against.is_some() {
        return Ok(());
    }
    if arguments.mapping_turns > 0 {
        let (host, address) = boot(1)?;
        measured.mapping = mapping::run(&host, &address, arguments.mapping_turns)?;
        measured.save(arguments)?;
    }
    if arguments.plug_turns > 0 {
        let (host, address) = boot(1)?;
        measured.plugging = plugging::run(&host, &address, arguments.plug_turns)?;
        measured.save(arguments)?;
    }
    if arguments.start_turns > 0 {
        let (host, address) = boot(1)?;
        measured.starting = starting::run(&host, &address, arguments.start_turns)?;
        measured.save(arguments)?;
    }
    Ok(())
}

/// All that was measured.
#[derive(Debug, Default, Serialize)]
struct Measured {
    drive: Vec<Turn>,
    mapping: Vec<mapping::Mapped>,
    plugging: Vec<plugging::Plugged>,
    starting: Vec<starting::Started>,
}

impl Measured {
    fn save(&self, arguments: &BenchArgs) -> Result<()> {
        let Some(path) = &arguments.json else {
            return Ok(());
        };
        fs::write(path, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A host for guests of so many processors, and the address of its drive, which is with VFIO.
fn boot(cpus: u32) -> Result<(Host, String)> {
    // Room for 2 GiB of huge pages beside 2 GiB of other memory.
    let config = HostConfig::new(Kernel::Iommufd)
        .memory_mib(6144)
        .cpus(cpus + 2)
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
    Ok((host, address))
}

/// The turns with guests of so many processors, printed, and put with what was measured before.
fn drive(cpus: u32, arguments: &BenchArgs, measured: &mut Measured) -> Result<()> {
    let before = measured.drive.len();
    let mut version = String::new();
    for number in 1..=arguments.turns {
        // A host of its own for each turn: what a boot may leave to chance lasts as long as that host, and the verdict
        // takes turns for independent.
        let (host, address) = boot(cpus)?;
        let _awake = keep_awake(&host, cpus)?;
        let other = match &arguments.against {
            Some(program) => {
                host.install_as(program, ANOTHER)?;
                (Vmm::Busway, ANOTHER)
            }
            None => (Vmm::Qemu, "qemu"),
        };
        let asked = match other.0 {
            Vmm::Busway => "another",
            Vmm::Qemu => "qemu-system-x86_64",
        };
        version = host.run(&format!(
            "{asked} --version | sed -n 's/.*\\(version\\|busway\\) \\([^ ]*\\).*/\\2/p'"
        ))?;
        let mut both = [(Vmm::Busway, "busway"), other];
        // Neither is always first.
        if number.is_multiple_of(2) {
            both.reverse();
        }
        for (vmm, name) in both {
            eprintln!(
                "turn {number} of {} with {cpus} vCPU: {name}",
                arguments.turns
            );
            let turn = again_if_stalled(|| turn(&host, (vmm, name), &address, cpus, arguments))?;
            measured.drive.push(turn);
        }
        measured.save(arguments)?;
    }
    let turns = &measured.drive[before..];
    let version = version.trim();
    let (other, title) = match (&arguments.against, arguments.hpet) {
        (Some(_), _) => (ANOTHER, format!("another, {version}")),
        (None, true) => ("qemu", format!("QEMU {version} q35")),
        (None, false) => ("qemu", format!("QEMU {version} q35, no HPET")),
    };
    figures::print(turns, other, &title);
    if arguments.counters {
        figures::print_counters(turns, other, &title);
    }
    Ok(())
}

/// What the program that is measured against is called in the host.
pub(crate) const ANOTHER: &str = "another";

/// Keeps the processor for the VMM's other threads awake, by what yields to all of them.
///
/// An emulated processor that sleeps is woken when the machine below sees fit, and how soon that is decides how many reads
/// an interrupt tells of. Where the machine below has no more processors than the guest has vCPUs, the loop would take from
/// these.
pub(crate) fn keep_awake(host: &Host, cpus: u32) -> Result<Option<Job>> {
    let below = thread::available_parallelism().map_or(1, usize::from);
    let spin = format!(
        "exec taskset -c {} chrt --idle 0 bash -c 'while :; do :; done'",
        cpus + 1
    );
    (below > cpus as usize)
        .then(|| host.spawn(&spin))
        .transpose()
}

/// Measures up to three times, for the emulator loses a guest now and then: see `docs/lab.md`.
pub(crate) fn again_if_stalled<T>(measure: impl Fn() -> Result<T>) -> Result<T> {
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
    (vmm, name): (Vmm, &'static str),
    address: &str,
    cpus: u32,
    arguments: &BenchArgs,
) -> Result<Turn> {
    let timers: &[&str] = match vmm {
        Vmm::Qemu if !arguments.hpet => &["-machine", "hpet=off"],
        _ => &[],
    };
    let guest = || {
        GuestRun::new(vmm)
            .args(timers)
            .kernel(GuestKernel::Stock)
            .cpus(cpus)
            .memory_mib(MEMORY_MIB)
            .booted_in_full()
            .device(address)
            .opened_by(&format!(
                "[ {name} != {ANOTHER} ] || set -- {ANOTHER} \"${{@:2}}\"\nexec taskset -c 1-{} \"$@\"",
                cpus + 1
            ))
    };
    let seconds = arguments.seconds;
    let fio = |how: &str, seconds: u32| {
        format!(
            "fio --name=reads --filename=/dev/nvme0n1 --rw=randread --bs=4k {how} --ioengine=libaio --direct=1 \
             --time_based --minimal --numjobs={cpus} --group_reporting --runtime={seconds} >/tmp/fio"
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
    let others = format!(
        "{}{}mark spin\ntimeout {seconds} sh -c 'while :; do :; done' || true\nmark spin-end\n",
        phase("many", &many),
        phase("lone", "--iodepth=1"),
    );
    let read = host
        .guest(&guest().programs().script(&format!(
            "{}\n{}{}mark memory 5\n",
            fio(&deep, 2),
            phase("deep", &deep),
            if arguments.at_will { "" } else { &others },
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
    let beyond = || {
        let exits_per_second = total("spin", EXITS)? / total("spin", VCPU_SECONDS)?;
        let without_timers = |phase: &str| {
            anyhow::Ok(total(phase, EXITS)? - exits_per_second * total(phase, VCPU_SECONDS)?)
        };
        let boot_ms = |run: GuestRun| {
            let booted = host.guest(&run)?.success()?;
            let time = booted.boot_time().context("no boot time")?;
            anyhow::Ok(time.as_secs_f64() * 1e3)
        };
        let firmware = || {
            host.run(BEFORE_FIRMWARE)?;
            boot_ms(guest().firmware())
        };
        anyhow::Ok(Beyond {
            exits_per_second,
            exits_per_interrupt: without_timers("deep")? / total("deep", INTERRUPTS)?,
            exits_per_read_of_many: without_timers("many")? / reads("many")?,
            exits_per_lone_read: without_timers("lone")? / reads("lone")?,
            boot_ms: boot_ms(guest())?,
            firmware_boot_ms: arguments.against.is_none().then(firmware).transpose()?,
        })
    };
    let memory = read
        .marks
        .get("memory")
        .context("the host took no snapshot of memory")?;
    Ok(Turn {
        vmm: name,
        cpus,
        reads_per_second: read.value("deep-rate")?.parse()?,
        exits_per_read: grew("deep", EXITS)?,
        interrupts_per_read: grew("deep", INTERRUPTS)?,
        mmio_exits_per_read: grew("deep", "mmio_exits")?,
        own_pss_kib: memory.own_pss(MEMORY_MIB) as f64,
        own_dirty_kib: memory.own_dirty(MEMORY_MIB) as f64,
        counters_per_read: memory
            .kvm
            .keys()
            .filter_map(|name| Some((name.clone(), grew("deep", name).ok()?)))
            .collect(),
        beyond: (!arguments.at_will).then(beyond).transpose()?,
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
