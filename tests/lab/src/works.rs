//! What each device of the zoo does to prove itself in a guest, by its own Linux driver where it has one.
//!
//! The trials, `docs/devices.md` and a guest with all devices at once stand on this one table.

use std::fs::{self, File};
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::config::{HostConfig, Iommu, Kernel};
use crate::guest::{GuestResult, GuestRun};
use crate::host::Host;
use crate::pattern;
use crate::program::{build_lab_io, build_lab_pci};
use crate::server::DataServer;
use crate::suspect::Suspect;
use crate::zoo::{Device, GATEWAY, USB_DISK_MIB};

/// Bytes that each NIC fetches, and sends back.
const NIC_BYTES: u64 = 2_000_000;
/// The drives' and the shared memory's sizes.
const DRIVE_MIB: u64 = 16;
const SHARED_MIB: u64 = 64;
/// How many vectors the doorbell device has.
const VECTORS: u64 = 4;
/// Interrupts that a device which sends them on request sends, for each vector, where they are not
/// what is measured.
const INTERRUPTS: u64 = 500;
/// How long one work may take in a guest that does all of them at once.
const SECONDS: u32 = 200;

/// One device's proof.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// The device, as `docs/devices.md` names it.
    pub device: &'static str,
    /// What it exercises.
    pub exercises: &'static str,
    /// What it does in the guest, in the same page's words.
    pub proof: &'static str,
    /// What names it in a script, and the values that it leaves.
    name: &'static str,
    /// The ids in [`zoo_host`] of what it needs.
    ids: &'static [&'static str],
    /// NICs take turns: emulated networks have the same addresses.
    takes_turns: bool,
    /// The body of its function in the guest's script.
    script: fn(&Outside) -> String,
    /// What the guest's values and the outer machine's files have to say.
    check: fn(&Outside, &GuestResult) -> Result<()>,
}

/// What a work finds outside the guest.
struct Outside<'a> {
    host: &'a Host,
    server: &'a DataServer,
}

