//! Devices that are added to a guest that runs, and removed from it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestRun, Host, HostConfig, Job, Lab, RunningGuest};

use crate::assigned::{Interface, give_back, guest, zoo};
use crate::proof::Tier;
use crate::{Proof, count, tell};

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
    Proof::new(
        "hotplug_of_devices_that_do_not_come_back_keeps_nobody_waiting",
        held_up,
    ),
    Proof::rounds(
        "hotplug_that_is_killed_at_any_step_leaves_devices_that_are_restored",
        killed,
    ),
];

/// The host of most trials, with a device of two functions, a conventional one, and one that has a lot of memory.
fn herd() -> HostConfig {
    zoo()
        .device(Device::e1000e("two0"))
        .device(Device::e1000e("two1").beside("two0"))
        .device(Device::e1000("old0"))
        .device(Device::ivshmem("big0", 16))
}

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

/// Has the guest release what is in a slot as soon as the slot's button was pressed, as its user can, and not after the
/// five seconds in which Linux waits for a second press: they are over in the first round, and cost each other one.
/// Linux, drivers/pci/hotplug/pciehp_ctrl.c, `pciehp_sysfs_disable_slot`.
pub(crate) const EAGER: &str = "\
    (cat /dev/kmsg | while read -r line; do case $line in *'will power off'*)\n\
    slot=${line#*Slot(}; echo 0 >/sys/bus/pci/slots/${slot%%)*}/power & ;; esac; done) &\n";

/// A script that has commands run at once, and fails where one of them does.
pub(crate) fn at_once(commands: &[String]) -> String {
    let started: String = commands
        .iter()
        .map(|command| format!("{command} & all=\"$all $!\"\n"))
        .collect();
    format!("{started}for one in $all; do wait $one || exit; done")
}

