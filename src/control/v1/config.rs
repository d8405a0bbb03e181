//! A VM's configuration in Cloud Hypervisor's words (its OpenAPI description, `VmConfig`): with defaults
//! filled in, and without what is unset.

use std::fs;

use serde::Serialize;

use super::generic::Generic;
use super::numa::{Node, Zone};
use super::pmem::Pmem;
use crate::arch::boot::default_cmdline;
use crate::config::{
    Accepted, BesideDevices, BucketConfig, Choice, ConsoleConfig, CpusConfig, DeviceConfig,
    DiskConfig, FsConfig, HotplugMethod, ImageType, LandlockRule, NetConfig, Placing,
    PlatformConfig, QueueAffinity, RateLimiterConfig, Topology, VcpuAffinity, VhostMode, VmConfig,
};
use crate::machine::Info;
use crate::sandbox::landlock;

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

#[derive(Clone, Debug, Serialize)]
struct Disk {
    #[serde(skip_serializing_if = "String::is_empty")]
    path: String,
    readonly: bool,
    direct: bool,
    iommu: bool,
    num_queues: u16,
    queue_size: u16,
    vhost_user: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    vhost_socket: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter_config: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    queue_affinity: Vec<QueueAffinity>,
    backing_files: bool,
    image_type: &'static str,
}

#[derive(Clone, Debug, Serialize)]
struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<TokenBucket>,
}

#[derive(Clone, Debug, Serialize)]
struct TokenBucket {
    size: u64,
    one_time_burst: u64,
    refill_time: u64,
}

