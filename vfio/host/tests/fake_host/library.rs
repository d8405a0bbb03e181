//! The library of hosts in `tests/hosts`: short descriptions that are expanded to trees of files.
//!
//! A line is a word that says what it is, and words that say more, some of them `key=value`. Quotes keep
//! words together, `\xNN` is a byte, `#` begins a comment. A line that is indented deeper belongs to the
//! one above it: a device behind a bridge, a disk of a device, a partition of a disk.
//! `tests/hosts/README.md` has every word.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};

use super::FakeHost;
use super::line::{Line, size, words};
use super::space::{config_with_acs, resource};

/// The hosts of a folder below `tests/hosts` by their names, each with its description.
macro_rules! hosts {
    ($folder:literal: $($name:literal)*) => {
        [$(($name, include_str!(concat!("../../../../tests/hosts/", $folder, $name, ".host")))),*]
    };
}

/// Every host of the library: its name and its description.
pub const HOSTS: [(&str, &str); 8] = hosts! {
    "": "laptop" "server" "storage" "workstation" "no-iommu" "old-xeon" "emulated" "hostile"
};

/// Hosts that people reported: each is there for one difficulty.
pub const REPORTED: [(&str, &str); 18] = hosts! {
    "reported/":
    "blocks" "bootfb" "chipset" "dsa" "holders" "hostile2" "huge" "mediated" "memlock" "net" "noiommu"
    "pfvfio" "pod-vf" "pve-off" "switchdev" "vmd" "vmd-kernel" "vmd-own-groups"
};

/// What descriptions have in common: `include NAME` stands for these lines.
const COMMON: [(&str, &str); 1] = [(
    "base-intel",
    include_str!("../../../../tests/hosts/reported/base-intel.inc"),
)];

impl FakeHost {
    /// A host of the library.
    pub fn named(name: &str) -> Self {
        let mut all = HOSTS.iter().chain(&REPORTED);
        let known = all.find(|(known, _)| *known == name);
        Self::described(known.unwrap_or_else(|| panic!("no host {name}")).1)
    }

    /// The host that a description says.
    pub fn described(text: &str) -> Self {
        let mut host = Self::new();
        host.add(text);
        host
    }

