//! What a VM is made of, as the command line and `--config vm.toml` say it in the same words.
//!
//! The field names are the words of the flags; see `docs/design.md`. What a single value must be is
//! checked where it is read (`cli`); what values must be together, by [`VmConfig::validate`]; what the
//! host must have for them, by those who open it.

mod accepted;
mod balloon;
mod cpus;
mod disk;
mod fs;
mod generic;
mod landlock;
mod limits;
mod memory;
mod net;
mod numa;
mod place;
mod placing;
mod pluggable;
mod pmem;
mod tpm;
mod validate;
mod virtio;
mod vsock;
mod zones;

use std::path::{Path, PathBuf};
use std::time::Duration;

use busway_pci::Reserve;
use busway_vfio::{HostName, ParseHostNameError};
use serde::{Deserialize, Serialize};

pub use accepted::Accepted;
pub use balloon::{BALLOON_BLOCKS, BalloonConfig, BesideDevices};
pub use cpus::{CoreScheduling, CpusConfig, Topology, TopologyError, VcpuAffinity};
pub use disk::{BucketConfig, DiskConfig, ImageType, QueueAffinity, RateLimiterConfig};
pub use fs::FsConfig;
pub use generic::GenericConfig;
pub use landlock::{LandlockAccess, LandlockRule};
use limits::MAX_HOTPLUG_SLOTS;
pub use limits::{
    CONSOLE_FILE_SIZE, DEFAULT_POWER_OFF_TIMEOUT, DEFAULT_REMOVAL_TIMEOUT, DISK_QUEUE_SIZES,
    FS_QUEUE_SIZES, MAX_CPUS, MAX_POWER_OFF_TIMEOUT, MAX_QUEUES, MAX_REMOVAL_TIMEOUT, MEMORY_STEP,
    MIN_CONSOLE_FILE_SIZE, MIN_MEMORY, NET_QUEUE_SIZES,
};
pub use memory::{HotplugMethod, InvalidHotplug, MOST_BLOCKS, MemoryConfig};
pub use net::{NetConfig, VhostMode};
pub use numa::{
    DEFAULT_ZONE, InvalidNuma, LOCAL_DISTANCE, MAX_NUMA_NODES, NumaConfig, NumaDistance,
    REMOTE_DISTANCE,
};
pub use place::{InvalidPlace, MAX_SEGMENTS, PciPlace};
pub use placing::Placing;
pub use pluggable::{MemoryToPlan, NoZoneError, PluggableConfig, ZoneSizeError};
pub use pmem::{PMEM_ALIGNMENT, PmemConfig};
pub use tpm::TpmConfig;
pub use validate::{InvalidConfig, InvalidVirtio};
pub(crate) use validate::{is_removal_timeout, validate_functions};
pub use virtio::VirtioConfig;
pub use vsock::VsockConfig;
pub use zones::{InvalidZone, MAX_HOST_NODES, MemoryZoneConfig};

/// Where Linux shows PCI functions by address.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// The folder in sysfs of mediated devices.
const MEDIATED_DEVICES: &str = "/sys/bus/mdev/devices";

