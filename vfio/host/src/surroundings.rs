//! What a host must have for any device to be passed through: its IOMMU, interrupt remapping, VFIO's
//! modules and nodes, and the limits of whoever asks.

use std::io;
use std::path::Path;

use busway_iommu::{Command, IommuAdvice, Obstacle, ParameterChange, Remapping};

use super::asker::Asker;
use super::boot::Loader;
use super::finding::{Finding, Level, Remedy};
use super::modules::{Availability, availability};
use super::root::{self, SysRoot};

/// Opens a node to see whether it can be, and closes it.
pub type Opens<'a> = &'a dyn Fn(&Path) -> io::Result<()>;

/// Opens a node for reading and writing.
///
/// # Errors
///
/// The kernel's answer.
pub fn open_node(path: &Path) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).open(path).map(drop)
}

/// The IOMMU as a whole.
pub(super) fn iommu(root: &SysRoot) -> Finding {
    if !root.has_iommu() {
        let advice = IommuAdvice::read(root);
        let groups = root.sys.join("kernel/iommu_groups");
        let text = match root::names(&groups).is_empty() {
            true => "the host's IOMMU is not in use",
            false => {
                "the host's IOMMU is not in use: VFIO lends devices without one, which serves programs \
                 such as DPDK, and no guest"
            }
        };
        return Finding::new(Level::Obstacle, "iommu", text).remedies(advised(root, advice));
    }
    let units = root::names(&root.sys.join("class/iommu"));
    let kind = match units.first() {
        Some(name) if name.starts_with("dmar") => "Intel VT-d",
        Some(name) if name.starts_with("ivhd") => "AMD-Vi",
        Some(name) if name.starts_with("smmu") => "Arm SMMU",
        _ => "an IOMMU",
    };
    let groups = root::names(&root.sys.join("kernel/iommu_groups")).len();
    let count = match units.len() {
        1 => "1 unit".to_owned(),
        count => format!("{count} units"),
    };
    let mut text = format!("{kind} is on: {count}, {groups} groups");
    if let Some(bits) = address_bits(root, &units) {
        text += &format!(", {bits}-bit addresses");
    }
    Finding::new(Level::Fine, "iommu", text)
}

/// The fewest address bits of any of Intel's units: the field MGAW of its capability register (VT-d
/// specification 4.1 §11.4.2).
fn address_bits(root: &SysRoot, units: &[String]) -> Option<u64> {
    let one = |name: &String| {
        let path = root.sys.join("class/iommu").join(name);
        let text = root::text(&path.join("intel-iommu/cap"))?;
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        let register = u64::from_str_radix(digits, 16).ok()?;
        Some((register >> 16 & 0x3f) + 1)
    };
    units.iter().filter_map(one).min()
}

/// What an advice comes to, as remedies.
pub(super) fn advised(root: &SysRoot, advice: IommuAdvice) -> Vec<Remedy> {
    let mut remedies = vec![Remedy::words(advice.to_string())];
    match advice.parameter() {
        Some(ParameterChange::Add(word)) => remedies.extend(Loader::read(root).add(word)),
        Some(ParameterChange::Remove(word)) => remedies.push(Loader::read(root).remove(root, word)),
        None => {}
    }
    remedies
}

/// The chipsets on which the kernel leaves interrupt remapping off, for it does not work there
/// (arch/x86/kernel/early-quirks.c, intel_remapping_check; Intel 5520 specification update, erratum 47).
const BROKEN_REMAPPING: [&str; 3] = ["0x3403", "0x3405", "0x3406"];

