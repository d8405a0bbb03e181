//! The walls behind the VMM, round a VM whose devices come and go.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Lab, RunningGuest};

use crate::assigned::{give_back, guest, zoo};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "walls_stand_round_every_task_while_devices_come_and_go",
        |lab| stand(lab, "iommufd=off"),
    ),
    Proof::soak(
        "a_vm_in_a_jail_as_another_user_has_its_devices_and_what_is_sent_to_it",
        |lab, _| apart(lab, "iommufd=off"),
    ),
    Proof::soak(
        "a_vm_in_a_jail_as_another_user_has_its_devices_by_iommufd",
        |lab, _| apart(lab, "iommufd=on,p2p=off"),
    ),
    Proof::soak(
        "walls_stand_round_a_vm_whose_devices_come_and_go_by_iommufd",
        |lab, _| stand(lab, "iommufd=on,p2p=off"),
    ),
];

/// The control socket, in a folder where nothing else is.
const SOCKET: [&str; 2] = ["--api-socket", "/run/walls/vm.sock"];
const CTL: &str = "busway ctl --api-socket /run/walls/vm.sock";

/// The capabilities of the table, by the beginnings of threads' names; the last is all others'. docs/security.md,
/// linux/capability.h
const RIGHTS: [(&str, u64); 9] = [
    ("vcpu", 1 << 14),
    ("_", 0),
    ("http", 0),
    ("log", 0),
    ("stdin", 1 << 1),
    ("serial-in", 1 << 1),
    ("console-out", 1 << 1),
    ("report", 1 << 1),
    ("", 1 << 1 | 1 << 12 | 1 << 14 | 1 << 19 | 1 << 21 | 1 << 24),
];

/// How names begin of threads that KVM, vhost and io_uring make in a process.
const KERNELS: [&str; 3] = ["kvm-", "vhost-", "iou-"];

/// Each task of the process has a filter, no way to more privileges, and what the table has for it.
fn look(host: &Host, running: &RunningGuest<'_>, when: &str) -> Result<()> {
    let pid = running.pid()?;
    let tasks = host.run(&format!(
        "for task in /proc/{pid}/task/*; do\n\
         awk '/^(Name|Seccomp|NoNewPrivs|CapEff):/ {{ printf \"%s \", $2 }} END {{ print \"\" }}' $task/status || true\n\
         done"
    ))?;
    tell!("{when}:\n{tasks}");
    for task in tasks.lines().filter(|line| !line.trim().is_empty()) {
        let [name, effective, privileges, filtered] =
            task.split_whitespace().collect::<Vec<_>>()[..]
        else {
            anyhow::bail!("{when}: {task:?}");
        };
        ensure!([privileges, filtered] == ["1", "2"], "{when}: {task}");
        // The kernel's own threads have the rights of the one that had them made, and run nothing of the process's.
        if KERNELS.iter().any(|begin| name.starts_with(begin)) {
            continue;
        }
        let rights = RIGHTS.iter().find(|(begin, _)| name.starts_with(begin));
        let (_, rights) = rights.context("the last fits all")?;
        let expected = format!("{rights:016x}");
        ensure!(effective == expected, "{when}: {task}, not {expected}");
    }
    Ok(())
}