/// A whole VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Kernel: a bzImage, or an ELF with a PVH entry.
    pub kernel: Option<PathBuf>,
    /// UEFI firmware, which boots from a disk or starts the kernel.
    pub firmware: Option<FirmwareConfig>,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line; where it is absent,
    /// [`default_cmdline`](crate::arch::boot::default_cmdline)'s.
    pub cmdline: Option<String>,
    /// Processors.
    pub cpus: CpusConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// What RAM is made of, in the order of the guest's addresses; where there is none it is all of one kind.
    #[serde(rename = "memory-zone")]
    pub memory_zone: Vec<MemoryZoneConfig>,
    /// The guest's NUMA nodes.
    pub numa: Vec<NumaConfig>,
    /// Whether RAM and vCPUs are placed by where the devices are.
    pub place: Placing,
    /// Virtio disks.
    pub disk: Vec<DiskConfig>,
    /// Virtio NICs.
    pub net: Vec<NetConfig>,
    /// Shared folders.
    pub fs: Vec<FsConfig>,
    /// Persistent memory.
    pub pmem: Vec<PmemConfig>,
    /// Devices of any kind that other processes serve.
    #[serde(rename = "generic-vhost-user")]
    pub generic: Vec<GenericConfig>,
    /// Virtio sockets between host and guest.
    pub vsock: Option<VsockConfig>,
    /// Virtio balloon.
    pub balloon: Option<BalloonConfig>,
    /// A watchdog, which resets a guest that does not feed it.
    pub watchdog: bool,
    /// A device by which the guest tells that it has panicked.
    pub pvpanic: bool,
    /// A TPM 2.0.
    pub tpm: Option<TpmConfig>,
    /// Virtio entropy device.
    pub rng: RngConfig,
    /// 16550 serial port.
    pub serial: ConsoleConfig,
    /// Virtio console.
    pub console: ConsoleConfig,
    /// Host PCI devices given to the guest.
    pub device: Vec<DeviceConfig>,
    /// How the platform is built.
    pub platform: PlatformConfig,
    /// Landlock bounds the process to the files that this names; `Auto` where the kernel has it.
    pub landlock: Choice,
    /// What may be opened beside them.
    #[serde(rename = "landlock-rules")]
    pub landlock_rules: Vec<LandlockRule>,
    /// The process is in namespaces of its own, in which there is what this names.
    pub jail: bool,
    /// Whose rights the process has: `UID[:GID]` or `NAME[:GROUP]`.
    pub user: Option<String>,
    /// What was said of it that changes nothing yet. It has no words of its own.
    #[serde(skip)]
    pub accepted: Option<Box<Accepted>>,
}

/// `--firmware`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FirmwareConfig {
    /// Its file; where it is absent, what the host's distribution has installed.
    pub path: Option<PathBuf>,
    /// The file that its variables are kept in; where it is absent, they last as long as the VM.
    pub vars: Option<PathBuf>,
}

/// `--rng`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// Where entropy comes from.
    pub src: PathBuf,
    /// Bytes of the limit.
    pub bw_size: Option<u64>,
    /// Bytes beside them that are there once.
    pub bw_one_time_burst: Option<u64>,
    /// The time in which they come back; milliseconds.
    pub bw_refill_time: Option<u64>,
}

impl RngConfig {
    /// How much of it the guest may use; `None` where that is not limited.
    #[must_use]
    pub fn rate_limiter(&self) -> Option<RateLimiterConfig> {
        let bandwidth =
            BucketConfig::of(self.bw_size, self.bw_one_time_burst, self.bw_refill_time)?;
        Some(RateLimiterConfig {
            bandwidth: Some(bandwidth),
            ops: None,
        })
    }
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
            bw_size: None,
            bw_one_time_burst: None,
            bw_refill_time: None,
        }
    }
}

/// `--serial` and `--console`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// No such device.
    #[default]
    Off,
    /// A device whose output goes nowhere.
    Null,
    /// Busway's own terminal.
    Tty,
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// Output to a file of this many bytes at most, and its end so far in `PATH.1`.
    File {
        /// The file.
        path: PathBuf,
        /// The most bytes in each of the two.
        #[serde(default = "console_file_size")]
        size: u64,
    },
    /// A listening Unix socket.
    Socket(PathBuf),
}

impl ConsoleConfig {
    /// A file with its size at the default.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::File {
            path: path.into(),
            size: CONSOLE_FILE_SIZE,
        }
    }
}