/// The table.
pub const WORKS: &[Work] = &[
    Work {
        device: "nvme",
        exercises: "MSI-X, 64-bit BAR with the table inside it, function-level reset",
        proof: "writes and verifies a whole drive",
        name: "nvme",
        ids: &["nv0"],
        takes_turns: false,
        script: |_| {
            "controller=$(drive NV0)\n\
             disk nvme \"/dev/${controller}n1\" 21\n\
             face nvme \"$(basename \"$(readlink -f \"/sys/class/nvme/$controller/device\")\")\""
                .to_owned()
        },
        check: |outside, result| {
            disk(result, "nvme", DRIVE_MIB)?;
            face(result, "nvme", "nvme", "msix", 10)?;
            holds(&outside.host.backing_file("nv0"), 21)
        },
    },
    Work {
        device: "e1000e",
        exercises: "MSI-X, I/O BAR, expansion ROM",
        proof: "fetches and sends 2 MB",
        name: "e1000e",
        ids: &["nic0"],
        takes_turns: true,
        script: |outside| nic(outside, "e1000e", "$(at 8086:10d3)", 22),
        check: |_, result| moved(result, "e1000e", "e1000e", "msix", 22),
    },
    Work {
        device: "igb",
        exercises: "MSI-X with several queues, SR-IOV hidden",
        proof: "fetches and sends 2 MB",
        name: "igb",
        ids: &["nic1"],
        takes_turns: true,
        script: |outside| nic(outside, "igb", "$(at 8086:10c9)", 23),
        check: |_, result| moved(result, "igb", "igb", "msix", 23),
    },
    Work {
        device: "igb, two virtual functions",
        exercises: "identity filled in by VFIO, BARs without registers, MSI-X",
        proof: "each fetches and sends 2 MB",
        name: "igbvf",
        ids: &["vf0", "vf1"],
        takes_turns: true,
        script: |outside| {
            let of = |number: u32| format!("$(at 8086:10ca | sed -n {number}p)");
            let first = nic(outside, "igbvf0", &of(1), 24);
            format!("{first}\n{}", nic(outside, "igbvf1", &of(2), 25))
        },
        check: |_, result| {
            moved(result, "igbvf0", "igbvf", "msix", 24)?;
            moved(result, "igbvf1", "igbvf", "msix", 25)?;
            let mac = result.value("igbvf0.mac")?;
            ensure!(mac.starts_with("02:00:00:00:01"), "MAC address {mac}");
            Ok(())
        },
    },
    Work {
        device: "e1000",
        exercises: "INTx, I/O BAR, no reset of its own, a group that it shares",
        proof: "fetches and sends 2 MB",
        name: "e1000",
        ids: &["nic2", "nic3"],
        takes_turns: true,
        script: |outside| nic(outside, "e1000", "$(at 8086:100e)", 26),
        check: |_, result| moved(result, "e1000", "e1000", "intx", 26),
    },
    Work {
        device: "rtl8139",
        exercises: "INTx, I/O BAR, memory BAR of 256 bytes, the same group",
        proof: "fetches and sends 2 MB",
        name: "rtl8139",
        ids: &["nic3", "nic2"],
        takes_turns: true,
        script: |outside| nic(outside, "rtl8139", "$(at 10ec:8139)", 27),
        check: |_, result| moved(result, "rtl8139", "8139cp", "intx", 27),
    },
    Work {
        device: "edu",
        exercises: "MSI, DMA engine",
        proof: "computes factorials, copies memory in and out, counts its interrupts",
        name: "edu",
        ids: &["edu0"],
        takes_turns: false,
        script: |_| {
            format!(
                "value edu.counts \"$(lab-pci edu \"$(at 1234:11e8 | head -n 1)\" msi {INTERRUPTS})\""
            )
        },
        check: |_, result| counted(result, "edu", edu_sends(INTERRUPTS)),
    },
    Work {
        device: "ivshmem-plain",
        exercises: "prefetchable 64-bit BAR, registers of less than a page, no interrupt",
        proof: "writes and reads all of its memory",
        name: "shared",
        ids: &["shm0"],
        takes_turns: false,
        script: |_| {
            "address=$(ivshmem plain)\n\
             echo 1 >\"/sys/bus/pci/devices/$address/enable\"\n\
             value shared.memory \"$(lab-pci memory \"$address\" 2 28)\""
                .to_owned()
        },
        check: |outside, result| {
            let line = result.value("shared.memory")?;
            ensure!(number(line, "bytes")? == SHARED_MIB << 20, "{line}");
            holds(&outside.host.backing_file("shm0"), 28)
        },
    },
    Work {
        device: "ivshmem-doorbell",
        exercises: "MSI-X without DMA, each vector by itself",
        proof: "rings itself by every vector, and counts",
        name: "doorbell",
        ids: &["bell0"],
        takes_turns: false,
        script: |_| {
            format!(
                "value doorbell.counts \"$(lab-pci doorbell \"$(ivshmem doorbell)\" {INTERRUPTS})\""
            )
        },
        check: |_, result| counted(result, "doorbell", VECTORS * INTERRUPTS),
    },
    Work {
        device: "qemu-xhci",
        exercises: "MSI-X, a bus behind the device",
        proof: "writes and verifies a whole USB disk",
        name: "xhci",
        ids: &["usb0"],
        takes_turns: false,
        script: |_| {
            "appear /dev/sda\ndisk xhci /dev/sda 29\nface xhci \"$(at 1b36:000d)\"".to_owned()
        },
        check: |outside, result| {
            disk(result, "xhci", USB_DISK_MIB)?;
            face(result, "xhci", "xhci_hcd", "msix", 10)?;
            holds(&outside.host.backing_file("usb0"), 29)
        },
    },
    Work {
        device: "intel-hda",
        exercises: "MSI with one vector, cyclic DMA",
        proof: "plays a second of sound",
        name: "hda",
        ids: &["hda0"],
        takes_turns: false,
        script: |_| {
            "appear /dev/dsp\nyes | head -c 8000 >/dev/dsp\nface hda \"$(at 8086:2668)\"".to_owned()
        },
        check: |outside, result| {
            face(result, "hda", "snd_hda_intel", "msi", 2)?;
            played(&outside.host.sound_file("hda0"))
        },
    },
    Work {
        device: "nvme and edu as two functions",
        exercises: "a multi-function device, one group",
        proof: "both work as they do alone, in one slot",
        name: "twin",
        ids: &["nv1", "edu1"],
        takes_turns: false,
        script: |_| {
            "controller=$(drive NV1)\n\
             address=$(basename \"$(readlink -f \"/sys/class/nvme/$controller/device\")\")\n\
             disk twin \"/dev/${controller}n1\" 30\n\
             face twin \"$address\"\n\
             value twin.counts \"$(lab-pci edu \"${address%.0}.1\" msi 100)\""
                .to_owned()
        },
        check: |outside, result| {
            disk(result, "twin", DRIVE_MIB)?;
            face(result, "twin", "nvme", "msix", 10)?;
            counted(result, "twin", edu_sends(100))?;
            holds(&outside.host.backing_file("nv1"), 30)
        },
    },
];

