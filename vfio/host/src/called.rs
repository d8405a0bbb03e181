//! What people call a device: its address in several spellings, or something that it is known by.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use busway_iommu::Uuid;
use busway_pci::{Bdf, ParseBdfError};

use super::root::{self, SysRoot};
use super::usage::block;

/// A device as a person names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Called {
    /// By its whole address (`0000:01:00.0`), which need not be there.
    Address(Bdf),
    /// By an address without its domain (`01:00.0`), which is 0 unless there is no such device.
    Short(Bdf),
    /// By the UUID of a mediated device, or its folder; it need not be there.
    Mediated(Uuid),
    /// By vendor and device id (`10de:1b81`), as `lspci -n` prints them.
    Ids {
        /// Vendor id.
        vendor: u16,
        /// Device id.
        device: u16,
    },
    /// By the name of its network interface (`wlp3s0`) or disk (`nvme0n1`), or of anything else that has a
    /// class (`renderD128`, `nvme0`, `mlx5_0`).
    Name(String),
    /// By a file of it (`/sys/class/net/wlp3s0/device`, `/dev/nvme0n1`).
    File(PathBuf),
}

/// What a person named is not one device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CalledError {
    /// no PCI device is called {0}
    #[error(
        "no PCI device has the address, the interface, the disk or the ids `{0}`\n  \
         see those there are: busway device list"
    )]
    Nothing(String),
    /// {0} is a mediated device, and no PCI device
    #[error(
        "{0} is a mediated device, and no PCI device\n  \
         its driver lends it without its being bound; to remove it: \
         echo 1 > /sys/bus/mdev/devices/{0}/remove"
    )]
    Mediated(Uuid),
    /// {called} is several devices
    #[error("`{called}` is {} devices\n  name one by its address: {}", .devices.len(), words(.devices))]
    Several {
        /// What was said.
        called: String,
        /// What it may mean.
        devices: Vec<Bdf>,
    },
}

fn words(devices: &[Bdf]) -> String {
    let words: Vec<_> = devices.iter().map(Bdf::to_string).collect();
    words.join(", ")
}

/// The longest name of a network interface: `IFNAMSIZ` of linux/if.h less the byte that ends it. Disks
/// have longer ones (`DISK_NAME_LEN` of linux/blkdev.h).
const LONGEST_NAME: usize = 31;

impl FromStr for Called {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseBdfError(text.to_owned());
        if text.contains('/') {
            let path = Path::new(text);
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.unwrap_or_default();
            if let Ok(uuid) = name.parse() {
                return Ok(Self::Mediated(uuid));
            }
            return match name.parse().ok() {
                Some(address) => Ok(Self::Address(address)),
                None if path.is_absolute() => Ok(Self::File(path.to_owned())),
                None => Err(error()),
            };
        }
        if let Ok(address) = text.parse() {
            return Ok(match text.matches(':').count() {
                1 => Self::Short(address),
                _ => Self::Address(address),
            });
        }
        if let Ok(uuid) = text.parse() {
            return Ok(Self::Mediated(uuid));
        }
        if let Some(address) = of_libvirt(text).or_else(|| of_tools(text)) {
            return Ok(Self::Address(address));
        }
        if let Some((vendor, device)) = ids(text) {
            return Ok(Self::Ids { vendor, device });
        }
        let is_name = (1..=LONGEST_NAME).contains(&text.len())
            && !matches!(text, "." | "..")
            && text.bytes().all(|b| b.is_ascii_graphic() && b != b':');
        is_name
            .then(|| Self::Name(text.to_owned()))
            .ok_or_else(error)
    }
}

/// `pci_0000_01_00_0`, as `virsh nodedev-list` prints it.
fn of_libvirt(text: &str) -> Option<Bdf> {
    let mut parts = text.strip_prefix("pci_")?.split('_');
    let mut next = || parts.next();
    let (segment, bus, device, function) = (next()?, next()?, next()?, next()?);
    let address = format!("{segment}:{bus}:{device}.{function}");
    next().is_none().then(|| address.parse().ok()).flatten()
}