    /// Adds to the host what a description says.
    pub fn add(&mut self, text: &str) {
        let mut above: Vec<(usize, Place)> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let words = words(line);
            let Some((what, words)) = words.split_first() else {
                continue;
            };
            let depth = line.len() - line.trim_start().len();
            while above.last().is_some_and(|(above, _)| *above >= depth) {
                above.pop();
            }
            let behind = above.last().map(|(_, place)| place.clone());
            let line = Line {
                what: what.clone(),
                words: words.to_vec(),
                number: number + 1,
            };
            let place = self.expand(&line, behind.as_ref());
            above.push((depth, place));
        }
    }

    fn expand(&mut self, line: &Line, above: Option<&Place>) -> Place {
        let folder = above.map(|place| place.folder.clone());
        let here = |folder: PathBuf| Place {
            folder,
            number: String::new(),
        };
        match line.what.as_str() {
            "include" => {
                let name = line.bare(0);
                let known = COMMON.iter().find(|(known, _)| *known == name);
                self.add(known.unwrap_or_else(|| line.wrong("no such text")).1);
            }
            "device" => return here(self.expand_device(line, folder)),
            "devattr" => {
                let device = folder.clone().unwrap_or_else(|| line.wrong("of no device"));
                self.put(&device.join(line.path(0)), &format!("{}\n", line.bare(1)));
            }
            "virtual" => {
                return here(joined("sys/devices/virtual", &line.path(0)));
            }
            "mediates" => {
                let parent = folder.clone().unwrap_or_else(|| line.wrong("of no device"));
                self.expand_mediated_type(line, &parent);
            }
            "mdev" => {
                let parent = folder.clone().unwrap_or_else(|| line.wrong("of no device"));
                return here(self.expand_mediated(line, &parent));
            }
            "devdir" => {
                let device = folder.clone().unwrap_or_else(|| line.wrong("of no device"));
                fs::create_dir_all(self.path("").join(device).join(line.path(0))).unwrap();
            }
            "kernel-does" => self.kernel_does(line),
            "disk" => {
                let device = folder.unwrap_or_else(|| line.wrong("of no device"));
                let major = line.bare(1);
                let place = Place {
                    folder: device.join(line.path(0)),
                    number: format!("{major}:0"),
                };
                self.expand_block(line, &place);
                return place;
            }
            "partition" => {
                let disk = above.unwrap_or_else(|| line.wrong("of no disk"));
                let (major, _) = disk.number.split_once(':').unwrap();
                let name = line.path(0);
                let text = name.to_string_lossy().into_owned();
                let digits = text.len() - text.trim_end_matches(|c: char| c.is_ascii_digit()).len();
                let index = &text[text.len() - digits..];
                let place = Place {
                    folder: disk.folder.join(&name),
                    number: format!("{major}:{index}"),
                };
                self.put(&place.folder.join("partition"), &format!("{index}\n"));
                self.expand_block(line, &place);
                return place;
            }
            "dm" => {
                let place = Place {
                    folder: format!("sys/devices/virtual/block/dm-{}", line.bare(0)).into(),
                    number: format!("253:{}", line.bare(0)),
                };
                self.put(
                    &place.folder.join("dm/name"),
                    &format!("{}\n", line.bare(1)),
                );
                self.put(
                    &place.folder.join("dm/uuid"),
                    &format!("{}\n", line.bare(2)),
                );
                let node = line.get("node").map_or_else(|| line.path(1), PathBuf::from);
                self.point(
                    &Path::new("dev/mapper").join(node),
                    &format!("dev/dm-{}", line.bare(0)),
                );
                self.expand_block(line, &place);
                return place;
            }
            "block" => {
                let place = Place {
                    folder: joined("sys/devices/virtual/block", &line.path(0)),
                    number: line.bare(1),
                };
                self.expand_block(line, &place);
                return place;
            }
            "class" => {
                let device = folder.clone().unwrap_or_else(|| line.wrong("of no device"));
                self.class(&device.join(line.path(0)), &line.path(0), &line.bare(1));
            }
            "interface" => self.expand_interface(line, folder.as_deref()),
            "route" => self.expand_route(line),
            "cpu" => self.expand_cpu(line),
            "kernel" => {
                let release = line.bare(0);
                self.put("proc/sys/kernel/osrelease", &format!("{release}\n"));
                fs::create_dir_all(self.path(&format!("lib/modules/{release}"))).unwrap();
            }
            "alias" => {
                let text = format!("alias {} {}", line.bare(0), line.bare(1));
                self.append(&self.modules("modules.alias"), &text);
            }
            "available" => {
                for name in &line.words {
                    let text = format!("kernel/drivers/{name}.ko.xz:");
                    self.append(&self.modules("modules.dep"), &text);
                }
            }
            "builtin" => {
                for name in &line.words {
                    let text = format!("kernel/drivers/{name}.ko");
                    self.append(&self.modules("modules.builtin"), &text);
                }
            }
            "module" => {
                let folder = Path::new("sys/module").join(line.path(0));
                fs::create_dir_all(self.path("").join(&folder)).unwrap();
                for (key, value) in line.pairs() {
                    self.put(&folder.join("parameters").join(key), &format!("{value}\n"));
                }
            }
            "driver" => self.driver(&line.bare(0)),
            "cmdline" => self.put("proc/cmdline", &format!("{}\n", line.words.join(" "))),
            "acpi" => {
                for table in &line.words {
                    self.put(&Path::new("sys/firmware/acpi/tables").join(table), "");
                }
            }
            "iommu" => self.expand_iommu(line),
            "remapping" => {
                let prefix = if line.bare(0) == "on" { "IR-" } else { "" };
                let text = format!(
                    "            CPU0       CPU1\n   9:          0          4  \
                     {prefix}IO-APIC    9-fasteoi   acpi\n 128:       7312          0  \
                     {prefix}PCI-MSI-0000:00:1f.3    0-edge      snd_hda_intel\n"
                );
                self.put("proc/interrupts", &text);
            }
            "region" => {
                let group = format!("sys/kernel/iommu_groups/{}/reserved_regions", line.bare(0));
                let text = format!("{} {} {}", line.bare(1), line.bare(2), line.bare(3));
                self.append(&group, &text);
            }
            "lockdown" => {
                let modes = ["none", "integrity", "confidentiality"];
                let mark = |mode: &str| match mode == line.bare(0) {
                    true => format!("[{mode}]"),
                    false => mode.to_owned(),
                };
                let text = modes.map(mark).join(" ");
                self.put("sys/kernel/security/lockdown", &format!("{text}\n"));
            }
            "vulnerability" => {
                let file = format!("sys/devices/system/cpu/vulnerabilities/{}", line.bare(0));
                self.put(&file, &format!("{}\n", line.bare(1)));
            }
            "memory" => {
                let kib = size(&line.bare(0)) >> 10;
                let text = format!("MemTotal: {kib} kB\nMemAvailable: {} kB\n", kib * 3 / 4);
                self.put("proc/meminfo", &text);
            }
            "hugepages" => {
                let kib = size(&line.bare(1)) >> 10;
                let node = line.bare(0);
                let folder = PathBuf::from(format!(
                    "sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB"
                ));
                let count = |key| line.get(key).unwrap_or_else(|| "0".to_owned());
                self.put(
                    &folder.join("nr_hugepages"),
                    &format!("{}\n", count("total")),
                );
                self.put(
                    &folder.join("free_hugepages"),
                    &format!("{}\n", count("free")),
                );
                self.put(&folder.join("surplus_hugepages"), "0\n");
            }
            "user" => self.expand_user(line),
            "node" => {
                let path = Path::new("dev").join(line.path(0));
                self.put(&path, "");
                let mode = u32::from_str_radix(&line.get("mode").unwrap_or("666".into()), 8);
                let mode = fs::Permissions::from_mode(mode.unwrap());
                fs::set_permissions(self.path("").join(path), mode).unwrap();
            }
            "process" => {
                let pid: u32 = line.bare(0).parse().unwrap();
                self.put(&format!("proc/{pid}/comm"), &format!("{}\n", line.bare(1)));
                for (index, target) in line.words[2..].iter().enumerate() {
                    let fd = PathBuf::from(format!("proc/{pid}/fd/{}", index + 3));
                    self.point_or_say(&fd, target);
                }
            }
            "ssh" => {
                let text = format!(
                    "LANG=C\0SSH_CONNECTION={} 50022 10.0.0.1 22\0",
                    line.bare(0)
                );
                self.put("proc/self/environ", &text);
            }
            "zfs" => {
                let folder = format!("proc/spl/kstat/zfs/{}", line.bare(0));
                fs::create_dir_all(self.path(&folder)).unwrap();
            }
            "mount" => {
                // TYPE SOURCE AT
                let text = format!(
                    "31 1 0:77 / {} rw shared:1 - {} {} rw",
                    line.bare(2),
                    line.bare(0),
                    line.bare(1)
                );
                self.append("proc/self/mountinfo", &text);
            }
            "file" => self.put(&line.path(0), &format!("{}\n", line.bare(1))),
            "remove" => fs::remove_file(self.path("").join(line.path(0))).unwrap(),
            "link" => self.point_or_say(&line.path(0), &line.bare(1)),
            _ => line.wrong("unknown"),
        }
        here(folder.unwrap_or_default())
    }

    fn expand_device(&mut self, line: &Line, behind: Option<PathBuf>) -> PathBuf {
        let address = full(&line.bare(0));
        let (domain_bus, _) = address.rsplit_once(':').unwrap();
        let root = PathBuf::from(format!("sys/devices/pci{domain_bus}"));
        let folder = match behind {
            Some(above) if line.get("rootbus").is_some() => above.join(format!("pci{domain_bus}")),
            Some(above) => above,
            None => root,
        };
        let folder = folder.join(&address);
        let get = |key: &str| line.get(key);
        let ids = |text: &str| {
            let (vendor, device) = text.split_once(':').unwrap();
            (vendor.to_owned(), device.to_owned())
        };
        let (vendor, device) = ids(&line.bare(1));
        let (subvendor, subdevice) = ids(&get("sub").unwrap_or("1af4:1100".into()));
        let class = get("class").unwrap_or("020000".into());
        let put = |name: &str, text: String| self.put(&folder.join(name), &(text + "\n"));
        put("vendor", format!("0x{vendor}"));
        put("device", format!("0x{device}"));
        put("subsystem_vendor", format!("0x{subvendor}"));
        put("subsystem_device", format!("0x{subdevice}"));
        put("class", format!("0x{class}"));
        put("numa_node", get("numa").unwrap_or("-1".into()));
        put(
            "driver_override",
            get("override").unwrap_or("(null)".into()),
        );
        let upper = |text: &str| format!("{:0>8}", text.to_uppercase());
        let pair = |index: usize| class[index..index + 2].to_uppercase();
        put(
            "modalias",
            format!(
                "pci:v{}d{}sv{}sd{}bc{}sc{}i{}",
                upper(&vendor),
                upper(&device),
                upper(&subvendor),
                upper(&subdevice),
                pair(0),
                pair(2),
                pair(4)
            ),
        );
        put("resource", resource(line));
        if let Some(link) = get("link") {
            // CURRENT/MAX, each SPEEDxWIDTH.
            let (now, most) = link.split_once('/').unwrap_or((&link, &link));
            for (which, text) in [("current", now), ("max", most)] {
                let (speed, width) = text.split_once('x').unwrap();
                put(&format!("{which}_link_speed"), format!("{speed} GT/s PCIe"));
                put(&format!("{which}_link_width"), width.to_owned());
            }
        }
        if let Some(reset) = get("reset") {
            put("reset_method", reset.replace(',', " "));
        }
        if let Some(functions) = get("vfs") {
            let (now, total) = functions.split_once('/').unwrap();
            put("sriov_numvfs", now.to_owned());
            put("sriov_totalvfs", total.to_owned());
        }
        if let Some(serial) = get("serial") {
            put("nvme/nvme0/serial", serial);
        }
        if line.has("boot_vga") {
            put("boot_vga", "1".into());
        }
        if let Some(acs) = get("acs") {
            let path = self.path("").join(folder.join("config"));
            fs::write(path, config_with_acs(&acs)).unwrap();
        }
        let text = folder.to_str().unwrap();
        self.point(Path::new(&format!("sys/bus/pci/devices/{address}")), text);
        if let Some(group) = get("group") {
            let group = format!("sys/kernel/iommu_groups/{group}");
            self.point(Path::new(&format!("{group}/devices/{address}")), text);
            self.point(&folder.join("iommu_group"), &group);
        }
        if let Some(driver) = get("driver") {
            self.driver(&driver);
            self.point(
                &folder.join("driver"),
                &format!("sys/bus/pci/drivers/{driver}"),
            );
            if !driver.contains("vfio") {
                self.native(&address, &driver);
            }
            let of = PathBuf::from(format!("sys/bus/pci/drivers/{driver}/module"));
            // Another device may have the same driver.
            if let Some(module) = get("module").filter(|_| !self.path("").join(&of).is_symlink()) {
                self.point(&of, &format!("sys/module/{module}"));
            }
        }
        if let Some(native) = get("native") {
            self.native(&address, &native);
        }
        if let Some(node) = get("cdev") {
            fs::create_dir_all(self.path("").join(folder.join("vfio-dev").join(&node))).unwrap();
            self.put(&format!("dev/vfio/devices/{node}"), "");
        }
        if let Some(physical) = get("pf") {
            let (physical, index) = physical.split_once('#').unwrap_or((&physical, "0"));
            let physical = format!("sys/bus/pci/devices/{}", full(physical));
            self.point(&folder.join("physfn"), &physical);
            let of = Path::new(&physical).join(format!("virtfn{index}"));
            self.point(&of, text);
        }
        folder
    }

    /// A kind of mediated device that the device in `parent` offers.
    fn expand_mediated_type(&self, line: &Line, parent: &Path) {
        let class = Path::new("sys/class/mdev_bus").join(parent.file_name().unwrap());
        if !self.path("").join(&class).is_symlink() {
            self.point(&class, parent);
        }
        let folder = parent.join("mdev_supported_types").join(line.path(0));
        let put = |name: &str, text: String| self.put(&folder.join(name), &(text + "\n"));
        put("create", String::new());
        put("device_api", line.get("api").unwrap_or("vfio-pci".into()));
        put(
            "available_instances",
            line.get("available").unwrap_or("1".into()),
        );
        for name in ["name", "description"] {
            if let Some(text) = line.get(name) {
                put(name, text);
            }
        }
    }

    /// A mediated device, made of the device in `parent`.
    fn expand_mediated(&self, line: &Line, parent: &Path) -> PathBuf {
        let folder = parent.join(line.path(0));
        fs::create_dir_all(self.path("").join(&folder)).unwrap();
        // Without a type it is being removed.
        if let Some(kind) = line.get("type") {
            let uuid = line.bare(0);
            self.point(&Path::new("sys/bus/mdev/devices").join(uuid), &folder);
            self.put(&folder.join("remove"), "");
            let kind = parent.join("mdev_supported_types").join(kind);
            self.point(&folder.join("mdev_type"), &kind);
        }
        if let Some(driver) = line.get("driver") {
            let driver = format!("sys/bus/mdev/drivers/{driver}");
            fs::create_dir_all(self.path(&driver)).unwrap();
            self.point(&folder.join("driver"), &driver);
        }
        if let Some(number) = line.get("group") {
            let group = format!("sys/kernel/iommu_groups/{number}");
            self.put(&format!("{group}/name"), "vfio-noiommu\n");
            self.put(&format!("{group}/reserved_regions"), "");
            let uuid = folder.file_name().unwrap();
            self.point(&Path::new(&group).join("devices").join(uuid), &folder);
            self.point(&folder.join("iommu_group"), &group);
            self.put(&format!("dev/vfio/{number}"), "");
        }
        if let Some(node) = line.get("cdev") {
            fs::create_dir_all(self.path("").join(folder.join("vfio-dev").join(&node))).unwrap();
            self.put(&format!("dev/vfio/devices/{node}"), "");
        }
        folder
    }

    fn expand_block(&self, line: &Line, place: &Place) {
        let name = place.folder.file_name().unwrap().to_owned();
        let folder = &place.folder;
        self.put(&place.folder.join("dev"), &format!("{}\n", place.number));
        fs::create_dir_all(self.path("").join(folder).join("holders")).unwrap();
        self.point(&Path::new("sys/class/block").join(&name), folder);
        self.put(&Path::new("dev").join(&name), "");
        if let Some(on) = line.get("on") {
            let folder = folder.to_str().unwrap();
            self.holds(folder, &on.split(',').collect::<Vec<_>>());
        }
        let node = match line.what.as_str() {
            "dm" => {
                let node = line.get("node").unwrap_or_else(|| line.bare(1));
                format!("/dev/mapper/{node}")
            }
            _ => format!("/dev/{}", name.to_string_lossy()),
        };
        for at in line.all("mount") {
            let fs = line.get("fs").unwrap_or("ext4".into());
            let text = format!("30 1 {} / {at} rw shared:1 - {fs} {node} rw", place.number);
            self.append("proc/self/mountinfo", &text);
        }
        if line.has("swap") {
            self.append("proc/swaps", &format!("{node} partition 8388604 0 -2"));
        }
        if let Some(pool) = line.get("zfs") {
            let text = format!("E:ID_FS_TYPE=zfs_member\nE:ID_FS_LABEL={pool}\n");
            self.put(&format!("run/udev/data/b{}", place.number), &text);
        }
    }
    fn expand_cpu(&self, line: &Line) {
        let get = |key: &str, other: &str| line.get(key).unwrap_or_else(|| other.to_owned());
        let count: u32 = get("count", "2").parse().unwrap();
        let mut text = String::new();
        for index in 0..count {
            text += &format!(
                "processor\t: {index}\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\n\
                 model name\t: {}\nmicrocode\t: {}\nflags\t\t: fpu {}\n\
                 address sizes\t: {} bits physical, 48 bits virtual\n\n",
                line.bare(0),
                get("family", "6"),
                get("model", "1"),
                line.bare(1),
                get("microcode", "0xf0"),
                get("flags", "").replace(',', " "),
                get("bits", "39"),
            );
        }
        self.put("proc/cpuinfo", &text);
    }

    fn expand_iommu(&self, line: &Line) {
        let name = line.bare(0);
        let folder = PathBuf::from(format!("sys/devices/virtual/iommu/{name}"));
        let kind = if name.starts_with("dmar") {
            "intel-iommu"
        } else {
            "amd-iommu"
        };
        for (key, value) in line.pairs() {
            self.put(&folder.join(kind).join(key), &format!("{value}\n"));
        }
        fs::create_dir_all(self.path("").join(&folder)).unwrap();
        self.point(
            Path::new(&format!("sys/class/iommu/{name}")),
            folder.to_str().unwrap(),
        );
    }

    fn expand_user(&self, line: &Line) {
        let get = |key: &str, other: &str| line.get(key).unwrap_or_else(|| other.to_owned());
        let id = line.bare(0);
        let all = if id == "0" {
            "000001ffffffffff"
        } else {
            "0000000000000000"
        };
        let status = format!(
            "Name:\tbusway\nPPid:\t1\nUid:\t{id}\t{id}\t{id}\t{id}\nGid:\t{id}\t{id}\t{id}\t{id}\n\
             Groups:\t{}\nVmLck:\t       0 kB\nCapEff:\t{}\n",
            get("groups", "").replace(',', " "),
            get("caps", all),
        );
        self.put("proc/self/status", &status);
        self.put("proc/self/uid_map", "         0          0 4294967295\n");
        let bytes = match &*get("memlock", "8M") {
            "unlimited" => "unlimited".to_owned(),
            text => size(text).to_string(),
        };
        let files = get("files", "1048576");
        let limits = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max open files            1024                 {files:<20} files     \n\
             Max locked memory         {bytes:<20} {bytes:<20} bytes     \n"
        );
        self.put("proc/self/limits", &limits);
    }

    /// A file of the running kernel's folder of modules, below the root.
    fn modules(&self, name: &str) -> String {
        let release = fs::read_to_string(self.path("proc/sys/kernel/osrelease"));
        format!("lib/modules/{}/{name}", release.unwrap().trim())
    }
}

/// What a line of a description made, for those that belong to it.
#[derive(Clone, Debug)]
struct Place {
    folder: PathBuf,
    number: String,
}

/// A path below a folder, which may lead out of it by `..`.
fn joined(folder: &str, below: &Path) -> PathBuf {
    let mut path = PathBuf::from(folder);
    for part in below.components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            part => path.push(part),
        }
    }
    path
}

/// `01:00.0` as `0000:01:00.0`.
fn full(address: &str) -> String {
    match address.matches(':').count() {
        1 => format!("0000:{address}"),
        _ => address.to_owned(),
    }
}
