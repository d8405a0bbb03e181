//! A whole host looked over: can it run guests, and give them its devices?

use busway_iommu::Command;

use super::asker::Asker;
use super::boot::Loader;
use super::finding::{Finding, Level, Remedy};
use super::host::Host;
use super::hugepages;
use super::modules::{Availability, availability};
use super::root::{self, SysRoot};
use super::surroundings::{self, Opens};
use super::walls;

/// Everything that was found, the processor first and the devices last. `memory` is a guest's, in bytes;
/// `opens` is asked whether a node can be opened.
#[must_use]
pub fn examine(root: &SysRoot, memory: u64, opens: Opens<'_>) -> Vec<Finding> {
    let asker = Asker::read(root);
    let cpu = Cpu::read(root);
    let mut findings = vec![cpu.finding(root.dev.join("kvm").exists())];
    findings.extend(kvm(root, &cpu, &asker, opens));
    findings.extend(nested(root));
    findings.push(surroundings::iommu(root));
    findings.extend(width(root, &cpu));
    findings.extend(surroundings::remapping(root));
    findings.extend(surroundings::modules(root));
    for node in ["vfio/vfio", "iommu"] {
        findings.extend(surroundings::node(root, &asker, node, opens));
    }
    findings.push(surroundings::memlock(&asker, memory));
    findings.extend(files(&asker));
    findings.extend(huge_pages(root));
    findings.extend(command_line(root, &cpu));
    findings.extend(surroundings::lockdown(root));
    findings.extend(walls::landlock(root));
    findings.extend(walls::leaks(root));
    findings.extend(errata(root));
    findings.push(devices(root));
    findings
}

/// What the kernel says of the first processor.
#[derive(Debug, Default)]
struct Cpu {
    vendor: String,
    model: String,
    flags: Vec<String>,
    physical_bits: Option<u64>,
}

impl Cpu {
    fn read(root: &SysRoot) -> Self {
        let text = root::text(&root.proc.join("cpuinfo")).unwrap_or_default();
        let field = |name: &str| {
            let mut fields = text.lines().filter_map(|line| line.split_once(':'));
            let found = fields.find(|(key, _)| key.trim() == name);
            found.map_or("", |(_, value)| value.trim())
        };
        let bits = field("address sizes").split_whitespace().next();
        Self {
            vendor: field("vendor_id").to_owned(),
            model: root::one_line(field("model name")),
            flags: field("flags").split(' ').map(str::to_owned).collect(),
            physical_bits: bits.and_then(|bits| bits.parse().ok()),
        }
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|f| f == flag)
    }

    fn is_amd(&self) -> bool {
        matches!(&*self.vendor, "AuthenticAMD" | "HygonGenuine")
    }

    fn finding(&self, kvm: bool) -> Finding {
        let mut text = match self.model.is_empty() {
            true => "an unknown processor".to_owned(),
            false => self.model.clone(),
        };
        let (technology, on) = match self.is_amd() {
            true => ("AMD-V", self.has("svm")),
            false => ("VT-x", self.has("vmx")),
        };
        if on {
            text += &format!(", {technology}");
            if self.has("ept") || self.has("npt") {
                text += " with nested paging";
            }
            if let Some(bits) = self.physical_bits {
                text += &format!(", {bits}-bit addresses");
            }
            return Finding::new(Level::Fine, "cpu", text);
        }
        text += &format!(" does not offer {technology}");
        if kvm {
            // KVM can do without, where this host is a guest that its own host helps.
            text += ", and KVM does without";
            return Finding::new(Level::Note, "cpu", text);
        }
        let remedy = match self.has("hypervisor") {
            true => Remedy::words(
                "this host is a guest itself: have its own host pass the processor's virtualisation \
                 on (QEMU: -cpu host, and nested=1 for the module kvm_intel or kvm_amd)",
            ),
            false => Remedy::words(format!(
                "turn {technology} (virtualisation) on in the firmware's set-up"
            )),
        };
        Finding::new(Level::Obstacle, "cpu", text).remedy(remedy)
    }
}

fn kvm(root: &SysRoot, cpu: &Cpu, asker: &Asker, opens: Opens<'_>) -> Vec<Finding> {
    const TOPIC: &str = "kvm";
    let module = if cpu.is_amd() { "kvm_amd" } else { "kvm_intel" };
    if !root.dev.join("kvm").exists() {
        let finding = Finding::new(Level::Obstacle, TOPIC, "there is no /dev/kvm");
        return vec![match availability(root, module) {
            Availability::Missing => finding.remedy(Remedy::words(
                "boot a kernel that was built with CONFIG_KVM_INTEL or CONFIG_KVM_AMD",
            )),
            _ => finding.remedy(Remedy::command("load it", load(module))),
        }];
    }
    let mut findings: Vec<_> = surroundings::node(root, asker, "kvm", opens)
        .map(|finding| Finding {
            topic: TOPIC,
            ..finding
        })
        .into_iter()
        .collect();
    if findings.is_empty() {
        findings.push(Finding::new(Level::Fine, TOPIC, "/dev/kvm can be used"));
    }
    let paging = root.sys.join("module").join(module).join("parameters");
    let paging = root::text(&paging.join(if cpu.is_amd() { "npt" } else { "ept" }));
    if paging.is_some_and(|text| text == "N" || text == "0") {
        let text = "nested paging is off, and guests are many times slower for it";
        let remedy = Remedy::command("have it on", unload(module).then(load(module)));
        findings.push(Finding::new(Level::Warning, TOPIC, text).remedy(remedy));
    }
    findings
}

