//! One PCI device as sysfs shows it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use busway_iommu::is_vfio_driver;
use busway_pci::Bdf;

use super::root::{self, SysRoot};

/// A PCI function of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Where it sits.
    pub address: Bdf,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem device id.
    pub subsystem_device: u16,
    /// Base class, subclass and programming interface: `0x010802` for NVMe.
    pub class: u32,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// The driver that alone may take it, where one was set.
    pub driver_override: Option<String>,
    /// What its drivers are found by: `pci:v00008086d000010D3sv…`.
    pub modalias: Option<String>,
    /// The bridge that it is behind; none on a root bus.
    pub parent: Option<Bdf>,
    /// Its host bridge, as sysfs names it: `pci0000:00`.
    pub root_bus: Option<String>,
    /// The PCI device whose driver made the host bridge that this one is behind: an Intel volume
    /// management device. It ends when that one loses its driver.
    pub made_by: Option<Bdf>,
    /// IOMMU group; none where no IOMMU translates for it.
    pub group: Option<u32>,
    /// Whether the group is one that VFIO made for want of an IOMMU: what has the device reaches all
    /// memory, and no guest's can be mapped for it (`enable_unsafe_noiommu_mode`).
    pub without_iommu: bool,
    /// NUMA node, where the firmware says one.
    pub numa_node: Option<u32>,
    /// BARs 0 to 5 and the expansion ROM, those that there are.
    pub resources: Vec<Resource>,
    /// Its PCI Express link, where it has one of its own.
    pub link: Option<Link>,
    /// How the kernel can reset it, the first choice first: `flr`, `pm`, `bus` and others.
    pub reset_methods: Vec<String>,
    /// Whether the firmware's messages appeared on it.
    pub boot_display: bool,
    /// Where it can make virtual functions.
    pub sriov: Option<Sriov>,
    /// Where it is a virtual function: what made it.
    pub physical_function: Option<Bdf>,
    /// Its node in `/dev/vfio/devices`, where VFIO has it and the kernel makes such nodes.
    pub vfio_cdev: Option<String>,
}

/// A range of addresses that a device decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// 0 to 5 for a BAR, 6 for the expansion ROM.
    pub index: u8,
    /// Bytes.
    pub size: u64,
    /// The kernel's `IORESOURCE_*` flags (linux/ioport.h).
    pub flags: u64,
}

impl Resource {
    /// Whether it is a range of I/O ports, not of memory.
    #[must_use]
    pub const fn is_io(&self) -> bool {
        self.flags & IORESOURCE_IO != 0
    }

    /// Whether it may be read ahead of need.
    #[must_use]
    pub const fn is_prefetchable(&self) -> bool {
        self.flags & IORESOURCE_PREFETCH != 0
    }

    /// Whether it may lie above 4 GiB.
    #[must_use]
    pub const fn is_64bit(&self) -> bool {
        self.flags & IORESOURCE_MEM_64 != 0
    }
}

// linux/ioport.h
const IORESOURCE_IO: u64 = 0x100;
const IORESOURCE_PREFETCH: u64 = 0x2000;
const IORESOURCE_MEM_64: u64 = 0x10_0000;

/// A PCI Express link: what it runs at, and the most that the device can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// As it runs; nothing while it is down.
    pub current: Option<LinkState>,
    /// At most.
    pub max: LinkState,
}

/// Speed and width of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Speed in tenths of GT/s: 25, 50, 80, 160, 320, 640.
    pub speed: u16,
    /// Lanes.
    pub width: u8,
}

impl Link {
    /// Whether it runs slower or narrower than the device could.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        let max = self.max;
        self.current
            .is_some_and(|now| now.speed < max.speed || now.width < max.width)
    }
}

/// Single-root I/O virtualisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// Virtual functions that it can make.
    pub total: u16,
    /// Virtual functions that there are.
    pub functions: Vec<Bdf>,
}

