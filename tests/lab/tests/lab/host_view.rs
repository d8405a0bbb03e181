//! What Busway says of a host is what is true there: `device list`, `device check` and `doctor`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, Host, HostConfig, Kernel, Lab};
use serde_json::Value;

use crate::Proof;

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "stock_host_is_seen_as_it_is_and_says_when_a_guest_can_have_its_drive",
        |lab| host_view(lab, Kernel::Stock),
    ),
    Proof::new(
        "iommufd_host_is_seen_as_it_is_and_says_when_a_guest_can_have_its_drive",
        |lab| host_view(lab, Kernel::Iommufd),
    ),
];

/// What a command prints as JSON, and its exit status.
fn json(host: &Host, command: &str) -> Result<(Value, i64)> {
    let text = host.run(&format!(
        "status=0; {command} || status=$?; echo; echo $status"
    ))?;
    let (json, status) = text.trim().rsplit_once('\n').context("a status")?;
    let json = serde_json::from_str(json).with_context(|| text.clone())?;
    Ok((json, status.trim().parse()?))
}

fn find<'a>(list: &'a Value, key: &str, value: &str) -> Result<&'a Value> {
    let mut all = list.as_array().context("a list")?.iter();
    let found = all.find(|entry| entry[key] == value);
    found.with_context(|| format!("nothing has {key} {value} in {list}"))
}

/// A fact about a device, as the shell reads it from sysfs.
fn fact(host: &Host, address: &str, name: &str) -> Result<String> {
    let text = host.run(&format!("cat /sys/bus/pci/devices/{address}/{name}"))?;
    Ok(text.trim().to_owned())
}

fn host_view(lab: &mut Lab, kernel: Kernel) -> Result<()> {
    let config = HostConfig::new(kernel)
        .device(Device::nvme("nv0", 256))
        .device(Device::e1000e("nic0"));
    let host = lab.host(&config)?;
    let (drive, nic) = (host.address("nv0")?, host.address("nic0")?);
    list(host, &drive, &nic)?;

    // The drive is mounted: it is not to be had, and the way on is named.
    host.run(
        "udevadm settle; mkfs.ext4 -q /dev/nvme0n1 && mkdir -p /tmp/m && mount /dev/nvme0n1 /tmp/m",
    )?;
    let (listed, _) = json(host, &format!("busway device list --json {drive}"))?;
    let used = find(&listed["devices"][0]["uses"], "kind", "mount")?;
    ensure!(
        used["paths"][0] == "/tmp/m" && used["chain"][0] == "nvme0n1",
        "{used}"
    );
    let (check, status) = json(host, &format!("busway device check --json {drive}"))?;
    ensure!(status != 0 && check["ready"] == false, "{check}");
    let use_ = find(&check["devices"][0]["findings"], "topic", "use")?;
    ensure!(use_["remedies"][0]["command"] == "umount /tmp/m", "{use_}");

    // What each remedy says is done, until none is left.
    host.run("umount /tmp/m")?;
    let (check, _) = json(host, &format!("busway device check --json {drive}"))?;
    let of_drive = &check["devices"][0];
    ensure!(of_drive["needs_only_binding"] == true, "{check}");
    let driver = find(&of_drive["findings"], "topic", "driver")?;
    let bind = driver["remedies"][0]["command"]
        .as_str()
        .context("a command")?;
    host.run(bind)?;
    let (check, status) = json(host, &format!("busway device check --json {drive}"))?;
    ensure!(status == 0 && check["ready"] == true, "{check}");

    // Whoever has it open is named, and nobody else may have it.
    let group = host.run(&format!(
        "basename $(readlink /sys/bus/pci/devices/{drive}/iommu_group)"
    ))?;
    let group = group.trim();
    let held = host.run(&format!(
        "sleep 600 3<>/dev/vfio/{group} & sleep_pid=$!\n\
         until [ \"$(cat /proc/$sleep_pid/comm)\" = sleep ]; do :; done\n\
         busway device check --json {drive}; kill $sleep_pid"
    ))?;
    let held: Value = serde_json::from_str(&held).with_context(|| held.clone())?;
    let use_ = find(&held["devices"][0]["findings"], "topic", "use")?;
    ensure!(held["ready"] == false, "{held}");
    ensure!(
        use_["text"]
            .as_str()
            .is_some_and(|text| text.contains("sleep (pid")),
        "{use_}"
    );
    host.run(&format!("busway device unbind {drive}"))?;

    doctor(host, kernel)
}

/// The list agrees with sysfs and with the host's tools.
fn list(host: &Host, drive: &str, nic: &str) -> Result<()> {
    let (list, status) = json(host, "busway device list --json")?;
    ensure!(status == 0 && list["version"] == 1);
    let devices = list["devices"].as_array().context("devices")?;
    let facts = host.run("cd /sys/bus/pci/devices; grep . */vendor */device */class")?;
    let facts: BTreeSet<&str> = facts.lines().collect();
    let mut listed = BTreeSet::new();
    for device in devices {
        let address = device["address"].as_str().context("an address")?;
        for key in ["vendor", "device", "class"] {
            let id = device[key].as_str().context("an id")?;
            listed.insert(format!("{address}/{key}:0x{id}"));
        }
    }
    let listed: BTreeSet<&str> = listed.iter().map(String::as_str).collect();
    ensure!(
        listed == facts,
        "listed {:?}, in sysfs {:?}",
        listed.difference(&facts),
        facts.difference(&listed)
    );
    let of_drive = find(&list["devices"], "address", drive)?;
    ensure!(
        of_drive["driver"] == "nvme" && of_drive["class_name"] == "NVMe",
        "{of_drive}"
    );
    let methods: Vec<_> = of_drive["reset_methods"]
        .as_array()
        .context("methods")?
        .iter()
        .filter_map(Value::as_str)
        .collect();
    ensure!(
        methods.join(" ") == fact(host, drive, "reset_method")?,
        "{methods:?}"
    );
    ensure!(methods.contains(&"flr"), "{methods:?}");
    let size = host.run(&format!(
        "stat --format %s /sys/bus/pci/devices/{drive}/resource0"
    ))?;
    ensure!(
        of_drive["bars"][0]["bytes"] == size.trim().parse::<u64>()?,
        "{of_drive}"
    );
    let parent = of_drive["parent"].as_str().context("a port above")?;
    ensure!(find(&list["devices"], "address", parent)?["bridge"] == true);

    let interface = host.run(&format!("ls /sys/bus/pci/devices/{nic}/net"))?;
    let of_nic = find(&list["devices"], "address", nic)?;
    let used = find(&of_nic["uses"], "kind", "interface")?;
    ensure!(used["chain"][0] == interface.trim(), "{used}");
    Ok(())
}

fn doctor(host: &Host, kernel: Kernel) -> Result<()> {
    let (found, status) = json(host, "busway doctor --json")?;
    ensure!(status == 0 && found["healthy"] == true, "{found}");
    let findings = &found["findings"];
    let text = |topic: &str| -> Result<String> {
        let text = &find(findings, "topic", topic)?["text"];
        Ok(text.as_str().context("a text")?.to_owned())
    };
    ensure!(text("iommu")?.contains("Intel VT-d is on"), "{found}");
    ensure!(
        find(findings, "topic", "remapping")?["level"] == "fine",
        "{found}"
    );
    ensure!(
        find(findings, "topic", "kvm")?["level"] == "fine",
        "{found}"
    );
    let iommufd = matches!(kernel, Kernel::Iommufd);
    ensure!(
        text("dma")?.contains("iommufd (/dev/iommu)") == iommufd,
        "{found}"
    );
    Ok(())
}