#[derive(Clone, Debug, Serialize)]
struct Net {
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    /// Busway gives a tap no address; some clients do not read a NIC without one.
    ip: &'static str,
    mask: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    iommu: bool,
    num_queues: u16,
    queue_size: u16,
    vhost_user: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    vhost_socket: Option<String>,
    vhost_mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u16>,
    /// Beside Cloud Hypervisor's: whether the host's kernel serves it, where that was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhost: Option<bool>,
    /// Beside Cloud Hypervisor's: what the guest sends from another address is dropped.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    spoofchk: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

#[derive(Clone, Debug, Serialize)]
struct Fs {
    tag: String,
    socket: String,
    num_queues: u16,
    queue_size: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

#[derive(Clone, Debug, Serialize)]
struct Vsock {
    cid: u32,
    /// Empty where the host's kernel has the sockets. Some clients do not read a device without one.
    socket: String,
    iommu: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
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
struct Device {
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fd: Option<u32>,
    iommu: bool,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_nv_gpudirect_clique: Option<u8>,
    /// Beside Cloud Hypervisor's.
    #[serde(skip_serializing_if = "Option::is_none")]
    root_port: Option<bool>,
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
            vsock: config.vsock.as_ref().map(|vsock| Vsock {
                cid: vsock.cid,
                socket: vsock.socket.as_deref().map(text).unwrap_or_default(),
                iommu: false,
                id: vsock.id.clone(),
                pci_segment: vsock.pci_segment,
                pci_device_id: vsock.pci_device_id,
            }),
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

/// With what came of it: a pseudo-terminal's name is known when it is made.
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
        Self {
            size: memory.at_start(),
            mergeable: false,
            hotplug_method: memory.hotplug_method,
            hotplug_size: memory.hotplug_size,
            hotplugged_size: memory.hotplugged_size.filter(|_| memory.comes_by_virtio()),
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

impl From<&DiskConfig> for Disk {
    fn from(disk: &DiskConfig) -> Self {
        Self {
            path: text(&disk.path),
            readonly: disk.readonly,
            direct: disk.direct,
            iommu: false,
            num_queues: disk.num_queues,
            queue_size: disk.queue_size,
            vhost_user: disk.vhost_user,
            vhost_socket: disk.socket.as_deref().map(text),
            pci_segment: disk.pci_segment,
            pci_device_id: disk.pci_device_id,
            id: disk.id.clone(),
            serial: disk.serial.clone(),
            rate_limiter_config: disk.rate_limiter().map(Into::into),
            queue_affinity: disk.queue_affinity.clone(),
            backing_files: disk.backing_files,
            image_type: match disk.image_type {
                ImageType::Raw => "Raw",
                ImageType::Qcow2 => "Qcow2",
            },
        }
    }
}

impl From<RateLimiterConfig> for RateLimiter {
    fn from(config: RateLimiterConfig) -> Self {
        Self {
            bandwidth: config.bandwidth.map(Into::into),
            ops: config.ops.map(Into::into),
        }
    }
}

impl From<BucketConfig> for TokenBucket {
    fn from(config: BucketConfig) -> Self {
        Self {
            size: config.size,
            one_time_burst: config.one_time_burst,
            refill_time: config.refill_time,
        }
    }
}

impl From<&NetConfig> for Net {
    fn from(net: &NetConfig) -> Self {
        Self {
            tap: net.tap.clone(),
            ip: "0.0.0.0",
            mask: "0.0.0.0",
            mac: net.mac.map(|mac| mac.to_string()),
            iommu: false,
            num_queues: net.num_queues,
            queue_size: net.queue_size,
            vhost_user: net.vhost_user,
            vhost_socket: net.socket.as_deref().map(text),
            vhost_mode: match net.vhost_mode {
                VhostMode::Client => "Client",
                VhostMode::Server => "Server",
            },
            mtu: net.mtu,
            vhost: known(net.vhost),
            spoofchk: net.spoofchk,
            id: net.id.clone(),
            pci_segment: net.pci_segment,
            pci_device_id: net.pci_device_id,
        }
    }
}

impl From<&FsConfig> for Fs {
    fn from(fs: &FsConfig) -> Self {
        Self {
            tag: fs.tag.clone(),
            socket: text(&fs.socket),
            num_queues: fs.num_queues,
            queue_size: fs.queue_size,
            id: fs.id.clone(),
            pci_segment: fs.pci_segment,
            pci_device_id: fs.pci_device_id,
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

impl From<&DeviceConfig> for Device {
    fn from(device: &DeviceConfig) -> Self {
        let path = Some(text(&device.path)).filter(|path| !path.is_empty());
        Self {
            path,
            fd: device.fd,
            iommu: false,
            pci_segment: device.pci_segment,
            pci_device_id: device.pci_device_id,
            id: device.id.clone(),
            x_nv_gpudirect_clique: device.x_nv_gpudirect_clique,
            root_port: device.root_port,
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
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn shown(config: &VmConfig) -> Value {
        serde_json::to_value(Config::from(config)).unwrap()
    }

    #[test]
    fn defaults_are_filled_in_and_what_is_unset_is_left_out() {
        let mut config = shown(&VmConfig::default());
        let bits = config["cpus"]["max_phys_bits"].take();
        assert!((32..=64).contains(&bits.as_u64().unwrap()), "{bits}");
        let expected = json!({
            "cpus": {
                "boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": false, "max_phys_bits": null,
                "nested": true,
            },
            "memory": {
                "size": 512 << 20, "mergeable": false, "hotplug_method": "Acpi", "shared": false,
                "hugepages": false, "prefault": false, "thp": true,
            },
            "payload": { "cmdline": "" },
            "rng": { "src": "/dev/urandom", "iommu": false },
            "serial": { "mode": "Off", "iommu": false },
            "console": { "mode": "Off", "iommu": false },
            "platform": { "num_pci_segments": 1, "removal_timeout_s": 30, "power_off_timeout_s": 20 },
            "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
        });
        assert_eq!(config, expected);
    }

    #[test]
    fn what_was_given_is_shown_in_cloud_hypervisors_words() {
        let mut device = DeviceConfig::new("01:00.0").unwrap();
        device.id = Some("drive".into());
        let config = VmConfig {
            kernel: Some("/boot/vmlinuz".into()),
            cmdline: Some("quiet".into()),
            cpus: CpusConfig {
                boot: 2,
                ..CpusConfig::default()
            },
            disk: vec![DiskConfig {
                readonly: true,
                id: Some("root/1".into()),
                serial: Some("S1".into()),
                bw_size: Some(1 << 20),
                bw_refill_time: Some(100),
                queue_affinity: vec![QueueAffinity {
                    queue_index: 0,
                    host_cpus: vec![1, 2],
                }],
                ..DiskConfig::new("a.raw")
            }],
            net: vec![NetConfig {
                tap: Some("vmtap0".into()),
                mac: Some("52:54:00:12:34:56".parse().unwrap()),
                ..NetConfig::default()
            }],
            tpm: Some(crate::config::TpmConfig {
                socket: "/run/swtpm".into(),
            }),
            serial: ConsoleConfig::file("/tmp/log"),
            console: ConsoleConfig::Socket("/tmp/socket".into()),
            device: vec![device],
            platform: PlatformConfig {
                iommufd: Choice::On,
                p2p: Choice::Off,
                // A secret that devices' users share is shown to nobody.
                vf_token: Some("2ab74924-c335-45f4-9b16-8569e5b08258".into()),
                ..PlatformConfig::default()
            },
            ..VmConfig::default()
        };
        let shown = shown(&config);
        for (pointer, value) in [
            ("/cpus/boot_vcpus", json!(2)),
            ("/cpus/max_vcpus", json!(2)),
            // A device's DMA needs it.
            ("/memory/prefault", json!(true)),
            ("/payload/kernel", json!("/boot/vmlinuz")),
            ("/payload/cmdline", json!("quiet")),
            ("/disks/0/path", json!("a.raw")),
            ("/disks/0/readonly", json!(true)),
            ("/disks/0/id", json!("root/1")),
            ("/disks/0/num_queues", json!(1)),
            ("/disks/0/queue_size", json!(128)),
            ("/disks/0/serial", json!("S1")),
            ("/disks/0/image_type", json!("Raw")),
            (
                "/disks/0/rate_limiter_config",
                json!({"bandwidth": {"size": 1 << 20, "one_time_burst": 0, "refill_time": 100}}),
            ),
            (
                "/disks/0/queue_affinity",
                json!([{"queue_index": 0, "host_cpus": [1, 2]}]),
            ),
            ("/net/0/tap", json!("vmtap0")),
            ("/net/0/mac", json!("52:54:00:12:34:56")),
            ("/net/0/num_queues", json!(2)),
            ("/tpm", json!({"socket": "/run/swtpm"})),
            ("/serial/mode", json!("File")),
            ("/serial/file", json!("/tmp/log")),
            ("/console/mode", json!("Socket")),
            ("/console/socket", json!("/tmp/socket")),
            (
                "/devices/0/path",
                json!("/sys/bus/pci/devices/0000:01:00.0"),
            ),
            ("/devices/0/id", json!("drive")),
            ("/platform/iommufd", json!(true)),
            ("/platform/vfio_p2p_dma", json!(false)),
        ] {
            assert_eq!(shown.pointer(pointer), Some(&value), "{pointer}");
        }
        assert!(!shown.to_string().contains("2ab74924"));
    }
}
