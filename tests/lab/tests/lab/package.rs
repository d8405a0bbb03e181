//! The package on a host that boots by systemd: it is installed, its VMs start with the host, it is upgraded under them, and it
//! leaves nothing.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{Device, GuestRun, Host, HostConfig, Kernel, Lab, Profile, Vmm, build_busway};

use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::soak(
    "package_starts_vms_with_the_host_is_upgraded_under_them_and_leaves_nothing_behind",
    |lab, _| life(lab),
)];

/// A VM of the trial's: its name, the driver that its device has on the host and in the guest, the file by which the guest
/// knows the device, and what is in it.
struct Machine {
    name: &'static str,
    driver: &'static str,
    file: &'static str,
    found: &'static str,
}

const MACHINES: [Machine; 2] = [
    Machine {
        name: "one",
        driver: "nvme",
        file: "/sys/class/nvme/nvme0/serial",
        found: "NV0",
    },
    Machine {
        name: "two",
        driver: "e1000e",
        file: "/sys/class/net/eth0/device/device",
        found: "0x10d3",
    },
];

/// The versions that are installed one after the other.
const VERSIONS: [&str; 2] = ["0.1.0~lab1", "0.1.0~lab2"];
/// What an emulated host may take to start two guests.
const LIMIT: Duration = Duration::from_secs(600);

/// Makes a package of what was built, in the host's `/lab`.
fn pack(host: &Host, version: &str) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/package");
    let output = Command::new(script)
        .arg("--fast")
        .args(["--version", version])
        .arg("--program")
        .arg(build_busway(Profile::Lab)?)
        .arg("--output")
        .arg(host.share())
        .stdin(Stdio::null())
        .output()
        .context("cannot run scripts/package")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "scripts/package: {said}");
    Ok(())
}

/// Writes a VM's file, as an administrator does.
fn describe(host: &Host, machine: &Machine, address: &str) -> Result<()> {
    let Machine {
        name, driver, file, ..
    } = machine;
    let run = GuestRun::new(Vmm::Busway).script(&format!(
        "modprobe -a {driver} evdev button\n\
         until [ -e {file} ]; do sleep 0.1; done\n\
         value found $(cat {file})\nuntil_pressed waiting\n"
    ));
    std::fs::write(host.share().join("segment"), run.segment()?)?;
    let words = run.kernel_words();
    host.run(&format!(
        "mkdir -p /srv/guests && cat /boot/guest.img /lab/segment >/srv/guests/{name}.img\n\
         cat >/etc/busway/{name}.toml <<'END'\n\
         kernel = \"/boot/vmlinux\"\n\
         initramfs = \"/srv/guests/{name}.img\"\n\
         cmdline = \"{words}\"\n\
         serial = \"tty\"\n\
         memory = \"size=256M\"\n\
         device = [\"{address}\"]\n\
         END"
    ))?;
    Ok(())
}

/// Waits until a guest has said on its console, which the journal of this boot has, that it runs with its device.
fn runs(host: &Host, machine: &Machine) -> Result<()> {
    let Machine { name, found, .. } = machine;
    let seconds = LIMIT.as_secs();
    // The journal is followed until the line is there, and not longer.
    let output = host.output(
        &format!(
            "unit=busway@{name}\n\
             timeout {seconds} grep -aq -m1 '@@value waiting' < <(exec journalctl -b -f -n all -o cat -u $unit)\n\
             status=$?\n\
             journalctl -b -o cat -u $unit | grep -a '@@value' | tail -n 2\n\
             [ $status = 0 ] || {{ systemctl status --no-pager -l $unit busway-devices; \
             journalctl -b --no-pager -u $unit -u busway-devices | tail -n 60; }}\n\
             exit $status"
        ),
        LIMIT + Duration::from_secs(60),
    )?;
    let said = output
        .success()
        .with_context(|| format!("{name} does not run"))?;
    let right = said
        .lines()
        .any(|line| line.trim() == format!("@@value found {found}"));
    ensure!(right, "{name}: {said}");
    Ok(())
}

/// A unit's property.
fn property(host: &Host, unit: &str, key: &str) -> Result<String> {
    let said = host.run(&format!("systemctl show --value -p {key} {unit}"))?;
    Ok(said.trim().to_owned())
}

