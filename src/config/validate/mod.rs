//! What the parts of a configuration must be for one another.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::{
    Choice, ConsoleConfig, DISK_QUEUE_SIZES, DeviceConfig, DiskConfig, ImageType, MAX_CPUS,
    MEMORY_STEP, MIN_CONSOLE_FILE_SIZE, MIN_MEMORY, MemoryConfig, NET_QUEUE_SIZES, NetConfig,
    PlatformConfig, QueueAffinity, VmConfig,
};

/// The longest name of a network interface. linux/if.h, `IFNAMSIZ` less its zero byte.
const INTERFACE_NAME: usize = 15;

/// Queues of as many pairs as there can be vCPUs.
const MAX_NET_QUEUES: u16 = 2 * MAX_CPUS as u16;

/// The last of the three descriptors that every process has.
const STANDARD_ERROR: u32 = 2;

/// Why a configuration is none. Each message is whole: what, on which device, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// nothing to boot: give a kernel with --kernel FILE (a bzImage, or an ELF file with a PVH entry), or a disk that firmware can boot, with --disk or --device
    #[error(
        "nothing to boot: give a kernel with --kernel FILE (a bzImage, or an ELF file with a PVH entry), or a \
         disk that firmware can boot, with --disk path=FILE or --device ADDRESS"
    )]
    NoKernel,
    /// {device}: boot_index= without firmware
    #[error(
        "{device}: boot_index= is for firmware: give --firmware auto, or leave boot_index= out"
    )]
    BootIndexAlone {
        /// Which.
        device: Name,
    },
    /// {what} without --kernel
    #[error("{what} is for a kernel: give that with --kernel FILE, or leave {what} out")]
    NeedsKernel {
        /// The flag.
        what: &'static str,
    },
    /// --cpus boot={boot}: a VM has 1 to 64 processors
    #[error("--cpus boot={boot}: a VM has 1 to {MAX_CPUS} processors")]
    Cpus {
        /// What was asked for.
        boot: u8,
    },
    /// --cpus max={max}: vCPUs cannot be added to a running guest yet
    #[error(
        "--cpus max={max}: vCPUs cannot be added to a running guest yet: leave max= out, or boot={max}"
    )]
    NoCpuHotplug {
        /// What was asked for.
        max: u8,
    },
    /// --cpus max={max}: must be from boot={boot} to 64
    #[error("--cpus max={max}: must be from boot={boot} to {MAX_CPUS}")]
    MaxCpus {
        /// What was asked for.
        max: u8,
        /// Processors at boot.
        boot: u8,
    },
    /// --memory size={size}: a guest needs 16M at least
    #[error(
        "--memory size={size}: a guest needs {}M at least; a size is in bytes, or has K, M, G or T \
         after it",
        MIN_MEMORY >> 20
    )]
    TooLittleMemory {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// --memory size={size}: must be a multiple of {step} bytes
    #[error("--memory size={size}: must be a multiple of {step} bytes ({what})")]
    UnevenMemory {
        /// What was asked for, in bytes.
        size: u64,
        /// What it must be a multiple of.
        step: u64,
        /// What that is.
        what: &'static str,
    },
    /// --memory hugepage_size={size}: huge pages are a power of two, 2M or more
    #[error("--memory hugepage_size={size}: a huge page's size is a power of two, 2M or more")]
    HugePageSize {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// --memory hugepage_size= without huge pages
    #[error("--memory hugepage_size= needs hugepages=on beside it")]
    HugePageSizeAlone,
    /// {device}: {why}
    #[error("{device}: {why}")]
    Virtio {
        /// Whose.
        device: Name,
        /// What is wrong with it.
        why: InvalidVirtio,
    },
    /// {device}: {why}
    #[error("{device}: {why}")]
    Address {
        /// Whose.
        device: Name,
        /// What is wrong with it.
        why: busway_vfio::ParseHostNameError,
    },
    /// {device}: vf_token={why}
    #[error("{device}: vf_token={why}")]
    VfToken {
        /// Whose.
        device: Name,
        /// What is wrong with it.
        why: busway_vfio::ParseVfTokenError,
    },
    /// {first} and {second} have the same {what}
    #[error("{first} and {second} have the same {what}, `{value}`: {remedy}")]
    Twice {
        /// The one that came first.
        first: Name,
        /// The other.
        second: Name,
        /// What is the same.
        what: &'static str,
        /// What it is.
        value: String,
        /// What to do.
        remedy: &'static str,
    },
    /// --serial and --console cannot both have the terminal
    #[error(
        "--serial tty and --console tty: there is one terminal; give one of them off, pty, \
         file=PATH or socket=PATH"
    )]
    OneTerminal,
    /// {flag} size={size}: too small
    #[error(
        "{flag} size={size}: a console's file needs room for {MIN_CONSOLE_FILE_SIZE} bytes at least"
    )]
    ConsoleFileSize {
        /// Which.
        flag: Name,
        /// What was asked for, in bytes.
        size: u64,
    },
    /// {device}: rom=off and romfile= exclude each other
    #[error("{device}: rom=off and romfile= exclude each other: leave one out")]
    RomfileUnwanted {
        /// Which.
        device: Name,
    },
    /// {device}: x_nv_gpudirect_clique={clique} is above 15
    #[error("{device}: x_nv_gpudirect_clique={clique} must be a number from 0 to 15")]
    Clique {
        /// Which.
        device: Name,
        /// What was given.
        clique: u8,
    },
    /// {device}: fd={fd} is standard input, output or error
    #[error(
        "{device}: {key}={fd} is standard input, output or error: hand the descriptor over as \
         another number, 3 or more"
    )]
    StandardFd {
        /// Whose.
        device: Name,
        /// `fd` or `iommufd_fd`.
        key: &'static str,
        /// What was asked for.
        fd: u32,
    },
    /// --platform hotplug_slots={slots}
    #[error("--platform hotplug_slots={slots}: a VM has 0 to {MAX_HOTPLUG_SLOTS} empty slots")]
    HotplugSlots {
        /// What was asked for.
        slots: u8,
    },
    /// --platform hotplug_mmio64={size}
    #[error(
        "--platform hotplug_mmio64={size}: the room for a slot is a multiple of 1 MiB, and 1 MiB at least"
    )]
    HotplugRoom {
        /// Bytes that were asked for.
        size: u64,
    },
    /// --platform iommufd_fd={fd} with iommufd=off
    #[error("--platform iommufd_fd={fd} contradicts iommufd=off beside it: leave one of them out")]
    IommufdOff {
        /// What was asked for.
        fd: u32,
    },
    /// {device}: `{id}` is no name
    #[error("{device}: id=`{id}` must have a character, and no spaces, commas or `/`")]
    Id {
        /// Whose.
        device: Name,
        /// What was asked for.
        id: String,
    },
}

