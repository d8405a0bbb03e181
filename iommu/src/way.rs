//! Which of the kernel's two interfaces a VM's devices are reached by, and why.
//!
//! iommufd is the newer one, and the one with a future. What it lacked until Linux 6.19 is a way to map
//! the memory of devices, which a type1 container maps by address: a device that reaches another's
//! memory, or its own by the address that its driver knows, fails without. So iommufd is taken where it
//! can do all that the VM may need. Whether it can map a device's memory is known once it has; the trial
//! opens the device, which the kernel resets, and so is left out where the kernel is too old.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use crate::{IommufdMode, SpaceKind, SysRoot, Uuid};

/// The first Linux whose iommufd maps the memory of devices, by dma-buf.
const MAPS_DEVICES: (u32, u32) = (6, 19);

/// The way of a VM's devices to the IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The interface.
    pub kind: SpaceKind,
    /// Why it is this one: a part of a sentence.
    pub why: String,
    on_trial: bool,
}

impl Way {
    /// The way for the functions whose folders in sysfs are `devices`. `peers`: they are to reach each
    /// other's memory where that is possible.
    #[must_use]
    pub fn choose(paths: &SysRoot, mode: IommufdMode, devices: &[&Path], peers: bool) -> Self {
        let way = |kind, why: &str| Self {
            kind,
            why: why.to_owned(),
            on_trial: false,
        };
        match mode {
            IommufdMode::On => return way(SpaceKind::Iommufd, "it is what was asked for"),
            IommufdMode::Off => return way(SpaceKind::Type1, "it is what was asked for"),
            IommufdMode::Auto => {}
        }
        if let Some(why) = without_iommufd(paths, devices) {
            return way(SpaceKind::Type1, &why);
        }
        if !peers {
            let why = "it does all that is needed where devices do not reach each other's memory \
                       (p2p=off)";
            return way(SpaceKind::Iommufd, why);
        }
        if !devices.iter().any(|device| has_memory(device)) {
            let why = "no device has memory that others could reach";
            return way(SpaceKind::Iommufd, why);
        }
        if let Some(why) = without_type1(paths, devices) {
            return way(SpaceKind::Iommufd, &why);
        }
        if release(paths).is_some_and(|release| release < MAPS_DEVICES) {
            let (major, minor) = MAPS_DEVICES;
            let why = format!(
                "it lets devices reach each other's memory, which iommufd does from Linux \
                 {major}.{minor} on"
            );
            return way(SpaceKind::Type1, &why);
        }
        Self {
            on_trial: true,
            ..way(
                SpaceKind::Iommufd,
                "it does all that is needed, with the devices' memory as dma-bufs",
            )
        }
    }

    /// Whether the interface has yet to show that it can map the devices' memory: there is another way.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        self.on_trial
    }

    /// The other way, after a trial that ended with this error.
    #[must_use]
    pub fn instead(error: &dyn fmt::Display) -> Self {
        Self {
            kind: SpaceKind::Type1,
            why: format!(
                "it lets devices reach each other's memory, which iommufd does not here: {error}"
            ),
            on_trial: false,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.why)
    }
}

/// Why iommufd cannot be used for these devices, where that is so.
fn without_iommufd(paths: &SysRoot, devices: &[&Path]) -> Option<String> {
    let node = paths.iommufd();
    if let Err(error) = open(&node) {
        return Some(match error.kind() {
            io::ErrorKind::NotFound => "the host has no iommufd".to_owned(),
            _ => format!("{} cannot be opened: {error}", node.display()),
        });
    }
    devices.iter().find_map(|device| {
        let name = device.file_name().unwrap_or_default().display();
        let Some(node) = paths.cdev(device) else {
            return Some(format!("{name} has no node in /dev/vfio/devices"));
        };
        let error = open(&node).err()?;
        Some(format!("{} cannot be opened: {error}", node.display()))
    })
}

