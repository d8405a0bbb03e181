//! QEMU's command line: the machine that a host is, apart from what is plugged into it.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::config::{Accelerator, HostConfig, Iommu};
use crate::parts::Parts;
use crate::tsc;

/// The folders that the outer machine shares, as the host's agent mounts them: each is a device of 9p's.
pub(crate) const FOLDERS: [&str; 3] = ["lab", "project", "cache"];

/// How many root ports there are for the devices of the zoo. They are `port1` and so on.
pub(crate) const PORTS: usize = 12;

/// QEMU out of the Debian root, by the root's own loader and libraries: it needs neither chroot nor
/// privilege, and nothing of this machine's distribution.
pub(crate) fn qemu(parts: &Parts) -> Command {
    let root = &parts.root;
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(root.join("usr/lib64/ld-linux-x86-64.so.2"));
    command
        .env("QEMU_MODULE_DIR", libraries.join("qemu"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(root.join("usr/bin/qemu-system-x86_64"));
    for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
        command.arg("-L").arg(root.join(firmware));
    }
    command
}

/// A character device whose other end is a socket of this process's.
pub(crate) fn line(id: &str, end: &UnixStream) -> [String; 2] {
    [
        "-chardev".to_owned(),
        format!("socket,id={id},fd={}", end.as_raw_fd()),
    ]
}

/// The machine: processors, memory, IOMMU, disk, and root ports that are empty.
pub(crate) fn arguments(
    config: &HostConfig,
    parts: &Parts,
    accelerator: Accelerator,
) -> Result<Vec<String>> {
    let (kernel, initramfs, modules) = parts.host_kernel(config.kernel)?;
    // A busy machine can be too slow for the kernel's check that timer interrupts arrive, and for its
    // measuring of the time-stamp counter, which is told and trusted instead. One that hangs shows its stacks when SysRq
    // or an NMI asks it to: see `inspector`.
    let cmdline = format!(
        "console=ttyS0 quiet panic=-1 no_timer_check tsc_early_khz={} tsc=reliable mitigations=off \
         sysrq_always_enabled unknown_nmi_panic {} lab.modules={modules} {}",
        tsc::khz(),
        match config.iommu {
            Iommu::Intel => "intel_iommu=on",
            Iommu::Amd | Iommu::None => "",
        },
        config.cmdline,
    );
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
    add(&["-machine", "q35,kernel-irqchip=split"]);
    add(&["-nodefaults", "-no-user-config"]);
    add(&["-display", "none", "-no-reboot"]);
    if config.native_hot_plug {
        let firmware = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off";
        add(&["-global", firmware]);
    }
    add(accelerator.arguments());
    add(&["-smp", &config.cpus.to_string()]);
    add(&["-m", &config.memory_mib.to_string()]);
    add(&["-kernel", &kernel.display().to_string()]);
    add(&["-initrd", &initramfs.display().to_string()]);
    add(&["-append", &cmdline]);
    add(config.iommu.arguments());
    let disk = parts.disk.join("root.erofs").display().to_string();
    add(&[
        "-drive",
        &format!("file={disk},format=raw,if=none,id=root,readonly=on"),
    ]);
    add(&["-device", "virtio-blk-pci,drive=root,addr=0x1c"]);
    // The kernel makes new random numbers where it sees that it was started anew from a saved state.
    add(&["-device", "vmgenid,guid=auto"]);
    let mut port = |name: String, chassis: usize, slot: usize| {
        // Faster ports say that they report a link that is up, and never do: after a reset of its bus the
        // host's kernel waits for that, and fails (`pci_bridge_wait_for_secondary_bus`).
        let option = format!(
            "pcie-root-port,id={name},slot={chassis},chassis={chassis},addr={slot:#x},x-speed=5"
        );
        add(&["-device", &option]);
    };
    for number in 1..=PORTS {
        port(format!("port{number}"), number, number);
    }
    for (number, folder) in (PORTS + 1..).zip(FOLDERS) {
        port(format!("{folder}-port"), number, number);
    }
    Ok(arguments)
}

/// What the outer machine shares, each behind the root port that is named after it: words for the command line, and
/// what is plugged.
pub(crate) fn folders(parts: &Parts, scratch: &Path) -> (Vec<String>, Vec<String>) {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let paths = [scratch.join("share"), project, parts.cache.clone()];
    let mut words = Vec::new();
    let mut devices = Vec::new();
    for (name, path) in FOLDERS.into_iter().zip(paths) {
        let access = if name == "lab" { "" } else { ",readonly=on" };
        let path = path.display();
        words.push("-fsdev".to_owned());
        words.push(format!(
            "local,id={name}-folder,path={path},security_model=none,multidevs=remap{access}"
        ));
        devices.push(format!(
            "virtio-9p-pci,fsdev={name}-folder,mount_tag={name},bus={name}-port"
        ));
    }
    (words, devices)
}
