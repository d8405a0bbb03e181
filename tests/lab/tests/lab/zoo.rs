//! The whole zoo: every device proves itself in one guest with all others, and is released and probed by its
//! driver again and again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    BEFORE_FIRMWARE, DataServer, GuestKernel, GuestRun, Host, Iommu, Lab, Vmm, WORKS, Way, Work,
    addresses, may_be_the_emulators, record, virtual_functions, with_works, zoo_host,
};

use crate::assigned::Interface;
use crate::{Proof, count, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new("zoo_in_one_guest_by_group", |lab| every(lab, Way::Group)),
    Proof::new("zoo_in_one_guest_by_cdev", |lab| every(lab, Way::Cdev)),
    Proof::soak("zoo_in_one_guest_by_cdev_on_an_amd_iommu", |lab, _| {
        every(lab, Way::CdevAmd)
    }),
    Proof::soak("zoo_in_one_guest_under_firmware", |lab, _| {
        under_firmware(lab)
    }),
    Proof::new(
        "zoo_devices_are_left_and_taken_again_one_after_another",
        |lab| reload(lab, &RELOADED.map(|(device, ..)| device), 2),
    ),
    Proof::soak("zoo_nvme_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["nvme"], 20)
    }),
    Proof::soak("zoo_e1000e_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["e1000e"], 20)
    }),
    Proof::soak("zoo_igb_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["igb"], 20)
    }),
    Proof::soak("zoo_e1000_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["e1000"], 20)
    }),
    Proof::soak("zoo_rtl8139_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["rtl8139"], 20)
    }),
    Proof::soak("zoo_xhci_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["qemu-xhci"], 20)
    }),
    Proof::soak("zoo_hda_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["intel-hda"], 20)
    }),
    Proof::soak("zoo_edu_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["edu"], 20)
    }),
    Proof::soak("zoo_doorbell_is_left_and_taken_20_times", |lab, _| {
        reload(lab, &["ivshmem-doorbell"], 20)
    }),
];

/// Devices of the table whose drivers release and probe them again and again: what the guest's shell runs each time,
/// with the device's address in `$at`, its folder in `$device`, and the functions of `works.sh`.
const RELOADED: [(&str, &str, &str); 9] = [
    // The device, its address in the guest, and a round.
    (
        "nvme",
        "$(basename \"$(readlink -f \"/sys/class/nvme/$(drive NV0)/device\")\")",
        "rebind nvme 'nvme/*/nvme*n1'",
    ),
    ("e1000e", "$(at 8086:10d3)", "rebind e1000e 'net/*'"),
    ("igb", "$(at 8086:10c9)", "rebind igb 'net/*'"),
    ("e1000", "$(at 8086:100e)", "rebind e1000 'net/*'"),
    ("rtl8139", "$(at 10ec:8139)", "rebind 8139cp 'net/*'"),
    (
        "qemu-xhci",
        "$(at 1b36:000d)",
        "rebind xhci_hcd 'usb*/*/*/host*/target*/*/block/*'",
    ),
    (
        "intel-hda",
        "$(at 8086:2668)",
        "rebind snd_hda_intel 'sound/card*'",
    ),
    (
        "edu",
        "$(at 1234:11e8 | head -n 1)",
        "lab-pci edu $at msi 20",
    ),
    (
        "ivshmem-doorbell",
        "$(ivshmem doorbell)",
        "lab-pci doorbell $at 20",
    ),
];

/// All works, or for a person's trials those that `BUSWAY_LAB_WORKS` names, by semicolons.
fn chosen() -> Vec<&'static Work> {
    let names = std::env::var("BUSWAY_LAB_WORKS").unwrap_or_default();
    let wanted =
        |work: &&Work| names.is_empty() || names.split(';').any(|name| name == work.device);
    WORKS.iter().filter(wanted).collect()
}

/// A guest that has room for all drivers, and no device yet. With `BUSWAY_LAB_VMM=qemu`, which tells a
/// person whose fault it is, QEMU runs it.
fn guest(host: &Host, addresses: &[String], interface: Interface) -> Result<GuestRun> {
    let by_qemu = std::env::var("BUSWAY_LAB_VMM").is_ok_and(|vmm| vmm == "qemu");
    let mut run = match by_qemu {
        true => GuestRun::new(Vmm::Qemu),
        false => GuestRun::new(Vmm::Busway).args(&interface.arguments()),
    };
    for address in addresses {
        if by_qemu {
            host.bind_by_hand(address)?;
        }
        run = run.device(address);
    }
    if !by_qemu {
        host.run(&format!("busway device bind {}", addresses.join(" ")))?;
    }
    Ok(run
        .kernel(GuestKernel::StockElf)
        .memory_mib(1024)
        .limit(Duration::from_secs(420)))
}

