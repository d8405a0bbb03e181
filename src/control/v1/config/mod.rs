//! A VM's configuration in Cloud Hypervisor's words (its OpenAPI description, `VmConfig`): with defaults
//! filled in, and without what is unset.

mod devices;

use std::fs;

use serde::Serialize;

use super::generic::Generic;
use super::numa::{Node, Zone};
use super::pmem::Pmem;
use crate::arch::boot::default_cmdline;
use crate::config::{
    Accepted, BesideDevices, Choice, ConsoleConfig, CoreScheduling, CpusConfig, HotplugMethod,
    LandlockRule, Placing, PlatformConfig, Topology, VcpuAffinity, VmConfig,
};
use crate::machine::Info;
use crate::sandbox::landlock;
use devices::{Device, Disk, Fs, Net, Vsock};

/// The width of a physical address where the host does not say, in bits.
const PHYSICAL_BITS: u8 = 46;

/// `VmConfig`
#[derive(Clone, Debug, Serialize)]
pub(super) struct Config {
    cpus: Cpus,
    memory: Memory,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    numa: Vec<Node>,
    /// Beside Cloud Hypervisor's, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<Placing>,
    payload: Payload,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<Disk>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<Net>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fs: Vec<Fs>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pmem: Vec<Pmem>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    generic_vhost_user: Vec<Generic>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vsock: Option<Vsock>,
    #[serde(skip_serializing_if = "Option::is_none")]
    balloon: Option<Balloon>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tpm: Option<Tpm>,
    rng: Rng,
    serial: Console,
    console: Console,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<Device>,
    platform: Platform,
    iommu: bool,
    watchdog: bool,
    pvpanic: bool,
    landlock_enable: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    landlock_rules: Vec<LandlockRule>,
}

#[derive(Clone, Debug, Serialize)]
struct Cpus {
    boot_vcpus: u8,
    max_vcpus: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    topology: Option<Topology>,
    kvm_hyperv: bool,
    max_phys_bits: u8,
    nested: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    affinity: Vec<VcpuAffinity>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dedicated: bool,
    core_scheduling: CoreScheduling,
}

#[derive(Clone, Debug, Serialize)]
struct Memory {
    size: u64,
    mergeable: bool,
    hotplug_method: HotplugMethod,
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplug_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplugged_size: Option<u64>,
    shared: bool,
    hugepages: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugepage_size: Option<u64>,
    prefault: bool,
    thp: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    zones: Vec<Zone>,
}

#[derive(Clone, Debug, Serialize)]
struct Tpm {
    socket: String,
}

#[derive(Clone, Debug, Serialize)]
struct Payload {
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    firmware: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initramfs: Option<String>,
    cmdline: String,
}

/// `BalloonConfig`
#[derive(Clone, Debug, Serialize)]
struct Balloon {
    size: u64,
    deflate_on_oom: bool,
    free_page_reporting: bool,
    /// Beside Cloud Hypervisor's: what becomes of it beside assigned devices, where that was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    vfio: Option<BesideDevices>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
struct Rng {
    src: String,
    iommu: bool,
}

/// `ConsoleConfig`
#[derive(Clone, Debug, Serialize)]
struct Console {
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<String>,
    iommu: bool,
}

#[derive(Clone, Debug, Serialize)]
struct Platform {
    num_pci_segments: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial_number: Option<String>,
    /// Under both names that Cloud Hypervisor has had for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_uuid: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    oem_strings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iommufd: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vfio_p2p_dma: Option<bool>,
    /// Beside Cloud Hypervisor's: devices are behind root ports, or on bus 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    root_ports: Option<bool>,
    /// Beside Cloud Hypervisor's: the seconds that the guest has to release a device.
    removal_timeout_s: u64,
    power_off_timeout_s: u64,
}

impl From<&VmConfig> for Config {
    fn from(config: &VmConfig) -> Self {
        let none = Accepted::default();
        let accepted = config.accepted.as_deref().unwrap_or(&none);
        Self {
            cpus: Cpus::of(&config.cpus, accepted),
            memory: Memory::of(config),
            numa: config.numa.iter().map(Into::into).collect(),
            place: Some(config.place).filter(|place| *place != Placing::Off),
            payload: Payload::of(config),
            disks: config.disk.iter().map(Into::into).collect(),
            net: config.net.iter().map(Into::into).collect(),
            fs: config.fs.iter().map(Into::into).collect(),
            pmem: config.pmem.iter().map(Into::into).collect(),
            generic_vhost_user: config.generic.iter().map(Into::into).collect(),
            vsock: config.vsock.as_ref().map(Into::into),
            balloon: config.balloon.as_ref().map(|balloon| Balloon {
                size: balloon.size,
                deflate_on_oom: balloon.deflate_on_oom,
                free_page_reporting: balloon.free_page_reporting,
                vfio: Some(balloon.vfio).filter(|vfio| *vfio != BesideDevices::Keep),
                block: balloon.block,
            }),
            tpm: config.tpm.as_ref().map(|tpm| Tpm {
                socket: text(&tpm.socket),
            }),
            rng: Rng {
                src: text(&config.rng.src),
                iommu: false,
            },
            serial: (&config.serial).into(),
            console: (&config.console).into(),
            devices: config.device.iter().map(Into::into).collect(),
            platform: Platform::of(&config.platform),
            iommu: false,
            watchdog: config.watchdog,
            pvpanic: config.pvpanic,
            landlock_enable: landlock::applies(config.landlock),
            landlock_rules: config.landlock_rules.clone(),
        }
    }
}

/// With what came of it: a pseudo-terminal's name is known when it is made, and how large a zone is while the guest runs.
impl From<&Info> for Config {
    fn from(info: &Info) -> Self {
        let mut config = Self::from(&info.config);
        let terminal = |path: &Option<std::path::PathBuf>| path.as_deref().map(text);
        for (console, at) in [
            (&mut config.serial, terminal(&info.serial)),
            (&mut config.console, terminal(&info.console)),
        ] {
            console.file = at.or(console.file.take());
        }
        for zone in &mut config.memory.zones {
            zone.has(&info.zones);
        }
        config
    }
}

/// A path as text, for JSON holds no other bytes.
fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

impl Cpus {
    fn of(cpus: &CpusConfig, accepted: &Accepted) -> Self {
        let bits = || physical_bits().unwrap_or(PHYSICAL_BITS);
        Self {
            boot_vcpus: cpus.boot,
            max_vcpus: cpus.most(),
            topology: cpus.topology,
            kvm_hyperv: false,
            max_phys_bits: accepted.max_phys_bits.unwrap_or_else(bits),
            nested: cpus.nested,
            affinity: cpus.affinity.clone(),
            dedicated: cpus.dedicated,
            core_scheduling: cpus.core_scheduling.unwrap_or(CoreScheduling::Vm),
        }
    }
}

/// Of `address sizes   : 46 bits physical, 48 bits virtual`. proc_cpuinfo(5)
fn physical_bits() -> Option<u8> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let sizes = text
        .lines()
        .find_map(|line| line.strip_prefix("address sizes"))?;
    let (_, value) = sizes.split_once(':')?;
    value.split_whitespace().next()?.parse().ok()
}