/// A drive, a NIC, a virtual function of another, a conventional one that has nothing but a pin, and two functions of one
/// device come and go together, and the drive is written to in each round. In every second round those of one function come
/// to bus 0, and are released by ACPI. While the guest has none of them, the
/// process has what it had after the first round, and no memory is locked; at the end the host reads what was written.
fn in_turn(lab: &mut Lab, interface: Interface, tier: Tier) -> Result<()> {
    let rounds = tier.of(20, 200);
    let limit = Duration::from_secs(180 + 20 * rounds);
    let host = lab.host(&herd())?;
    let [drive, nic, old, zero, one] =
        ["nv0", "nic0", "old0", "two0", "two1"].map(|id| host.address(id));
    let (drive, nic, old, zero, one) = (drive?, nic?, old?, zero?, one?);
    let functions = host.virtual_functions("nic1", 1)?;
    let function = functions.first().context("a virtual function")?;
    host.run(&format!(
        "busway device bind {drive} {nic} {function} {old} {zero} {one}"
    ))?;
    let together = format!("{zero} {one}");
    let [_, way] = interface.arguments();
    let platform = format!("{way},hotplug_slots=5,hotplug_mmio64=64M");
    let run = guest()?
        .args(&["--platform", &platform])
        .args(&SOCKET)
        .limit(limit)
        .script(&format!(
            "modprobe -aq nvme e1000e e1000 igbvf\n\
             nics() {{ ls /sys/class/net | grep -c eth || true; }}\n\
             value ready yes\n\
             for round in $(seq {rounds}); do\n\
             until [ -b /dev/nvme0n1 ] && [ \"$(nics)\" = 5 ]; do sleep 0.1; done\n\
             old=$(basename \"$(dirname \"$(dirname \"$(grep -l 0x100e /sys/class/net/eth*/device/device)\")\")\")\n\
             ip link set $old up\n\
             until grep -qE \"^ *[0-9]+: +[1-9].* $old\\$\" /proc/interrupts; do sleep 0.1; done\n\
             value together \"$round $(ls /sys/bus/pci/devices | grep -c '[.]1$')\"\n\
             lab-io write /dev/nvme0n1 $round\n\
             value wrote $round\n\
             while [ -e /sys/class/nvme/nvme0 ] || [ \"$(nics)\" != 0 ]; do sleep 0.1; done\n\
             value gone $round\n\
             [ $round -gt 1 ] || {{ {EAGER} }}\n\
             done\n\
             until_pressed waiting\n\
             dmesg | grep -iE 'pciehp|BAR|bridge window|AER' | block log\n"
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let mut first = None;
    for round in 1..=rounds {
        // Each comes first in turn: the first device makes the DMA space, and the last one leaves it. In the first
        // round each waits for the one before, then they come at once.
        let mut order = [&drive, &nic, function, &old, &together];
        order.rotate_left((round % 5) as usize);
        let on_bus_0 = round % 2 == 0;
        let place = if on_bus_0 { " --root-port off" } else { "" };
        let adds = order.map(|address| format!("{CTL} add-device {address}{place}"));
        let began = Instant::now();
        let said = match round {
            1 => host.run(&adds.join(" && "))?,
            _ => host.run(&at_once(&adds))?,
        };
        tell!("round {round}: {said}");
        let info = host.run(&format!("{CTL} info"))?;
        ensure!(
            order
                .iter()
                .flat_map(|addresses| addresses.split(' '))
                .all(|address| info.contains(address)),
            "info does not show all: {info}"
        );
        running.wait_line(&format!("@@value wrote {round}"))?;
        running.wait_line(&format!("@@value together {round} 1"))?;
        let devices = host.run(&format!("{CTL} devices --json"))?;
        let devices: serde_json::Value = serde_json::from_str(&devices)?;
        for address in [&drive, &nic, function, &old, &zero] {
            let is_it = |device: &&serde_json::Value| device["host_bdf"] == address.as_str();
            let device = devices["devices"]
                .as_array()
                .and_then(|all| all.iter().find(is_it));
            let guest = device.and_then(|device| device["pci_bdf"].as_str());
            let guest = guest.with_context(|| format!("{address} has no place: {devices}"))?;
            ensure!(
                guest.starts_with("0000:00:") == (on_bus_0 && *address != zero),
                "round {round}: {address} is at {guest} in the guest"
            );
        }
        let worked = began.elapsed();
        let removals = [&drive, &nic, function, &old, &one];
        let said = host.run(&at_once(
            &removals.map(|address| format!("{CTL} remove-device {address}")),
        ))?;
        tell!("round {round}: {said}");
        ensure!(
            said.lines()
                .any(|line| line.contains("them") && line.contains(&zero) && line.contains(&one)),
            "not both functions are named: {said}"
        );
        running.wait_line(&format!("@@value gone {round}"))?;
        tell!(
            "round {round}: they were at work after {worked:.1?}, and gone after {:.1?}",
            began.elapsed()
        );
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
    count("rounds", rounds);
    running.wait_line("@@value waiting")?;
    looked_at(host)?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("the guest's log:\n{}", result.block("log")?);
    give_back(host, function, "igbvf")?;
    host.run(&format!("busway device unbind {together}"))?;
    give_back(host, &old, "e1000")?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")?;
    let verified = host.run(&format!(
        "udevadm wait --timeout=120 /dev/nvme0n1 && lab-io verify /dev/nvme0n1 {rounds}"
    ))?;
    tell!("the host reads what the guest wrote last: {verified}");
    Ok(())
}

/// A VM that runs says of each of the host's devices whether it could have it, as `busway device check` does.
fn looked_at(host: &Host) -> Result<()> {
    let said = host.run(&format!(
        "for one in /sys/bus/pci/devices/*; do {CTL} check-device ${{one##*/}} >/run/check; status=$?\n\
         case $status in 0 | 3) ;; *) echo \"${{one##*/}}: status $status\"; exit 1 ;; esac\n\
         echo $status; done | sort | uniq -c"
    ))?;
    tell!("devices by the status of check-device:\n{said}");
    host.run(&format!("{CTL} info")).map(drop)
}

/// What cannot be added or removed is refused with a reason, and the guest, whose drive works all the while, has what it
/// had.
fn failing(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&herd())?;
    let [drive, nic, first, second, big] =
        ["nv0", "nic0", "two0", "two1", "big0"].map(|id| host.address(id));
    let (drive, nic, first, second, big) = (drive?, nic?, first?, second?, big?);
    host.run(&format!(
        "busway device bind {drive} {big} && busway device bind --allow-group {first}"
    ))?;
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
        // A group that is not viable, functions of several devices, and a BAR without room.
        refused(&format!("add-device {first}"), &[&first, &second])?;
        refused(&format!("add-device {big} {drive}"), &[&drive, "already"])?;
        refused(
            &format!("add-device {big}"),
            &[&big, "16 MiB", "2 MiB", "hotplug_mmio64="],
        )?;
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
    host.run(&format!("busway device unbind {first} {big}"))?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")
}

/// Where the kernel is held up, by a build of the lab alone.
const HOLD: &str = "/run/hold";

/// A guest that stays, of a VM whose steps with devices are held up by files in [`HOLD`].
fn patient(host: &Host) -> Result<GuestRun> {
    host.run(&format!("rm -rf {HOLD}; mkdir {HOLD}"))?;
    let run = guest()?
        .opened_by(&format!("BUSWAY_TEST_HOLD_UP={HOLD} exec \"$@\"\n"))
        .args(&["--platform", "hotplug_slots=3,hotplug_mmio64=64M"])
        .args(&SOCKET)
        .script("value ready yes\nwhile true; do sleep 1000; done\n");
    Ok(run)
}

/// Has a step of a device be held up, begins it by `verb`, and returns when it stands there.
fn hold_up(
    host: &Host,
    running: &RunningGuest<'_>,
    step: &str,
    verb: &str,
    address: &str,
) -> Result<Job> {
    host.run(&format!("touch {HOLD}/{step}-{address}"))?;
    // What it answers is nobody's: the VM ends meanwhile. Dropped, it would be killed.
    let asking = host.spawn(&format!("{CTL} {verb} {address} || true"))?;
    running.wait_said(&format!("{address}: its {step} is held up"))?;
    Ok(asking)
}

/// Ends what is held up, and sees that the host gets all devices back.
fn release(host: &Host, devices: &[(&String, &str)]) -> Result<()> {
    host.run(&format!("rm -rf {HOLD}"))?;
    for (address, driver) in devices {
        give_back(host, address, driver)?;
    }
    Ok(())
}

/// A device that does not come back from its reset holds up neither another that is added, nor a pause, nor the end: the
/// second signal is heard in each state.
fn held_up(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&herd())?;
    let [drive, nic, old] = ["nv0", "nic0", "old0"].map(|id| host.address(id));
    let (drive, nic, old) = (drive?, nic?, old?);
    let bind = format!("busway device bind {drive} {nic} {old}");
    let devices = [(&drive, "nvme"), (&nic, "e1000e"), (&old, "e1000")];

    // Paused, with one device on its way to the guest and one on its way back.
    host.run(&bind)?;
    let running = host.start_guest(&patient(host)?)?;
    running.wait_line("@@value ready")?;
    host.run(&format!("{CTL} add-device {drive}"))?;
    let _leaving = hold_up(host, &running, "closing", "remove-device --force", &drive)?;
    let _coming = hold_up(host, &running, "opening", "add-device", &nic)?;
    let waits = format!("{CTL} remove-device {nic} 2>&1 || true");
    for (script, said) in [
        (format!("{CTL} add-device {old}"), "in the guest at"),
        (waits, "ask again when it is there"),
        (format!("{CTL} pause && {CTL} info"), "paused"),
    ] {
        let start = Instant::now();
        let found = host.run(&script)?;
        ensure!(found.contains(said), "{script}: {found}");
        ensure!(
            start.elapsed().as_secs() < 10,
            "{script}: {:?}",
            start.elapsed()
        );
    }
    running.signal("TERM")?;
    running.wait_said("the VM ends as it is")?;
    running.signal("TERM")?;
    ended(running, &["while the VM was ending", &drive, &nic])?;
    release(host, &devices)?;

    // While it is put together.
    host.run(&bind)?;
    let run = patient(host)?.device(&drive);
    host.run(&format!("touch {HOLD}/opening-{drive}"))?;
    let running = host.start_guest(&run)?;
    running.wait_said("its opening is held up")?;
    let info = host.run(&format!("{CTL} info"))?;
    ensure!(info.contains("being put together"), "info: {info}");
    // Signals of one kind that wait are one.
    running.signal("TERM")?;
    running.signal("INT")?;
    ended(running, &["while the VM was being put together", &drive])?;
    // Asked by the socket, it ends when the kernel lets it.
    host.run(&format!("touch {HOLD}/opening-{drive}"))?;
    let running = host.start_guest(&run)?;
    running.wait_said("its opening is held up")?;
    let asked = host.spawn(&format!("{CTL} shutdown"))?;
    running.wait_said("the VM is not wanted any more")?;
    host.run(&format!("rm {HOLD}/opening-{drive}"))?;
    asked.wait(Duration::from_secs(60))?.success()?;
    let status = running.finish()?.status;
    ensure!(status == 0, "status {status}");

    // In a guest that runs and does not listen, both signals are for it: its devices have 5 s.
    let running = host.start_guest(&patient(host)?)?;
    running.wait_line("@@value ready")?;
    let _coming = hold_up(host, &running, "opening", "add-device", &nic)?;
    running.signal("TERM")?;
    running.signal("INT")?;
    ended(running, &["5 s went by while the VM was ending", &nic])?;
    release(host, &devices)
}

/// The VM ends with status 1, and says this.
fn ended(running: RunningGuest<'_>, words: &[&str]) -> Result<()> {
    let result = running.finish()?;
    let (status, said) = (result.status, &result.stderr);
    ensure!(status == 1, "status {status}: {said}");
    let missing: Vec<_> = words.iter().filter(|word| !said.contains(**word)).collect();
    ensure!(missing.is_empty(), "no {missing:?} in: {said}");
    Ok(())
}

/// Killed in the middle of adding one device and of removing another, in each of their steps, Busway leaves nothing that
/// `busway device restore` does not put back.
fn killed(lab: &mut Lab, tier: Tier) -> Result<()> {
    let rounds = tier.of(1, 20);
    let host = lab.host(&herd())?;
    let [drive, nic] = ["nv0", "nic0"].map(|id| host.address(id));
    let (drive, nic) = (drive?, nic?);
    for _ in 0..rounds {
        // What the drive does, which is being removed, and the NIC, which is being added.
        for step in ["opening", "presented", "asked", "closing"] {
            host.run(&format!("busway device bind {drive} {nic}"))?;
            let running = host.start_guest(&patient(host)?)?;
            running.wait_line("@@value ready")?;
            let added = format!("{CTL} add-device {drive}");
            let _asking = match step {
                "opening" => Some(hold_up(host, &running, "opening", "add-device", &nic)?),
                // The guest has only just heard of it.
                "presented" => host.run(&added).map(|_said| None)?,
                "asked" => {
                    host.run(&added)?;
                    let asking = host.spawn(&format!("{CTL} remove-device {drive} || true"))?;
                    running.wait_said("the guest is asked to release it")?;
                    Some(asking)
                }
                _ => {
                    host.run(&added)?;
                    let asked = "remove-device --force";
                    Some(hold_up(host, &running, "closing", asked, &drive)?)
                }
            };
            running.signal("KILL")?;
            let status = running.finish()?.status;
            ensure!(status == 128 + 9, "{step}: status {status}");
            host.run("busway device restore --all && udevadm settle")?;
            for (address, driver) in [(&drive, "nvme"), (&nic, "e1000e")] {
                let found = host.driver(address)?;
                ensure!(
                    found.as_deref() == Some(driver),
                    "{step}: {address} is with {found:?}"
                );
            }
            let left = host.run("ls /run/busway | grep -v lock || true")?;
            ensure!(left.is_empty(), "{step}: /run/busway has {left}");
            count("kills", 1);
        }
    }
    Ok(())
}