/// Everything at once: each device works beside all others.
fn every(lab: &mut Lab, way: Way) -> Result<()> {
    let (iommu, interface) = match way {
        Way::Group => (Iommu::Intel, Interface::Group),
        Way::Cdev => (Iommu::Intel, Interface::Cdev),
        Way::CdevAmd => (Iommu::Amd, Interface::Cdev),
    };
    let host = lab.host(&zoo_host(iommu))?;
    let works = chosen();
    let devices = all(host, &works)?;
    let server = DataServer::start()?;
    let run = with_works(guest(host, &devices, interface)?, host, &server, &works, "")?;
    let result = host.guest(&run)?.success()?;
    for (key, value) in &result.transcript.values {
        tell!("{key}: {value}");
    }
    let mut outcomes: Vec<_> = works
        .iter()
        .map(|&work| (work, work.done(host, &server, &result)))
        .collect();
    let suspect =
        |(_, outcome): &(_, Result<()>)| outcome.as_ref().is_err_and(may_be_the_emulators);
    if let Some(index) = outcomes.iter().position(suspect) {
        return outcomes.swap_remove(index).1;
    }
    record(way, &outcomes)
}

/// The functions that these works need; for all works also every virtual function there is, which makes sixteen.
fn all(host: &Host, works: &[&Work]) -> Result<Vec<String>> {
    let mut devices = addresses(host, works)?;
    if works.len() == WORKS.len() {
        devices.extend(virtual_functions(host)?);
        let mut known = std::collections::BTreeSet::new();
        devices.retain(|address| known.insert(address.clone()));
        ensure!(devices.len() == 16, "{} functions", devices.len());
    }
    Ok(devices)
}

/// Everything at once, where firmware has numbered the buses and placed the BARs its own way.
fn under_firmware(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo_host(Iommu::Intel))?;
    host.run(BEFORE_FIRMWARE)?;
    let works = chosen();
    let devices = all(host, &works)?;
    let server = DataServer::start()?;
    let run = guest(host, &devices, Interface::Cdev)?
        .kernel(GuestKernel::Stock)
        .firmware();
    let first = "value efi \"$([ -d /sys/firmware/efi ] && echo yes)\"\n";
    let run = with_works(run, host, &server, &works, first)?;
    let result = host.guest(&run)?.success()?;
    ensure!(result.value("efi")? == "yes", "{}", result.stderr);
    for work in works {
        work.done(host, &server, &result)?;
        tell!("{}: done", work.device);
    }
    Ok(())
}

/// In one guest the drivers release their devices and probe them again, one device after another; then each device does
/// its work as it does after a boot.
fn reload(lab: &mut Lab, devices: &[&str], rounds: u64) -> Result<()> {
    let host = lab.host(&zoo_host(Iommu::Intel))?;
    let works: Vec<&Work> = WORKS
        .iter()
        .filter(|work| devices.contains(&work.device))
        .collect();
    ensure!(works.len() == devices.len(), "no such device: {devices:?}");
    let mut first = String::from(
        "rebind() { # DRIVER SIGN: once the device is up, which the sign tells\n\
             appear \"$device/$2\"\n\
             for port in $(ls $device/net 2>/dev/null); do ip link set $port up; done\n\
             echo $at >/sys/bus/pci/drivers/$1/unbind\n\
             [ ! -e $device/driver ]\n\
             echo $at >/sys/bus/pci/drivers/$1/bind\n\
             appear \"$device/$2\"\n\
         }\n",
    );
    for (device, address, round) in RELOADED {
        if devices.contains(&device) {
            first += &format!(
                "at=\"{address}\"; device=/sys/bus/pci/devices/$at\n\
                 for number in $(seq {rounds}); do echo \"{device}: round $number\"; {round} >/dev/null; done\n\
                 value {device}.rounds $number\n"
            );
        }
    }
    let server = DataServer::start()?;
    let functions = addresses(host, &works)?;
    let run = guest(host, &functions, Interface::Cdev)?;
    let run = with_works(run, host, &server, &works, &first)?;
    let result = host.guest(&run)?.success()?;
    let slowed = result.stderr.contains("slowed down");
    ensure!(!slowed, "reloads are taken for a storm: {}", result.stderr);
    for device in devices {
        let done = result.value(&format!("{device}.rounds"))?;
        ensure!(done == rounds.to_string(), "{device}: {done} rounds");
        count("rounds", rounds);
    }
    let done = |work: &Work| work.done(host, &server, &result);
    works
        .into_iter()
        .try_for_each(done)
        .context("after its driver had it again")
}
