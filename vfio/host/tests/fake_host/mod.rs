//! A made-up host: a tree of files as the kernel would show it.

#![allow(dead_code, missing_docs, unreachable_pub, unused_imports)]

mod kernel;
pub mod library;
mod line;
mod network;
mod space;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use busway_host::SysRoot;
pub use kernel::FakeKernel;

/// The tree. It goes when this is dropped.
#[derive(Debug)]
pub struct FakeHost {
    folder: tempfile::TempDir,
    pub root: SysRoot,
    /// The host's own driver for each device, by address.
    native: BTreeMap<String, String>,
    /// What its kernel does of its own.
    habits: Vec<kernel::Habit>,
}

/// A device to be put into the tree.
#[derive(Clone, Debug)]
pub struct Spec<'a> {
    pub address: &'a str,
    /// The bridge it is behind: a path below `sys/devices`.
    pub behind: &'a str,
    pub vendor: u16,
    pub device: u16,
    pub class: u32,
    pub group: Option<u32>,
    pub node: i32,
    pub driver: Option<&'a str>,
    pub driver_override: Option<&'a str>,
}

/// An Intel 82574L on the root bus, with its driver, in a group of its own.
impl Default for Spec<'_> {
    fn default() -> Self {
        Self {
            address: "0000:00:02.0",
            behind: "pci0000:00",
            vendor: 0x8086,
            device: 0x10d3,
            class: 0x020000,
            group: Some(2),
            node: -1,
            driver: Some("e1000e"),
            driver_override: None,
        }
    }
}

impl FakeHost {
    /// A host without a device.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(&folder.path().canonicalize().unwrap());
        let host = Self {
            folder,
            root,
            native: BTreeMap::new(),
            habits: Vec::new(),
        };
        for name in [
            "sys/bus/pci/devices",
            "sys/class/iommu",
            "sys/kernel/iommu_groups",
            "dev",
        ] {
            fs::create_dir_all(host.path(name)).unwrap();
        }
        host.file("sys/bus/pci/drivers_probe", "");
        host.file("proc/self/mountinfo", "");
        host.file("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        host.file("proc/net/route", "Iface\tDestination\tGateway\tFlags\n");
        host
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.root.sys.parent().unwrap().join(below)
    }