/// Why a type1 container cannot be used for these devices, where that is so.
fn without_type1(paths: &SysRoot, devices: &[&Path]) -> Option<String> {
    let groups = devices.iter().filter_map(|device| paths.group_of(device));
    let groups = groups.map(|number| paths.group(number));
    let nodes = [paths.container()].into_iter().chain(groups);
    nodes.into_iter().find_map(|node| {
        let error = open(&node).err()?;
        let node = node.display();
        Some(match error.kind() {
            io::ErrorKind::NotFound => format!("the other way is not there ({node})"),
            _ => format!("the other way is closed: {node} cannot be opened: {error}"),
        })
    })
}

/// Opens a node for a moment, which of all that says no is the only thing that is sure. What is busy
/// can be opened: by whom it is held is told when it is opened for good.
fn open(node: &Path) -> io::Result<()> {
    match OpenOptions::new().read(true).write(true).open(node) {
        Err(error) if error.raw_os_error() != Some(libc::EBUSY) => Err(error),
        _ => Ok(()),
    }
}

/// Whether a function has a BAR that is memory and others could reach, as far as sysfs says: a line of start, end and flags
/// (linux/ioport.h) for each.
fn has_memory(device: &Path) -> bool {
    const BARS: usize = 6;
    const IORESOURCE_MEM: u64 = 0x200;
    // A mediated device's is nobody else's to reach.
    if Uuid::of_device(device).is_some() {
        return false;
    }
    let Ok(text) = fs::read_to_string(device.join("resource")) else {
        return true;
    };
    let flags = text.lines().take(BARS).filter_map(|line| {
        let word = line.split_whitespace().nth(2)?;
        u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()
    });
    let mut flags = flags;
    flags.any(|flags| flags & IORESOURCE_MEM != 0)
}

