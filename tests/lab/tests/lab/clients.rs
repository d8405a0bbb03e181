//! What clients of Cloud Hypervisor's API send, to a process that has a real guest and a host device for it: the files of
//! `tests/kvm/clients`, walked by the tests of `tests/kvm/clients.rs` in the emulated host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::spent::Undisturbed;
use busway_lab::{Device, Lab, Profile, archive, build_busway, build_tests};

use crate::assigned::{give_back, guest, zoo};
use crate::proof::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "clients_lead_a_vm_with_an_assigned_drive_through_its_life",
    led,
)];

/// What Kata waits for the answers to `vm.create` and `vm.boot` together.
const KATA_LIMIT: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(400);

/// The guest reads its drive for ever, and the one that comes later while it is there. Both are on bus 0, where Kata looks for
/// them; what comes to a root port would not be. One that has just come has no node yet, or has none any more.
/// At its vsock, where it has one, it answers with what it is told.
const SCRIPT: &str = "\
    socat VSOCK-LISTEN:1024,fork,reuseaddr EXEC:cat 2>/dev/null &\n\
    while true; do\n\
    for drive in /sys/bus/pci/devices/0000:00:*/nvme/nvme*; do\n\
    dd if=/dev/${drive##*/}n1 of=/dev/null bs=4096 count=64 iflag=direct 2>/dev/null || true\n\
    done\n\
    done\n";

/// By Kata's first runtime the guest has 2 GiB, which are pinned for its drive. Kata's runtimes add another drive to the guest
/// that runs, and remove it.
fn led(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo().device(Device::nvme("nv1", 64)))?;
    let (address, second) = (host.address("nv0")?, host.address("nv1")?);
    host.run(&format!("busway device bind {address} {second}"))?;
    let tests = build_tests("kvm")?;
    host.install_as(&tests, "busway-kvm-tests")?;
    // The tests start the program where it was when they were built.
    let busway = build_busway(Profile::Lab)?;
    let folder = busway.parent().context("a program is in a folder")?;
    let run = guest()?;
    fs::write(
        host.share().join("segment"),
        archive([("script", SCRIPT.as_bytes())]),
    )?;
    host.run(&format!(
        "mkdir -p '{}'\nln -s /usr/local/bin/busway '{}'\ncat /boot/guest.img /boot/guest-programs.img /lab/segment >/run/guest.img",
        folder.display(),
        busway.display()
    ))?;
    let walk = |names: &str, memory: u64| {
        let words = format!(
            "KERNEL=/boot/vmlinux\nINITRAMFS=/run/guest.img\nCMDLINE={}\nMEMORY={}\nVFIO={address}\nVFIO2={second}",
            run.kernel_words(),
            memory << 20
        );
        host.spawn(&format!(
            "BUSWAY_CLIENTS='{words}' exec busway-kvm-tests {names} --nocapture --test-threads=1 2>&1"
        ))
    };
    let job = walk("katas_go", 2048)?;
    let event = |event: &str| {
        let is_it = |line: &str| line == event || line.starts_with(&format!("{event} after"));
        job.wait_line(LIMIT, is_it)
    };
    event("@@ create")?;
    let since = Undisturbed::start(host.qemu_pid());
    let told = event("@@ booted")?;
    let booted = since.elapsed();
    tell!("{told}, undisturbed {} ms", booted.as_millis());
    let told = event("@@ works")?;
    let works = since.elapsed();
    tell!("{told}, undisturbed {} ms", works.as_millis());
    let said = job.wait(LIMIT)?.success()?;
    ensure!(said.contains("1 passed"), "{said}");
    ensure!(
        booted < KATA_LIMIT,
        "vm.create and vm.boot took {booted:?}, and Kata gives up after {KATA_LIMIT:?}"
    );
    let said = walk("clients:: --skip katas_go", 512)?
        .wait(LIMIT)?
        .success()?;
    let worked = said
        .lines()
        .filter(|line| line.starts_with("@@ works"))
        .count();
    ensure!(worked == 6, "the guests of {worked} clients worked: {said}");
    give_back(host, &address, "nvme")?;
    give_back(host, &second, "nvme")
}
