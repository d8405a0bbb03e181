//! What a host runs out of while a VM is there, as no test without a host of its own can have it: memory in its cgroup, room
//! for an image, room for what the helper notes, and a sysfs that can be written.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, Lab, RunningGuest};

use crate::assigned::{bound, give_back, guest, zoo};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak(
        "want_of_memory_kills_busway_and_its_drive_is_given_back",
        |lab, _| killed_for_memory(lab),
    ),
    Proof::soak(
        "want_of_room_fails_a_disks_request_and_no_more",
        |lab, _| without_room(lab),
    ),
    Proof::soak(
        "want_of_a_sysfs_or_of_a_run_that_can_be_written_is_named_and_changes_nothing",
        |lab, _| only_read(lab),
    ),
];

/// Has the VMM in a cgroup of its own with so much memory.
fn in_a_cgroup(most: &str) -> String {
    format!(
        "cd /sys/fs/cgroup; mkdir -p want; echo +memory >cgroup.subtree_control\n\
         echo {most} >want/memory.max; echo $$ >want/cgroup.procs; cd /; exec \"$@\""
    )
}

/// The guest's drive works, and has what the guest writes.
fn works(host: &Host, address: &str, seed: u32) -> Result<()> {
    let run = guest()?.device(address).script(&format!(
        "lab-io write /dev/nvme0n1 {seed}\nvalue verified \"$(lab-io verify /dev/nvme0n1 {seed})\"\n"
    ));
    host.guest(&run)?.success()?.value("verified").map(drop)
}

/// The kernel ends Busway by SIGKILL, first while it pins the guest's memory and then under the guest's I/O. The next VM has the
/// drive each time, `device restore` finds nothing to mend, and the host's driver takes the drive in the end.
fn killed_for_memory(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let endless = "lab-io write /dev/nvme0n1 1\nvalue io begun\n\
                   while true; do lab-io write /dev/nvme0n1 1 >/dev/null; done\n";
    let run = |most: &str| {
        let run = guest()?.device(&address).script(endless).dies();
        anyhow::Ok(run.opened_by(&in_a_cgroup(most)))
    };
    let ended = |running: RunningGuest<'_>, when: &str| {
        let result = running.finish()?;
        let killed = host.run(
            "grep -E '^oom_kill ' /sys/fs/cgroup/want/memory.events; rmdir /sys/fs/cgroup/want",
        )?;
        tell!("{when}: {} {}", result.status, killed.trim());
        ensure!(result.status == 128 + 9, "{when}: status {}", result.status);
        ensure!(
            killed.trim() != "oom_kill 0",
            "{when}: it was not the kernel"
        );
        anyhow::Ok(())
    };
    ended(host.start_guest(&run("128M")?)?, "at the start")?;
    works(host, &address, 2)?;
    let running = host.start_guest(&run("max")?)?;
    running.wait_line("@@value io begun")?;
    host.run("echo 128M >/sys/fs/cgroup/want/memory.max")?;
    ended(running, "while the guest runs")?;
    works(host, &address, 3)?;
    tell!(
        "{}",
        host.run(&format!("busway device restore {address} 2>&1"))?
    );
    let driver = host.driver(&address)?;
    ensure!(driver.as_deref() == Some("nvme"), "{driver:?}");
    Ok(())
}

/// An image on a file system that is full: the guest's requests fail, the log says why, and the guest goes on; when there is
/// room again its disk works.
fn without_room(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    host.run(
        "mkdir -p /run/want; mount -t tmpfs -o size=6M want /run/want\n\
         truncate -s 4M /run/want/disk; head -c 4M /dev/zero >/run/want/other",
    )?;
    let run = guest()?
        .args(&["--disk", "path=/run/want/disk"])
        .limit(Duration::from_secs(240))
        .script(
            "modprobe virtio_blk\n\
             value full \"$(lab-io write /dev/vda 1 >/dev/null 2>&1 && echo no || echo yes)\"\n\
             until_pressed full_now\n\
             value room \"$(lab-io write /dev/vda 2) $(lab-io verify /dev/vda 2)\"\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value full_now")?;
    host.run("rm /run/want/other")?;
    running.signal("TERM")?;
    let result = running.finish()?.success()?;
    ensure!(result.value("full")? == "yes", "there was room");
    let said = &result.stderr;
    ensure!(said.contains("No space left on device"), "{said}");
    tell!("{}", said.trim());
    host.run("umount /run/want; rmdir /run/want").map(drop)
}

/// In a mount namespace where sysfs is only read, as in a container, or where `/run` is full: devices are neither bound nor
/// unbound, with the reason, and stay as they were. A VM needs neither.
fn only_read(lab: &mut Lab) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    let within = |mounts: &str, command: &str| {
        host.output(
            &format!("exec unshare --mount sh -ec '{mounts}; exec {command}'"),
            Duration::from_secs(120),
        )
    };
    const READ_ONLY: &str = "mount -o remount,bind,ro /sys";
    const FULL: &str =
        "mkdir -p /run/busway; mount -t tmpfs -o nr_inodes=1,mode=700 full /run/busway";
    for (mounts, says) in [
        (READ_ONLY, "sysfs is mounted read-only"),
        (FULL, "there is no room left on its file system"),
    ] {
        for (verb, address, driver) in [("bind", &nic, "e1000e"), ("unbind", &drive, "vfio-pci")] {
            let output = within(mounts, &format!("busway device {verb} {address}"))?;
            tell!("{verb}: {}", output.stderr.trim());
            ensure!(
                output.status == 1 && output.stderr.contains(says),
                "{verb}: status {}: {}",
                output.status,
                output.stderr
            );
            let found = host.driver(address)?;
            ensure!(found.as_deref() == Some(driver), "{verb}: {found:?}");
        }
    }
    let output = within(
        "mount -t tmpfs -o nr_inodes=1 full /mnt",
        "busway run --kernel /boot/vmlinux --serial off --api-socket /mnt/api",
    )?;
    tell!("{}", output.stderr.trim());
    ensure!(
        output.status == 3
            && ["/mnt/api", "No space left", "df"]
                .iter()
                .all(|word| output.stderr.contains(word)),
        "status {}: {}",
        output.status,
        output.stderr
    );
    let opener = format!("exec unshare --mount sh -ec '{READ_ONLY}; exec \"$@\"' sh \"$@\"");
    let run = guest()?.device(&drive).opened_by(&opener).script(
        "lab-io write /dev/nvme0n1 4\nvalue verified \"$(lab-io verify /dev/nvme0n1 4)\"\n",
    );
    host.guest(&run)?.success()?.value("verified")?;
    give_back(host, &drive, "nvme")
}