impl HostDevice {
    /// Whether it is a bridge to another bus, which no guest can be given.
    ///
    /// PCI Code and ID Assignment 1.15 §1.7: PCI-to-PCI, CardBus and semi-transparent bridges, those
    /// whose header is not of type 0.
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        matches!(self.class >> 8, 0x0604 | 0x0607 | 0x0609)
    }

    /// The device whose driver brought it forth: its physical function, or what made its PCI domain.
    #[must_use]
    pub fn maker(&self) -> Option<Bdf> {
        self.physical_function.or(self.made_by)
    }

    /// Whether a VFIO driver has it.
    #[must_use]
    pub fn is_with_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }
}

/// The devices whose drivers brought one forth, the nearest first.
pub(super) fn makers(devices: &BTreeMap<Bdf, HostDevice>, address: Bdf) -> Vec<Bdf> {
    let mut makers = Vec::new();
    let of = |address| devices.get(&address).and_then(HostDevice::maker);
    let mut next = of(address);
    while let Some(maker) = next {
        // Nothing makes itself; what is read may say so.
        if maker == address || makers.contains(&maker) {
            break;
        }
        makers.push(maker);
        next = of(maker);
    }
    makers
}

/// The host could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// cannot list the PCI devices in {folder}: {source}
    #[error("cannot list the PCI devices in {}: {source}\n  is sysfs mounted, and has this host PCI?", folder.display())]
    NoPciBus {
        /// Where they were looked for.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Every device of the host.
pub(super) fn read_all(root: &SysRoot) -> Result<BTreeMap<Bdf, HostDevice>, HostError> {
    let folder = root.bus().join("devices");
    let names =
        root::try_names(&folder).map_err(|source| HostError::NoPciBus { folder, source })?;
    let addresses: Vec<_> = names
        .iter()
        .filter_map(|name| root::full_address(name))
        .collect();
    let read_some = |addresses: &[Bdf]| -> Vec<HostDevice> {
        let devices = addresses.iter().filter_map(|&address| read(root, address));
        devices.collect()
    };
    // A device is two dozen small files: with hundreds of devices that is worth every processor.
    let share = addresses.len().div_ceil(threads()).max(FEW);
    let devices = if addresses.len() <= share {
        read_some(&addresses)
    } else {
        thread::scope(|scope| {
            let parts = addresses.chunks(share);
            let readers: Vec<_> = parts.map(|part| scope.spawn(|| read_some(part))).collect();
            let parts = readers
                .into_iter()
                .map(|reader| reader.join().unwrap_or_default());
            parts.flatten().collect()
        })
    };
    Ok(devices
        .into_iter()
        .map(|device| (device.address, device))
        .collect())
}

/// So few devices that a thread costs more than it brings.
const FEW: usize = 64;

/// How many threads share what is read of a host.
pub(super) fn threads() -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(16))
}

/// One device; none where it is not there, or has just vanished.
fn read(root: &SysRoot, address: Bdf) -> Option<HostDevice> {
    // By its real place: the way there is shorter for each of the files.
    let folder = root::target(root, &root.device(address))?;
    let modalias = root::attribute(&folder.join("modalias"));
    let Ids {
        vendor,
        device,
        subsystem_vendor,
        subsystem_device,
        class,
    } = modalias
        .as_deref()
        .and_then(Ids::of_modalias)
        .or_else(|| Ids::read(&folder))?;
    let Place {
        parent,
        root_bus,
        made_by,
    } = Place::of(&folder);
    let driver = root.driver_of(&folder);
    let lent = driver.as_deref().is_some_and(is_vfio_driver);
    let sriov = sriov(&folder);
    Some(HostDevice {
        address,
        vendor,
        device,
        subsystem_vendor,
        subsystem_device,
        class,
        driver,
        driver_override: root::override_in(&folder),
        modalias,
        parent,
        root_bus,
        made_by,
        group: root.group_of(&folder),
        without_iommu: lent && SysRoot::is_without_iommu(&folder.join("iommu_group")),
        // -1 where the firmware says nothing.
        numa_node: root::number(&folder.join("numa_node")),
        resources: resources_in(&folder),
        link: link(&folder),
        reset_methods: reset_methods(&folder),
        // Only displays have the attributes: VGA the one, any since Linux 6.17 the other.
        boot_display: class >> 16 == 0x03
            && ["boot_vga", "boot_display"]
                .iter()
                .any(|name| root::number(&folder.join(name)) == Some(1_u8)),
        physical_function: match &sriov {
            Some(_) => None,
            None => link_address(&folder.join("physfn")),
        },
        sriov,
        vfio_cdev: match lent {
            true => root::names(&folder.join("vfio-dev")).into_iter().next(),
            false => None,
        },
    })
}