/// `--device`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The device's folder in sysfs, or its name: an address, `0000:01:00.0`, or a mediated device's UUID.
    /// Empty where `fd` says which.
    #[serde(default)]
    pub path: PathBuf,
    /// A descriptor that somebody else has opened: of the device's VFIO character device, or of its
    /// VFIO group.
    #[serde(default)]
    pub fd: Option<u32>,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
    /// What an error of the device's does to the VM.
    #[serde(default)]
    pub on_error: OnError,
    /// VF token, a UUID: what the users of a physical function and of its virtual functions share.
    #[serde(default)]
    pub vf_token: Option<String>,
    /// Whether the guest gets the device's expansion ROM. Absent: it does, unless that is known to do
    /// harm.
    #[serde(default)]
    pub rom: Option<bool>,
    /// An expansion ROM to be had in place of the device's.
    #[serde(default)]
    pub romfile: Option<PathBuf>,
    /// Which of NVIDIA's GPUDirect cliques a GPU is in, 0 to 15.
    #[serde(default)]
    pub x_nv_gpudirect_clique: Option<u8>,
    /// Where it stands in firmware's boot order, the lowest first.
    #[serde(default)]
    pub boot_index: Option<u16>,
    /// Whether the guest has it behind a PCIe root port of its own, or on bus 0 by itself; what
    /// [`PlatformConfig::root_ports`] says where absent. Of several functions of one device none is on bus 0.
    #[serde(default)]
    pub root_port: Option<bool>,
    /// The PCI segment that it is in.
    #[serde(default)]
    pub pci_segment: u16,
    /// The device number on bus 0 of that segment of the root port that it is behind, 1 to 31, or of the device itself where
    /// that is on bus 0, 1 to 15; any that is free where absent.
    #[serde(default)]
    pub pci_device_id: Option<u8>,
}

/// What an uncorrectable error of a device's does to the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The VM ends, as failed.
    #[default]
    Stop,
    /// The guest is paused, and goes on when it is asked to.
    Pause,
    /// It is logged.
    Ignore,
}

impl VmConfig {
    /// Whether a device has this name.
    pub(crate) fn has_id(&self, id: &str) -> bool {
        let disks = self.disk.iter().map(|disk| disk.id.as_deref());
        let nets = self.net.iter().map(|net| net.id.as_deref());
        let folders = self.fs.iter().map(|fs| fs.id.as_deref());
        let pmems = self.pmem.iter().map(|pmem| pmem.id.as_deref());
        let generic = self.generic.iter().map(|one| one.id.as_deref());
        let vsocks = self.vsock.iter().map(|vsock| vsock.id.as_deref());
        let devices = self.device.iter().map(|device| device.id.as_deref());
        disks
            .chain(nets)
            .chain(folders)
            .chain(pmems)
            .chain(generic)
            .chain(vsocks)
            .chain(devices)
            .any(|other| other == Some(id))
    }

    /// Whether RAM is mapped so that another process can map it: it was asked for, or a device of another process's
    /// is among those that the VM starts with. It is not so of every VM, for most hosts make no huge pages of shared
    /// memory (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`).
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        let needs = |(_, device): (usize, VirtioConfig)| device.socket().is_some();
        let zones = &self.memory_zone;
        let all_zones = !zones.is_empty() && zones.iter().all(|zone| zone.shared);
        self.memory.shared || all_zones || self.virtio().any(needs)
    }

    /// Has a VM that was given something to boot from, and nothing that boots it, begin with the firmware that
    /// the host's distribution has installed.
    pub fn find_firmware(&mut self) {
        let bootable = !self.disk.is_empty() || !self.device.is_empty();
        if self.kernel.is_none() && self.firmware.is_none() && bootable {
            self.firmware = Some(FirmwareConfig::default());
        }
    }
}

impl DeviceConfig {
    /// The device that a person means by `text`: an address (`0000:01:00.0`, `01:00.0`), a mediated
    /// device's UUID, or any path in sysfs that ends in one. Its path is then the one on its bus.
    ///
    /// # Errors
    ///
    /// When there is neither at the end of it.
    pub fn new(text: &str) -> Result<Self, ParseHostNameError> {
        let name: HostName = last_component(Path::new(text))
            .unwrap_or(text)
            .parse()
            .map_err(|_no_name| ParseHostNameError(text.to_owned()))?;
        let bus = match name {
            HostName::Pci(_) => PCI_DEVICES,
            HostName::Mediated(_) => MEDIATED_DEVICES,
        };
        Ok(Self {
            path: Path::new(bus).join(name.to_string()),
            fd: None,
            id: None,
            on_error: OnError::default(),
            vf_token: None,
            rom: None,
            romfile: None,
            x_nv_gpudirect_clique: None,
            boot_index: None,
            root_port: None,
            pci_segment: 0,
            pci_device_id: None,
        })
    }