    pub fn file(&self, below: &str, text: &str) {
        let path = self.path(below);
        let folder = path.parent().unwrap();
        fs::create_dir_all(folder).unwrap();
        fs::write(&path, text).unwrap();
        if below.starts_with("run/busway/") {
            // As Busway has its own, whatever the umask of who runs the tests.
            for (path, mode) in [(folder, 0o700), (&path, 0o600)] {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
    }

    /// A link, its target given below the host's root.
    pub fn link(&self, below: &str, target: &str) {
        let path = self.path(below);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(self.path(target), path).unwrap();
    }

    pub(crate) fn put<P: AsRef<Path> + ?Sized>(&self, below: &P, text: &str) {
        let path = self.path("").join(below);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn point<P: AsRef<Path> + ?Sized>(
        &self,
        below: &P,
        target: &(impl AsRef<Path> + ?Sized),
    ) {
        let path = self.path("").join(below);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(self.path("").join(target), path).unwrap();
    }

    /// A link to a path of the host, or one whose text is not a path, as the kernel's for open files.
    pub(crate) fn point_or_say(&self, below: &Path, target: &str) {
        if target.contains(":[") || target.starts_with("..") {
            let path = self.path("").join(below);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        } else {
            self.point(below, target);
        }
    }

    pub fn append(&self, below: &str, line: &str) {
        let path = self.path(below);
        let text = fs::read_to_string(&path).unwrap_or_default();
        self.file(below, &format!("{text}{line}\n"));
    }

    pub fn device(&mut self, spec: &Spec<'_>) {
        let Spec { address, .. } = *spec;
        let folder = format!("sys/devices/{}/{address}", spec.behind);
        let file = |name: &str, text: String| self.file(&format!("{folder}/{name}"), &text);
        file("vendor", format!("{:#06x}\n", spec.vendor));
        file("device", format!("{:#06x}\n", spec.device));
        file("subsystem_vendor", "0x1af4\n".to_owned());
        file("subsystem_device", "0x1100\n".to_owned());
        file("class", format!("{:#08x}\n", spec.class));
        file("numa_node", format!("{}\n", spec.node));
        let set = spec.driver_override.unwrap_or("(null)");
        file("driver_override", format!("{set}\n"));
        file(
            "modalias",
            format!("pci:v{:08X}d{:08X}\n", spec.vendor, spec.device),
        );
        self.link(&format!("sys/bus/pci/devices/{address}"), &folder);
        if let Some(group) = spec.group {
            let group = format!("sys/kernel/iommu_groups/{group}");
            self.link(&format!("{group}/devices/{address}"), &folder);
            self.link(&format!("{folder}/iommu_group"), &group);
        }
        if let Some(driver) = spec.driver {
            self.driver(driver);
            let driver_folder = format!("sys/bus/pci/drivers/{driver}");
            self.link(&format!("{folder}/driver"), &driver_folder);
            if !driver.contains("vfio") {
                self.native(address, driver);
            }
        }
    }

    /// Says which of the host's drivers matches a device.
    pub fn native(&mut self, address: &str, driver: &str) {
        self.driver(driver);
        self.native.insert(address.to_owned(), driver.to_owned());
    }

    /// A loaded driver.
    pub fn driver(&self, name: &str) {
        fs::create_dir_all(self.path("sys/bus/pci/drivers").join(name)).unwrap();
    }

    /// A disk of a device: a path below the device's folder, and its partitions.
    pub fn disk(&self, device: &str, below: &str, number: u32, partitions: &[&str]) {
        let device = self.root.sys.join("bus/pci/devices").join(device);
        let device = device.canonicalize().unwrap();
        let folder = device.strip_prefix(self.path("")).unwrap().join(below);
        let folder = folder.to_str().unwrap().to_owned();
        self.block(&folder, &format!("{number}:0"));
        for (index, partition) in partitions.iter().enumerate() {
            let folder = format!("{folder}/{partition}");
            self.block(&folder, &format!("{number}:{}", index + 1));
            self.file(&format!("{folder}/partition"), &format!("{}\n", index + 1));
        }
    }

    /// A block device by its folder below the root.
    pub fn block(&self, folder: &str, number: &str) {
        let name = folder.rsplit('/').next().unwrap();
        self.file(&format!("{folder}/dev"), &format!("{number}\n"));
        fs::create_dir_all(self.path(folder).join("holders")).unwrap();
        self.link(&format!("sys/class/block/{name}"), folder);
        self.file(&format!("dev/{name}"), "");
    }

    /// A device of a class in `folder` below the root, the class and its name at `within`, with a node.
    pub fn class(&self, folder: &Path, within: &Path, node: &str) {
        self.put(
            &folder.join("uevent"),
            &format!("MAJOR=1\nDEVNAME={node}\n"),
        );
        let class = within.iter().next().unwrap();
        let link = Path::new("sys/class")
            .join(class)
            .join(within.file_name().unwrap());
        self.point(&link, folder);
        self.put(&Path::new("dev").join(node), "");
    }

    /// A mapped device `dm-N` on top of others.
    pub fn mapped(&self, index: u32, name: &str, uuid: &str, on: &[&str]) {
        let folder = format!("sys/devices/virtual/block/dm-{index}");
        self.block(&folder, &format!("253:{index}"));
        self.file(&format!("{folder}/dm/name"), &format!("{name}\n"));
        self.file(&format!("{folder}/dm/uuid"), &format!("{uuid}\n"));
        self.link(&format!("dev/mapper/{name}"), &format!("dev/dm-{index}"));
        self.holds(&folder, on);
    }

    /// Puts the block device in `folder` on top of others.
    pub fn holds(&self, folder: &str, on: &[&str]) {
        let name = folder.rsplit('/').next().unwrap();
        for below in on {
            let below = self.path("sys/class/block").join(below);
            symlink(self.path(folder), below.join("holders").join(name)).unwrap();
        }
    }

    pub fn mount(&self, number: &str, at: &str, source: &str) {
        let line = format!("30 1 {number} / {at} rw,relatime shared:1 - ext4 {source} rw");
        self.append("proc/self/mountinfo", &line);
    }

    /// A network interface of a device; none: a virtual one.
    pub fn interface(&self, device: Option<&str>, name: &str, uppers: &[&str]) {
        let folder = match device {
            Some(device) => {
                let device = self.root.sys.join("bus/pci/devices").join(device);
                let device = device.canonicalize().unwrap();
                let below = device.strip_prefix(self.path("")).unwrap();
                format!("{}/net/{name}", below.display())
            }
            None => format!("sys/devices/virtual/net/{name}"),
        };
        self.file(&format!("{folder}/operstate"), "up\n");
        for upper in uppers {
            let target = format!("sys/devices/virtual/net/{upper}");
            self.link(&format!("{folder}/upper_{upper}"), &target);
            // Bonds and bridges are masters of their ports; a VLAN (`bond0.7`) is none.
            if !upper.contains('.') {
                self.link(&format!("{folder}/master"), &target);
            }
        }
        self.link(&format!("sys/class/net/{name}"), &folder);
    }

    pub fn default_route(&self, interface: &str) {
        let line = format!("{interface}\t00000000\t0102000A\t0003\t0\t0\t100\t00000000\t0\t0\t0");
        self.append("proc/net/route", &line);
    }

    /// A process with an open file; `target` is below the host's root.
    pub fn process(&self, pid: u32, command: &str, target: &str) {
        self.file(&format!("proc/{pid}/comm"), &format!("{command}\n"));
        let fd = format!("proc/{pid}/fd/7");
        if target.starts_with("anon_inode:") {
            fs::create_dir_all(self.path(&fd).parent().unwrap()).unwrap();
            symlink(target, self.path(&fd)).unwrap();
        } else {
            self.link(&fd, target);
        }
    }

    /// What binding may change: driver and override of every device.
    pub fn state(&self) -> BTreeMap<String, (Option<String>, String)> {
        let folder = self.path("sys/bus/pci/devices");
        let names = fs::read_dir(&folder).unwrap();
        let state = |name: String| {
            let device = folder.join(&name);
            let driver = link_name(&device.join("driver"));
            let set = fs::read_to_string(device.join("driver_override")).unwrap();
            (name, (driver, set.trim().to_owned()))
        };
        names
            .map(|entry| state(entry.unwrap().file_name().into_string().unwrap()))
            .collect()
    }

    /// What moving devices leaves beside what is on the bus: nodes with their owners, the journal,
    /// rules of udev's.
    pub fn traces(&self) -> BTreeMap<String, String> {
        let folders = [
            "dev/vfio",
            "dev/vfio/devices",
            "run/busway",
            "etc/udev/rules.d",
        ];
        let entries = folders
            .iter()
            .filter_map(|folder| fs::read_dir(self.path(folder)).ok());
        let files = entries.flatten().map(|entry| entry.unwrap().path());
        let files = files.filter(|path| path.is_file() && !path.ends_with("lock"));
        files
            .map(|path| {
                let text = fs::read_to_string(&path).unwrap();
                let below = path.strip_prefix(self.path("")).unwrap();
                (below.to_str().unwrap().to_owned(), text)
            })
            .collect()
    }

    pub fn driver_of(&self, address: &str) -> Option<String> {
        self.state()[address].0.clone()
    }
}

fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}