/// What a virtio device cannot be, whoever asks for it: [`VmConfig::validate`] as well as the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVirtio {
    /// num_queues={0} must be from 1 to 64
    #[error("num_queues={0} must be from 1 to {MAX_CPUS}")]
    Queues(u16),
    /// num_queues={0} must be even, from 2 to 128
    #[error(
        "num_queues={0} must be even, from 2 to {MAX_NET_QUEUES}: a receive and a transmit queue for each \
         pair"
    )]
    Pairs(u16),
    /// queue_size={size} must be a power of two from {least} to {most}
    #[error("queue_size={size} must be a power of two from {least} to {most}")]
    QueueSize {
        /// What was asked for.
        size: u16,
        /// The least that there can be.
        least: u16,
        /// The most.
        most: u16,
    },
    /// queue_affinity names queue {queue}, and there are {queues}, counted from 0
    #[error("queue_affinity names queue {queue}, and num_queues={queues}, counted from 0")]
    AffinityQueue {
        /// The queue that there is not.
        queue: u16,
        /// How many there are.
        queues: u16,
    },
    /// queue_affinity says twice where queue {0} runs
    #[error("queue_affinity says twice where queue {0} runs")]
    AffinityTwice(u16),
    /// serial is longer than 20 characters, or has others than printable ASCII
    #[error("serial=`{0}` must be printable ASCII, and no longer than {SERIAL_SIZE} characters")]
    Serial(String),
    /// {key}_size= and {key}_refill_time= go together
    #[error(
        "{key}_size= and {key}_refill_time= go together, and neither is 0; a burst goes with both"
    )]
    Bucket {
        /// `bw` or `ops`.
        key: &'static str,
    },
    /// backing_files=on goes with image_type=qcow2
    #[error("backing_files=on goes with image_type=qcow2: no other image names files")]
    BackingFiles,
    /// `{0}` is no name for a network interface
    #[error(
        "`{0}` is no name for a network interface: 1 to {INTERFACE_NAME} characters, without spaces, \
         `/` and `:`"
    )]
    TapName(String),
    /// id=`{0}` must have a character, and no spaces, commas or `/`
    #[error("id=`{0}` must have a character, and no spaces, commas or `/`")]
    Id(String),
}