    /// What the host calls the device.
    ///
    /// # Errors
    ///
    /// When the path does not end in that.
    pub fn host_name(&self) -> Result<HostName, ParseHostNameError> {
        last_component(&self.path)
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| ParseHostNameError(self.path.display().to_string()))
    }
}

impl DeviceConfig {
    /// What a machine calls the device: the name that it was given, or its address on the host.
    #[must_use]
    pub fn id(&self) -> String {
        let address = || last_component(&self.path).unwrap_or("a device");
        self.id.as_deref().unwrap_or_else(address).to_owned()
    }

    /// The device as messages name it: its address on the host, and the name that it was given.
    #[must_use]
    pub fn name(&self) -> String {
        let address = last_component(&self.path).unwrap_or("a device");
        match &self.id {
            Some(id) => format!("{address} ({id})"),
            None => address.to_owned(),
        }
    }
}

fn last_component(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// `--platform`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlatformConfig {
    /// Which of the kernel's VFIO interfaces to use: iommufd, the type1 container, or the one that can do
    /// all that the VM may need.
    pub iommufd: Choice,
    /// An iommufd that somebody else has opened.
    pub iommufd_fd: Option<u32>,
    /// Whether assigned devices reach each other's memory.
    pub p2p: Choice,
    /// VF token of every device that needs one and has none of its own.
    pub vf_token: Option<String>,
    /// Empty slots for devices that are added while the guest runs, 0 to 15; 8 where there is a control socket,
    /// and none where there is not.
    pub hotplug_slots: Option<u8>,
    /// Bytes of guest addresses above RAM for the memory of what comes into such a slot.
    pub hotplug_mmio64: Option<u64>,
    /// PCI segments, from 1, which is the default, to [`MAX_SEGMENTS`].
    pub num_pci_segments: Option<u16>,
    /// Empty slots for devices that are added while the guest runs, in each segment but the first, 0 to 15; one where there is
    /// a control socket, and none where there is not.
    pub segment_hotplug_slots: Option<u8>,
    /// Whether devices are behind PCIe root ports, or on bus 0, where nothing is said of one: behind ports where absent,
    /// but for a VM that was made over Cloud Hypervisor's API, whose clients look for them on bus 0.
    pub root_ports: Option<bool>,
    /// Seconds that the guest has to release a device that somebody wants back; from 1 to
    /// [`MAX_REMOVAL_TIMEOUT`], and [`DEFAULT_REMOVAL_TIMEOUT`] where absent.
    pub removal_timeout: Option<u32>,
    /// Seconds that the guest has to power off when a signal asks it to; from 1 to [`MAX_POWER_OFF_TIMEOUT`], and
    /// [`DEFAULT_POWER_OFF_TIMEOUT`] where absent.
    pub power_off_timeout: Option<u32>,
    /// The machine's serial number, which the guest reads in SMBIOS.
    pub serial_number: Option<String>,
    /// The machine's UUID, likewise.
    pub uuid: Option<String>,
    /// Strings that programs in the guest look for in SMBIOS, such as systemd's credentials.
    pub oem_strings: Vec<String>,
}

impl PlatformConfig {
    /// How long the guest has to release a device where whoever wants it back does not say.
    #[must_use]
    pub fn removal_limit(&self) -> Duration {
        let seconds = self.removal_timeout.unwrap_or(DEFAULT_REMOVAL_TIMEOUT);
        Duration::from_secs(seconds.into())
    }

    /// How long the guest has to power off when a signal asks it to, before it is killed.
    #[must_use]
    pub fn power_off_limit(&self) -> Duration {
        let seconds = self.power_off_timeout.unwrap_or(DEFAULT_POWER_OFF_TIMEOUT);
        Duration::from_secs(seconds.into())
    }