/// Whether a device can forge another's interrupts.
pub(super) fn remapping(root: &SysRoot) -> Option<Finding> {
    const TOPIC: &str = "remapping";
    if !root.has_iommu() {
        return None;
    }
    match Remapping::read(root) {
        Remapping::On => {
            return Some(Finding::new(Level::Fine, TOPIC, "interrupts are remapped"));
        }
        Remapping::Unknown => return None,
        Remapping::Off => {}
    }
    let modules = ["vfio_iommu_type1", "iommufd"];
    if modules
        .iter()
        .any(|module| Remapping::is_waived(root, module))
    {
        let text = "interrupts are not remapped, and devices are lent all the same \
                    (allow_unsafe_interrupts): a guest can forge any interrupt of the host";
        return Some(Finding::new(Level::Warning, TOPIC, text));
    }
    let text = "interrupts are not remapped, and the kernel lends no device that could forge them";
    let mut finding = Finding::new(Level::Obstacle, TOPIC, text);
    let host_bridge = root::text(&root.sys.join("bus/pci/devices/0000:00:00.0/device"));
    if host_bridge.is_some_and(|id| BROKEN_REMAPPING.contains(&id.as_str())) {
        finding.text += "; this chipset (Intel 5500, 5520 or X58) cannot remap them";
    } else {
        let parameters = root::text(&root.proc.join("cmdline")).unwrap_or_default();
        let switch = ["intremap=off", "nointremap"];
        let switch = switch
            .into_iter()
            .find(|word| parameters.split(' ').any(|w| w == *word));
        finding = finding.remedy(match switch {
            Some(word) => Loader::read(root).remove(root, word),
            None => {
                Remedy::words("turn interrupt remapping (or x2APIC) on in the firmware's set-up")
            }
        });
    }
    let module = match root.dev.join("vfio/vfio").exists() || !root.dev.join("iommu").exists() {
        true => "vfio_iommu_type1",
        false => "iommufd",
    };
    Some(finding.remedy(Remedy::command(
        "where every guest is trusted",
        Command::write(
            "Y",
            format!("/sys/module/{module}/parameters/allow_unsafe_interrupts"),
        ),
    )))
}

/// VFIO's modules: the driver that takes devices, and what maps memory for them.
pub(super) fn modules(root: &SysRoot) -> Vec<Finding> {
    let mut findings = Vec::new();
    let loaded = root.driver("vfio-pci").exists();
    let driver = if loaded {
        Availability::There
    } else {
        availability(root, "vfio_pci")
    };
    findings.push(module(
        root,
        "vfio-pci",
        "CONFIG_VFIO_PCI",
        driver,
        "lends devices to user space",
    ));
    let (legacy, iommufd) = (root.dev.join("vfio/vfio"), root.dev.join("iommu"));
    let type1 = availability(root, "vfio_iommu_type1");
    let text = match (legacy.exists(), iommufd.exists()) {
        (_, true) => "iommufd (/dev/iommu) is there, and VFIO's nodes for single devices with it",
        (true, false) if type1 != Availability::Missing => {
            "VFIO containers (/dev/vfio/vfio); this kernel has no iommufd, which is not needed"
        }
        _ => {
            findings.push(module(
                root,
                "vfio_iommu_type1",
                "CONFIG_VFIO_IOMMU_TYPE1",
                type1,
                "maps guests' memory for devices",
            ));
            return findings;
        }
    };
    findings.push(Finding::new(Level::Fine, "dma", text));
    findings
}

fn release(root: &SysRoot) -> String {
    root::text(&root.proc.join("sys/kernel/osrelease")).unwrap_or_else(|| "generic".to_owned())
}

fn module(root: &SysRoot, name: &str, option: &str, is: Availability, does: &str) -> Finding {
    let topic = "modules";
    match is {
        Availability::There => Finding::new(
            Level::Fine,
            topic,
            format!("{name}, which {does}, is loaded"),
        ),
        Availability::Loadable => {
            let text = format!("{name}, which {does}, is not loaded yet");
            let remedy = Remedy::command(
                "busway device bind loads it; by hand",
                Command::new(["modprobe"]).operand(name),
            );
            Finding::new(Level::Note, topic, text).remedy(remedy)
        }
        Availability::Missing => {
            let text = format!("this kernel has no module {name}, which {does}");
            let finding = Finding::new(Level::Obstacle, topic, text);
            finding.remedies([
                Remedy::command(
                    "on Ubuntu it is in a package of its own",
                    Command::new(["apt-get", "install"])
                        .setting("linux-modules-extra-", release(root)),
                ),
                Remedy::words(format!("or boot a kernel that was built with {option}")),
            ])
        }
        Availability::Unknown => {
            let text = format!("{name}, which {does}, is not loaded");
            Finding::new(Level::Note, topic, text).remedy(Remedy::command(
                "load it",
                Command::new(["modprobe"]).operand(name),
            ))
        }
    }
}