/// A device of the configuration, by the name it has or else by where it was said: `--disk no. 2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    fn new(flag: &str, index: usize, id: Option<&String>) -> Self {
        match id {
            Some(id) => Self(format!("{flag} id={id}")),
            None => Self::numbered(flag, index),
        }
    }

    fn numbered(flag: &str, index: usize) -> Self {
        Self(format!("{flag} no. {}", index.saturating_add(1)))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl VmConfig {
    /// Checks what can be checked without looking at the host.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.validate_payload()?;
        self.validate_parts()
    }

    /// Whether there is something to boot.
    fn validate_payload(&self) -> Result<(), InvalidConfig> {
        if self.kernel.is_none() {
            let kernels = [
                ("--initramfs", self.initramfs.is_some()),
                ("--cmdline", self.cmdline.is_some()),
            ];
            if self.firmware.is_none() {
                return Err(InvalidConfig::NoKernel);
            }
            if let Some(&(what, _)) = kernels.iter().find(|(_, given)| *given) {
                return Err(InvalidConfig::NeedsKernel { what });
            }
        }
        Ok(())
    }

    /// The same of a VM that is given something to boot later.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn validate_parts(&self) -> Result<(), InvalidConfig> {
        self.validate_cpus()?;
        self.memory.validate()?;
        for (index, disk) in self.disk.iter().enumerate() {
            disk.check().map_err(|why| InvalidConfig::Virtio {
                device: Name::new("--disk", index, disk.id.as_ref()),
                why,
            })?;
        }
        for (index, net) in self.net.iter().enumerate() {
            net.check().map_err(|why| InvalidConfig::Virtio {
                device: Name::new("--net", index, net.id.as_ref()),
                why,
            })?;
        }
        if self.serial == ConsoleConfig::Tty && self.console == ConsoleConfig::Tty {
            return Err(InvalidConfig::OneTerminal);
        }
        self.validate_console_files()?;
        self.validate_vf_tokens()?;
        self.platform.validate_slots()?;
        self.validate_ids()?;
        self.validate_boot_order()?;
        self.validate_disjoint()
    }

    /// The devices that stand in firmware's boot order, each at a place of its own.
    fn validate_boot_order(&self) -> Result<(), InvalidConfig> {
        let disks = self.disk.iter().enumerate().map(|(index, disk)| {
            let name = Name::new("--disk", index, disk.id.as_ref());
            (name, disk.boot_index)
        });
        let devices = self.device.iter().enumerate().map(|(index, device)| {
            let name = Name::new("--device", index, device.id.as_ref());
            (name, device.boot_index)
        });
        let mut seen = Seen::new("boot_index", "give each a number of its own");
        for (device, index) in disks.chain(devices) {
            match index {
                Some(_) if self.firmware.is_none() => {
                    return Err(InvalidConfig::BootIndexAlone { device });
                }
                Some(index) => seen.add(device, index.to_string(), true)?,
                None => {}
            }
        }
        Ok(())
    }

    fn validate_cpus(&self) -> Result<(), InvalidConfig> {
        let boot = self.cpus.boot;
        if !(1..=MAX_CPUS).contains(&boot) {
            return Err(InvalidConfig::Cpus { boot });
        }
        match self.cpus.max {
            Some(max) if !(boot..=MAX_CPUS).contains(&max) => {
                Err(InvalidConfig::MaxCpus { max, boot })
            }
            Some(max) if max > boot => Err(InvalidConfig::NoCpuHotplug { max }),
            _ => Ok(()),
        }
    }

    fn validate_console_files(&self) -> Result<(), InvalidConfig> {
        let mut files = Seen::new("file", "give each a file of its own");
        for (flag, console) in [("--serial", &self.serial), ("--console", &self.console)] {
            let ConsoleConfig::File { path, size } = console else {
                continue;
            };
            let (flag, size) = (Name(flag.to_owned()), *size);
            if size < MIN_CONSOLE_FILE_SIZE {
                return Err(InvalidConfig::ConsoleFileSize { flag, size });
            }
            files.add(flag, plain(path).display().to_string(), true)?;
        }
        Ok(())
    }

    fn validate_vf_tokens(&self) -> Result<(), InvalidConfig> {
        let devices = self.device.iter().enumerate().map(|(index, device)| {
            let name = Name::new("--device", index, device.id.as_ref());
            (name, device.vf_token.as_ref())
        });
        let platform = Name("--platform".to_owned());
        for (device, token) in devices.chain([(platform, self.platform.vf_token.as_ref())]) {
            if let Some(token) = token {
                token
                    .parse::<busway_vfio::VfToken>()
                    .map_err(|why| InvalidConfig::VfToken { device, why })?;
            }
        }
        Ok(())
    }

    /// Names are unique among all devices.
    fn validate_ids(&self) -> Result<(), InvalidConfig> {
        let disks = self.disk.iter().map(|disk| disk.id.as_ref());
        let nets = self.net.iter().map(|net| net.id.as_ref());
        let devices = self.device.iter().map(|device| device.id.as_ref());
        let named = numbered("--disk", disks)
            .chain(numbered("--net", nets))
            .chain(numbered("--device", devices));
        let mut seen = Seen::new("id", "names are unique in a VM");
        for (name, id) in named {
            let Some(id) = id else { continue };
            if !is_id(id) {
                return Err(InvalidConfig::Id {
                    device: name,
                    id: id.clone(),
                });
            }
            seen.add(name, id.clone(), true)?;
        }
        Ok(())
    }

    /// No two devices stand on the same thing of the host's.
    fn validate_disjoint(&self) -> Result<(), InvalidConfig> {
        validate_functions(&self.device)?;
        for (index, device) in self.device.iter().enumerate() {
            device.validate(&Name::new("--device", index, device.id.as_ref()))?;
        }
        self.validate_descriptors()?;
        let mut images = Seen::new(
            "path",
            "a disk that is written to can be given once; give both readonly=on, or make a copy",
        );
        for (index, disk) in self.disk.iter().enumerate() {
            let name = Name::new("--disk", index, disk.id.as_ref());
            images.add(
                name,
                plain(&disk.shown()).display().to_string(),
                !disk.readonly,
            )?;
        }
        let mut taps = Seen::new("tap", "each NIC needs its own");
        let mut macs = Seen::new("mac", "each NIC needs its own, or none to get a random one");
        for (index, net) in self.net.iter().enumerate() {
            let name = Name::new("--net", index, net.id.as_ref());
            if let Some(tap) = &net.tap {
                taps.add(name.clone(), tap.clone(), true)?;
            }
            if let Some(mac) = &net.mac {
                macs.add(name, mac.to_string(), true)?;
            }
        }
        Ok(())
    }
}

