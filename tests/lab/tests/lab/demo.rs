//! The demonstration on a machine's own devices: the emulated host is the machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, HostConfig, Kernel, Lab};

use crate::Proof;

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "the_demonstration_on_a_machines_own_devices_reads_its_drive_and_reaches_its_router",
    own_devices,
)];

/// Stands in for cargo, which the emulated host has not: names the program that was installed.
const CARGO: &str = r#"#!/bin/sh
while [ "$1" != --bin ]; do shift; done
echo "{\"target\":{\"name\":\"$2\"},\"executable\":\"/usr/local/bin/$2\"}"
"#;

fn own_devices(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Stock)
        .device(Device::nvme("nv0", 64))
        .device(Device::e1000e("nic0"));
    let host = lab.host(&config)?;
    host.install(Path::new(env!("CARGO_BIN_EXE_lab")))?;
    let cargo = host.share().join("cargo");
    fs::write(&cargo, CARGO)?;
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755))?;
    let project = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .and_then(Path::parent)
        .context("the lab is in the project")?;
    let script = format!(
        "mkdir -p {project} /tmp/xdg/busway-lab\nmount --bind /project {project}\n\
         for part in /cache/*-*; do ln -sfn $part /tmp/xdg/busway-lab/; done\n\
         CARGO=/lab/cargo XDG_CACHE_HOME=/tmp/xdg CPUS=1 lab demo --here {} {} 2>&1",
        host.address("nv0")?,
        host.address("nic0")?,
        project = project.display(),
    );
    host.run("lab-io write /dev/nvme0n1 5")?;
    let before = fs::read(host.backing_file("nv0"))?;
    let output = host.output(&script, Duration::from_secs(600))?;
    ensure!(output.status == 0, "{}", output.stdout);
    let table = output.stdout.split("== what was seen").last();
    for words in [
        "first 256 MiB, read",
        "address, router",
        "pattern, both ways",
    ] {
        let seen = table.is_some_and(|table| table.contains(words));
        ensure!(seen, "the table does not say '{words}':\n{}", output.stdout);
    }
    ensure!(
        fs::read(host.backing_file("nv0"))? == before,
        "a drive was written to that was only to be read"
    );
    Ok(())
}