    /// Has a VM whose devices can be changed have empty slots for them, if nothing else was said: 8, or what
    /// is left beside the `devices` that it starts with.
    pub fn make_slots(&mut self, devices: usize) {
        let left = MAX_HOTPLUG_SLOTS.saturating_sub(u8::try_from(devices).unwrap_or(u8::MAX));
        self.hotplug_slots.get_or_insert(left.min(8));
        self.segment_hotplug_slots.get_or_insert(1);
    }

    /// Whether devices of which nothing is said are behind root ports.
    #[must_use]
    pub fn root_ports(&self) -> bool {
        self.root_ports.unwrap_or(true)
    }

    /// Whether a device is to sit on bus 0 by itself.
    #[must_use]
    pub fn has_on_root_bus(&self, device: &DeviceConfig) -> bool {
        !device.root_port.unwrap_or(self.root_ports())
    }

    /// How many PCI segments there are.
    #[must_use]
    pub fn segments(&self) -> u16 {
        self.num_pci_segments.unwrap_or(1)
    }

    /// How many empty slots there are in a segment.
    #[must_use]
    pub fn hotplug_slots(&self, segment: u16) -> u8 {
        match segment {
            0 => self.hotplug_slots.unwrap_or(0),
            _ => self.segment_hotplug_slots.unwrap_or(0),
        }
    }

    /// Whether there are empty slots.
    #[must_use]
    pub fn has_hotplug_slots(&self) -> bool {
        (0..self.segments()).any(|segment| self.hotplug_slots(segment) > 0)
    }

    /// What the windows of an empty slot reserve: below 4 GiB what a graphics card needs beside its large
    /// BAR, above RAM what was asked for, or 4 GiB.
    #[must_use]
    pub fn reserve(&self) -> Reserve {
        Reserve {
            memory32: 32 << 20,
            memory64: self.hotplug_mmio64.unwrap_or(4 << 30),
        }
    }
}

/// A switch with a default that depends on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// Required.
    On,
    /// Forbidden.
    Off,
    /// Used where the host has it.
    #[default]
    Auto,
}

fn yes() -> bool {
    true
}

fn one() -> u16 {
    1
}

fn two() -> u16 {
    2
}

fn console_file_size() -> u64 {
    CONSOLE_FILE_SIZE
}

fn disk_queue_size() -> u16 {
    128
}

fn net_queue_size() -> u16 {
    256
}

fn fs_queue_size() -> u16 {
    1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_device_is_one_path() {
        for text in [
            "01:00.0",
            "0000:01:00.0",
            "0000:01:00.0/",
            "/sys/bus/pci/devices/0000:01:00.0",
            "/sys/bus/pci/devices/0000:01:00.0/",
            "/sys/devices/pci0000:00/0000:00:1c.0/0000:01:00.0",
        ] {
            let device = DeviceConfig::new(text).unwrap();
            assert_eq!(device.path, Path::new("/sys/bus/pci/devices/0000:01:00.0"));
            assert_eq!(device.host_name().unwrap().to_string(), "0000:01:00.0");
        }
        for text in [
            "BD8D9D2B-5a5f-4f5a-a211-f591514ba1f3",
            "/sys/bus/mdev/devices/bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3",
            "/sys/devices/virtual/mtty/mtty/bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3/",
        ] {
            let device = DeviceConfig::new(text).unwrap();
            let name = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
            assert_eq!(device.path, Path::new("/sys/bus/mdev/devices").join(name));
            assert_eq!(device.name(), name);
            assert!(device.host_name().unwrap().is_mediated());
        }
    }

    #[test]
    fn a_device_is_named_by_address_and_by_the_name_it_was_given() {
        let mut config = DeviceConfig::new("01:00.0").unwrap();
        assert_eq!(config.name(), "0000:01:00.0");
        config.id = Some("scratch".into());
        assert_eq!(config.name(), "0000:01:00.0 (scratch)");
    }

    #[test]
    fn what_is_neither_a_pci_function_nor_mediated_is_no_device() {
        for text in ["", "/", "..", "eth0", "/sys/class/net/eth0", "01:00"] {
            let error = DeviceConfig::new(text).unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{text}`")));
        }
    }
}
