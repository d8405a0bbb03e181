//! NICs, assigned: a physical one and an SR-IOV virtual function, each moving 20 MB, and 100 MB in a soak.

use anyhow::{Result, ensure};
use busway_lab::{DataServer, GuestRun, Host, Lab};

use crate::assigned::{Interface, bound, give_back, guest, zoo};
use crate::proof::Tier;
use crate::{Proof, count};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak("nic_by_group_moves_data_unharmed", |lab, tier| {
        nic(lab, Interface::Group, bytes(tier))
    }),
    Proof::rounds("nic_by_cdev_moves_data_unharmed", |lab, tier| {
        nic(lab, Interface::Cdev, bytes(tier))
    }),
    Proof::soak(
        "virtual_function_by_group_moves_data_unharmed",
        |lab, tier| virtual_function(lab, Interface::Group, bytes(tier)),
    ),
    Proof::rounds(
        "virtual_function_by_cdev_moves_data_unharmed",
        |lab, tier| virtual_function(lab, Interface::Cdev, bytes(tier)),
    ),
];

fn bytes(tier: Tier) -> u64 {
    let bytes = tier.of(20_000_000, 100_000_000);
    count("bytes", bytes);
    bytes
}

/// The guest gets an address, fetches the bytes, and checks their sum.
fn fetch(host: &Host, run: GuestRun, driver: &str, bytes: u64) -> Result<()> {
    let server = DataServer::start()?;
    let run = run.script(&format!(
        "cat >/tmp/udhcpc <<'END'\n#!/bin/sh\n\
         [ \"$1\" != bound ] || ip addr add \"$ip/$mask\" dev \"$interface\"\nEND\n\
         chmod +x /tmp/udhcpc\nip link set eth0 up\n\
         value driver \"$(basename \"$(readlink /sys/class/net/eth0/device/driver)\")\"\n\
         value mac \"$(cat /sys/class/net/eth0/address)\"\n\
         udhcpc -q -n -t 20 -i eth0 -s /tmp/udhcpc\n\
         value sum \"$(wget -q -O - {} | sha256sum | cut -d ' ' -f 1)\"\n\
         grep eth0 /proc/interrupts | block interrupts\n",
        server.url(bytes, 3)
    ));
    let result = host.guest(&run)?.success()?;
    ensure!(
        result.value("driver")? == driver,
        "driver {}",
        result.value("driver")?
    );
    ensure!(
        result.value("sum")? == DataServer::sha256(bytes, 3),
        "wrong data"
    );
    if driver == "igbvf" {
        ensure!(
            result.value("mac")? == MAC,
            "MAC address {}",
            result.value("mac")?
        );
    }
    Ok(())
}

fn nic(lab: &mut Lab, interface: Interface, bytes: u64) -> Result<()> {
    let (host, address) = bound(lab, "nic0")?;
    fetch(
        host,
        guest()?.device(&address).args(&interface.arguments()),
        "e1000e",
        bytes,
    )?;
    give_back(host, &address, "e1000e")
}

const MAC: &str = "02:00:00:00:00:07";

fn virtual_function(lab: &mut Lab, interface: Interface, bytes: u64) -> Result<()> {
    let host = lab.host(&zoo())?;
    let physical = host.address("nic1")?;
    let folder = format!("/sys/bus/pci/devices/{physical}");
    let nic = host.link_up("nic1")?;
    let address = host.run(&format!(
        "set -e; echo 1 >{folder}/sriov_numvfs\n\
         ip link set {nic} vf 0 mac {MAC}\n\
         basename $(readlink {folder}/virtfn0)\n"
    ))?;
    let address = address.trim();
    host.run(&format!("busway device bind {address}"))?;
    fetch(
        host,
        guest()?.device(address).args(&interface.arguments()),
        "igbvf",
        bytes,
    )?;
    host.run(&format!("busway device unbind {address}"))
        .map(drop)
}
