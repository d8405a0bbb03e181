//! The demonstration: `demo/demo.sh`, run in the emulated host or, with `--here`, on this machine.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    DataServer, Device, Host, HostConfig, Kernel, Parts, Profile, archive, build_busway,
    build_lab_io,
};
use clap::Args;

/// How much the NIC fetches.
const NIC_BYTES: u64 = 100 << 20;
const SEED: u64 = 7;

/// What to demonstrate with.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Use this machine's own devices: the addresses of NVMe drives and NICs, as `busway device
    /// list` shows them. Drives are only read, unless --overwrite is given too.
    #[arg(long, num_args = 1.., value_name = "ADDRESS")]
    here: Vec<String>,
    /// With --here: write over the drives, all of them. Everything on them is lost.
    #[arg(long, requires = "here")]
    overwrite: bool,
}

/// Runs the demonstration; the exit status is its own.
pub(crate) fn run(arguments: &DemoArgs) -> Result<ExitCode> {
    let parts = Parts::prepare()?;
    let busway = build_busway(Profile::Release)?;
    let lab_io = build_lab_io()?;
    let status = if arguments.here.is_empty() {
        in_the_lab(&busway, &lab_io)?
    } else {
        here(&parts, &busway, &lab_io, arguments)?
    };
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

/// Writes what the demonstration reads into `folder`: its two scripts and the guest's initramfs.
fn lay_out(folder: &Path, parts: &Parts, lab_io: &Path) -> Result<()> {
    let mut initramfs = fs::read(parts.images.join("guest.img"))?;
    initramfs.extend(archive([
        ("script", include_str!("../demo/guest.sh").as_bytes()),
        ("bin/lab-io", &fs::read(lab_io)?),
    ]));
    fs::write(folder.join("initramfs.base"), initramfs)?;
    fs::copy(parts.stock.join("bzImage"), folder.join("bzImage"))?;
    fs::write(folder.join("demo.sh"), include_str!("../demo/demo.sh"))?;
    Ok(())
}

fn in_the_lab(busway: &Path, lab_io: &Path) -> Result<i32> {
    println!("booting a Linux host in the emulated lab, with an NVMe drive and a NIC");
    let host = Host::boot(
        HostConfig::new(Kernel::Stock)
            .device(Device::nvme("nv0", 64))
            .device(Device::e1000e("nic0")),
    )?;
    host.install(busway)?;
    host.install(lab_io)?;
    lay_out(&host.share(), host.parts(), lab_io)?;
    let server = DataServer::start()?;
    let script = format!(
        // The emulator loses a guest with several processors now and then: see docs/lab.md.
        "mkdir /tmp/demo && export CPUS=1 KERNEL=/lab/bzImage INITRAMFS=/lab/initramfs.base WORK=/tmp/demo \
         OVERWRITE=yes NIC_BYTES={NIC_BYTES} URL={} SHA256={}\nexec bash /lab/demo.sh {} {} 2>&1",
        server.url(NIC_BYTES, SEED),
        DataServer::sha256(NIC_BYTES, SEED),
        host.address("nv0")?,
        host.address("nic0")?,
    );
    host.spawn(&script)?.follow(
        Duration::from_secs(900),
        &mut io::stdout(),
        &mut io::stderr(),
    )
}

fn here(parts: &Parts, busway: &Path, lab_io: &Path, arguments: &DemoArgs) -> Result<i32> {
    let missing: Vec<&str> = ["busybox", "curl", "ip"]
        .into_iter()
        .filter(|program| Command::new(program).arg("--help").output().is_err())
        .collect();
    ensure!(
        missing.is_empty(),
        "the demonstration needs {} on this machine: apt-get install busybox curl iproute2",
        missing.join(", ")
    );
    let folder = std::env::temp_dir().join(format!("busway-demo.{}", std::process::id()));
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let bin = folder.join("bin");
    fs::create_dir(&bin)?;
    fs::copy(busway, bin.join("busway"))?;
    fs::copy(lab_io, bin.join("lab-io"))?;
    lay_out(&folder, parts, lab_io)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let status = Command::new("bash")
        .arg(folder.join("demo.sh"))
        .args(&arguments.here)
        .env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()))
        .env("KERNEL", folder.join("bzImage"))
        .env("INITRAMFS", folder.join("initramfs.base"))
        .env("WORK", &folder)
        .env("OVERWRITE", if arguments.overwrite { "yes" } else { "" })
        .status()
        .context("cannot run bash")?;
    fs::remove_dir_all(&folder)?;
    Ok(status.code().unwrap_or(1))
}