/// As udev (`pci-0000:01:00.0`), lshw (`pci@0000:01:00.0`) and Xorg (`PCI:1@0:0:0`, in decimal) write it.
fn of_tools(text: &str) -> Option<Bdf> {
    let of_udev = text
        .strip_prefix("pci-")
        .or_else(|| text.strip_prefix("pci@"));
    if let Some(rest) = of_udev {
        return root::full_address(rest);
    }
    let rest = text
        .strip_prefix("PCI:")
        .or_else(|| text.strip_prefix("pci:"))?;
    let mut parts = rest.split(':');
    let mut next = || parts.next();
    let (bus, device, function) = (next()?, next()?, next()?);
    let (bus, segment) = bus.split_once('@').unwrap_or((bus, "0"));
    let number = |text: &str| text.parse::<u32>().ok();
    let (segment, bus) = (number(segment)?, number(bus)?);
    let (device, function) = (number(device)?, number(function)?);
    let address = format!("{segment:04x}:{bus:02x}:{device:02x}.{function:x}");
    next().is_none().then(|| address.parse().ok()).flatten()
}

/// `10de:1b81`
fn ids(text: &str) -> Option<(u16, u16)> {
    let id = |text: &str| {
        let digits = text.len() == 4 && text.bytes().all(|b| b.is_ascii_hexdigit());
        digits.then(|| u16::from_str_radix(text, 16).ok()).flatten()
    };
    let (vendor, device) = text.split_once(':')?;
    Some((id(vendor)?, id(device)?))
}

impl Called {
    /// The one device that is meant.
    ///
    /// # Errors
    ///
    /// Where it is none or several, or a mediated one. A whole address is what it says, there or not.
    pub fn find(&self, root: &SysRoot) -> Result<Bdf, CalledError> {
        let (called, found) = match self {
            Self::Address(address) => return Ok(*address),
            Self::Mediated(uuid) => return Err(CalledError::Mediated(*uuid)),
            Self::Short(address) if root.device(*address).exists() => return Ok(*address),
            Self::Short(address) => {
                let same = format!(":{}", place(*address));
                let all = addresses(root).into_iter();
                let found: Vec<_> = all.filter(|a| a.to_string().ends_with(&same)).collect();
                if found.is_empty() {
                    return Ok(*address);
                }
                (place(*address), found)
            }
            Self::Ids { vendor, device } => {
                let has = |address: &Bdf| {
                    let folder = root.device(*address);
                    let is = |name, id: u16| root::hex(&folder.join(name)) == Some(id.into());
                    is("vendor", *vendor) && is("device", *device)
                };
                let found = addresses(root).into_iter().filter(has).collect();
                (format!("{vendor:04x}:{device:04x}"), found)
            }
            Self::Name(name) => (name.clone(), named(root, name)),
            Self::File(path) => {
                let found = match of_file(root, path) {
                    // A mediated device may be a PCI device's.
                    Some(place) => match mediated(&place) {
                        Some(uuid) => return Err(CalledError::Mediated(uuid)),
                        None => root::innermost_pci(&place),
                    },
                    None => None,
                };
                let called = root::one_line(&path.to_string_lossy());
                (called, found.into_iter().collect())
            }
        };
        match found[..] {
            [one] => Ok(one),
            [] => Err(CalledError::Nothing(called)),
            _ => Err(CalledError::Several {
                called,
                devices: found,
            }),
        }
    }
}

/// The devices that something is of that is called so: an interface or a disk, or else anything that has
/// a class (`card0`, `renderD128`, `nvme0`, `mlx5_0`).
fn named(root: &SysRoot, name: &str) -> Vec<Bdf> {
    let classes = root.sys.join("class");
    let of = |class: &str| root::target(root, &classes.join(class).join(name));
    let owners = |folder: PathBuf| block::owners(root, &folder);
    if let Some(folder) = ["net", "block"].into_iter().find_map(of) {
        return owners(folder);
    }
    let all = root::names(&classes);
    let found: BTreeSet<_> = all
        .iter()
        .filter_map(|class| of(class))
        .flat_map(owners)
        .collect();
    found.into_iter().collect()
}

/// An address without its domain: `e1:00.0`.
fn place(address: Bdf) -> String {
    let text = address.to_string();
    text.split_once(':')
        .map_or_else(|| text.clone(), |(_, place)| place.to_owned())
}

fn addresses(root: &SysRoot) -> Vec<Bdf> {
    let names = root::names(&root.bus().join("devices"));
    names
        .iter()
        .filter_map(|name| root::full_address(name))
        .collect()
}

/// Where in sysfs a file of it is, or the disk of a node in `/dev`, links followed.
fn of_file(root: &SysRoot, path: &Path) -> Option<PathBuf> {
    if path.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    if let Ok(below) = path.strip_prefix("/sys") {
        return place_of(root, &root.sys.join(below));
    }
    let node = root.dev.join(path.strip_prefix("/dev").ok()?);
    // Links by name: /dev/disk/by-id.
    let node = fs::canonicalize(node).ok()?;
    let name = node.file_name()?.to_str()?;
    let block = place_of(root, &root.sys.join("class/block").join(name));
    block.or_else(|| {
        let below = node.strip_prefix(fs::canonicalize(&root.dev).ok()?).ok()?;
        of_node(root, below)
    })
}

