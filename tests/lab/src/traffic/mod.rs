//! The benchmark of virtio disks and NICs: the same loads on each way by which a guest has a disk or a NIC, in turns, each
//! turn on an emulated host of its own.
//!
//! Each reading stands beside that of QEMU in the same turn, and ratios are those of turns. KVM's exits and the guest's
//! interrupts are counted during the loads, and system calls in a turn of their own, by the kernel's tracing.

pub(crate) mod disks;
mod fio;
mod iperf;
pub(crate) mod nets;
mod plot;
mod result;
mod spread;
mod table;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use busway_lab::{GuestResult, GuestRun, Host, HostConfig, Profile, Vmm, build_busway};
use clap::Args;
use serde_json::json;

use crate::bench::{again_if_stalled, keep_awake};
use result::{Reading, Results, SetUp, Workload};

/// How to measure, for disks and NICs alike.
#[derive(Debug, Clone, Args)]
pub(crate) struct IoArgs {
    /// Turns, in each of which every set-up is measured once. Fewer than 5 cannot tell a miss from noise.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// Seconds of each load.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Every load, and every set-up of QEMU's: some hours.
    #[arg(long)]
    all: bool,
    /// Measure only set-ups whose name in the JSON contains one of these, beside the reference.
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    only: Vec<String>,
    /// Leave out the last turn, which counts system calls.
    #[arg(long)]
    without_calls: bool,
    /// Write every figure to a file, too, after each turn.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratios into a file, as SVG, after each turn.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// One turn, on a host of its own.
struct Turn<'a> {
    host: &'a Host,
    number: u32,
    /// Whether system calls are counted, which makes rates worthless.
    counts_calls: bool,
    seconds: u32,
    /// Processors of the guest.
    cpus: u32,
}

/// What is measured, and how.
struct Bench<'a> {
    /// `disks`, in messages.
    what: &'static str,
    arguments: &'a IoArgs,
    /// Processors of the guests.
    cpus: u32,
    host: HostConfig,
    /// What the host does once in each turn.
    prepare: &'a dyn Fn(&Host) -> Result<()>,
    measure: &'a dyn Fn(&Turn<'_>, &SetUp) -> Result<Vec<Reading>>,
}

/// Where the kernel counts system calls by thread (Linux, Documentation/trace/histogram.rst).
const COUNT_CALLS: &str = "set -e; mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing\n\
    echo 'hist:keys=common_pid:size=8192' >/sys/kernel/tracing/events/raw_syscalls/sys_enter/trigger";

impl Bench<'_> {
    /// All turns. `results` grows, and has `workloads` beside what it had.
    fn run(&self, workloads: Vec<Workload>, results: &mut Results, title: &str) -> Result<()> {
        results.workloads.extend(workloads);
        let turns = self.arguments.turns;
        let last = turns + u32::from(!self.arguments.without_calls);
        for number in 1..=last {
            let host = Host::boot(self.host.clone())?;
            host.install(&build_busway(Profile::Release)?)?;
            // Interrupts that are asked for from now on come on the first processor; the VMMs run on the others.
            host.run("echo 1 >/proc/irq/default_smp_affinity")?;
            (self.prepare)(&host)?;
            let _awake = keep_awake(&host, self.cpus)?;
            let counts_calls = number > turns;
            if counts_calls {
                host.run(COUNT_CALLS)?;
            }
            let turn = Turn {
                host: &host,
                number,
                counts_calls,
                seconds: self.arguments.seconds,
                cpus: self.cpus,
            };
            let mut set_ups = results.set_ups.clone();
            // None is always first.
            let first = number as usize % set_ups.len().max(1);
            set_ups.rotate_left(first);
            for set_up in &set_ups {
                let why = if counts_calls {
                    ", for system calls"
                } else {
                    ""
                };
                eprintln!(
                    "{}, turn {number} of {last}{why}: {}",
                    self.what, set_up.title
                );
                let readings = again_if_stalled(|| (self.measure)(&turn, set_up))
                    .with_context(|| format!("turn {number}, {}", set_up.name))?;
                results.readings.extend(readings);
            }
            self.save(results, title)?;
        }
        Ok(())
    }

    fn save(&self, results: &Results, title: &str) -> Result<()> {
        let write = |path: &PathBuf, text: String| {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        if let Some(path) = &self.arguments.json {
            let all = json!({"summary": results.rows(), "readings": results.readings});
            write(path, serde_json::to_string_pretty(&all)?)?;
        }
        if let Some(path) = &self.arguments.plot {
            let note = format!(
                "in an emulated host, in turns of one run; {} s each",
                self.arguments.seconds
            );
            write(path, plot::render(results, title, &note))?;
        }
        Ok(())
    }
}