/// A guest with a disk, a NIC on a tap and an assigned NIC gets another disk, another NIC and an assigned drive by their paths,
/// works with them, is paused, restarts, and gives all back, one device because the host unbinds it. All walls
/// stand: filters that end the process at the first call that is not in the table, and Landlock, which refuses a disk
/// that lies elsewhere.
fn stand(lab: &mut Lab, iommu: &str) -> Result<()> {
    let host = lab.host(&zoo())?;
    let (drive, nic) = (host.address("nv0")?, host.address("nic0")?);
    host.run(&format!(
        "busway device bind {drive} {nic}; rm -rf /run/walls /run/images; mkdir -p /run/walls /run/images/vm\n\
         truncate -s 4M /run/images/vm/base.raw /run/images/vm/hot.raw /run/images/outside.raw\n\
         ip tuntap add dev walls-tap mode tap; ip tuntap add dev walls-hot mode tap"
    ))?;
    let run = guest()?
        .device(&nic)
        // What the guest boots is on 9p here, where it would bound threads alone by default.
        .args(&["--landlock", "true", "--disk", "path=/run/images/vm/base.raw"])
        .args(&["--net", "tap=walls-tap"])
        .args(&["--platform", &format!("hotplug_slots=2,hotplug_mmio64=64M,{iommu}")])
        .args(&SOCKET)
        .limit(Duration::from_secs(240))
        .script(
            "modprobe -aq virtio_blk virtio_net nvme e1000e\n\
             if lab-io verify /dev/vda 1; then value again yes; until_pressed waiting; exit 0; fi\n\
             for each in /sys/class/net/eth*; do ip link set ${each##*/} up; done\n\
             nics() { ls -d /sys/class/net/eth* | wc -l; }\n\
             before=$(nics)\n\
             value written \"$(lab-io write /dev/vda 1) $(lab-io verify /dev/vda 1)\"\n\
             value ready yes\n\
             until [ -b /dev/vdb ] && [ -b /dev/nvme0n1 ] && [ $(nics) -gt $before ]; do sleep 0.1; done\n\
             value hot \"$(lab-io write /dev/vdb 2) $(lab-io write /dev/nvme0n1 3)\"\n\
             while [ -b /dev/vdb ] || [ -b /dev/nvme0n1 ]; do sleep 0.1; done\n\
             value gone yes\n\
             reboot -f\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    look(host, &running, "at the start")?;
    bounded(host, &running)?;
    host.run(&format!(
        "{CTL} add-disk /run/images/vm/hot.raw --id hot && {CTL} add-net walls-hot && {CTL} add-device {drive}"
    ))?;
    let refused = host.run(&format!(
        "if {CTL} add-disk /run/images/outside.raw 2>&1; then echo taken; fi"
    ))?;
    ensure!(
        refused.contains("--landlock-rules") && !refused.contains("taken"),
        "{refused}"
    );
    running.wait_line("@@value hot")?;
    look(host, &running, "with what has come")?;
    host.run(&format!(
        "{CTL} pause && {CTL} resume && {CTL} devices && {CTL} top --once"
    ))?;
    // One is asked for over the API, and the other by the host, which wants it back.
    host.run(&format!(
        "{CTL} remove-device hot && echo {drive} >/sys/bus/pci/drivers/vfio-pci/unbind"
    ))?;
    running.wait_line("@@value gone")?;
    running.wait_line("@@value waiting")?;
    look(host, &running, "after a restart")?;
    host.run(&format!("{CTL} power-button"))?;
    running.finish()?.success()?;
    host.run("ip link del walls-tap; ip link del walls-hot; rm -r /run/walls /run/images")?;
    give_back(host, &drive, "nvme")?;
    give_back(host, &nic, "e1000e")
}

/// The process says that Landlock bounds it: of another process that is not to be seen. Nobody else can see a domain, but what
/// it does to its signals: docs/security.md.
fn bounded(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    let shown = host.run(&format!("{CTL} --json info"))?;
    ensure!(
        shown.contains("\"landlock_enable\": true") || shown.contains("\"landlock_enable\":true"),
        "process {}: {shown}",
        running.pid()?
    );
    Ok(())
}

/// A user that the host does not know.
const USER: u32 = 4711;

/// A VM whose process root starts, in a jail and as another user: root's are a disk, a tap and an assigned NIC. It gets an
/// assigned drive by its path, which the user may open, and a disk by a descriptor, which the user may not; it is paused, its
/// guest restarts, and it gives all back.
fn apart(lab: &mut Lab, iommu: &str) -> Result<()> {
    let host = lab.host(&zoo())?;
    let (drive, nic) = (host.address("nv0")?, host.address("nic0")?);
    host.run(&format!(
        "busway device bind {nic}; busway device bind --user {USER} {drive}\n\
         rm -rf /run/walls /run/images; mkdir -p /run/walls /run/images/vm; chown {USER}:{USER} /run/walls\n\
         truncate -s 4M /run/images/vm/base.raw /run/images/hot.raw; chmod 600 /run/images/vm/base.raw /run/images/hot.raw\n\
         ip tuntap add dev walls-tap mode tap"
    ))?;
    let run = guest()?
        .device(&nic)
        .args(&[
            "--jail",
            "--user",
            &format!("{USER}:{USER}"),
            "--landlock",
            "true",
        ])
        .args(&[
            "--disk",
            "path=/run/images/vm/base.raw",
            "--net",
            "tap=walls-tap",
        ])
        .args(&[
            "--platform",
            &format!("hotplug_slots=2,hotplug_mmio64=64M,{iommu}"),
        ])
        .args(&SOCKET)
        // The report is written beside this.
        .opened_by("chmod 777 $(dirname $0)\nexec \"$@\"\n")
        .limit(Duration::from_secs(240))
        .script(
            "modprobe -aq virtio_blk virtio_net nvme e1000e\n\
             if lab-io verify /dev/vda 1; then value again yes; until_pressed waiting; exit 0; fi\n\
             value nics $(ls -d /sys/class/net/eth* | wc -l)\n\
             for each in /sys/class/net/eth*; do ip link set ${each##*/} up; done\n\
             value written \"$(lab-io write /dev/vda 1) $(lab-io verify /dev/vda 1)\"\n\
             value ready yes\n\
             until [ -b /dev/vdb ] && [ -b /dev/nvme0n1 ]; do sleep 0.1; done\n\
             value hot \"$(lab-io write /dev/vdb 2) $(lab-io write /dev/nvme0n1 3)\"\n\
             while [ -b /dev/vdb ] || [ -b /dev/nvme0n1 ]; do sleep 0.1; done\n\
             value gone yes\n\
             reboot -f\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    is_apart(host, &running, "at the start")?;
    host.run(&format!(
        "{CTL} add-disk /run/images/hot.raw --id hot --send && {CTL} add-device {drive}"
    ))?;
    let refused = host.run(&format!(
        "if {CTL} add-disk /run/images/hot.raw 2>&1; then echo taken; fi"
    ))?;
    ensure!(
        refused.contains("--jail") && !refused.contains("taken"),
        "{refused}"
    );
    running.wait_line("@@value hot")?;
    is_apart(host, &running, "with what has come")?;
    host.run(&format!(
        "{CTL} pause && {CTL} resume && {CTL} devices && {CTL} top --once"
    ))?;
    host.run(&format!(
        "{CTL} remove-device hot && echo {drive} >/sys/bus/pci/drivers/vfio-pci/unbind"
    ))?;
    running.wait_line("@@value gone")?;
    running.wait_line("@@value waiting")?;
    is_apart(host, &running, "after a restart")?;
    host.run(&format!("{CTL} power-button"))?;
    running.finish()?.success()?;
    host.run("ip link del walls-tap; rm -r /run/walls /run/images")?;
    give_back(host, &drive, "nvme")?;
    give_back(host, &nic, "e1000e")
}

/// Each task is the other user's, without any capability, and the process has namespaces and a root of its own.
fn is_apart(host: &Host, running: &RunningGuest<'_>, when: &str) -> Result<()> {
    let outer = running.pid()?;
    let inner = host.run(&format!("cat /proc/{outer}/task/{outer}/children"))?;
    let pid = inner.trim();
    let tasks = host.run(&format!(
        "for task in /proc/{outer}/task/* /proc/{pid}/task/*; do\n\
         awk '/^(Name|Uid|Gid|CapPrm|CapEff):/ {{ printf \"%s \", $2 }} END {{ print \"\" }}' $task/status || true\n\
         done"
    ))?;
    tell!("{when}:\n{tasks}");
    let nothing = "0".repeat(16);
    let user = USER.to_string();
    for task in tasks.lines().filter(|line| !line.trim().is_empty()) {
        let words: Vec<_> = task.split_whitespace().collect();
        let [name, rest @ ..] = &words[..] else {
            continue;
        };
        if KERNELS.iter().any(|begin| name.starts_with(begin)) {
            continue;
        }
        ensure!(rest == [&user, &user, &nothing, &nothing], "{when}: {task}");
    }
    let seen = host.run(&format!(
        "for each in mnt pid net ipc uts; do\n\
         [ $(readlink /proc/{pid}/ns/$each) != $(readlink /proc/self/ns/$each) ] || echo shared $each\n\
         done; echo $(ls /proc/{pid}/root /proc/{pid}/root/run); tail -n +3 /proc/{pid}/net/dev"
    ))?;
    tell!("{seen}");
    for word in ["shared", "etc", "usr", "bin", "eth0", "walls-tap"] {
        ensure!(
            !seen
                .split_whitespace()
                .any(|one| one.trim_end_matches(':') == word),
            "{when}: {seen}"
        );
    }
    Ok(())
}
