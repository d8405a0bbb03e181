//! The whole zoo: every device proves itself in one guest with all others, and is left and taken by its
//! driver again and again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    DataServer, GuestKernel, GuestRun, Host, Iommu, Lab, Vmm, WORKS, Way, Work, addresses,
    may_be_the_emulators, record, virtual_functions, with_works, zoo_host,
};

use crate::assigned::Interface;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    ("zoo_in_one_guest_by_group", |lab| every(lab, Way::Group)),
    ("zoo_in_one_guest_by_cdev", |lab| every(lab, Way::Cdev)),
    ("zoo_drivers_leave_and_take_their_devices_20_times", reload),
    ("zoo_in_one_guest_by_cdev_on_an_amd_iommu", |lab| {
        every(lab, Way::CdevAmd)
    }),
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
        .kernel(GuestKernel::SmallElf)
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
    let mut devices = addresses(host, &works)?;
    if works.len() == WORKS.len() {
        // Every virtual function there is: sixteen functions in all.
        devices.extend(virtual_functions(host)?);
        let mut known = std::collections::BTreeSet::new();
        devices.retain(|address| known.insert(address.clone()));
        ensure!(devices.len() == 16, "{} functions", devices.len());
    }
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

/// Each driver lets its device go and takes it again, all drivers at the same time; then the device
/// does its work as it does after a boot.
fn reload(lab: &mut Lab) -> Result<()> {
    const DRIVERS: &[(&str, &str, &str)] = &[
        // The device in the guest, its driver, and what is there when it is up.
        ("$(nvme_at NV0)", "nvme", "nvme/*/nvme*n1"),
        ("$(at 8086:10d3)", "e1000e", "net/*"),
        ("$(at 8086:10c9)", "igb", "net/*"),
        ("$(at 8086:100e)", "e1000", "net/*"),
        ("$(at 10ec:8139)", "8139cp", "net/*"),
        (
            "$(at 1b36:000d)",
            "xhci_hcd",
            "usb*/*/*/host*/target*/*/block/*",
        ),
        ("$(at 8086:2668)", "snd_hda_intel", "sound/card*"),
    ];
    let host = lab.host(&zoo_host(Iommu::Intel))?;
    let works: Vec<&Work> = WORKS
        .iter()
        .filter(|work| !work.device.starts_with("ivshmem-plain"))
        .collect();
    let mut first = String::from(
        "nvme_at() { basename \"$(readlink -f \"/sys/class/nvme/$(drive \"$1\")/device\")\"; }\n\
         reload() { # ADDRESS DRIVER SIGN\n\
             device=/sys/bus/pci/devices/$1\n\
             for round in $(seq 20); do\n\
                 echo \"reload $2 $round\"\n\
                 appear \"$device/$3\"\n\
                 for port in $(ls $device/net 2>/dev/null); do ip link set $port up; done\n\
                 echo $1 >/sys/bus/pci/drivers/$2/unbind\n\
                 [ ! -e $device/driver ]\n\
                 echo $1 >/sys/bus/pci/drivers/$2/bind\n\
             done\n\
             appear \"$device/$3\"\n\
             value reloaded.$2 $round\n\
         }\n",
    );
    for (address, driver, sign) in DRIVERS {
        first += &format!("reload \"{address}\" {driver} '{sign}' &\n");
    }
    first += "wait\n";
    for (kind, count) in [("edu", "msi 20"), ("doorbell", "20")] {
        let address = match kind {
            "edu" => "$(at 1234:11e8 | head -n 1)",
            _ => "$(ivshmem doorbell)",
        };
        first += &format!(
            "for round in $(seq 20); do lab-pci {kind} \"{address}\" {count} >/dev/null; done\n\
             value reloaded.{kind} $round\n"
        );
    }
    let server = DataServer::start()?;
    let devices = addresses(host, &works)?;
    let run = guest(host, &devices, Interface::Cdev)?;
    let run = with_works(run, host, &server, &works, &first)?;
    let result = host.guest(&run)?.success()?;
    for driver in DRIVERS
        .iter()
        .map(|(_, driver, _)| *driver)
        .chain(["edu", "doorbell"])
    {
        let rounds = result.value(&format!("reloaded.{driver}"))?;
        ensure!(rounds == "20", "{driver}: {rounds} times");
    }
    for work in works {
        work.done(host, &server, &result)
            .context("after its driver was loaded again")?;
    }
    Ok(())
}