/// No two devices are one. Which one a descriptor alone is shows when the VM is put together,
/// and is then asked again.
pub(crate) fn validate_functions(devices: &[DeviceConfig]) -> Result<(), InvalidConfig> {
    let mut functions = Seen::new("host device", "a device can be given once");
    for (index, device) in devices.iter().enumerate() {
        let name = Name::new("--device", index, device.id.as_ref());
        if device.fd.is_some() && device.path.as_os_str().is_empty() {
            continue;
        }
        let host = device.host_name().map_err(|why| InvalidConfig::Address {
            device: name.clone(),
            why,
        })?;
        functions.add(name, host.to_string(), true)?;
    }
    Ok(())
}

impl DeviceConfig {
    fn validate(&self, name: &Name) -> Result<(), InvalidConfig> {
        if self.rom == Some(false) && self.romfile.is_some() {
            return Err(InvalidConfig::RomfileUnwanted {
                device: name.clone(),
            });
        }
        match self.x_nv_gpudirect_clique {
            Some(clique @ 16..) => Err(InvalidConfig::Clique {
                device: name.clone(),
                clique,
            }),
            _ => Ok(()),
        }
    }
}

impl VmConfig {
    /// Descriptors that somebody else has opened can be that, and each serves one purpose.
    fn validate_descriptors(&self) -> Result<(), InvalidConfig> {
        let mut seen = Seen::new(
            "fd",
            "give it once: the descriptor of a group serves all of its devices",
        );
        let devices = self.device.iter().enumerate().map(|(index, device)| {
            let name = Name::new("--device", index, device.id.as_ref());
            (name, "fd", device.fd)
        });
        let disks = self.disk.iter().enumerate().map(|(index, disk)| {
            let name = Name::new("--disk", index, disk.id.as_ref());
            (name, "fd", disk.fd)
        });
        let platform = Name("--platform".to_owned());
        let all = devices
            .chain(disks)
            .chain([(platform, "iommufd_fd", self.platform.iommufd_fd)]);
        for (device, key, fd) in all {
            let Some(fd) = fd else { continue };
            if fd <= STANDARD_ERROR {
                return Err(InvalidConfig::StandardFd { device, key, fd });
            }
            seen.add(device, fd.to_string(), true)?;
        }
        match self.platform {
            PlatformConfig {
                iommufd: Choice::Off,
                iommufd_fd: Some(fd),
                ..
            } => Err(InvalidConfig::IommufdOff { fd }),
            _ => Ok(()),
        }
    }
}