impl IoArgs {
    /// Those of the set-ups that are asked for. `reference` is always among them.
    fn chosen(&self, set_ups: &[SetUp], rare: &[&str], reference: &str) -> Vec<SetUp> {
        let wanted = |set_up: &&SetUp| {
            let named = |name: &String| set_up.name.contains(name.as_str());
            set_up.name == reference
                || match self.only.is_empty() {
                    true => self.all || !rare.contains(&set_up.name),
                    false => self.only.iter().any(named),
                }
        };
        set_ups.iter().filter(wanted).copied().collect()
    }
}

impl Turn<'_> {
    /// A guest of a VMM whose threads have the processors beside the first.
    fn guest(&self, vmm: Vmm) -> GuestRun {
        let timers: &[&str] = match vmm {
            Vmm::Busway => &[],
            Vmm::Qemu => &["-machine", "hpet=off"],
        };
        GuestRun::new(vmm)
            .cpus(self.cpus)
            .args(timers)
            .opened_by(&format!("exec taskset -c 1-{} \"$@\"", self.cpus + 1))
    }

    /// The reading of a load that a guest has put between the marks `NAME` and `NAME-end`, with its interrupts as the value
    /// `NAME-interrupts`. `per_second` is the rate of so many `operations`.
    fn reading(
        &self,
        set_up: &SetUp,
        workload: &str,
        (operations, per_second): (f64, f64),
        guest: &GuestResult,
    ) -> Result<Reading> {
        let mark = |name: &str| {
            let mark = guest.marks.get(name);
            mark.with_context(|| format!("the host took no snapshot at {name}"))
        };
        let (before, after) = (mark(workload)?, mark(&format!("{workload}-end"))?);
        let exits = after
            .since(before, "exits")
            .context("KVM counts no exits")?;
        let calls = before.calls.zip(after.calls);
        let calls = calls.map(|(before, after)| after.saturating_sub(before));
        let interrupts: f64 = guest.value(&format!("{workload}-interrupts"))?.parse()?;
        let measured = |figure: f64| (!self.counts_calls).then_some(figure);
        Ok(Reading {
            turn: self.number,
            set_up: set_up.name,
            workload: workload.to_owned(),
            rate: measured(per_second),
            p99_us: None,
            exits: measured(exits as f64 / operations),
            interrupts: measured(interrupts / operations),
            calls: match self.counts_calls {
                true => {
                    Some(calls.context("the host counted no system calls")? as f64 / operations)
                }
                false => None,
            },
        })
    }
}

/// Interrupts so far of the devices whose names in /proc/interrupts match, as a function of the guest's or the host's shell.
fn interrupts(names: &str) -> String {
    format!(
        "interrupts() {{ awk '/{names}/ {{ for (at = 2; $at ~ /^[0-9]+$/; at++) n += $at }} END {{ print n + 0 }}' \
         /proc/interrupts; }}\n"
    )
}

/// A load between two marks, as shell: the interrupts meanwhile are the value `NAME-interrupts`, and what it has written to
/// `report` is the block `NAME`, without blanks, for a console is slow.
fn marked(name: &str, command: &str, report: &str) -> String {
    format!(
        "mark {name} 1\nbefore=$(interrupts)\n{command}\nafter=$(interrupts)\nmark {name}-end 1\n\
         value {name}-interrupts $((after - before))\n\
         {{ tr -d ' \\n\\t' <{report}; echo; }} | block {name}\n"
    )
}
