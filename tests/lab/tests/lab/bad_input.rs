//! What Busway says when it cannot: the message names what, which, why and what to do.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Device, Host, HostConfig, Kernel, Lab, Parts};

use crate::assigned::{Interface, bound, give_back, guest, zoo};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new("a_kernel_that_is_none_is_named", not_a_kernel),
    Proof::new("a_device_that_is_not_there_is_named", absent),
    Proof::new(
        "a_device_with_its_own_driver_is_named_with_the_way_out",
        own_driver,
    ),
    Proof::new("a_device_in_a_group_with_others_names_each", shared_group),
    Proof::new("a_device_given_twice_is_refused", twice),
    Proof::new(
        "more_memory_than_the_host_has_is_refused_with_figures",
        too_much_memory,
    ),
    Proof::new(
        "an_unknown_word_in_the_configuration_is_named_with_the_nearest",
        unknown_word,
    ),
    Proof::new("a_device_unplugged_after_bind_is_missed_by_name", unplugged),
    Proof::new("a_mounted_drive_is_not_bound", mounted),
    Proof::new(
        "missing_interrupt_remapping_is_named_on_both_interfaces_and_can_be_waived",
        not_remapped,
    ),
];

/// `busway run` with these words ends with this status, and says all of these.
fn refused(host: &Host, words: &str, status: i32, says: &[&str]) -> Result<()> {
    refused_command(
        host,
        &format!("busway run --kernel $KERNEL --serial off {words}"),
        status,
        says,
    )
}

fn refused_command(host: &Host, command: &str, status: i32, says: &[&str]) -> Result<()> {
    let kernel = Parts::inside("bzImage");
    let script = format!("KERNEL={kernel}\n{command}");
    let output = host.output(&script, Duration::from_secs(120))?;
    tell!("$ {command}\n{}", output.stderr);
    ensure!(
        output.status == status,
        "status {}, not {status}: {}",
        output.status,
        output.stderr
    );
    for words in says {
        ensure!(
            output.stderr.contains(words),
            "no {words:?} in: {}",
            output.stderr
        );
    }
    Ok(())
}

fn not_a_kernel(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    refused_command(
        host,
        "busway run --kernel /etc/services",
        2,
        &["/etc/services", "kernel"],
    )?;
    refused_command(
        host,
        "busway run --kernel /nowhere/bzImage",
        2,
        &["/nowhere/bzImage"],
    )
}

fn absent(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    refused(
        host,
        "--device 0000:7f:00.0",
        3,
        &["0000:7f:00.0", "busway device list"],
    )?;
    refused(host, "--device nonsense", 2, &["nonsense", "0000:01:00.0"])
}

fn own_driver(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    let address = host.address("nic0")?;
    host.run(&format!("busway device unbind {address} || true"))?;
    let remedy = format!("busway device bind {address}");
    refused(
        host,
        &format!("--device {address}"),
        3,
        &[&address, "e1000e", &remedy],
    )
}

/// The board's own functions on 00:1f share a group: LPC, SATA and SMBus.
fn shared_group(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Stock).device(Device::nvme("nv0", 64)))?;
    let drivers = host.run("ls -d /sys/bus/pci/devices/0000:00:1f.*/driver")?;
    ensure!(
        drivers.contains("1f.2"),
        "nobody drives the SATA controller"
    );
    // The ISA bridge among them is what the host works by, so that nothing can be bound together.
    let names = ["0000:00:1f.2", "ahci"];
    let says = [&names[..], &["functions of its chipset"]].concat();
    refused_command(host, "busway device bind 0000:00:1f.3", 3, &says)?;
    host.bind_by_hand("0000:00:1f.3")?;
    refused(host, "--device 0000:00:1f.3", 3, &names)?;
    host.unbind_by_hand("0000:00:1f.3")
}

fn twice(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let path = format!("path=/sys/bus/pci/devices/{address}/,id=second");
    refused(
        host,
        &format!("--device {address} --device {path}"),
        2,
        &[&address, "second"],
    )
}

fn too_much_memory(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    refused(host, "--memory size=512G", 3, &["512 GiB", "ask for less"])
}

fn unknown_word(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    host.run("printf 'kernel = \"/x\"\\n[memroy]\\nsize = \"1G\"\\n' >/run/vm.toml")?;
    refused_command(
        host,
        "busway run --config /run/vm.toml",
        2,
        &["memroy", "memory", "2"],
    )
}

fn unplugged(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nic0")?;
    host.run(&format!("echo 1 >/sys/bus/pci/devices/{address}/remove"))?;
    let outcome = refused(
        host,
        &format!("--device {address}"),
        3,
        &[&address, "busway device list"],
    );
    host.run("echo 1 >/sys/bus/pci/rescan; udevadm settle")?;
    outcome
}

fn mounted(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    give_back(host, &address, "nvme")?;
    host.run("udevadm settle; mkfs.ext4 -q /dev/nvme0n1 && mkdir -p /run/mnt && mount /dev/nvme0n1 /run/mnt")?;
    let outcome = refused_command(
        host,
        &format!("busway device bind {address}"),
        3,
        &[&address, "/run/mnt"],
    );
    host.run("umount /run/mnt; wipefs -qa /dev/nvme0n1")?;
    outcome
}

/// A host that leaves interrupt remapping off lends no device, and says by which parameter it would: a
/// type1 container when the group is attached, an iommufd when the device is bound.
fn not_remapped(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Iommufd)
        .cmdline("intremap=off")
        .device(Device::nvme("nv0", 64));
    let host = lab.host(&config)?;
    let interrupts = host.run("cat /proc/interrupts")?;
    ensure!(!interrupts.contains("IR-"), "remapped all the same");
    let address = host.address("nv0")?;
    host.run(&format!("busway device bind {address}"))?;
    for (interface, module) in [
        (Interface::Cdev, "iommufd"),
        (Interface::Group, "vfio_iommu_type1"),
    ] {
        let platform = interface.arguments();
        let parameter = format!("/sys/module/{module}/parameters/allow_unsafe_interrupts");
        let remedy = format!("echo Y > {parameter}");
        refused(
            host,
            &format!("{} --device {address}", platform.join(" ")),
            3,
            &["interrupt remapping", "intremap=off", &remedy],
        )?;
        host.run(&remedy)?;
        let run = guest()?
            .args(&platform)
            .device(&address)
            .script("value serial \"$(cat /sys/class/nvme/nvme0/serial)\"");
        let result = host.guest(&run)?.success()?;
        ensure!(result.value("serial")?.trim() == "NV0", "another drive");
        host.run(&format!("echo N > {parameter}"))?;
    }
    Ok(())
}