/// What a device says that it is.
struct Ids {
    vendor: u16,
    device: u16,
    subsystem_vendor: u16,
    subsystem_device: u16,
    class: u32,
}

impl Ids {
    /// From `pci:v00008086d000010D3sv00008086sd0000A01Fbc02sc00i00` (drivers/pci/pci-driver.c,
    /// modalias_show), which is one file for five.
    fn of_modalias(text: &str) -> Option<Self> {
        let mut rest = text.strip_prefix("pci:")?;
        let mut field = |name: &str, digits: usize| {
            let number = rest.strip_prefix(name)?;
            let value = u32::from_str_radix(number.get(..digits)?, 16).ok()?;
            rest = number.get(digits..)?;
            Some(value)
        };
        let ids = [
            field("v", 8)?,
            field("d", 8)?,
            field("sv", 8)?,
            field("sd", 8)?,
        ];
        let [vendor, device, subsystem_vendor, subsystem_device] =
            ids.map(|id| u16::try_from(id).ok());
        Some(Self {
            vendor: vendor?,
            device: device?,
            subsystem_vendor: subsystem_vendor?,
            subsystem_device: subsystem_device?,
            class: field("bc", 2)? << 16 | field("sc", 2)? << 8 | field("i", 2)?,
        })
    }

    fn read(folder: &Path) -> Option<Self> {
        let id = |name: &str| u16::try_from(root::hex(&folder.join(name))?).ok();
        Some(Self {
            vendor: id("vendor")?,
            device: id("device")?,
            subsystem_vendor: id("subsystem_vendor").unwrap_or(0),
            subsystem_device: id("subsystem_device").unwrap_or(0),
            class: root::hex(&folder.join("class"))?,
        })
    }
}

/// Where a device is, by the way to it: `/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0`.
struct Place {
    /// The bridge above it.
    parent: Option<Bdf>,
    /// Its host bridge.
    root_bus: Option<String>,
    /// The device above the host bridge, whose driver made that: drivers/pci/controller/vmd.c makes
    /// `pci0000:00/0000:00:0e.0/pci10000:e0`.
    made_by: Option<Bdf>,
}

impl Place {
    fn of(folder: &Path) -> Self {
        let above = folder.ancestors().skip(1);
        let mut above = above
            .filter_map(|path| path.file_name()?.to_str())
            .peekable();
        let parent = above.peek().copied().and_then(root::full_address);
        let root_bus = above.find(|name| is_root_bus(name)).map(str::to_owned);
        Self {
            parent,
            root_bus,
            made_by: above.find_map(root::full_address),
        }
    }
}

/// `pci0000:00`; with five digits behind an Intel volume management device.
fn is_root_bus(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    name.strip_prefix("pci")
        .and_then(|rest| rest.split_once(':'))
        .is_some_and(|(segment, bus)| digits(segment) && digits(bus))
}

fn link_address(path: &Path) -> Option<Bdf> {
    root::link_name(path)?.parse().ok()
}

fn sriov(folder: &Path) -> Option<Sriov> {
    Some(Sriov {
        total: root::number(&folder.join("sriov_totalvfs"))?,
        functions: root::names(folder)
            .iter()
            .filter(|name| name.starts_with("virtfn"))
            .filter_map(|name| link_address(&folder.join(name)))
            .collect(),
    })
}