/// How many virtual functions the zoo has: enough that a guest gets sixteen functions with them.
const VIRTUAL_FUNCTIONS: u32 = 4;

/// The host that has every device of [`WORKS`].
pub fn zoo_host(iommu: Iommu) -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .iommu(iommu)
        .device(Device::nvme("nv0", DRIVE_MIB))
        .device(Device::e1000e("nic0"))
        .device(Device::igb("nic1"))
        .device(Device::igb("nic4"))
        .device(Device::e1000("nic2"))
        .device(Device::rtl8139("nic3"))
        .device(Device::edu("edu0"))
        .device(Device::ivshmem("shm0", SHARED_MIB))
        .device(Device::doorbell("bell0", VECTORS as u16))
        .device(Device::xhci("usb0"))
        .device(Device::hda("hda0"))
        .device(Device::nvme("nv1", DRIVE_MIB))
        .device(Device::edu("edu1").beside("nv1"))
}

/// The host addresses of what these works need, in the order of the table, each once.
pub fn addresses(host: &Host, works: &[&Work]) -> Result<Vec<String>> {
    let mut addresses = Vec::new();
    let mut functions = None;
    for id in works.iter().flat_map(|work| work.ids) {
        let address = match id.strip_prefix("vf") {
            None => host.address(id)?,
            Some(number) => {
                if functions.is_none() {
                    functions = Some(virtual_functions(host)?);
                }
                let of = functions.as_deref().unwrap_or_default();
                let number: usize = number.parse()?;
                of.get(number).context("too few virtual functions")?.clone()
            }
        };
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// The virtual functions of the second `igb`, which the host keeps; made when they are asked for first.
pub fn virtual_functions(host: &Host) -> Result<Vec<String>> {
    let folder = format!("/sys/bus/pci/devices/{}", host.address("nic4")?);
    let made = host.run(&format!(
        "for each in {folder}/virtfn*; do if [ -e $each ]; then basename $(readlink $each); fi; done"
    ))?;
    if made.is_empty() {
        return host.virtual_functions("nic4", VIRTUAL_FUNCTIONS);
    }
    Ok(made.lines().map(str::to_owned).collect())
}

/// The same guest with a script that runs `first`, which can use the functions of `works.sh`, and then
/// these works: all at the same time but for the NICs, which take turns.
pub fn with_works(
    run: GuestRun,
    host: &Host,
    server: &DataServer,
    works: &[&Work],
    first: &str,
) -> Result<GuestRun> {
    let outside = Outside { host, server };
    let mut script = format!("{}{first}", include_str!("works.sh"));
    let (mut turns, mut at_once) = (String::new(), String::new());
    for work in works {
        let body = (work.script)(&outside);
        script += &format!("work_{}() {{\n{body}\n}}\n", work.name);
        let call = format!("work {} {SECONDS}", work.name);
        match work.takes_turns {
            true => turns += &format!("{call}\n"),
            false => at_once += &format!("{call} &\n"),
        }
    }
    script += &format!("{at_once}(\n:\n{turns}) &\nwait\n");
    Ok(run
        .script(&script)
        .file("bin/lab-io", &build_lab_io()?)
        .file("bin/lab-pci", &build_lab_pci()?))
}

impl Work {
    /// Whether this work was done in a guest with [`with_works`], and all of what it left is right.
    pub fn done(&self, host: &Host, server: &DataServer, result: &GuestResult) -> Result<()> {
        let status = result.value(&format!("{}.status", self.name))?;
        ensure!(
            status == "0",
            "{}: it ended with {status} in the guest",
            self.device
        );
        (self.check)(&Outside { host, server }, result).with_context(|| self.device)
    }
}

fn number(line: &str, key: &str) -> Result<u64> {
    let mut words = line.split_ascii_whitespace();
    let word = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    word.and_then(|word| word.parse().ok())
        .with_context(|| format!("no {key}= in: {line}"))
}

fn disk(result: &GuestResult, name: &str, size_mib: u64) -> Result<()> {
    for step in ["write", "verify"] {
        let line = result.value(&format!("{name}.{step}"))?;
        ensure!(number(line, "bytes")? == size_mib << 20, "{step}: {line}");
    }
    Ok(())
}

/// The driver, the kind of interrupt, and how many there were at least.
fn face(result: &GuestResult, name: &str, driver: &str, kind: &str, least: u64) -> Result<()> {
    let found = result.value(&format!("{name}.driver"))?;
    ensure!(found == driver, "its driver is {found}");
    let line = result.value(&format!("{name}.interrupts"))?;
    ensure!(
        line.starts_with(&format!("kind={kind} ")),
        "interrupts: {line}"
    );
    ensure!(number(line, "count")? >= least, "interrupts: {line}");
    Ok(())
}

fn nic(outside: &Outside, name: &str, address: &str, seed: u64) -> String {
    let url = outside.server.url(NIC_BYTES, seed);
    let port = outside.server.port();
    format!("nic {name} \"{address}\" {url} {GATEWAY} {port}")
}

fn moved(result: &GuestResult, name: &str, driver: &str, kind: &str, seed: u64) -> Result<()> {
    let sum = DataServer::sha256(NIC_BYTES, seed);
    for way in ["sum", "echoed"] {
        let found = result.value(&format!("{name}.{way}"))?;
        ensure!(found == sum, "{name}.{way} is {found}, not {sum}");
    }
    face(result, name, driver, kind, 10)
}

/// What `lab-pci edu` has the device send beside the interrupts that it is asked for: one for each of
/// twelve factorials and four transfers.
pub fn edu_sends(asked: u64) -> u64 {
    asked + 12 + 4
}

/// As many interrupts as the device sent, by the eventfds' count and by the kernel's.
fn counted(result: &GuestResult, name: &str, sent: u64) -> Result<()> {
    exact(result.value(&format!("{name}.counts"))?, sent)
}

/// Whether a line of `lab-pci`'s says that every interrupt of so many was counted once.
pub fn exact(line: &str, sent: u64) -> Result<()> {
    let mut keys = ["sent", "counted", "kernel"].into_iter();
    keys.try_for_each(|key| within(line, key, sent..=sent))
}

/// The same of interrupts that moved between processors meanwhile. The kernel counts those too few: one that comes while
/// another processor still handles the one before is left to that (Linux, kernel/irq/chip.c, `handle_edge_irq`).
pub fn exact_while_moved(line: &str, sent: u64) -> Result<()> {
    within(line, "sent", sent..=sent)?;
    within(line, "counted", sent..=sent)?;
    within(line, "kernel", 1..=sent)
}

fn within(line: &str, key: &str, right: RangeInclusive<u64>) -> Result<()> {
    /// How many the emulator was seen to deliver twice in one count.
    const DOUBLED: u64 = 2;
    let (found, most) = (number(line, key)?, *right.end());
    let said = format!("{most} interrupts: {line}");
    if (most + 1..=most + DOUBLED).contains(&found) {
        bail!(Suspect(said));
    }
    ensure!(right.contains(&found), said);
    Ok(())
}

/// Whether a file of the outer machine holds the pattern that a guest wrote to the device it is behind.
fn holds(file: &Path, seed: u64) -> Result<()> {
    const CHUNK: usize = 1 << 20;
    let mut file = File::open(file).with_context(|| format!("opening {}", file.display()))?;
    let mut chunk = vec![0; CHUNK];
    for offset in (0..file.metadata()?.len()).step_by(CHUNK) {
        file.read_exact(&mut chunk)?;
        pattern::check(&chunk, offset, seed).context("on the outer machine")?;
    }
    Ok(())
}

/// Whether a sound controller has played something louder than silence.
fn played(file: &Path) -> Result<()> {
    const HEADER: usize = 44;
    let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let loud = bytes.iter().skip(HEADER).filter(|&&byte| byte != 0).count();
    ensure!(
        loud > 10_000,
        "{} bytes of sound, {loud} of them not silent",
        bytes.len()
    );
    Ok(())
}
