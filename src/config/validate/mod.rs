//! What the parts of a configuration must be for one another.

mod disk;
mod error;
mod net;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::limits::{
    MAX_CPUS, MAX_HOTPLUG_SLOTS, MAX_IDENTITY, MAX_OEM_STRINGS, MAX_POWER_OFF_TIMEOUT,
    MAX_REMOVAL_TIMEOUT, MEMORY_STEP, MIN_CONSOLE_FILE_SIZE, MIN_MEMORY,
};
use super::{
    BALLOON_BLOCKS, BalloonConfig, BesideDevices, Choice, ConsoleConfig, DeviceConfig,
    MemoryConfig, Placing, PlatformConfig, RngConfig, VmConfig,
};

use busway_pci::PAGE_SIZE;
pub(super) use error::Name;
pub use error::{InvalidConfig, InvalidVirtio};

/// The last of the three descriptors that every process has.
const STANDARD_ERROR: u32 = 2;

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
        let hotplug = self.memory.validate_hotplug();
        hotplug.map_err(InvalidConfig::Hotplug)?;
        self.validate_placing()?;
        self.validate_zones().map_err(InvalidConfig::Zone)?;
        self.validate_numa().map_err(InvalidConfig::Numa)?;
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
        for (index, fs) in self.fs.iter().enumerate() {
            fs.check().map_err(|why| InvalidConfig::Virtio {
                device: Name::new("--fs", index, fs.id.as_ref()),
                why,
            })?;
        }
        for (index, pmem) in self.pmem.iter().enumerate() {
            pmem.check().map_err(|why| InvalidConfig::Virtio {
                device: Name::new("--pmem", index, pmem.id.as_ref()),
                why,
            })?;
        }
        for (index, generic) in self.generic.iter().enumerate() {
            generic.check().map_err(|why| InvalidConfig::Virtio {
                device: Name::new("--generic-vhost-user", index, generic.id.as_ref()),
                why,
            })?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.check().map_err(|why| InvalidConfig::Virtio {
                device: Name::of("--vsock"),
                why,
            })?;
        }
        self.validate_balloon()?;
        let RngConfig {
            bw_size,
            bw_one_time_burst,
            bw_refill_time,
            ..
        } = self.rng;
        bucket("bw", bw_size, bw_one_time_burst, bw_refill_time).map_err(|why| {
            InvalidConfig::Virtio {
                device: Name::of("--rng"),
                why,
            }
        })?;
        if self.serial == ConsoleConfig::Tty && self.console == ConsoleConfig::Tty {
            return Err(InvalidConfig::OneTerminal);
        }
        self.validate_console_files()?;
        if self.landlock == Choice::Off && !self.landlock_rules.is_empty() {
            return Err(InvalidConfig::LandlockRules);
        }
        for (console, flag) in [(&self.serial, "serial"), (&self.console, "console")] {
            if self.jail && *console == ConsoleConfig::Pty {
                return Err(InvalidConfig::JailTerminal(flag));
            }
        }
        self.validate_vf_tokens()?;
        self.platform.validate_slots()?;
        self.platform.validate_identity()?;
        self.validate_places()?;
        self.validate_ids()?;
        self.validate_boot_order()?;
        self.validate_disjoint()
    }

    /// A balloon has room in RAM, of which single pages can go back to the host.
    fn validate_balloon(&self) -> Result<(), InvalidConfig> {
        match &self.balloon {
            Some(_) if self.has_huge_pages() => Err(InvalidConfig::BalloonOfHugePages),
            Some(BalloonConfig { size, .. })
                if *size > self.memory.size || !size.is_multiple_of(PAGE_SIZE) =>
            {
                Err(InvalidConfig::Balloon { size: *size })
            }
            Some(balloon) => match balloon.block {
                Some(_) if balloon.vfio == BesideDevices::Keep => {
                    Err(InvalidConfig::BalloonBlockAlone)
                }
                Some(block) if !block.is_power_of_two() || !BALLOON_BLOCKS.contains(&block) => {
                    Err(InvalidConfig::BalloonBlock { block })
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
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
            _ => Ok(()),
        }?;
        let checked = self.cpus.grouped().check(self.cpus.most());
        checked.map_err(InvalidConfig::Topology)?;
        // Each will have one where they are placed by the devices.
        let placed = match self.place {
            Placing::Auto => Ok(()),
            Placing::Off => self.cpus.check_places(),
        };
        placed.map_err(InvalidConfig::CpuPlaces)
    }

    /// Where a VM is, is said in one way.
    fn validate_placing(&self) -> Result<(), InvalidConfig> {
        let also = [
            ("--memory-zone", !self.memory_zone.is_empty()),
            ("--numa", !self.numa.is_empty()),
            ("--cpus affinity=", !self.cpus.affinity.is_empty()),
        ];
        match also.into_iter().find(|(_, said)| *said) {
            Some((what, _)) if self.place == Placing::Auto => Err(InvalidConfig::Placed { what }),
            _ => Ok(()),
        }
    }

    fn validate_console_files(&self) -> Result<(), InvalidConfig> {
        let mut files = Seen::new("file", "give each a file of its own");
        for (flag, console) in [("--serial", &self.serial), ("--console", &self.console)] {
            let ConsoleConfig::File { path, size } = console else {
                continue;
            };
            let (flag, size) = (Name::of(flag), *size);
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
        let platform = Name::of("--platform");
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
        let vsocks = self.vsock.iter().map(|vsock| vsock.id.as_ref());
        let devices = self.device.iter().map(|device| device.id.as_ref());
        let folders = self.fs.iter().map(|fs| fs.id.as_ref());
        let pmems = self.pmem.iter().map(|pmem| pmem.id.as_ref());
        let generic = self.generic.iter().map(|one| one.id.as_ref());
        let named = numbered("--disk", disks)
            .chain(numbered("--net", nets))
            .chain(numbered("--fs", folders))
            .chain(numbered("--pmem", pmems))
            .chain(numbered("--generic-vhost-user", generic))
            .chain(numbered("--vsock", vsocks))
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
            if disk.vhost_user {
                continue;
            }
            let name = Name::new("--disk", index, disk.id.as_ref());
            images.add(
                name,
                plain(&disk.shown()).display().to_string(),
                !disk.readonly,
            )?;
        }
        let mut files = Seen::new(
            "file",
            "memory that is written to can be given once; give both discard_writes=on, or make a copy",
        );
        for (index, pmem) in self.pmem.iter().enumerate() {
            let name = Name::new("--pmem", index, pmem.id.as_ref());
            let file = plain(&pmem.file).display().to_string();
            files.add(name, file, !pmem.discard_writes)?;
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
        let mut tags = Seen::new("tag", "the guest mounts each folder by a tag of its own");
        for (index, fs) in self.fs.iter().enumerate() {
            let name = Name::new("--fs", index, fs.id.as_ref());
            tags.add(name, fs.tag.clone(), true)?;
        }
        self.validate_sockets()
    }

    /// A back end serves one device.
    fn validate_sockets(&self) -> Result<(), InvalidConfig> {
        let mut sockets = Seen::new("socket", "each device needs a back end of its own");
        for (index, device) in self.virtio() {
            if let Some(socket) = device.socket() {
                let id = device.id().map(str::to_owned);
                let name = Name::new(device.flag(), index, id.as_ref());
                sockets.add(name, plain(socket).display().to_string(), true)?;
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
        let nets = self.net.iter().enumerate().flat_map(|(index, net)| {
            let name = Name::new("--net", index, net.id.as_ref());
            net.fd.iter().map(move |&fd| (name.clone(), "fd", Some(fd)))
        });
        let platform = Name::of("--platform");
        let all = devices.chain(disks).chain(nets).chain([(
            platform,
            "iommufd_fd",
            self.platform.iommufd_fd,
        )]);
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

/// The socket of the process that serves a device; `None` where that is Busway.
fn back_ends_socket(
    vhost_user: bool,
    socket: Option<&Path>,
) -> Result<Option<&Path>, InvalidVirtio> {
    match (vhost_user, socket) {
        (false, None) => Ok(None),
        (false, Some(_)) => Err(InvalidVirtio::SocketAlone),
        (true, Some(socket)) if !socket.as_os_str().is_empty() => Ok(Some(socket)),
        (true, _) => Err(InvalidVirtio::NoSocket),
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

pub(super) fn queue_size(size: u16, sizes: RangeInclusive<u16>) -> Result<(), InvalidVirtio> {
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

/// Whether a guest can be given so many seconds to release a device.
pub(crate) fn is_removal_timeout(seconds: u32) -> bool {
    (1..=MAX_REMOVAL_TIMEOUT).contains(&seconds)
}

impl PlatformConfig {
    fn validate_slots(&self) -> Result<(), InvalidConfig> {
        for (key, slots) in [
            ("hotplug_slots", self.hotplug_slots),
            ("segment_hotplug_slots", self.segment_hotplug_slots),
        ] {
            if let Some(slots) = slots.filter(|slots| *slots > MAX_HOTPLUG_SLOTS) {
                return Err(InvalidConfig::HotplugSlots { key, slots });
            }
        }
        if let Some(seconds) = self.removal_timeout
            && !is_removal_timeout(seconds)
        {
            return Err(InvalidConfig::RemovalTimeout { seconds });
        }
        if let Some(seconds) = self.power_off_timeout
            && !(1..=MAX_POWER_OFF_TIMEOUT).contains(&seconds)
        {
            return Err(InvalidConfig::PowerOffTimeout { seconds });
        }
        match self.hotplug_mmio64 {
            Some(size) if size == 0 || !size.is_multiple_of(1 << 20) => {
                Err(InvalidConfig::HotplugRoom { size })
            }
            _ => Ok(()),
        }
    }

    /// What the guest is told in SMBIOS, whose texts end with a zero and are none where they are empty.
    fn validate_identity(&self) -> Result<(), InvalidConfig> {
        if let Some(uuid) = &self.uuid {
            uuid.parse::<busway_iommu::Uuid>()
                .map_err(InvalidConfig::Uuid)?;
        }
        let serial = self.serial_number.iter();
        let texts = serial.map(|text| ("serial_number", text));
        let texts = texts.chain(self.oem_strings.iter().map(|text| ("oem_strings", text)));
        let mut size = 0;
        for (key, text) in texts {
            if text.is_empty() || text.contains('\0') {
                return Err(InvalidConfig::IdentityText { key });
            }
            size += text.len() + 1;
        }
        let count = self.oem_strings.len();
        if count > MAX_OEM_STRINGS {
            return Err(InvalidConfig::OemStrings { count });
        }
        if size > MAX_IDENTITY {
            return Err(InvalidConfig::IdentitySize { size });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