/// Whether a node can be used, where it is there.
pub(super) fn node(
    root: &SysRoot,
    asker: &Asker,
    below: &str,
    opens: Opens<'_>,
) -> Option<Finding> {
    const TOPIC: &str = "nodes";
    let path = root.dev.join(below);
    if !path.exists() {
        return None;
    }
    let shown = format!("/dev/{below}");
    if !asker.may_use(&path) {
        let text = format!("user {} may not use {shown}", asker.user);
        let finding = Finding::new(Level::Obstacle, TOPIC, text);
        let remedy = match below {
            // Made by udev for a group of users.
            "kvm" => Remedy::command(
                "join its group, and log in again",
                Command::new(["usermod", "--append", "--groups", "kvm"])
                    .printed(Command::new(["id", "-un"]).operand(asker.user.to_string())),
            ),
            _ => Remedy::command(
                "as root, give it away",
                Command::new(["chown"])
                    .operand(asker.user.to_string())
                    .operand(&shown),
            ),
        };
        return Some(finding.remedy(remedy));
    }
    let error = opens(&path).err()?;
    match Obstacle::opening(root, &path, error) {
        Obstacle::DeviceCgroup { major, minor, .. } => {
            let text =
                format!("the device cgroup forbids {shown} (character device {major}:{minor})");
            let finding = Finding::new(Level::Obstacle, TOPIC, text);
            Some(finding.remedies([
                Remedy::words(format!(
                    "in a container of Docker or Podman: --device {shown}"
                )),
                Remedy::words(format!("in a systemd unit: DeviceAllow={shown} rw")),
            ]))
        }
        // Who has it is told elsewhere.
        Obstacle::Busy { .. } => None,
        other => Some(Finding::new(
            Level::Obstacle,
            TOPIC,
            format!("{shown} cannot be opened: {other}"),
        )),
    }
}

/// What is not seen of other users' processes, where that is so.
pub(super) fn processes(asker: &Asker) -> Option<Finding> {
    if asker.may_see_files() {
        return None;
    }
    let text = "what other users' programs have open cannot be seen: a device may be in use though \
                no program is named";
    let remedy = Remedy::words("look again as root");
    Some(Finding::new(Level::Note, "processes", text).remedy(remedy))
}

/// Whether a guest's memory may be pinned.
pub(super) fn memlock(asker: &Asker, need: u64) -> Finding {
    const TOPIC: &str = "memlock";
    let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
    match asker.may_lock() {
        Some(limit) if limit < need => Finding::new(
            Level::Obstacle,
            TOPIC,
            format!(
                "a guest of {} needs as much locked memory, and the limit is {}",
                mib(need),
                mib(limit)
            ),
        )
        .remedies(match &asker.service {
            Some(unit) => vec![lock_in_service(unit)],
            None => vec![
                Remedy::command(
                    "as root, for this shell",
                    Command::new(["prlimit", "--memlock=unlimited", "--pid"]).shell_process(),
                ),
                // limits.conf(5): a user by number stands behind a colon.
                Remedy::command(
                    "as root, for good",
                    Command::append(
                        format!(":{} - memlock unlimited", asker.user),
                        "/etc/security/limits.d/vfio.conf",
                    ),
                ),
            ],
        }),
        Some(limit) => Finding::new(
            Level::Fine,
            TOPIC,
            format!("{} of memory may be locked", mib(limit)),
        ),
        None => Finding::new(Level::Fine, TOPIC, "any amount of memory may be locked"),
    }
}

/// How a service is let lock memory, which no limits of users' sessions do (systemd.exec(5),
/// LimitMEMLOCK=).
fn lock_in_service(unit: &str) -> Remedy {
    let folder = Path::new("/etc/systemd/system").join(format!("{unit}.d"));
    let command = Command::new(["mkdir", "-p"])
        .operand(&folder)
        .then(Command::write_lines(
            ["[Service]", "LimitMEMLOCK=infinity"],
            folder.join("memlock.conf"),
        ))
        .then(Command::new(["systemctl", "daemon-reload"]));
    // A user's manager has all of their services and sessions, and ends none of them for this.
    if unit.starts_with("user@") {
        let what = "as root, for the services of this user; then have them log out everywhere, and in again";
        return Remedy::command(what, command);
    }
    let restart = Command::new(["systemctl", "restart"]);
    let command = command.then(restart.end_of_options().operand(unit));
    let what = "as root, for the service that this runs in, which is started again";
    Remedy::command(what, command)
}

/// Whether the kernel is locked down, and what that means here.
pub(super) fn lockdown(root: &SysRoot) -> Option<Finding> {
    let text = root::text(&root.sys.join("kernel/security/lockdown"))?;
    let mode = text.split_once('[')?.1.split_once(']')?.0;
    if mode == "none" {
        return None;
    }
    let text = format!(
        "the kernel is locked down ({mode}): it loads only signed modules; VFIO works all the same"
    );
    Some(Finding::new(Level::Note, "lockdown", text))
}