impl MemoryConfig {
    fn validate(&self) -> Result<(), InvalidConfig> {
        let size = self.size;
        if size < MIN_MEMORY {
            return Err(InvalidConfig::TooLittleMemory { size });
        }
        if !size.is_multiple_of(MEMORY_STEP) {
            return Err(InvalidConfig::UnevenMemory {
                size,
                step: MEMORY_STEP,
                what: "1M",
            });
        }
        let Some(page) = self.hugepage_size else {
            return Ok(());
        };
        if !self.hugepages {
            return Err(InvalidConfig::HugePageSizeAlone);
        }
        if !page.is_power_of_two() || page < 2 << 20 {
            return Err(InvalidConfig::HugePageSize { size: page });
        }
        if !size.is_multiple_of(page) {
            return Err(InvalidConfig::UnevenMemory {
                size,
                step: page,
                what: "hugepage_size",
            });
        }
        Ok(())
    }
}

/// Bytes of a disk's serial number. Virtio 1.3 §5.2.6.
const SERIAL_SIZE: usize = 20;

impl DiskConfig {
    /// Whether there can be such a disk.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        if !(1..=u16::from(MAX_CPUS)).contains(&self.num_queues) {
            return Err(InvalidVirtio::Queues(self.num_queues));
        }
        let mut placed = Vec::new();
        for QueueAffinity { queue_index, .. } in &self.queue_affinity {
            let (queue, queues) = (*queue_index, self.num_queues);
            if queue >= queues {
                return Err(InvalidVirtio::AffinityQueue { queue, queues });
            }
            if placed.contains(&queue) {
                return Err(InvalidVirtio::AffinityTwice(queue));
            }
            placed.push(queue);
        }
        let is_serial = |serial: &&String| {
            serial.len() <= SERIAL_SIZE
                && serial
                    .bytes()
                    .all(|byte| byte == b' ' || byte.is_ascii_graphic())
        };
        if let Some(serial) = self.serial.as_ref().filter(|serial| !is_serial(serial)) {
            return Err(InvalidVirtio::Serial(serial.clone()));
        }
        if self.backing_files && self.image_type != ImageType::Qcow2 {
            return Err(InvalidVirtio::BackingFiles);
        }
        bucket(
            "bw",
            self.bw_size,
            self.bw_one_time_burst,
            self.bw_refill_time,
        )?;
        bucket(
            "ops",
            self.ops_size,
            self.ops_one_time_burst,
            self.ops_refill_time,
        )?;
        queue_size(self.queue_size, DISK_QUEUE_SIZES)
    }
}

