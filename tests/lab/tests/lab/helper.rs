//! The host's side with real devices: each is bound and put back, what the host uses is refused, and
//! whatever interrupts a change leaves nothing that cannot be put back.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Device, Host, HostConfig, Kernel, Lab, Output};

use crate::assigned::guest;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "helper_binds_and_restores_each_device_of_the_zoo",
        each_device,
    ),
    Proof::new(
        "helper_killed_or_interrupted_in_a_group_puts_it_back",
        killed,
    ),
    Proof::new(
        "helper_refuses_what_the_host_uses_but_for_its_switch",
        in_use,
    ),
    Proof::new(
        "helper_makes_virtual_functions_with_the_mac_that_was_set",
        virtual_functions,
    ),
    Proof::new("helper_binds_at_boot_what_persists_and_no_other", persists),
];

const LIMIT: Duration = Duration::from_secs(240);

/// Two functions behind one conventional bridge, which share its group, and one device of each other
/// kind.
fn zoo() -> HostConfig {
    HostConfig::new(Kernel::Stock)
        .device(Device::nvme("nv0", 64))
        .device(Device::e1000e("nic0"))
        .device(Device::igb("nic1"))
        .device(Device::e1000("old0"))
        .device(Device::rtl8139("old1"))
        .device(Device::edu("edu0"))
        .device(Device::xhci("usb0"))
        .device(Device::hda("snd0"))
}

const ALONE: [&str; 6] = ["nv0", "nic0", "nic1", "edu0", "usb0", "snd0"];

/// Driver, override and nodes of everything.
fn state(host: &Host) -> Result<String> {
    host.run(
        "for device in /sys/bus/pci/devices/*; do\n\
             driver=; [ ! -e $device/driver ] || driver=$(cd -P $device/driver && echo ${PWD##*/})\n\
             read -r override <$device/driver_override\n\
             echo ${device##*/} $driver $override\n\
         done\n\
         ls /dev/vfio; ls /run/busway 2>/dev/null | grep -v lock; ls /etc/udev/rules.d; true",
    )
}

/// Runs a command that has to end with this status; returns all that it said.
fn ends_with(host: &Host, status: i32, command: &str) -> Result<String> {
    let output = host.output(command, LIMIT)?;
    let Output { stdout, stderr, .. } = &output;
    tell!("$ {command}\n{stdout}{stderr}");
    let said = format!("{stdout}{stderr}");
    ensure!(
        output.status == status,
        "status {}, not {status}: {command}\n{said}",
        output.status
    );
    Ok(said)
}

fn each_device(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    // The folder and the lock in it stay.
    host.run("busway device restore --all; udevadm settle")?;
    let before = state(host)?;
    for id in ALONE {
        let address = host.address(id)?;
        let planned = host.run(&format!("busway device bind --dry-run {address}"))?;
        ensure!(planned.contains("driver_override"), "{planned}");
        ensure!(
            state(host)? == before,
            "the dry run of {id} changed something"
        );
        host.run(&format!("busway device bind --user 1000 {address}"))?;
        ensure!(
            host.driver(&address)?.as_deref() == Some("vfio-pci"),
            "{id}"
        );
        let owner = host.run(&format!(
            "stat -c %u /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{address}/iommu_group))"
        ))?;
        ensure!(owner.trim() == "1000", "{id}'s group belongs to {owner}");
        host.run(&format!("busway device restore {address}; udevadm settle"))?;
        ensure!(
            state(host)? == before,
            "{id}: {}\nnot\n{before}",
            state(host)?
        );
    }
    // Alone, a function of the group is refused; together, and beside another bind, they are not.
    let group = [host.address("old0")?, host.address("old1")?];
    let said = ends_with(host, 3, &format!("busway device bind {}", group[0]))?;
    ensure!(
        said.contains(&group[1]) && said.contains("--allow-group"),
        "{said}"
    );
    let nvme = host.address("nv0")?;
    host.run(&format!(
        "busway device bind {} & busway device bind {nvme}; wait $!",
        group.join(" ")
    ))?;
    for address in group.iter().chain([&nvme]) {
        ensure!(
            host.driver(address)?.as_deref() == Some("vfio-pci"),
            "{address}"
        );
    }
    host.run("busway device restore --all; udevadm settle")?;
    ensure!(state(host)? == before, "{}\nnot\n{before}", state(host)?);

    let said = host.run("busway hugepages 64M --size 2M --node 0; busway hugepages")?;
    ensure!(
        said.contains("node 0: 32 huge pages of 2 MiB (64 MiB)"),
        "{said}"
    );
    ensure!(host.run("cat /proc/sys/vm/nr_hugepages")?.trim() == "32");
    let said = ends_with(host, 3, "busway hugepages 64G --size 1G")?;
    ensure!(said.contains("hugepagesz=1G hugepages=64"), "{said}");
    ends_with(host, 0, "busway hugepages 0 --size 1G")?;
    ends_with(host, 0, "busway hugepages 0").map(drop)
}

