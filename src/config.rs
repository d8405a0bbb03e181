//! What a VM is made of, as the command line and `--config vm.toml` say it in the same words.
//!
//! The field names are the words of the flags; see `docs/design.md`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A whole VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Kernel: a bzImage, or an ELF with a PVH entry.
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Processors.
    pub cpus: CpusConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// Virtio disks.
    pub disk: Vec<DiskConfig>,
    /// Virtio NICs.
    pub net: Vec<NetConfig>,
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
}

/// `--cpus`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpusConfig {
    /// vCPUs running at boot, 1 to 64.
    pub boot: u8,
    /// vCPUs that there can be; `boot` where absent.
    pub max: Option<u8>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self { boot: 1, max: None }
    }
}

/// `--memory`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Bytes of RAM.
    pub size: u64,
    /// Map RAM shared, so that another process can map it.
    pub shared: bool,
    /// Take RAM from hugetlbfs.
    pub hugepages: bool,
    /// Bytes of a huge page; the host's default where absent.
    pub hugepage_size: Option<u64>,
    /// Touch all RAM before the guest starts. Absent: done when devices are assigned, for the IOMMU
    /// pins it all anyway.
    pub prefault: Option<bool>,
    /// Ask for transparent huge pages.
    pub thp: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: None,
            thp: true,
        }
    }
}

/// `--disk`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Request queues, one worker each.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors a queue; a power of two.
    #[serde(default = "disk_queue_size")]
    pub queue_size: u16,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
}

/// `--net`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap interface; made where it does not exist, and named by the kernel where absent.
    #[serde(default)]
    pub tap: Option<String>,
    /// The guest's MAC address; a random, locally administered one where absent.
    #[serde(default)]
    pub mac: Option<String>,
    /// Receive and transmit queues together; even.
    #[serde(default = "two")]
    pub num_queues: u16,
    /// Descriptors a queue; a power of two.
    #[serde(default = "net_queue_size")]
    pub queue_size: u16,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
}

/// `--rng`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// Where entropy comes from.
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
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
    /// Output to a file.
    File(PathBuf),
    /// A listening Unix socket.
    Socket(PathBuf),
}

/// `--device`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The device's folder in sysfs, or its address: `0000:01:00.0`.
    pub path: PathBuf,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
}

/// `--platform`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlatformConfig {
    /// Which of the kernel's VFIO interfaces to use.
    pub iommufd: Choice,
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

fn one() -> u16 {
    1
}

fn two() -> u16 {
    2
}

fn disk_queue_size() -> u16 {
    128
}

fn net_queue_size() -> u16 {
    256
}
