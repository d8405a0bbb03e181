//! Guests whose devices are in several PCI segments.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    DataServer, GuestKernel, GuestResult, GuestRun, Host, Iommu, Lab, Vmm, WORKS, Work, addresses,
    with_works, zoo_host,
};
use serde_json::Value;

use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, count, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "segments_hold_the_zoos_devices_with_their_interrupts",
    split,
)];

/// The works that are done, and the segments that the devices of each are in, in the order of its ids: those of two, by
/// messages, by pins and as virtual functions.
const SPLIT: [(&str, &[u16]); 6] = [
    ("nvme", &[1]),
    ("e1000e", &[0]),
    ("igb, two virtual functions", &[0, 1]),
    // It comes with the other conventional NIC, whose group it shares.
    ("e1000", &[1, 0]),
    ("rtl8139", &[0, 1]),
    ("edu", &[1]),
];

/// What the guest does before these works: it tells the address of each PCI function and of the disk `9`, by its serial
/// number, waits for the drive that comes, writes it and reads it back, and tells what its kernel says of PCI.
const FIRST: &str = "\
    ls /sys/bus/pci/devices | block functions\n\
    for each in /sys/block/vd*; do case $(cat $each/serial) in second)\n\
    value second.at \"$(basename \"$(readlink -f $each/device/..)\")\";; esac; done\n\
    value ready yes\n\
    until [ -n \"$(drive NV1)\" ] && [ -b \"/dev/$(drive NV1)n1\" ]; do sleep 0.1; done\n\
    at=$(basename \"$(readlink -f \"/sys/class/nvme/$(drive NV1)/device\")\")\n\
    value late.at \"$at\"\n\
    disk late \"/dev/$(drive NV1)n1\" 41\n\
    face late \"$at\"\n\
    dmesg | grep -E 'pci|PCI|ECAM' | block log\n";

/// What says in a guest's log that something of PCI's is not where it should be.
const CONFLICTS: [&str; 8] = [
    "conflict",
    "can't claim",
    "no space",
    "failed to assign",
    "can't assign",
    "not reserved",
    "overlap",
    "no compatible bridge",
];

/// A guest of two segments with a drive, NICs by messages and by pins, virtual functions and a teaching device split over them.
/// Each works as in one segment, has the address that was told, and its kernel finds each BAR and window where it can be.
/// A virtio disk is in segment 1 as well, at the place that was said. A second drive is plugged into segment 1 while the guest
/// runs.
fn split(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo_host(Iommu::Intel))?;
    let works: Vec<&Work> = WORKS
        .iter()
        .filter(|work| SPLIT.iter().any(|(device, _)| *device == work.device))
        .collect();
    let placed = placed(host, &works)?;
    let late = host.address("nv1")?;
    let beside = host.address("edu1")?;
    let all: Vec<_> = placed.iter().map(|(address, _)| address.as_str()).collect();
    host.run(&format!(
        "busway device bind {} {late} {beside}\n\
         truncate -s 8M /run/first.raw /run/second.raw",
        all.join(" ")
    ))?;
    let server = DataServer::start()?;
    let mut run = GuestRun::new(Vmm::Busway)
        .kernel(GuestKernel::StockElf)
        .memory_mib(1024)
        .cpus(2)
        .limit(Duration::from_secs(420))
        .args(&[
            "--platform",
            "iommufd=on,num_pci_segments=2,hotplug_slots=2,segment_hotplug_slots=1,hotplug_mmio64=64M",
        ])
        .args(&["--disk", "path=/run/first.raw"])
        .args(&[
            "--disk",
            "path=/run/second.raw,id=second,pci_segment=1,pci_device_id=9",
        ])
        .args(&SOCKET);
    for (address, segment) in &placed {
        run = run.device(&format!("{address},pci_segment={segment}"));
    }
    let run = with_works(run, host, &server, &works, FIRST)?;
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let answer = host.run(&format!(
        "{CTL} --json add-device {late} --id late --pci-segment 1"
    ))?;
    tell!("{answer}");
    let answer: Value = serde_json::from_str(&answer)?;
    let info: Value = serde_json::from_str(&host.run(&format!("{CTL} --json info"))?)?;
    ensure!(
        info.pointer("/config/platform/num_pci_segments") == Some(&2.into()),
        "{info}"
    );
    let result = running.finish()?.success()?;
    for work in &works {
        work.done(host, &server, &result)?;
    }
    let told = answer["bdf"].as_str().context("no bdf")?;
    let found = result.value("late.at")?;
    ensure!(
        told == found && found.starts_with("0001:"),
        "told {told}, found at {found}"
    );
    let line = result.value("late.interrupts")?;
    ensure!(line.starts_with("kind=msix "), "{line}");
    ensure!(
        result.value("second.at")? == "0001:00:09.0",
        "{}",
        result.value("second.at")?
    );
    check_places(&result, &placed)?;
    let log = result.block("log")?.lines();
    let conflict = |line: &&str| CONFLICTS.iter().any(|word| line.contains(word));
    let wrong: Vec<_> = log.filter(conflict).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    count("functions", placed.len() as u64 + 1);
    Ok(())
}

/// The report has each function in the segment that it is to be in, where the guest has one.
fn check_places(result: &GuestResult, placed: &[(String, u16)]) -> Result<()> {
    let functions = result.block("functions")?;
    let report = result.report.as_ref().context("no report")?;
    let devices = report["devices"].as_array().context("no devices")?;
    for (address, segment) in placed {
        let of = |device: &&Value| device["host"] == address.as_str();
        let guest = devices
            .iter()
            .find(of)
            .and_then(|device| device["guest"].as_str());
        let guest = guest.with_context(|| format!("{address} is not in {devices:?}"))?;
        ensure!(
            guest.starts_with(&format!("{segment:04x}:"))
                && functions.lines().any(|at| at == guest),
            "{address} is to be in segment {segment}, and was told to be at {guest}; the guest has:\n{functions}"
        );
        tell!("{address}: {guest}");
    }
    Ok(())
}

/// The host's functions that these works need, each with the segment that it is to be in.
fn placed(host: &Host, works: &[&Work]) -> Result<Vec<(String, u16)>> {
    let mut placed: Vec<(String, u16)> = Vec::new();
    for work in works {
        let (_, segments) = SPLIT
            .iter()
            .find(|(device, _)| *device == work.device)
            .context("a work that is not split")?;
        let functions = addresses(host, &[work])?;
        ensure!(functions.len() == segments.len(), "{functions:?}");
        for (address, segment) in functions.into_iter().zip(*segments) {
            if !placed.iter().any(|(known, _)| *known == address) {
                placed.push((address, *segment));
            }
        }
    }
    Ok(placed)
}
