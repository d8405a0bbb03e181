//! The third part of the benchmark: how long it takes to add a drive to a guest that runs, and to take it away again,
//! under Busway and under QEMU, in turns on one emulated host.
//!
//! An add lasts from the request until the guest has the drive's disk, a removal from the request until the host's own
//! driver has the drive. What Linux always waits in between is the guest's affair, and taken off.

use std::fs;

use anyhow::{Context, Result};
use busway_lab::{GuestRun, Host, RunningGuest, Vmm};
use serde::Serialize;

use crate::figures::print_beside;

/// Adds and removals of each start of a VMM.
const ROUNDS: u32 = 5;

/// How long Linux waits after an attention button was pushed, in ms (drivers/pci/hotplug/pciehp_ctrl.c).
const BUTTON_MS: f64 = 5000.0;

/// At most this much of QEMU's time, beyond what the guest always waits.
const WANTED: f64 = 0.5;

/// One round.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Plugged {
    vmm: &'static str,
    /// From the request to add the drive until the guest has its disk.
    added_ms: f64,
    /// From the request to remove the drive until the host's driver has it.
    removed_ms: f64,
    /// What of this the guest waits after the button.
    removed_waits_ms: f64,
}

/// What it takes to ask a VMM.
struct Asked {
    name: &'static str,
    vmm: Vmm,
    arguments: &'static [&'static str],
    add: String,
    remove: String,
    /// What the guest waits after the button at a removal.
    removed_waits_ms: f64,
}

impl Asked {
    fn busway(address: &str) -> Self {
        let ask = |words: &str| format!("busway ctl --api-socket /run/vm.sock {words} {address}");
        Self {
            name: "busway",
            vmm: Vmm::Busway,
            arguments: &[
                "--api-socket",
                "/run/vm.sock",
                "--platform",
                "hotplug_slots=1",
            ],
            add: ask("add-device"),
            remove: ask("remove-device"),
            removed_waits_ms: BUTTON_MS,
        }
    }

    fn qemu(address: &str) -> Self {
        let ask = |words: &str| format!("python3 /lab/qmp.py {words}");
        Self {
            name: "qemu",
            vmm: Vmm::Qemu,
            arguments: &[
                "-machine",
                "hpet=off",
                "-device",
                "pcie-root-port,id=empty,chassis=9",
                "-qmp",
                "unix:/run/qmp.sock,server=on,wait=off",
            ],
            add: ask(&format!(
                r#"device_add '{{"driver":"vfio-pci","host":"{address}","bus":"empty","id":"hot"}}'"#
            )),
            remove: ask(r#"device_del '{"id":"hot"}' DEVICE_DELETED"#),
            // It asks by ACPI, which has no button.
            removed_waits_ms: 0.0,
        }
    }
}

/// Measures, and prints both side by side. The device at `address`, an NVMe drive, is with VFIO.
pub(crate) fn run(host: &Host, address: &str, turns: u32) -> Result<Vec<Plugged>> {
    fs::write(host.share().join("qmp.py"), include_str!("qmp.py"))?;
    let mut both = [Asked::busway(address), Asked::qemu(address)];
    let mut all = Vec::new();
    for turn in 1..=turns {
        for asked in &both {
            eprintln!(
                "a drive comes and goes, turn {turn} of {turns}: {}",
                asked.name
            );
            rounds(host, address, asked, &mut all)?;
        }
        // Neither is always first.
        both.reverse();
    }
    print(&all);
    Ok(all)
}

/// One start of a VMM.
fn rounds(host: &Host, address: &str, asked: &Asked, all: &mut Vec<Plugged>) -> Result<()> {
    let guest = GuestRun::new(asked.vmm)
        .args(asked.arguments)
        .script(&format!(
            "modprobe -q nvme\nvalue ready yes\n\
         for round in $(seq {ROUNDS}); do\n\
         until [ -b /dev/nvme0n1 ]; do usleep 20000; done\n\
         value driven $round\n\
         while [ -e /sys/class/nvme/nvme0 ]; do usleep 20000; done\n\
         value gone $round\n\
         done\n"
        ));
    let running = host.start_guest(&guest)?;
    running.wait_line("@@value ready")?;
    for round in 1..=ROUNDS {
        let asked_at = seconds(&host.run(&format!("echo $EPOCHREALTIME; {}", asked.add))?)?;
        let driven = said_at(&running, &format!("@@value driven {round}"))?;
        let removed = host.run(&format!(
            "began=$EPOCHREALTIME; {} >&2; busway device unbind {address} >&2\n\
             echo $began $EPOCHREALTIME; busway device bind {address} >&2",
            asked.remove
        ))?;
        let (began, ended) = removed.trim().split_once(' ').context("no two times")?;
        said_at(&running, &format!("@@value gone {round}"))?;
        all.push(Plugged {
            vmm: asked.name,
            added_ms: (driven - asked_at) * 1e3,
            removed_ms: (seconds(ended)? - seconds(began)?) * 1e3,
            removed_waits_ms: asked.removed_waits_ms,
        });
    }
    running.finish()?.success().map(drop)
}

/// When the guest said these words, by the host's clock.
fn said_at(running: &RunningGuest<'_>, words: &str) -> Result<f64> {
    seconds(&running.wait_line(words)?)
}

/// The time that a text begins with.
fn seconds(text: &str) -> Result<f64> {
    let word = text.split_ascii_whitespace().next();
    let word = word.context("no time")?;
    word.parse().with_context(|| format!("{word} is no time"))
}

fn print(all: &[Plugged]) {
    let figures = |vmm: &str, of: fn(&Plugged) -> f64| {
        let of_vmm = all.iter().filter(|one| one.vmm == vmm);
        of_vmm.map(of).collect::<Vec<_>>()
    };
    let row = |name, of: fn(&Plugged) -> f64| (name, figures("busway", of), figures("qemu", of));
    print_beside(
        &format!(
            "An NVMe drive comes to a guest that runs and goes again, ms beyond the {BUTTON_MS:.0} that Linux waits after \
             a button; median (least..most) of the rounds"
        ),
        &[
            row("add-device until the guest has the disk", |one| {
                one.added_ms
            }),
            row("remove-device until the host's driver has it", |one| {
                one.removed_ms - one.removed_waits_ms
            }),
        ],
        Some(WANTED),
    );
}