/// Both VMs run, each as a user of its own without rights, with devices that VFIO has; their processes.
fn both_run(host: &Host, addresses: &[String; 2]) -> Result<Vec<String>> {
    let mut pids = Vec::new();
    for (machine, address) in MACHINES.iter().zip(addresses) {
        runs(host, machine)?;
        let unit = format!("busway@{}", machine.name);
        ensure!(property(host, &unit, "ActiveState")? == "active", "{unit}");
        let pid = property(host, &unit, "MainPID")?;
        let status = host.run(&format!(
            "awk '/^(Uid|CapEff|CapBnd|NoNewPrivs):/ {{ print $1, $2 }}' /proc/{pid}/status\n\
             basename $(readlink /sys/bus/pci/devices/{address}/driver)"
        ))?;
        tell!("{unit}: {status}");
        ensure!(!status.contains("Uid: 0\n"), "{unit} is root's: {status}");
        for word in [
            "CapEff: 0000000000000000",
            "CapBnd: 0000000000000000",
            "NoNewPrivs: 1",
            "vfio-pci",
        ] {
            ensure!(status.contains(word), "{unit}: {word}: {status}");
        }
        pids.push(pid);
    }
    Ok(pids)
}

/// Waits until systemd has done what this boot has to do. Nothing of the package's has failed.
fn booted(host: &Host) -> Result<()> {
    let state = host.output("systemctl is-system-running --wait", LIMIT)?;
    tell!("{}", state.stdout.trim());
    let failed = host.run("systemctl list-units --failed --plain --no-legend 'busway*'")?;
    ensure!(failed.trim().is_empty(), "{failed}");
    Ok(())
}

fn life(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Iommufd)
        .systemd()
        .device(Device::nvme("nv0", 64))
        .device(Device::e1000e("nic0"));
    let host = lab.host(&config)?;
    let addresses = [host.address("nv0")?, host.address("nic0")?];
    for version in VERSIONS {
        pack(host, version)?;
    }
    // What was said before the restart is looked at after it.
    host.run("mkdir -p /var/log/journal && journalctl --flush")?;
    booted(host)?;

    // Installed, on a host that has no other.
    let install = |version: &str| {
        host.run(&format!("dpkg -i /lab/busway_{version}_amd64.deb 2>&1"))
            .with_context(|| format!("installing {version}"))
    };
    host.run("rm -f /usr/local/bin/busway")?;
    tell!("{}", install(VERSIONS[0])?);
    let [drive, nic] = &addresses;
    host.run(&format!("busway device bind --persist {drive} {nic}"))?;
    for (machine, address) in MACHINES.iter().zip(&addresses) {
        describe(host, machine, address)?;
        let enabled = host.output(
            &format!("systemctl enable --now busway@{}", machine.name),
            LIMIT,
        )?;
        enabled.success()?;
    }
    both_run(host, &addresses)?;

    // The host restarts: the guests power off before, and are back without anybody's doing.
    host.reboot()?;
    booted(host)?;
    let pids = both_run(host, &addresses)?;
    for machine in &MACHINES {
        let Machine { name, .. } = machine;
        let ended = host.run(&format!(
            "journalctl -b -1 -o cat -u busway@{name} | grep -aF 'Deactivated successfully' || true"
        ))?;
        ensure!(!ended.trim().is_empty(), "{name} was not stopped in order");
    }
    let result = host.run(
        "journalctl -b -1 -o cat -u busway@one -u busway@two | grep -aE 'Failed with result|status=' || true",
    )?;
    ensure!(result.trim().is_empty(), "before the restart: {result}");

    // Upgraded: the VMs go on with the program that they have.
    tell!("{}", install(VERSIONS[1])?);
    ensure!(both_run(host, &addresses)? == pids, "an upgrade ended a VM");
    for pid in &pids {
        let program = host.run(&format!("readlink /proc/{pid}/exe"))?;
        ensure!(
            program.contains("(deleted)"),
            "it is another program: {program}"
        );
    }

    // Stopped, by the power button; the other runs on.
    host.output("systemctl stop busway@two", LIMIT)?.success()?;
    ensure!(property(host, "busway@two", "Result")? == "success");
    ensure!(property(host, "busway@one", "ActiveState")? == "active");

    // Removed: nothing runs, and the host has its devices.
    let removed = host.output("dpkg -r busway 2>&1", LIMIT)?.success()?;
    tell!("{removed}");
    for (machine, address) in MACHINES.iter().zip(&addresses) {
        let driver = host.run(&format!(
            "udevadm settle; basename $(readlink /sys/bus/pci/devices/{address}/driver)"
        ))?;
        ensure!(
            driver.trim() == machine.driver,
            "{address} is with {driver}"
        );
    }
    let rules = host.run("ls /etc/udev/rules.d")?;
    ensure!(!rules.contains("busway"), "{rules}");
    ensure!(host.run("pgrep -x busway || true")?.trim().is_empty());
    host.run("test -e /etc/busway/one.toml")
        .context("its configuration stays")?;

    // Purged.
    tell!("{}", host.run("dpkg -P busway 2>&1")?);
    let left = host.run(
        "find / -xdev \\( -path /proc -o -path /lab -o -path /project -o -path /cache -o -path /boot \\) -prune \
         -o -name '*busway*' -print",
    )?;
    match left.trim() {
        "" => Ok(()),
        left => bail!("left behind: {left}"),
    }
}