fn load(module: &str) -> Command {
    Command::new(["modprobe"]).operand(module)
}

fn unload(module: &str) -> Command {
    Command::new(["modprobe", "-r"]).operand(module)
}

/// Whether a guest can run guests.
fn nested(root: &SysRoot) -> Option<Finding> {
    let nested = |module: &str| {
        let path = root.sys.join("module").join(module);
        root::text(&path.join("parameters/nested")).map(|text| (module.to_owned(), text))
    };
    let (module, text) = nested("kvm_intel").or_else(|| nested("kvm_amd"))?;
    Some(match text.as_str() {
        "Y" | "1" => Finding::new(Level::Fine, "nested", "guests can run guests of their own"),
        _ => Finding::new(
            Level::Note,
            "nested",
            "guests cannot run guests of their own",
        )
        .remedy(Remedy::command(
            "where they are to",
            unload(&module).then(load(&module).operand("nested=1")),
        )),
    })
}

/// Whether the IOMMU reaches as far as the processor.
fn width(root: &SysRoot, cpu: &Cpu) -> Option<Finding> {
    let text = surroundings::iommu(root).text;
    let bits = text
        .split_once("groups, ")?
        .1
        .strip_suffix("-bit addresses")?;
    let bits: u64 = bits.parse().ok()?;
    let processor = cpu.physical_bits.filter(|processor| *processor > bits)?;
    let text = format!(
        "a device reaches {bits} bits of addresses, the processor {processor}: of large guests and BARs \
         what lies above is not within a device's reach"
    );
    Some(Finding::new(Level::Note, "iommu", text))
}

/// Each vector of an assigned device takes a descriptor, each queue of a virtio device two.
const FILES_WANTED: u64 = 4096;

fn files(asker: &Asker) -> Option<Finding> {
    let limit = asker.may_open()?;
    let text = format!("{limit} files may be open");
    if limit >= FILES_WANTED {
        return Some(Finding::new(Level::Fine, "files", text));
    }
    let text = format!("{text}: too few for devices with many interrupt vectors");
    let remedy = Remedy::command(
        "as root, for this shell",
        Command::new(["prlimit", "--nofile=65536", "--pid"]).shell_process(),
    );
    Some(Finding::new(Level::Warning, "files", text).remedy(remedy))
}

/// Huge pages that are set aside, by NUMA node.
fn huge_pages(root: &SysRoot) -> Vec<Finding> {
    const TOPIC: &str = "hugepages";
    let nodes = root.sys.join("devices/system/node");
    let mut parts = Vec::new();
    let mut low = Vec::new();
    for node in hugepages::nodes(root) {
        let folder = nodes.join(format!("node{node}/hugepages"));
        for size in root::names(&folder) {
            let kib = size
                .strip_prefix("hugepages-")
                .and_then(|size| size.strip_suffix("kB")?.parse::<u64>().ok());
            let count = |name: &str| root::number::<u64>(&folder.join(&size).join(name));
            let (Some(kib), Some(total), Some(free)) =
                (kib, count("nr_hugepages"), count("free_hugepages"))
            else {
                continue;
            };
            if total == 0 {
                continue;
            }
            let unit = match kib {
                kib if kib >= 1 << 20 => format!("{} GiB", kib >> 20),
                kib => format!("{} MiB", kib >> 10),
            };
            parts.push(format!("node {node}: {free} of {total} of {unit} free"));
            if free * 10 < total {
                low.push(node);
            }
        }
    }
    if parts.is_empty() {
        let text = "no huge pages are set aside; guests use transparent ones where they can";
        let remedy = Remedy::command(
            "to set some aside",
            Command::new(["busway", "hugepages", "--help"]),
        );
        return vec![Finding::new(Level::Note, TOPIC, text).remedy(remedy)];
    }
    let finding = Finding::new(Level::Fine, TOPIC, parts.join("; "));
    if low.is_empty() {
        return vec![finding];
    }
    let words: Vec<_> = low.iter().map(u32::to_string).collect();
    let text = format!("hardly any huge page is free on node {}", words.join(", "));
    let remedy = Remedy::command(
        "to set more aside",
        Command::new(["busway", "hugepages", "--help"]),
    );
    vec![
        finding,
        Finding::new(Level::Warning, TOPIC, text).remedy(remedy),
    ]
}