/// The running kernel's version, as in `6.8.12-4-pve`.
fn release(paths: &SysRoot) -> Option<(u32, u32)> {
    let text = fs::read_to_string(paths.proc.join("sys/kernel/osrelease")).ok()?;
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// A host of a kernel of this release, with two functions at one group each.
    struct Host {
        _root: tempfile::TempDir,
        paths: SysRoot,
        devices: [PathBuf; 2],
    }

    const MEMORY: &str = "0x00000000f0000000 0x00000000f000ffff 0x0000000000040200\n";
    const PORTS: &str = "0x000000000000e000 0x000000000000e01f 0x0000000000040101\n";
    const ROM: &str = "0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n0x0 0x0 0x0\n\
                       0x00000000f0100000 0x00000000f01fffff 0x000000000004e200\n";

    impl Host {
        fn new(release: &str) -> Self {
            let root = tempfile::tempdir().unwrap();
            let paths = SysRoot::under(root.path());
            let devices = [3, 4].map(|number| {
                let folder = paths.device(format_args!("0000:0{number}:00.0"));
                let cdev = format!("vfio{number}");
                fs::create_dir_all(folder.join("vfio-dev").join(&cdev)).unwrap();
                let group = paths.sys.join(format!("kernel/iommu_groups/{number}"));
                symlink(group, folder.join("iommu_group")).unwrap();
                fs::write(folder.join("resource"), MEMORY).unwrap();
                fs::create_dir_all(paths.dev.join("vfio/devices")).unwrap();
                fs::write(paths.dev.join("vfio/devices").join(cdev), "").unwrap();
                fs::write(paths.group(number), "").unwrap();
                folder
            });
            for node in [paths.iommufd(), paths.container()] {
                fs::write(node, "").unwrap();
            }
            fs::create_dir_all(paths.proc.join("sys/kernel")).unwrap();
            fs::write(paths.proc.join("sys/kernel/osrelease"), release).unwrap();
            Self {
                _root: root,
                paths,
                devices,
            }
        }

        fn way(&self, peers: bool) -> Way {
            let devices: Vec<_> = self.devices.iter().map(PathBuf::as_path).collect();
            Way::choose(&self.paths, IommufdMode::Auto, &devices, peers)
        }

        #[track_caller]
        fn check(&self, peers: bool, kind: SpaceKind, on_trial: bool, why: &str) {
            let way = self.way(peers);
            assert_eq!((way.kind, way.is_on_trial()), (kind, on_trial), "{way}");
            assert!(way.why.contains(why), "{way}");
        }
    }

    #[test]
    fn iommufd_is_taken_where_it_can_map_what_the_devices_need() {
        for release in ["6.19.0", "6.20.1-rc1", "7.0.4+deb14-amd64"] {
            let host = Host::new(release);
            host.check(true, SpaceKind::Iommufd, true, "dma-bufs");
            host.check(false, SpaceKind::Iommufd, false, "p2p=off");
        }
        for release in ["6.18.7", "6.12.48+deb13-amd64", "6.8.12-4-pve", "5.15.0"] {
            let host = Host::new(release);
            host.check(true, SpaceKind::Type1, false, "from Linux 6.19 on");
            host.check(false, SpaceKind::Iommufd, false, "p2p=off");
        }
        // A kernel that does not say how old it is is tried.
        Host::new("").check(true, SpaceKind::Iommufd, true, "dma-bufs");
        let other = Way::instead(&"no dma-buf of it");
        assert_eq!((other.kind, other.is_on_trial()), (SpaceKind::Type1, false));
        assert!(other.to_string().starts_with("type1: it lets devices"));
        assert!(other.why.ends_with("no dma-buf of it"));
    }

    #[test]
    fn devices_without_memory_have_nothing_that_others_could_reach() {
        let host = Host::new("6.12.0");
        let [one, other] = &host.devices;
        fs::write(one.join("resource"), PORTS).unwrap();
        host.check(true, SpaceKind::Type1, false, "from Linux 6.19 on");
        // An expansion ROM is never mapped for others.
        fs::write(other.join("resource"), format!("{PORTS}{ROM}")).unwrap();
        host.check(true, SpaceKind::Iommufd, false, "no device has memory");
        fs::remove_file(other.join("resource")).unwrap();
        host.check(true, SpaceKind::Type1, false, "from Linux 6.19 on");
    }

    #[test]
    fn the_memory_of_a_mediated_device_is_for_nobody_else() {
        let mut host = Host::new("6.12.0");
        let [one, other] = &mut host.devices;
        fs::write(one.join("resource"), PORTS).unwrap();
        let uuid = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let mediated = host.paths.mediated(uuid.parse().unwrap());
        fs::create_dir_all(mediated.parent().unwrap()).unwrap();
        fs::rename(&*other, &mediated).unwrap();
        *other = mediated;
        host.check(true, SpaceKind::Iommufd, false, "no device has memory");
    }

    #[test]
    fn where_one_way_is_not_there_it_is_the_other() {
        let host = Host::new("6.12.0");
        fs::remove_file(host.paths.group(4)).unwrap();
        host.check(true, SpaceKind::Iommufd, false, "vfio/4)");
        fs::remove_file(host.paths.container()).unwrap();
        host.check(true, SpaceKind::Iommufd, false, "vfio/vfio)");

        let host = Host::new("7.0.0");
        fs::remove_file(host.paths.dev.join("vfio/devices/vfio4")).unwrap();
        host.check(true, SpaceKind::Type1, false, "0000:04:00.0 has no node");
        host.check(false, SpaceKind::Type1, false, "0000:04:00.0 has no node");
        fs::remove_file(host.paths.iommufd()).unwrap();
        host.check(false, SpaceKind::Type1, false, "the host has no iommufd");
        // What is there and cannot be opened is no way either.
        fs::create_dir(host.paths.iommufd()).unwrap();
        host.check(false, SpaceKind::Type1, false, "dev/iommu cannot be opened");
    }

    #[test]
    fn what_was_asked_for_is_what_is_taken() {
        let host = Host::new("6.12.0");
        for (mode, kind) in [
            (IommufdMode::On, SpaceKind::Iommufd),
            (IommufdMode::Off, SpaceKind::Type1),
        ] {
            let way = Way::choose(&host.paths, mode, &[], true);
            assert_eq!((way.kind, way.is_on_trial()), (kind, false));
            assert!(way.why.contains("asked for"));
        }
    }
}