/// What has the node at a path below `/dev`.
fn of_node(root: &SysRoot, node: &Path) -> Option<PathBuf> {
    let name = node.file_name()?;
    let classes = root.sys.join("class");
    let mut all = root::names(&classes)
        .into_iter()
        .filter_map(|class| root::target(root, &classes.join(class).join(name)));
    let says = format!("DEVNAME={}", node.to_str()?);
    let place = all.find(|folder| {
        let text = root::attribute(&folder.join("uevent")).unwrap_or_default();
        text.lines().any(|line| line == says)
    })?;
    Some(place.strip_prefix(&root.sys).ok()?.to_owned())
}

/// A file's real place, below sysfs.
fn place_of(root: &SysRoot, file: &Path) -> Option<PathBuf> {
    let place = fs::canonicalize(file).ok()?;
    let sys = fs::canonicalize(&root.sys).ok()?;
    Some(place.strip_prefix(sys).ok()?.to_owned())
}

/// The mediated device that a place below sysfs is in.
fn mediated(place: &Path) -> Option<Uuid> {
    let names = place.iter().rev().filter_map(|name| name.to_str());
    let mut uuids = names.filter_map(|name| name.parse().ok());
    uuids.next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_spelling_is_told_from_the_others() {
        let address = |text: &str| text.parse::<Bdf>().unwrap();
        let one = address("0000:01:00.0");
        for (text, called) in [
            ("0000:01:00.0", Called::Address(one)),
            ("01:00.0", Called::Short(one)),
            ("pci_0000_01_00_0", Called::Address(one)),
            ("pci-0000:01:00.0", Called::Address(one)),
            ("pci@0000:01:00.0", Called::Address(one)),
            ("PCI:1:0:0", Called::Address(one)),
            ("PCI:26@1:16:2", Called::Address(address("0001:1a:10.2"))),
            ("00000000:01:00.0", Called::Address(one)),
            ("/sys/bus/pci/devices/0000:01:00.0/", Called::Address(one)),
            (
                "10de:1b81",
                Called::Ids {
                    vendor: 0x10de,
                    device: 0x1b81,
                },
            ),
            ("wlp3s0", Called::Name("wlp3s0".into())),
            (
                "/sys/class/net/wlp3s0/device",
                Called::File("/sys/class/net/wlp3s0/device".into()),
            ),
        ] {
            assert_eq!(text.parse(), Ok(called), "{text}");
        }
        let uuid = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let mediated = Called::Mediated(uuid.parse().unwrap());
        for text in [
            uuid.to_owned(),
            uuid.to_uppercase(),
            format!("/sys/bus/mdev/devices/{uuid}/"),
            format!("/sys/devices/pci0000:00/0000:00:02.0/{uuid}"),
        ] {
            assert_eq!(text.parse(), Ok(mediated.clone()), "{text}");
        }
        for text in ["", "01:00", "a b", "..", "10de:1b8", "pci:1b81", "a/b"] {
            assert!(text.parse::<Called>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_of_a_mediated_device_is_not_its_parents() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        let uuid = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let parent = root.sys.join("devices/pci0000:00/0000:00:02.0");
        let node = parent.join(uuid).join("vfio-dev/vfio2");
        fs::create_dir_all(&node).unwrap();
        fs::create_dir_all(root.sys.join("class/vfio-dev")).unwrap();
        std::os::unix::fs::symlink(&node, root.sys.join("class/vfio-dev/vfio2")).unwrap();
        let called: Called = "/sys/class/vfio-dev/vfio2".parse().unwrap();
        let error = called.find(&root).unwrap_err();
        assert_eq!(error, CalledError::Mediated(uuid.parse().unwrap()));
        let called: Called = "/sys/devices/pci0000:00/0000:00:02.0/uevent"
            .parse()
            .unwrap();
        fs::write(parent.join("uevent"), "").unwrap();
        assert_eq!(called.find(&root), Ok("0000:00:02.0".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail(text in "\\PC{0,40}") {
            let folder = tempfile::tempdir().unwrap();
            if let Ok(called) = text.parse::<Called>() {
                let _ = called.find(&SysRoot::under(folder.path()));
            }
        }
    }
}
