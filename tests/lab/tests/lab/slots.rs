//! Slots and what a guest does with them: while it boots, restarts, scans its buses or resets them, without
//! messages, and without a driver.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    Device, GuestResult, GuestRun, Host, HostConfig, Kernel, Lab, Profile, RunningGuest, Vmm,
    build_static,
};

use crate::assigned::{bound, give_back, guest};
use crate::hotplug::{CTL, Held, SOCKET};
use crate::proof::{Tier, count};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "slots_take_devices_at_any_moment_of_a_boot_until_none_is_empty",
        during_boot,
    ),
    Proof::rounds(
        "slots_show_a_guest_that_scans_all_the_time_the_same_device_each_time",
        again_and_again,
    ),
    Proof::rounds(
        "slots_are_after_each_restart_as_what_is_in_them_and_nothing_is_left_behind",
        restarted,
    ),
    Proof::new(
        "slots_without_messages_are_heard_and_those_without_a_driver_are_told_of",
        unusual,
    ),
    Proof::new(
        "slots_have_room_for_large_memory_and_refuse_what_is_larger_with_both_sizes",
        large,
    ),
];

/// Shell for guests: the functions behind root ports that have a driver.
const DRIVEN: &str = "driven() { for each in /sys/bus/pci/devices/*; do\n\
     case ${each##*/} in 0000:00:*) ;; *) [ ! -L $each/driver ] || echo ${each##*/};; esac; done; }\n";

fn control(host: &Host, words: &str) -> Result<String> {
    let said = host.run(&format!("{CTL} {words}"))?;
    tell!("$ busway ctl {words}\n{said}");
    Ok(said)
}

/// What `busway ctl` says of what is refused.
fn refused(host: &Host, request: &str, words: &[&str]) -> Result<()> {
    let said = host.run(&format!(
        "{CTL} {request} 2>&1 && exit 99 || echo \"status $?\""
    ))?;
    tell!("$ busway ctl {request}\n{said}");
    let missing: Vec<_> = words.iter().filter(|word| !said.contains(**word)).collect();
    ensure!(missing.is_empty(), "{request}: no {missing:?} in: {said}");
    Ok(())
}

/// Pulls devices out of their slots without asking the guest: it is paused meanwhile.
fn pull(host: &Host, addresses: &[&str]) -> Result<()> {
    let removals: String = addresses
        .iter()
        .map(|address| format!("{CTL} remove-device --force {address}\n"))
        .collect();
    host.run(&format!("set -e\n{CTL} pause\n{removals}{CTL} resume\n"))?;
    Ok(())
}

fn power_off(running: RunningGuest<'_>, host: &Host) -> Result<GuestResult> {
    host.run(&format!("{CTL} power-button"))?;
    running.finish()?.success()
}

/// Six devices are added from the moment when the socket answers, one 50 ms after the other, and the guest that comes up
/// meanwhile has all of them. Then no slot is empty, which is said with who has them. Of removals of one device at once, one
/// is done, and the others change nothing.
fn during_boot(lab: &mut Lab) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    let functions = host.virtual_functions("nic1", 5)?;
    host.run(&format!("busway device bind {nic} {}", functions.join(" ")))?;
    let (last, functions) = functions.split_last().context("virtual functions")?;
    let devices = [&[drive.clone(), nic.clone()], functions].concat();
    let run = guest()?
        .cpus(2)
        .args(&["--platform", "hotplug_slots=6,hotplug_mmio64=64M"])
        .args(&SOCKET)
        .script(&format!(
            "modprobe -aq nvme e1000e igbvf\n{DRIVEN}\
             until [ \"$(driven | wc -l)\" = 6 ]; do sleep 0.1; done\n\
             value devices \"$(driven | wc -l)\"\n\
             until_pressed waiting\n\
             value left \"$(driven | wc -l)\"\n\
             {{ dmesg | grep -E 'pciehp|pcieport' || true; }} | block log\n"
        ));
    let running = host.start_guest(&run)?;
    let added = host.run(&format!(
        "until {CTL} ping >/dev/null 2>&1; do sleep 0.05; done\n\
         for each in {}; do {CTL} add-device $each || exit; sleep 0.05; done\n",
        devices.join(" ")
    ))?;
    tell!("added:\n{added}");
    ensure!(
        added.contains("finds the device when it has one"),
        "the guest was up before the first was there: {added}"
    );
    running.wait_line("@@value devices 6")?;
    running.wait_line("@@value waiting")?;
    let all: Vec<&str> = devices.iter().map(String::as_str).collect();
    let words = [&["6 slots", "hotplug_slots=N"], &all[..]].concat();
    refused(host, &format!("add-device {last}"), &words)?;
    let info = control(host, "info")?;
    ensure!(!info.contains(" empty"), "there are empty slots: {info}");
    let both = host.run(&format!(
        "for each in 1 2 3; do {{ {CTL} remove-device --force {nic} 2>&1 && echo done; }} & done; wait"
    ))?;
    tell!("three removals at once:\n{both}");
    ensure!(both.matches("done\n").count() == 1, "{both}");
    for id in [&*nic, "nonsense"] {
        refused(host, &format!("remove-device {id}"), &[id, "has no device"])?;
    }
    ensure!(control(host, "info")?.contains("1 empty"), "no empty slot");
    let result = power_off(running, host)?;
    ensure!(
        result.value("left")? == "5",
        "{} left",
        result.value("left")?
    );
    tell!("the guest's log:\n{}", result.block("log")?);
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")
}

