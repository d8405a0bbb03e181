//! The fourth part of the benchmark: how long it takes until a VM with 2 GiB and a drive, for which all of them are
//! pinned, is started, and until its guest's first program begins, under Busway and under QEMU, in turns on one emulated
//! host.
//!
//! Busway is asked as a container runtime asks it: its process waits at its socket, and the time is that of `vm.create` and
//! `vm.boot`. QEMU is started by its command line, and its monitor answers when all is in place.

use std::fs;

use anyhow::{Result, bail};
use busway_lab::{GuestRun, Host, Vmm};
use serde::Serialize;
use serde_json::json;

use crate::figures::print_beside;

/// The guest's memory, in MiB.
const MEMORY_MIB: u64 = 2048;

/// One start.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Started {
    vmm: &'static str,
    /// From the first request until the VMM has answered that the VM runs.
    answered_ms: f64,
    /// From the first request until the guest's first program begins.
    user_space_ms: f64,
}

/// Measures, and prints both side by side. The device at `address`, an NVMe drive, is with VFIO.
pub(crate) fn run(host: &Host, address: &str, turns: u32) -> Result<Vec<Started>> {
    let guest = GuestRun::new(Vmm::Busway).script("sleep 600\n");
    let words = guest.kernel_words();
    fs::write(host.share().join("qmp.py"), include_str!("qmp.py"))?;
    fs::write(host.share().join("segment"), guest.segment()?)?;
    let config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": MEMORY_MIB << 20},
        "payload": {"kernel": "/boot/vmlinux", "initramfs": "/run/guest.img", "cmdline": words},
        "serial": {"mode": "File", "file": "/run/serial"},
        "console": {"mode": "Off"},
        "devices": [{"path": format!("/sys/bus/pci/devices/{address}")}],
    });
    fs::write(host.share().join("vm.json"), config.to_string())?;
    host.run("cat /boot/guest.img /lab/segment >/run/guest.img")?;
    let ctl = "busway ctl --api-socket /run/vm.sock";
    let busway = (
        "busway",
        format!(
            "busway --api-socket /run/vm.sock & pid=$!\nuntil {ctl} ping; do :; done\n\
             began=$EPOCHREALTIME\n{ctl} create /lab/vm.json\n{ctl} boot\n"
        ),
    );
    let qemu = (
        "qemu",
        format!(
            "began=$EPOCHREALTIME\nqemu-system-x86_64 -machine q35,accel=kvm,hpet=off -cpu host -nodefaults \
             -no-user-config -display none -no-reboot -qmp unix:/run/qmp.sock,server=on,wait=off -serial file:/run/serial \
             -kernel /boot/vmlinux -initrd /run/guest.img -append '{words}' -smp 1 -m {MEMORY_MIB} \
             -device pcie-root-port,id=above,chassis=1 -device vfio-pci,host={address},bus=above & pid=$!\n\
             until python3 /lab/qmp.py query-status '{{}}' 2>/dev/null; do [ -d /proc/$pid ]; done\n"
        ),
    );
    let mut both = [busway, qemu];
    let mut all = Vec::new();
    for turn in 1..=turns {
        for (vmm, start) in &both {
            eprintln!("a VM with a drive and {MEMORY_MIB} MiB, turn {turn} of {turns}: {vmm}");
            // The VMM is gone before the next begins, and its group is free: it was killed, and waited for.
            let times = host.run(&format!(
                "set -e; rm -f /run/serial; exec 9>&1; trap '[ $? = 0 ] || cat /run/vmm.log >&9' EXIT\n{{ {start} answered=$EPOCHREALTIME; }} >/run/vmm.log 2>&1\n\
                 until grep -q @@up /run/serial; do sleep 0.01; done\nended=$EPOCHREALTIME\n\
                 kill -KILL $pid; while [ -d /proc/$pid ]; do sleep 0.01; wait; done\n\
                 echo $began $answered $ended"
            ))?;
            let times = times.split_ascii_whitespace().map(str::parse::<f64>);
            let times = times.collect::<Result<Vec<_>, _>>();
            let [began, answered, ended] = times?[..] else {
                bail!("not three times");
            };
            all.push(Started {
                vmm,
                answered_ms: (answered - began) * 1e3,
                user_space_ms: (ended - began) * 1e3,
            });
        }
        // Neither is always first.
        both.reverse();
    }
    let figures = |vmm: &str, of: fn(&Started) -> f64| {
        let of_vmm = all.iter().filter(|one| one.vmm == vmm);
        of_vmm.map(of).collect::<Vec<_>>()
    };
    let row = |name, of: fn(&Started) -> f64| (name, figures("busway", of), figures("qemu", of));
    print_beside(
        &format!(
            "A VM with an NVMe drive and {MEMORY_MIB} MiB, ms; median (least..most) of the turns"
        ),
        &[
            row("from the request until the VM runs", |one| one.answered_ms),
            row("until the guest's first program begins", |one| {
                one.user_space_ms
            }),
        ],
        None,
    );
    Ok(all)
}
