//! Devices that are added to a guest that runs, and removed from it.

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Lab, RunningGuest};

use crate::assigned::{Interface, bound, give_back, guest};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "hotplug_adds_and_removes_a_drive_and_a_nic_in_turn_by_group",
        |lab| in_turn(lab, Interface::Group),
    ),
    Proof::new(
        "hotplug_adds_and_removes_a_drive_and_a_nic_in_turn_by_cdev",
        |lab| in_turn(lab, Interface::Cdev),
    ),
    Proof::new("hotplug_that_fails_leaves_the_vm_as_it_was", failing),
];

const CTL: &str = "busway ctl --api-socket /run/vm.sock";
const SOCKET: [&str; 2] = ["--api-socket", "/run/vm.sock"];
const ROUNDS: usize = 5;

/// What a VM's process has: descriptors by kind, and memory locked for devices.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: String,
    locked: String,
}

impl Held {
    fn by(guest: &RunningGuest<'_>, host: &Host) -> Result<Self> {
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

/// A drive and a NIC come and go in turn, and the drive is written to in each round. While the guest has neither, the
/// process has what it had after the first round, and no memory is locked; at the end the host reads what was written.
fn in_turn(lab: &mut Lab, interface: Interface) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    host.run(&format!("busway device bind {nic}"))?;
    let [_, way] = interface.arguments();
    let platform = format!("{way},hotplug_slots=2,hotplug_mmio64=64M");
    let run = guest()?
        .args(&["--platform", &platform])
        .args(&SOCKET)
        .script(&format!(
            "modprobe -aq nvme e1000e\n\
             nics() {{ ls /sys/class/net | grep -c eth || true; }}\n\
             value ready yes\n\
             for round in $(seq {ROUNDS}); do\n\
             until [ -b /dev/nvme0n1 ] && [ \"$(nics)\" = 1 ]; do sleep 0.1; done\n\
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
    for round in 1..=ROUNDS {
        // The NIC comes first in every other round: the first device makes the DMA space, the last one leaves it.
        let order = match round % 2 {
            0 => [&drive, &nic],
            _ => [&nic, &drive],
        };
        for address in order {
            let said = host.run(&format!("{CTL} add-device {address}"))?;
            tell!("round {round}: {said}");
        }
        let info = host.run(&format!("{CTL} info"))?;
        ensure!(
            info.contains(&drive) && info.contains(&nic),
            "info does not show both: {info}"
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
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")?;
    let verified = host.run(&format!(
        "udevadm wait --timeout=120 /dev/nvme0n1 && lab-io verify /dev/nvme0n1 {ROUNDS}"
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
