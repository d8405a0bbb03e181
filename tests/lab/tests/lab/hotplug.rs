//! Devices that are added to a guest that runs, and removed from it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Lab, RunningGuest};

use crate::assigned::{Interface, bound, give_back, guest};
use crate::proof::Tier;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::rounds(
        "hotplug_adds_and_removes_a_drive_and_nics_in_turn_by_group",
        |lab, tier| in_turn(lab, Interface::Group, tier),
    ),
    Proof::rounds(
        "hotplug_adds_and_removes_a_drive_and_nics_in_turn_by_cdev",
        |lab, tier| in_turn(lab, Interface::Cdev, tier),
    ),
    Proof::new("hotplug_that_fails_leaves_the_vm_as_it_was", failing),
];

pub(crate) const CTL: &str = "busway ctl --api-socket /run/vm.sock";
pub(crate) const SOCKET: [&str; 2] = ["--api-socket", "/run/vm.sock"];

/// What a VM's process has: descriptors by kind, and memory locked for devices.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) descriptors: String,
    pub(crate) locked: String,
}

impl Held {
    pub(crate) fn by(guest: &RunningGuest<'_>, host: &Host) -> Result<Self> {
        let pid = guest.pid()?;
        let descriptors = format!(
            "for each in /proc/{pid}/fd/*; do readlink \"$each\"; done | \
             sed 's/[0-9]*\\]*$//' | sort | uniq -c"
        );
        Ok(Self {
            descriptors: host.run(&descriptors)?,
            locked: host.run(&format!("grep VmLck /proc/{pid}/status"))?,
        })
    }
}

/// A drive, a NIC and a virtual function of another come and go in turn, and the drive is written to in each round. While
/// the guest has none of them, the process has what it had after the first round, and no memory is locked; at the end the
/// host reads what was written.
fn in_turn(lab: &mut Lab, interface: Interface, tier: Tier) -> Result<()> {
    let rounds = tier.of(3, 200);
    let limit = Duration::from_secs(180 + 20 * rounds);
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    let functions = host.virtual_functions("nic1", 1)?;
    let function = functions.first().context("a virtual function")?;
    host.run(&format!("busway device bind {nic} {function}"))?;
    let [_, way] = interface.arguments();
    let platform = format!("{way},hotplug_slots=3,hotplug_mmio64=64M");
    let run = guest()?
        .args(&["--platform", &platform])
        .args(&SOCKET)
        .limit(limit)
        .script(&format!(
            "modprobe -aq nvme e1000e igbvf\n\
             nics() {{ ls /sys/class/net | grep -c eth || true; }}\n\
             value ready yes\n\
             for round in $(seq {rounds}); do\n\
             until [ -b /dev/nvme0n1 ] && [ \"$(nics)\" = 2 ]; do sleep 0.1; done\n\
             lab-io write /dev/nvme0n1 $round\n\
             value wrote $round\n\
             while [ -e /sys/class/nvme/nvme0 ] || [ \"$(nics)\" != 0 ]; do sleep 0.1; done\n\
             value gone $round\n\
             done\n\
             until_pressed waiting\n\
             dmesg | grep -iE 'pciehp|BAR|bridge window|AER' | block log\n"
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let mut first = None;
    for round in 1..=rounds {
        // Each comes first in turn: the first device makes the DMA space, and the last one leaves it.
        let mut order = [&drive, &nic, function];
        order.rotate_left((round % 3) as usize);
        for address in order {
            let said = host.run(&format!("{CTL} add-device {address}"))?;
            tell!("round {round}: {said}");
        }
        let info = host.run(&format!("{CTL} info"))?;
        ensure!(
            order.iter().all(|address| info.contains(*address)),
            "info does not show all: {info}"
        );
        running.wait_line(&format!("@@value wrote {round}"))?;
        for address in order {
            let said = host.run(&format!("{CTL} remove-device {address}"))?;
            tell!("round {round}: {said}");
        }
        running.wait_line(&format!("@@value gone {round}"))?;
        let held = Held::by(&running, host)?;
        ensure!(
            held.locked.split_whitespace().nth(1) == Some("0"),
            "memory stays locked: {}",
            held.locked
        );
        match &first {
            None => {
                tell!("between the rounds:\n{}{}", held.descriptors, held.locked);
                first = Some(held);
            }
            Some(first) => ensure!(
                *first == held,
                "round {round}: {held:?}, after the first {first:?}"
            ),
        }
    }
    running.wait_line("@@value waiting")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("the guest's log:\n{}", result.block("log")?);
    give_back(host, function, "igbvf")?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")?;
    let verified = host.run(&format!(
        "udevadm wait --timeout=120 /dev/nvme0n1 && lab-io verify /dev/nvme0n1 {rounds}"
    ))?;
    tell!("the host reads what the guest wrote last: {verified}");
    Ok(())
}

/// What cannot be added or removed is refused with a reason, and the guest, whose drive works all the while, has what it
/// had.
fn failing(lab: &mut Lab) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    let run = guest()?
        .device(&drive)
        .args(&["--platform", "hotplug_slots=1,hotplug_mmio64=2M"])
        .args(&SOCKET)
        .script(
            "lab-io write /dev/nvme0n1 1\nuntil_pressed waiting\nlab-io verify /dev/nvme0n1 1\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value waiting")?;
    let before = Held::by(&running, host)?;
    let refused = |verb: &str, words: &[&str]| -> Result<()> {
        let said = host.run(&format!(
            "{CTL} {verb} 2>&1 && exit 99 || echo \"status $?\""
        ))?;
        tell!("$ busway ctl {verb}\n{said}");
        let words = words.iter().chain(&["status 1"]);
        let missing: Vec<_> = words.filter(|word| !said.contains(**word)).collect();
        ensure!(missing.is_empty(), "{verb}: no {missing:?} in: {said}");
        Ok(())
    };
    for _ in 0..3 {
        refused(
            &format!("add-device {nic}"),
            &[&nic, "e1000e", "busway device bind"],
        )?;
        refused(
            "add-device 0000:7f:00.0",
            &["0000:7f:00.0", "no PCI device"],
        )?;
        refused(&format!("add-device {drive}"), &[&drive, "already"])?;
        refused("remove-device nonsense", &["nonsense"])?;
    }
    let after = Held::by(&running, host)?;
    ensure!(before == after, "{after:?}, before {before:?}");
    // And what can be added still can.
    host.run(&format!(
        "busway device bind {nic} && {CTL} add-device {nic}"
    ))
    .context("adding the NIC after all")?;
    refused(&format!("add-device {nic}"), &[&nic, "already"])?;
    host.run(&format!("{CTL} remove-device --force {nic}"))?;
    host.run(&format!("{CTL} power-button"))?;
    running.finish()?.success()?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")
}
