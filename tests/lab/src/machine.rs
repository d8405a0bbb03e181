//! QEMU's command line: the machine that a host is, apart from what is plugged into it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::config::{Accelerator, HostConfig, Iommu};
use crate::parts::Parts;
use crate::tsc;
use crate::zoo;

/// The folders that the outer machine shares, as the host's agent mounts them: each is a device of 9p's.
pub(crate) const FOLDERS: [&str; 3] = ["lab", "project", "cache"];

/// What the kernel of a host is told that boots by systemd. Nobody logs in, and nothing is to be waited for at a console.
const SYSTEMD: &str = "lab.init=systemd systemd.unit=multi-user.target systemd.wants=lab-agent.service \
     systemd.mask=serial-getty@ttyS0.service systemd.mask=getty.target systemd.mask=e2scrub_reap.service";

/// The most that such a host writes, in MiB.
const WRITTEN_MIB: u64 = 4096;

/// How far the nodes of a host that has some are from each other.
pub(crate) const NODE_DISTANCE: u8 = 24;

/// How many root ports there are for the devices of the zoo. They are `port1` and so on. With those of the folders they
/// are 14, for as many as the firmware finds windows of I/O ports.
const PORTS: usize = 11;

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
        .arg(&parts.emulator);
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
    // What defends against attackers takes an emulated processor a tenth of its time, and KVM's polling before a vCPU
    // sleeps takes it from the others.
    // A busy machine can be too slow for the kernel's check that timer interrupts arrive, and for its
    // measuring of the time-stamp counter, which is told and trusted instead. One that hangs shows its stacks when SysRq
    // or an NMI asks it to: see `inspector`.
    let init = if config.systemd { SYSTEMD } else { "" };
    let cmdline = format!(
        "console=ttyS0 quiet panic=-1 no_timer_check tsc_early_khz={} tsc=reliable mitigations=off \
         init_on_alloc=0 randomize_kstack_offset=off lsm=landlock kvm.halt_poll_ns=0 sysrq_always_enabled unknown_nmi_panic {} lab.modules={modules} {init} {}",
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
    add(&["-smp", &processors(config)]);
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
    add(&[
        "-device",
        "virtio-blk-pci,drive=root,addr=0x1c,disable-legacy=on",
    ]);
    // The kernel makes new random numbers where it sees that it was started anew from a saved state.
    add(&["-device", "vmgenid,guid=auto"]);
    let windows = zoo::large_windows(&config.devices);
    let names = (1..=PORTS).map(|number| format!("port{number}"));
    let names = names.chain(FOLDERS.map(|folder| format!("{folder}-port")));
    for (number, name) in (1..).zip(names) {
        // AMD's IOMMU has a function in the first slot.
        let slot = number + 1;
        // Faster ports say that they report a link that is up, and never do: after a reset of its bus the
        // host's kernel waits for that, and fails (`pci_bridge_wait_for_secondary_bus`).
        let mut option = format!(
            "pcie-root-port,id={name},slot={number},chassis={number},addr={slot:#x},x-speed=5"
        );
        if let Some(size_mib) = windows.get(&number) {
            option += &format!(",pref64-reserve={size_mib}M");
        }
        add(&["-device", &option]);
    }
    arguments.extend(nodes(config));
    Ok(arguments)
}

/// How many processors there are, and how many of them a core runs.
fn processors(config: &HostConfig) -> String {
    match config.threads {
        1 => config.cpus.to_string(),
        threads => format!("{},threads={threads}", config.cpus),
    }
}

/// The host's NUMA nodes: processors, memory, and a PCI root bus with a root port. The buses are numbered from 64 on, 32
/// apart, past those of the first root bus.
fn nodes(config: &HostConfig) -> Vec<String> {
    let mut words = Vec::new();
    let count = config.numa_nodes;
    for node in 0..count {
        let size = config.memory_mib / u64::from(count);
        let (first, last) = (
            config.cpus * node / count,
            config.cpus * (node + 1) / count - 1,
        );
        let (bus, port) = (64 + 32 * node, 100 + node);
        for word in [
            "-object",
            &format!("memory-backend-ram,id=node{node}-memory,size={size}M"),
            "-numa",
            &format!("node,nodeid={node},memdev=node{node}-memory,cpus={first}-{last}"),
            "-device",
            &format!("pxb-pcie,id=node{node}-bus,bus=pcie.0,bus_nr={bus},numa_node={node}"),
            "-device",
            &format!(
                "pcie-root-port,id=node{node}-port,bus=node{node}-bus,slot={port},chassis={port},x-speed=5,io-reserve=0"
            ),
        ] {
            words.push(word.to_owned());
        }
    }
    for (first, second) in (0..count).flat_map(|a| (a + 1..count).map(move |b| (a, b))) {
        words.push("-numa".to_owned());
        words.push(format!("dist,src={first},dst={second},val={NODE_DISTANCE}"));
    }
    words
}

/// The disk of a host that boots by systemd, for what it writes: a file in `scratch`, which grows as it is written.
pub(crate) fn written(config: &HostConfig, scratch: &Path) -> Result<Vec<String>> {
    if !config.systemd {
        return Ok(Vec::new());
    }
    let path = scratch.join("written.img");
    File::create_new(&path)?.set_len(WRITTEN_MIB << 20)?;
    let drive = format!("file={},format=raw,if=none,id=written", path.display());
    let device = "virtio-blk-pci,drive=written,addr=0x1d,disable-legacy=on";
    Ok(["-drive", &drive, "-device", device]
        .map(str::to_owned)
        .into())
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
            "virtio-9p-pci,id={name},fsdev={name}-folder,mount_tag={name},bus={name}-port"
        ));
    }
    (words, devices)
}