/// A guest that scans its buses without end gets a drive and a virtual function again and again, pulled out or released
/// in turn. Each time the drive's configuration space is as it was the first time but for its addresses, before a driver has
/// it, and its data is written and read. Resets of the bus in its midst do not look like a removal.
fn again_and_again(lab: &mut Lab, tier: Tier) -> Result<()> {
    let (rounds, resets) = (tier.of(5, 100), tier.of(3, 50));
    let config = HostConfig::new(Kernel::Iommufd)
        .device(Device::nvme("nv0", 8))
        .device(Device::igb("nic1"));
    let host = lab.host(&config)?;
    let drive = host.address("nv0")?;
    let functions = host.virtual_functions("nic1", 1)?;
    let function = functions.first().context("a virtual function")?;
    host.run(&format!("busway device bind {drive} {function}"))?;
    let run = guest()?
        .cpus(2)
        .args(&["--platform", "hotplug_slots=3,hotplug_mmio64=64M"])
        .args(&SOCKET)
        .limit(Duration::from_secs(180 + 10 * (rounds + resets)))
        .script(&format!(
            "at() {{ for each in /sys/bus/pci/devices/*; do\n\
             [ \"$(cat $each/vendor 2>/dev/null):$(cat $each/device 2>/dev/null)\" != $1 ] || echo ${{each##*/}}; done; }}\n\
             while true; do [ ! -e /tmp/scan ] || echo 1 >/sys/bus/pci/rescan; sleep 0.05; done &\n\
             scans=$!\n\
             for round in $(seq {rounds}); do\n\
             >/tmp/scan\n\
             value scans $round\n\
             until [ -n \"$(at 0x1b36:0x0010)\" ] && [ -n \"$(at 0x8086:0x10ca)\" ]; do sleep 0.1; done\n\
             drive=$(at 0x1b36:0x0010); nic=$(at 0x8086:0x10ca)\n\
             hexdump -C /sys/bus/pci/devices/$drive/config | grep -v '^000000[13]0' >/tmp/face\n\
             [ -f /tmp/first ] || cp /tmp/face /tmp/first\n\
             cmp -s /tmp/first /tmp/face || {{ diff /tmp/first /tmp/face | block face; exit 1; }}\n\
             modprobe -aq nvme igbvf\n\
             until [ -b /dev/nvme0n1 ] && [ -L /sys/bus/pci/devices/$nic/driver ]; do sleep 0.1; done\n\
             lab-io write /dev/nvme0n1 $round; lab-io verify /dev/nvme0n1 $round\n\
             rm /tmp/scan; sleep 0.1; echo 1 >/sys/bus/pci/rescan\n\
             if [ $round = {rounds} ]; then\n\
             kill $scans\n\
             while true; do lab-io write /dev/nvme0n1 $round >/dev/null; done &\n\
             io=$!\n\
             echo bus >/sys/bus/pci/devices/$drive/reset_method\n\
             dmesg -c >/tmp/log\n\
             for each in $(seq {resets}); do echo 1 >/sys/bus/pci/devices/$drive/reset; done\n\
             kill $io; wait $io || true\n\
             lab-io write /dev/nvme0n1 $round; lab-io verify /dev/nvme0n1 $round\n\
             dmesg >/tmp/after; cat /tmp/after >>/tmp/log\n\
             grep -E 'Link Down|not present|Slot' /tmp/after | block removals || true\n\
             fi\n\
             value wrote $round\n\
             while [ -n \"$(at 0x1b36:0x0010)$(at 0x8086:0x10ca)\" ]; do sleep 0.1; done\n\
             modprobe -r nvme igbvf\n\
             value gone $round\n\
             done\n\
             until_pressed waiting\n\
             {{ grep -E 'BUG|WARNING|assign|Slot' /tmp/log || true; }} | tail -n 200 | block log\n"
        ));
    let running = host.start_guest(&run)?;
    for round in 1..=rounds {
        // Linux finds a device anew that it has just released, where it scans before its slot is without power: so it
        // scans until the devices work.
        running.wait_line(&format!("@@value scans {round}"))?;
        for address in [&drive, function] {
            host.run(&format!("{CTL} add-device {address}"))?;
        }
        running.wait_line(&format!("@@value wrote {round}"))?;
        match round % 3 {
            // One after the other, so that the second is added to a slot that is being left.
            0 => host
                .run(&format!(
                    "{CTL} remove-device {drive} && {CTL} remove-device {function}"
                ))
                .map(drop)?,
            _ => pull(host, &[&drive, function])?,
        }
        running.wait_line(&format!("@@value gone {round}"))?;
        count("rounds", 1);
    }
    running.wait_line("@@value waiting")?;
    let result = power_off(running, host)?;
    ensure!(
        result.block("removals")?.is_empty(),
        "resets that looked like removals: {}",
        result.block("removals")?
    );
    tell!("the guest's log:\n{}", result.block("log")?);
    let log = result.block("log")?;
    ensure!(
        !log.contains("BUG") && !log.contains("failed to assign"),
        "the guest complains:\n{log}"
    );
    give_back(host, function, "igbvf")?;
    give_back(host, &drive, "nvme")
}