fn killed(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    host.run("busway device restore --all; udevadm settle")?;
    let before = state(host)?;
    let group = format!("{} {}", host.address("old0")?, host.address("old1")?);
    // A signal comes with the nth device's gift to VFIO.
    let signalled = |signal: &str, nth: u32| {
        format!(
            "strace -f -o /dev/null -P /sys/bus/pci/drivers/vfio-pci/bind \
             -e inject=write:signal={signal}:when={nth} busway device bind {group}"
        )
    };
    ends_with(host, 128 + 9, &signalled("KILL", 2))?;
    let torn = state(host)?;
    ensure!(
        torn.contains("vfio-pci vfio-pci") && torn != before,
        "it was not in the middle: {torn}"
    );
    let said = ends_with(host, 0, "busway device restore --all; udevadm settle")?;
    ensure!(said.matches("as before, with").count() == 2, "{said}");
    ensure!(state(host)? == before, "{}\nnot\n{before}", state(host)?);

    let said = ends_with(host, 1, &signalled("INT", 1))?;
    for words in [
        "interrupted",
        "every device has the driver that it had before",
    ] {
        ensure!(said.contains(words), "{said}");
    }
    host.run("udevadm settle")?;
    ensure!(state(host)? == before, "{}\nnot\n{before}", state(host)?);
    Ok(())
}

/// The device is refused with these words, and taken with this switch; then it is put back.
fn refused_but_for(host: &Host, address: &str, switch: &str, says: &[&str]) -> Result<()> {
    let said = ends_with(host, 3, &format!("busway device bind {address}"))?;
    for words in says.iter().chain([&switch]) {
        ensure!(said.contains(words), "no {words:?} in: {said}");
    }
    ends_with(host, 0, &format!("busway device bind {switch} {address}"))?;
    ensure!(host.driver(address)?.as_deref() == Some("vfio-pci"));
    Ok(())
}

fn in_use(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Stock)
        .device(Device::nvme("nv0", 64))
        .device(Device::nvme("nv1", 64))
        .device(Device::nvme("nv2", 64))
        .device(Device::nvme("nv3", 64))
        .device(Device::e1000e("nic0"));
    let host = lab.host(&config)?;
    let disk = |id: &str| -> Result<(String, String)> {
        let address = host.address(id)?;
        let name = host.run(&format!(
            "basename /sys/bus/pci/devices/{address}/nvme/nvme*/nvme*n1"
        ))?;
        Ok((address, format!("/dev/{}", name.trim())))
    };
    let (mounted, device) = disk("nv0")?;
    host.run(&format!(
        "mkfs.ext4 -q {device} && mkdir -p /data && mount {device} /data"
    ))?;
    refused_but_for(
        host,
        &mounted,
        "--allow-mounted",
        &["/data", "umount /data"],
    )?;

    let (volume, device) = disk("nv1")?;
    host.run(&format!(
        "pvcreate -q {device} && vgcreate -q vg0 {device} && lvcreate -q -y -n data -L 16M vg0"
    ))?;
    refused_but_for(
        host,
        &volume,
        "--allow-holders",
        &["vg0-data", "lvchange --activate n"],
    )?;

    let (first, device) = disk("nv2")?;
    let (second, other) = disk("nv3")?;
    host.run(&format!(
        "modprobe raid1; mdadm --create /dev/md0 --run --level=1 --raid-devices=2 {device} {other}"
    ))?;
    let says = ["md0", "mdadm --stop /dev/md0"];
    refused_but_for(host, &first, "--allow-holders", &says)?;
    ends_with(
        host,
        3,
        &format!("busway device bind --allow-mounted {second}"),
    )?;

    let nic = host.address("nic0")?;
    // By a rule's table first, which procfs does not show, then by the main one.
    host.run(&format!(
        "set -e; nic=$(ls /sys/bus/pci/devices/{nic}/net); ip link set $nic up\n\
         ip addr add 10.0.2.15/24 dev $nic; ip rule add from 10.0.2.15 table 100\n\
         ip route add default via 10.0.2.2 dev $nic table 100"
    ))?;
    let said = ends_with(host, 3, &format!("busway device bind {nic}"))?;
    ensure!(said.contains("default route"), "{said}");
    let ssh = "SSH_CONNECTION='192.0.2.1 50000 10.0.2.15 22'";
    let said = host.run(&format!("{ssh} busway device list {nic}"))?;
    ensure!(said.contains("this SSH session"), "{said}");
    host.run("ip rule del table 100; ip route flush table 100; ip route add default via 10.0.2.2")?;
    refused_but_for(host, &nic, "--allow-route", &["default route"])?;

    ends_with(host, 0, "busway device restore --all")?;
    for (address, driver) in [
        (mounted, "nvme"),
        (volume, "nvme"),
        (first, "nvme"),
        (nic, "e1000e"),
    ] {
        ensure!(
            host.driver(&address)?.as_deref() == Some(driver),
            "{address}"
        );
    }
    // Its disks are torn from under what stood on them.
    lab.stop();
    Ok(())
}