fn link(folder: &Path) -> Option<Link> {
    let state = |which: &str| {
        let text = root::attribute(&folder.join(format!("{which}_link_speed")))?;
        Some(LinkState {
            speed: speed(&text)?,
            // 0 and 255 where it is not known, or the device does not answer.
            width: root::number(&folder.join(format!("{which}_link_width")))
                .filter(|width| (1..=32).contains(width))?,
        })
    };
    let max = state("max")?;
    let current = state("current");
    Some(Link { current, max })
}

/// `8.0 GT/s PCIe` (before Linux 5.7 `8 GT/s`) in tenths; `Unknown` is none.
fn speed(text: &str) -> Option<u16> {
    let number = text.strip_suffix(" PCIe").unwrap_or(text);
    let number: f32 = number.strip_suffix(" GT/s")?.parse().ok()?;
    let tenths = (number * 10.0).round();
    (1.0..10_000.0).contains(&tenths).then_some(tenths as u16)
}

/// The attribute `reset_method`, since Linux 5.15; before, only `reset` says that there is one.
fn reset_methods(folder: &Path) -> Vec<String> {
    let words = root::attribute(&folder.join("reset_method"));
    let words = words.or_else(|| folder.join("reset").exists().then(|| "yes".to_owned()));
    let words = words.unwrap_or_default();
    words.split_whitespace().map(str::to_owned).collect()
}

/// BARs 0 to 5 and the expansion ROM, those that there are, of the device whose folder in sysfs is
/// `folder`.
#[must_use]
pub fn resources_in(folder: &Path) -> Vec<Resource> {
    root::attribute(&folder.join("resource")).map_or_else(Vec::new, |text| resources(&text))
}

/// The sysfs attribute `resource`: a line `START END FLAGS` for each, all zero where absent.
fn resources(text: &str) -> Vec<Resource> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    (0..7u8)
        .zip(text.lines())
        .filter_map(|(index, line)| {
            let mut words = line.split_whitespace().map(number);
            let (start, end, flags) = (words.next()??, words.next()??, words.next()??);
            (end > start).then(|| Resource {
                index,
                size: (end - start).saturating_add(1),
                flags,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_those_that_the_device_decodes() {
        let text = "0x00000000fe000000 0x00000000fe003fff 0x0000000000140204\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    nonsense\n\
                    0x0000000000000000 0xffffffffffffffff 0x0000000000040200\n";
        let sizes: Vec<_> = resources(text).iter().map(|r| (r.index, r.size)).collect();
        assert_eq!(sizes, [(0, 0x4000), (3, u64::MAX)]);
    }

    #[test]
    fn speeds_are_read_in_both_spellings_and_nonsense_is_none() {
        assert_eq!(speed("8.0 GT/s PCIe"), Some(80));
        assert_eq!(speed("2.5 GT/s"), Some(25));
        assert_eq!(speed("64 GT/s"), Some(640));
        for text in ["Unknown", "", "NaN GT/s", "-8 GT/s", "inf GT/s", "1e9 GT/s"] {
            assert_eq!(speed(text), None, "{text}");
        }
    }

    #[test]
    fn a_modalias_says_all_five_numbers() {
        let ids = Ids::of_modalias("pci:v00008086d000010D3sv00001AF4sd00001100bc02sc01i03");
        let ids = ids.unwrap();
        assert_eq!((ids.vendor, ids.device), (0x8086, 0x10d3));
        assert_eq!(
            (ids.subsystem_vendor, ids.subsystem_device),
            (0x1af4, 0x1100)
        );
        assert_eq!(ids.class, 0x020103);
        for text in [
            "",
            "pci:v0000",
            "pci:vFFFFFFFFd00000000",
            "pci:v0000808éd000010D3",
        ] {
            assert!(Ids::of_modalias(text).is_none(), "{text}");
        }
    }
}