/// A guest with a disk, a tap and a drive, to which a NIC is added. After a restart it has all of them without a scan. One
/// that restarts while a NIC is asked for finds it gone, and whoever asked is answered. After each further restart the
/// process has what it had after the first.
fn restarted(lab: &mut Lab, tier: Tier) -> Result<()> {
    let restarts: u64 = tier.of(2, 100);
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    host.run(&format!(
        "busway device bind {nic}; truncate -s 1M /run/restarts.raw; ip tuntap add dev lab-tap mode tap"
    ))?;
    let run = guest()?
        .device(&drive)
        .args(&["--platform", "hotplug_slots=1,hotplug_mmio64=64M"])
        .args(&["--disk", "path=/run/restarts.raw", "--net", "tap=lab-tap"])
        .args(&SOCKET)
        .limit(Duration::from_secs(240 + 15 * restarts))
        .script(&format!(
            "modprobe -aq nvme e1000e\n{DRIVEN}\
             boot=$(dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\\0')\n\
             boot=$((${{boot:-0}} + 1))\n\
             value devices \"$boot: $(driven | wc -l)\"\n\
             echo $boot | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null\n\
             case $boot in\n\
             1) value up 1; until [ \"$(driven | wc -l)\" = 2 ]; do sleep 0.1; done; reboot -f;;\n\
             2) value up 2; until dmesg | grep -q 'power off in 5 sec'; do sleep 0.1; done; reboot -f;;\n\
             {}) until_pressed up_$boot; exit 0;;\n\
             *) until_pressed up_$boot; reboot -f;;\n\
             esac\n",
            restarts + 3
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value up 1")?;
    control(host, &format!("add-device {nic}"))?;
    running.wait_line("@@value devices 2: 2")?;
    running.wait_line("@@value up 2")?;
    // Answered though its guest is no more.
    control(host, &format!("remove-device {nic}"))?;
    running.wait_line("@@value devices 3: 1")?;
    let mut first = None;
    for restart in 0..=restarts {
        running.wait_line(&format!("@@value up_{} yes", restart + 3))?;
        let held = Held::by(&running, host)?;
        match &first {
            None => {
                tell!("after a restart:\n{}{}", held.descriptors, held.locked);
                first = Some(held);
            }
            Some(first) => ensure!(*first == held, "{restart}: {held:?}, first {first:?}"),
        }
        host.run(&format!("{CTL} power-button"))?;
        count("restarts", 1);
    }
    running.finish()?.success()?;
    host.run("ip link del lab-tap")?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")
}

/// A guest that uses no messages hears of its slots by their ports' pins. One whose kernel has hot-plug off does not, which
/// who adds and who removes is told, as who removes from a guest that is paused; the device can be pulled out, and be added
/// again and again.
fn unusual(lab: &mut Lab) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    host.run(&format!("busway device bind {nic}"))?;
    let start = |words: &str, script: &str| {
        let run = guest()?
            .cmdline(words)
            .args(&["--platform", "hotplug_slots=1,hotplug_mmio64=64M"])
            .args(&SOCKET)
            .script(&format!("modprobe -aq nvme e1000e\n{DRIVEN}{script}"));
        anyhow::Ok(run)
    };
    let run = start(
        // Linux leaves slots alone that it has no messages for, unless it is told.
        "pci=nomsi pcie_ports=native",
        "value ready yes\n\
         until ls /sys/class/net | grep -q eth; do sleep 0.1; done\n\
         value driven yes\n\
         until [ -z \"$(driven)\" ]; do sleep 0.1; done\n\
         value interrupts \"$(grep -c pciehp /proc/interrupts)\"\n\
         until_pressed waiting\n",
    )?;
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let said = control(host, &format!("add-device {nic}"))?;
    ensure!(!said.contains("no driver"), "{said}");
    running.wait_line("@@value driven")?;
    control(host, &format!("remove-device {nic}"))?;
    running.wait_line("@@value waiting")?;
    let result = power_off(running, host)?;
    ensure!(
        result.value("interrupts")? != "0",
        "pciehp has no interrupt"
    );
    give_back(host, &nic, "e1000e")?;

    let run = start("pcie_ports=compat", "until_pressed waiting\n")?;
    let running = host.start_guest(&run.device(&drive))?;
    running.wait_line("@@value waiting")?;
    refused(
        host,
        &format!("remove-device {drive}"),
        &["no driver that could be asked", "--force"],
    )?;
    host.run(&format!("{CTL} pause"))?;
    refused(
        host,
        &format!("remove-device {drive}"),
        &["the guest does not run", "keeps it", "--force"],
    )?;
    host.run(&format!("{CTL} resume"))?;
    ensure!(control(host, "info")?.contains(&drive), "it keeps it");
    control(host, &format!("remove-device --force {drive}"))?;
    for _ in 0..2 {
        // It is in the slot, which nobody gives power: the guest has not had it.
        let said = control(host, &format!("add-device {drive}"))?;
        ensure!(said.contains("no driver for the slot"), "{said}");
        control(host, &format!("remove-device {drive}"))?;
    }
    power_off(running, host)?;
    give_back(host, &drive, "nvme")
}

/// Memory of 1 and 4 GiB comes into slots that have room for it, and each of its pages that has a mark of the outer
/// machine's is found; slots with less refuse it, and say how much it is and how much there is.
fn large(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Iommufd)
        .memory_mib(3072)
        .device(Device::ivshmem("mem1", 1024))
        .device(Device::ivshmem("mem4", 4096));
    let host = lab.host(&config)?;
    let [one, four] = [host.address("mem1")?, host.address("mem4")?];
    host.run(&format!("busway device bind {one} {four}"))?;
    let bars = build_static("busway-lab", "lab-bars", Profile::Lab)?;
    let start = |room: &str, script: &str| {
        let run = GuestRun::new(Vmm::Busway)
            .file("bin/lab-bars", &bars)
            .args(&[
                "--platform",
                &format!("hotplug_slots=2,hotplug_mmio64={room}"),
            ])
            .args(&SOCKET)
            .script(script);
        host.start_guest(&run)
    };
    let running = start(
        "4G",
        "value ready yes\n\
         of() { for each in /sys/bus/pci/devices/*; do\n\
         [ ! -f $each/resource2 ] || [ \"$(stat -c %s $each/resource2)\" != $1 ] || echo $each; done; }\n\
         for size in 1073741824 4294967296; do\n\
         until [ -n \"$(of $size)\" ]; do sleep 0.1; done\n\
         f=$(of $size); echo 1 >$f/enable\n\
         value ends_$size \"$(lab-bars peek $f/resource2 0) $(lab-bars peek $f/resource2 $((size - 4096)))\"\n\
         done\n\
         until_pressed waiting\n",
    )?;
    running.wait_line("@@value ready")?;
    for address in [&one, &four] {
        control(host, &format!("add-device {address}"))?;
    }
    running.wait_line("@@value waiting")?;
    let result = power_off(running, host)?;
    for size in ["1073741824", "4294967296"] {
        let ends = result.value(&format!("ends_{size}"))?;
        tell!("memory of {size} bytes, its first and last page: {ends}");
        ensure!(
            !ends.contains("0xffffffff"),
            "{size} is out of reach: {ends}"
        );
    }
    let running = start("1G", "until_pressed waiting\n")?;
    running.wait_line("@@value waiting")?;
    let before = Held::by(&running, host)?;
    for _ in 0..2 {
        let request = format!("add-device {four}");
        refused(host, &request, &[&four, "4 GiB", "1 GiB", "hotplug_mmio64"])?;
        ensure!(control(host, "info")?.contains("2 empty"), "a slot is gone");
    }
    // It is closed beside the answer.
    host.run(&format!(
        "until ! ls -l /proc/{}/fd | grep -qE 'vfio-device|/dev/vfio'; do sleep 0.1; done",
        running.pid()?
    ))?;
    let after = Held::by(&running, host)?;
    ensure!(before == after, "{after:?}, before {before:?}");
    power_off(running, host)?;
    Ok(())
}