impl NetConfig {
    /// Whether there can be such a NIC.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        let pairs = self.num_queues / 2;
        if !self.num_queues.is_multiple_of(2) || !(1..=u16::from(MAX_CPUS)).contains(&pairs) {
            return Err(InvalidVirtio::Pairs(self.num_queues));
        }
        if let Some(tap) = self.tap.as_ref().filter(|tap| !is_interface_name(tap)) {
            return Err(InvalidVirtio::TapName(tap.clone()));
        }
        queue_size(self.queue_size, NET_QUEUE_SIZES)
    }
}

/// A limit has a size and a time, which are not 0, or nothing at all; 0 is no limit for other VMMs, and here.
fn bucket(
    key: &'static str,
    size: Option<u64>,
    burst: Option<u64>,
    refill: Option<u64>,
) -> Result<(), InvalidVirtio> {
    match (size.unwrap_or(0), refill.unwrap_or(0), burst.unwrap_or(0)) {
        (0, 0, 0) | (1.., 1.., _) => Ok(()),
        _ => Err(InvalidVirtio::Bucket { key }),
    }
}

fn queue_size(size: u16, sizes: RangeInclusive<u16>) -> Result<(), InvalidVirtio> {
    if size.is_power_of_two() && sizes.contains(&size) {
        return Ok(());
    }
    let (least, most) = sizes.into_inner();
    Err(InvalidVirtio::QueueSize { size, least, most })
}

/// Whether a device can be called this.
pub(super) fn is_id(id: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_graphic() && byte != b',' && byte != b'/';
    !id.is_empty() && id.bytes().all(good)
}

/// What the kernel takes as an interface's name: `dev_valid_name` of linux/netdevice.h.
fn is_interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .bytes()
            .any(|byte| byte == b'/' || byte == b':' || byte.is_ascii_whitespace())
}

/// The path as it would be if nobody had written `.` and doubled slashes into it.
fn plain(path: &Path) -> PathBuf {
    path.components().collect()
}

fn numbered<'a>(
    flag: &'static str,
    ids: impl Iterator<Item = Option<&'a String>>,
) -> impl Iterator<Item = (Name, Option<&'a String>)> {
    ids.enumerate()
        .map(move |(index, id)| (Name::numbered(flag, index), id))
}

/// What was said so far of one kind, where a thing can be said once.
struct Seen {
    what: &'static str,
    remedy: &'static str,
    all: Vec<(Name, String, bool)>,
}

impl Seen {
    fn new(what: &'static str, remedy: &'static str) -> Self {
        Self {
            what,
            remedy,
            all: Vec::new(),
        }
    }

    /// Adds one; an equal one before it is an error when either is exclusive.
    fn add(&mut self, name: Name, value: String, exclusive: bool) -> Result<(), InvalidConfig> {
        let clash = self
            .all
            .iter()
            .find(|(_, before, alone)| *before == value && (*alone || exclusive));
        if let Some((first, ..)) = clash {
            return Err(InvalidConfig::Twice {
                first: first.clone(),
                second: name,
                what: self.what,
                value,
                remedy: self.remedy,
            });
        }
        self.all.push((name, value, exclusive));
        Ok(())
    }
}

/// How many slots bus 0 has for root ports beside the functions that come first.
pub(super) const MAX_HOTPLUG_SLOTS: u8 = 15;

impl PlatformConfig {
    fn validate_slots(&self) -> Result<(), InvalidConfig> {
        if let Some(slots) = self.hotplug_slots
            && slots > MAX_HOTPLUG_SLOTS
        {
            return Err(InvalidConfig::HotplugSlots { slots });
        }
        match self.hotplug_mmio64 {
            Some(size) if size == 0 || !size.is_multiple_of(1 << 20) => {
                Err(InvalidConfig::HotplugRoom { size })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