/// Words of the kernel's command line that stand in the way, or help.
fn command_line(root: &SysRoot, cpu: &Cpu) -> Vec<Finding> {
    const TOPIC: &str = "cmdline";
    let text = root::text(&root.proc.join("cmdline")).unwrap_or_default();
    let words: Vec<_> = text.split_whitespace().collect();
    let mut findings = Vec::new();
    let against = [
        ("iommu=off", "it turns the IOMMU off"),
        ("intel_iommu=off", "it turns the IOMMU off"),
        ("amd_iommu=off", "it turns the IOMMU off"),
        (
            "pci=nomsi",
            "devices have no message-signalled interrupts by it",
        ),
        (
            "mitigations=off",
            "guests can read the host's memory by faults of the processor",
        ),
    ];
    for (word, why) in against {
        if words.contains(&word) {
            findings.push(
                Finding::new(Level::Warning, TOPIC, format!("{word}: {why}"))
                    .remedy(Loader::read(root).remove(root, word)),
            );
        }
    }
    let overridden = words.iter().find(|word| {
        let name = word.split_once('=').map_or(**word, |(name, _)| name);
        name == "pcie_acs_override"
    });
    if let Some(word) = overridden {
        let text = "pcie_acs_override: groups are made smaller than the hardware keeps apart, so that \
                    a guest may reach devices that are not its own";
        findings.push(
            Finding::new(Level::Warning, TOPIC, text).remedy(Loader::read(root).remove(root, word)),
        );
    }
    let reported = words.iter().any(|word| {
        let on = |values: &str| {
            values
                .split(',')
                .any(|value| matches!(value, "on" | "sm_on"))
        };
        word.strip_prefix("intel_iommu=").is_some_and(on)
    });
    if cpu.vendor == "GenuineIntel" && !reported && root.has_iommu() {
        let text = "the IOMMU is on without intel_iommu=on: another kernel may have it off";
        let finding = Finding::new(Level::Note, TOPIC, text);
        findings.push(finding.remedies(Loader::read(root).add("intel_iommu=on")));
    }
    if findings.is_empty() {
        let text = "nothing on the kernel's command line is in the way";
        findings.push(Finding::new(Level::Fine, TOPIC, text));
    }
    findings
}

/// Faults of this processor by which a guest could harm the host, that nothing has been done against.
///
/// Documentation/ABI/testing/sysfs-devices-system-cpu; what matters to hosts is in
/// Documentation/admin-guide/hw-vuln.
fn errata(root: &SysRoot) -> Vec<Finding> {
    const TOPIC: &str = "errata";
    let folder = root.sys.join("devices/system/cpu/vulnerabilities");
    let names = root::names(&folder);
    let parameters = root::text(&root.proc.join("cmdline")).unwrap_or_default();
    let cure = match parameters
        .split_whitespace()
        .any(|word| word == "mitigations=off")
    {
        true => {
            "boot the kernel without mitigations=off; where that is not enough, update it and \
                 the processor's microcode"
        }
        false => "update the processor's microcode and the kernel",
    };
    let mut findings = Vec::new();
    for name in &names {
        let text = root::text(&folder.join(name)).unwrap_or_default();
        let open = text.starts_with("Vulnerable")
            || text.starts_with("KVM: Vulnerable")
            || text.contains("VMX: vulnerable");
        if !open {
            continue;
        }
        let means = match name.as_str() {
            "mmio_stale_data" => "a guest with a device can read what others left in the processor",
            "itlb_multihit" => "a guest can halt the host",
            "l1tf" => "a guest can read the host's memory in the first-level cache",
            "mds"
            | "tsx_async_abort"
            | "srbds"
            | "reg_file_data_sampling"
            | "gather_data_sampling" => "a guest can read what others left in the processor",
            "vmscape"
            | "retbleed"
            | "spec_rstack_overflow"
            | "spectre_v2"
            | "bhi"
            | "its"
            | "tsa"
            | "indirect_target_selection" => "a guest can make the host speculate to its advantage",
            _ => continue,
        };
        let text = format!("{name} is not mitigated: {means}");
        findings.push(Finding::new(Level::Warning, TOPIC, text).remedy(Remedy::words(cure)));
    }
    if findings.is_empty() && !names.is_empty() {
        let text = "every known fault of the processor that matters to guests is mitigated";
        findings.push(Finding::new(Level::Fine, TOPIC, text));
    }
    findings
}

/// How many devices could be given away.
fn devices(root: &SysRoot) -> Finding {
    const TOPIC: &str = "devices";
    let host = match Host::read(root) {
        Ok(host) => host,
        Err(error) => {
            let text = error.to_string();
            let text = text.lines().next().unwrap_or_default();
            return Finding::new(Level::Obstacle, TOPIC, text);
        }
    };
    let all: Vec<_> = host
        .devices()
        .filter(|device| !device.is_bridge())
        .collect();
    let with_vfio = all.iter().filter(|device| device.is_with_vfio()).count();
    let shared = host.shared_groups();
    let alone = all
        .iter()
        .filter(|device| device.group.is_some_and(|group| !shared.contains(&group)));
    let text = format!(
        "{} besides bridges: {} alone in their groups, {with_vfio} with VFIO",
        all.len(),
        alone.count(),
    );
    Finding::new(Level::Fine, TOPIC, text).remedy(Remedy::command(
        "which they are",
        Command::new(["busway", "device", "list"]),
    ))
}