const MAC: &str = "02:00:00:00:00:2a";

fn virtual_functions(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&crate::assigned::zoo())?;
    let physical = host.address("nic1")?;
    let folder = format!("/sys/bus/pci/devices/{physical}");
    host.link_up("nic1")?;
    let made = ends_with(
        host,
        0,
        &format!(
            "busway device vfs {physical} 2 --no-autoprobe --vf 1,mac={MAC},vlan=0,spoofchk=off"
        ),
    )?;
    ensure!(
        made.contains("2 of 7 virtual functions") && made.contains(MAC),
        "{made}"
    );
    let tells = host.run(&format!("ip link show $(ls {folder}/net)"))?;
    ensure!(
        tells.contains(MAC) && tells.contains("spoof checking off"),
        "{tells}"
    );
    let address = host.run(&format!("basename $(readlink {folder}/virtfn1)"))?;
    let address = address.trim();
    // Neither a driver that is there before them nor one that is loaded later.
    host.run("modprobe igbvf")?;
    ensure!(
        host.driver(address)?.is_none(),
        "a driver of the host's took it"
    );
    host.run(&format!("busway device bind {address}"))?;

    let run = guest()?.device(address).script(
        "ip link set eth0 up\nvalue mac \"$(cat /sys/class/net/eth0/address)\"\nsleep infinity\n",
    );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value mac")?;
    let said = ends_with(host, 3, &format!("busway device vfs {physical} 0"))?;
    ensure!(
        said.contains(address) && said.contains("busway (pid"),
        "{said}"
    );
    running.signal("KILL")?;
    let result = running.finish()?;
    ensure!(
        result.value("mac")? == MAC,
        "the guest has {}",
        result.value("mac")?
    );

    let gone = ends_with(host, 0, &format!("busway device vfs {physical} 0"))?;
    ensure!(gone.contains("0 of 7"), "{gone}");
    host.run(&format!(
        "[ ! -e {folder}/virtfn0 ] && [ \"$(cat {folder}/sriov_drivers_autoprobe)\" = 1 ]"
    ))?;
    Ok(())
}

fn persists(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Stock)
        .device(Device::nvme("nv0", 64))
        .device(Device::e1000e("nic0"))
        .device(Device::e1000("old0"))
        .device(Device::rtl8139("old1"));
    let host = lab.host(&config)?;
    let (nvme, nic) = (host.address("nv0")?, host.address("nic0")?);
    let group = [host.address("old0")?, host.address("old1")?];
    let before = state(host)?;
    ends_with(
        host,
        0,
        &format!(
            "busway device bind --persist --user 1000 {nvme} {}",
            group.join(" ")
        ),
    )?;
    ends_with(host, 0, &format!("busway device bind --persist {nic}"))?;
    // /etc and /usr would be on the host's disk. At one address another kind of device comes up.
    host.run(&format!(
        "set -e; mkdir -p /lab/keep/etc/udev/rules.d /lab/keep/usr/local/bin\n\
         cp /etc/udev/rules.d/60-busway-* /lab/keep/etc/udev/rules.d/\n\
         sed -i 's/0x10d3/0x10d4/' /lab/keep/etc/udev/rules.d/60-busway-{nic}.rules\n\
         cp /usr/local/bin/busway /lab/keep/usr/local/bin/"
    ))?;
    host.reboot()?;
    for address in group.iter().chain([&nvme]) {
        let driver = host.driver(address)?;
        ensure!(
            driver.as_deref() == Some("vfio-pci"),
            "{address} is with {driver:?} after the boot"
        );
    }
    ensure!(
        host.driver(&nic)?.as_deref() == Some("e1000e"),
        "the wrong NIC was taken"
    );
    let owner = host.run(&format!(
        "stat -c %u /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{nvme}/iommu_group))"
    ))?;
    ensure!(owner.trim() == "1000", "the group belongs to {owner}");

    let said = ends_with(host, 0, "busway device restore --all; udevadm settle")?;
    ensure!(said.matches("left to the host").count() == 3, "{said}");
    ensure!(said.contains("another device is there now"), "{said}");
    let after = state(host)?;
    lab.stop();
    ensure!(after == before, "{after}\nnot\n{before}");
    Ok(())
}