impl Memory {
    fn of(config: &VmConfig) -> Self {
        let (memory, has_devices) = (&config.memory, !config.device.is_empty());
        let (shared, prefault) = (
            config.shares_memory(),
            memory.prefault.unwrap_or(has_devices),
        );
        let zones = config.memory_zone.iter();
        // Zones are as large together as RAM is said to be; what comes beside them is beside both.
        let has_zones = !config.memory_zone.is_empty();
        Self {
            size: match has_zones {
                true => memory.size,
                false => memory.at_start(),
            },
            mergeable: false,
            hotplug_method: memory.hotplug_method,
            hotplug_size: memory.hotplug_size,
            hotplugged_size: memory
                .hotplugged_size
                .filter(|_| memory.comes_by_virtio() || has_zones),
            shared,
            hugepages: memory.hugepages,
            hugepage_size: memory.hugepage_size,
            prefault,
            thp: memory.thp,
            zones: zones.map(|zone| Zone::of(zone, shared, prefault)).collect(),
        }
    }
}

impl Payload {
    fn of(config: &VmConfig) -> Self {
        let default = || default_cmdline(&config.serial, &config.console).to_owned();
        Self {
            kernel: config.kernel.as_deref().map(text),
            firmware: config
                .firmware
                .as_ref()
                .and_then(|firmware| firmware.path.as_deref())
                .map(text),
            initramfs: config.initramfs.as_deref().map(text),
            cmdline: config.cmdline.clone().unwrap_or_else(default),
        }
    }
}

impl From<&ConsoleConfig> for Console {
    fn from(console: &ConsoleConfig) -> Self {
        let (mode, file, socket) = match console {
            ConsoleConfig::Off => ("Off", None, None),
            ConsoleConfig::Null => ("Null", None, None),
            ConsoleConfig::Tty => ("Tty", None, None),
            ConsoleConfig::Pty => ("Pty", None, None),
            ConsoleConfig::File { path, .. } => ("File", Some(text(path)), None),
            ConsoleConfig::Socket(path) => ("Socket", None, Some(text(path))),
        };
        Self {
            mode,
            file,
            socket,
            iommu: false,
        }
    }
}

/// What depends on the host is not known beforehand.
const fn known(choice: Choice) -> Option<bool> {
    match choice {
        Choice::On => Some(true),
        Choice::Off => Some(false),
        Choice::Auto => None,
    }
}

impl Platform {
    fn of(platform: &PlatformConfig) -> Self {
        Self {
            num_pci_segments: platform.segments(),
            serial_number: platform.serial_number.clone(),
            uuid: platform.uuid.clone(),
            system_uuid: platform.uuid.clone(),
            oem_strings: platform.oem_strings.clone(),
            iommufd: known(platform.iommufd),
            vfio_p2p_dma: known(platform.p2p),
            root_ports: platform.root_ports,
            removal_timeout_s: platform.removal_limit().as_secs(),
            power_off_timeout_s: platform.power_off_limit().as_secs(),
        }
    }
}

#[cfg(test)]
mod tests;
