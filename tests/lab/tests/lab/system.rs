//! A whole Debian, as an installer leaves it on a disk, that boots by its own shim and GRUB to its login.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{BEFORE_FIRMWARE, Device, GuestRun, Host, HostConfig, Kernel, Lab, Vmm};

use crate::assigned::give_back;
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak(
        "system_of_debian_boots_to_its_login_from_a_virtio_disk_and_from_an_assigned_drive",
        |lab, _| to_its_login(lab),
    ),
    Proof::soak(
        "system_of_debian_boots_to_its_login_by_the_firmware_of_debian_12",
        |lab, _| by_firmware_of_debian_12(lab),
    ),
];

/// What the console shows last before the login.
const ISSUE: &str = "Debian GNU/Linux 13 debian ttyS0";
const LIMIT: Duration = Duration::from_secs(400);

/// A host with a drive that takes the whole system, and a NIC, both assigned.
fn host(lab: &mut Lab) -> Result<(&Host, String, String)> {
    let config = HostConfig::new(Kernel::Iommufd)
        .device(Device::nvme("nv0", 512))
        .device(Device::e1000e("nic0"));
    let host = lab.host(&config)?;
    let (drive, nic) = (host.address("nv0")?, host.address("nic0")?);
    host.run(BEFORE_FIRMWARE)?;
    Ok((host, drive, nic))
}

/// A VM with the devices given, which is told neither kernel nor firmware, and has a disk or none.
fn booted(words: &str, firmware: &str, devices: &[&String]) -> GuestRun {
    let run = GuestRun::new(Vmm::Busway)
        .limit(LIMIT)
        .args(&SOCKET)
        .opened_by(&format!(
            "rm -f \"$6\"\nshift 8\nexec busway run {words} {firmware} \"$@\"\n"
        ));
    devices.iter().fold(run, |run, device| run.device(device))
}

/// The system comes up to its login from the disk where it is, with nothing that failed, has the devices, and goes down by
/// the power button.
fn comes_up(host: &Host, run: &GuestRun, root: &str, drivers: &[&str]) -> Result<()> {
    let running = host.start_guest(run)?;
    running.wait_line(ISSUE)?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?;
    let console = result.transcript.text();
    tell!("{console}");
    ensure!(result.status == 0, "{}: {}", result.status, result.stderr);
    ensure!(console.contains("debian login:"), "no login");
    let found = result.value("root")?;
    ensure!(found.starts_with(root), "its root is {found}");
    ensure!(result.value("serial")?.trim() == "NV0");
    ensure!(result.value("failed")? == "0", "units failed");
    let has = result.value("drivers")?;
    for driver in drivers {
        ensure!(has.split(' ').any(|one| one == *driver), "{driver}: {has}");
    }
    Ok(())
}

/// The words of a disk that is the system's own, whose changes go to a file of the host's.
fn overlay(host: &Host) -> Result<String> {
    let system = host.parts().system()?;
    let name = system.file_name().context("a name")?.to_string_lossy();
    host.run(&format!(
        "rm -f /run/system.qcow2; qemu-img create -q -f qcow2 -b /cache/{name}/system.qcow2 -F qcow2 /run/system.qcow2"
    ))?;
    Ok("--disk path=/run/system.qcow2,image_type=qcow2,backing_files=on".to_owned())
}

fn to_its_login(lab: &mut Lab) -> Result<()> {
    let (host, drive, nic) = host(lab)?;
    let disk = overlay(host)?;
    host.run(&format!("busway device bind {drive} {nic}"))?;
    let devices = [&drive, &nic];
    let both = booted(&disk, "", &devices);
    comes_up(host, &both, "/dev/vda2", &["virtio-pci", "nvme", "e1000e"])?;
    // The same on the drive, and no other disk.
    give_back(host, &drive, "nvme")?;
    host.run(&format!(
        "qemu-img convert -n -O raw /run/system.qcow2 /dev/nvme0n1 && sync && udevadm settle && \
         busway device bind {drive}"
    ))?;
    let alone = booted("", "", &devices);
    comes_up(host, &alone, "/dev/nvme0n1p2", &["nvme", "e1000e"])?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")
}

/// The firmware of the distribution before, which keeps configuration space elsewhere and asks for memory in another way.
fn by_firmware_of_debian_12(lab: &mut Lab) -> Result<()> {
    let (host, drive, nic) = host(lab)?;
    let disk = overlay(host)?;
    host.run(&format!("busway device bind {drive} {nic}"))?;
    let firmware = "--firmware /usr/share/OVMF-debian-12/OVMF_CODE_4M.fd,vars=/run/debian-12.vars";
    let run = booted(&disk, firmware, &[&drive, &nic]);
    comes_up(host, &run, "/dev/vda2", &["virtio-pci", "nvme", "e1000e"])?;
    give_back(host, &nic, "e1000e")?;
    give_back(host, &drive, "nvme")
}
