//! Disks, and what stands on them: partitions, LVM, RAID, encryption, file systems, swap.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use busway_iommu::Command;
use busway_pci::Bdf;

use super::Usage;
use super::exports::{self, Export};
use super::mounts::{Mounts, device_name};
use crate::root::{self, SysRoot};

/// How deep one block device may stand on another. Real stacks have fewer than ten.
const DEEPEST: usize = 32;

/// Every block device of the host.
struct Blocks {
    nodes: BTreeMap<String, Block>,
    mounts: Mounts,
}

#[derive(Debug, Default)]
struct Block {
    /// `MAJOR:MINOR`.
    number: String,
    /// Device-mapper's name of it, where it is one of its own.
    mapped: Option<Mapped>,
    /// The PCI devices that it is on; several for an NVMe namespace with several paths.
    owners: Vec<Bdf>,
    /// What stands on it: partitions, and devices that hold it.
    above: Vec<String>,
    /// Whether it is part of another block device.
    partition: bool,
    /// The others of a file system that spans several.
    spanned: Vec<String>,
    /// The ZFS pool that it is of, where that is in use.
    pool: Option<String>,
    /// The files on it that are swapped to.
    swap_files: Vec<PathBuf>,
    /// What hands it, or a file on it, on to others.
    exports: Vec<Export>,
}

#[derive(Debug)]
struct Mapped {
    name: String,
    /// The name's bytes.
    raw: OsString,
    uuid: String,
}

/// The uses of the disks of every PCI device.
pub(super) fn read(root: &SysRoot) -> Vec<(Bdf, Usage)> {
    let blocks = Blocks::read(root);
    let mut uses = Vec::new();
    for (name, block) in &blocks.nodes {
        if block.owners.is_empty() || block.partition {
            continue;
        }
        let mut found = Vec::new();
        blocks.walk(name, &mut Vec::new(), &mut found);
        for &owner in &block.owners {
            uses.extend(found.iter().map(|usage| (owner, usage.clone())));
        }
    }
    uses
}

/// The disks that `server` knows to be another machine's by their folder in sysfs, each with what
/// `server` says of it and its uses.
pub(super) fn served<T>(
    root: &SysRoot,
    server: impl Fn(&Path) -> Option<T>,
) -> Vec<(T, String, Vec<Usage>)> {
    let blocks = Blocks::read(root);
    let class = root.sys.join("class/block");
    let disks = blocks.nodes.iter().filter(|(_, block)| !block.partition);
    let one = |(name, _): (&String, &Block)| {
        let known = server(&root::target(root, &class.join(name))?)?;
        let mut found = Vec::new();
        blocks.walk(name, &mut Vec::new(), &mut found);
        Some((known, name.clone(), found))
    };
    disks.filter_map(one).collect()
}

/// A disk of the device that somebody has open exclusively, where one is.
pub(crate) fn claimed_disk(root: &SysRoot, address: Bdf) -> Option<Usage> {
    let blocks = Blocks::read(root);
    let disks = blocks
        .nodes
        .iter()
        .filter(|(_, block)| block.owners.contains(&address) && !block.partition);
    disks
        .map(|(name, _)| name)
        .find(|name| {
            // open(2): without O_CREAT, on a block device, O_EXCL fails with EBUSY while the device,
            // or a partition of it, is in use by the system.
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
                .open(root.dev.join(name.replace('!', "/")))
                .is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
        })
        .map(|disk| Usage::Claimed { disk: disk.clone() })
}

impl Blocks {
    fn read(root: &SysRoot) -> Self {
        let class = root.sys.join("class/block");
        let mut paths = BTreeMap::new();
        for name in root::names(&class) {
            if let Some(path) = root::target(root, &class.join(&name)) {
                paths.insert(root::one_line(&name), path);
            }
        }
        // A partition's folder is in its disk's.
        let disk_of = |path: &Path| {
            let disk = root::one_line(&path.parent()?.file_name()?.to_string_lossy());
            paths.contains_key(&disk).then_some(disk)
        };
        let mut partitions: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, path) in &paths {
            if let Some(disk) = disk_of(path) {
                partitions.entry(disk).or_default().push(name.clone());
            }
        }
        let mut nodes = BTreeMap::new();
        for (name, path) in &paths {
            // Vanished meanwhile, where there is none.
            if let Some(mut block) = Block::read(root, path) {
                block.partition = disk_of(path).is_some();
                let mut above = partitions.remove(name).unwrap_or_default();
                above.append(&mut block.above);
                block.above = above;
                nodes.insert(name.clone(), block);
            }
        }
        let mut blocks = Self {
            nodes,
            mounts: Mounts::read(root),
        };
        blocks.read_lower(root, &paths);
        blocks.read_exports(root);
        blocks.read_spanned(root);
        blocks.read_zfs(root);
        blocks
    }

    /// What a block device says itself that it stands on, where that does not say it: the inverse of
    /// holders, a loop device's file, and where zram writes back to (Documentation/ABI).
    fn read_lower(&mut self, root: &SysRoot, paths: &BTreeMap<String, PathBuf>) {
        for (upper, path) in paths {
            let mut lower = root::names(&path.join("slaves"));
            let file = root::attribute(&path.join("loop/backing_file"));
            let written = root::attribute(&path.join("backing_dev"));
            for on in file.into_iter().chain(written) {
                let on = on.strip_suffix(" (deleted)").unwrap_or(&on);
                lower.extend(self.below(root, Path::new(on)));
            }
            for lower in lower {
                if let Some(block) = self.nodes.get_mut(&lower)
                    && !block.above.contains(upper)
                    && lower != *upper
                {
                    block.above.push(upper.clone());
                }
            }
        }
        for file in self.mounts.swap_files() {
            for name in self.of_file(root, file) {
                if let Some(block) = self.nodes.get_mut(&name) {
                    block.swap_files.push(file.clone());
                }
            }
        }
    }

    fn read_exports(&mut self, root: &SysRoot) {
        for export in exports::read(root) {
            for name in self.below(root, &export.of) {
                if let Some(block) = self.nodes.get_mut(&name) {
                    block.exports.push(export.clone());
                }
            }
        }
    }

    /// The block device that `path` is the node of or, where it is a file, those that it is on.
    fn below(&self, root: &SysRoot, path: &Path) -> Vec<String> {
        let node = device_name(root, path.as_os_str());
        match node.filter(|name| self.nodes.contains_key(name)) {
            Some(name) => vec![name],
            None => self.of_file(root, path),
        }
    }

    /// The block devices that the file system is on in which a file is.
    fn of_file(&self, root: &SysRoot, file: &Path) -> Vec<String> {
        let Some((number, source)) = self.mounts.below(root, file) else {
            return Vec::new();
        };
        let holds = |(name, block): &(&String, &Block)| {
            block.number == number || source.as_ref() == Some(name)
        };
        let found = self.nodes.iter().filter(holds);
        found.map(|(name, _)| name.clone()).collect()
    }

    /// ZFS holds its disks without a word in sysfs. Which pools are in use it says itself, and which
    /// disk is of which udev has noted (systemd's udev, ID_FS_LABEL of a zfs_member).
    fn read_zfs(&mut self, root: &SysRoot) {
        let pools = root::names(&root.proc.join("spl/kstat/zfs"));
        if pools.is_empty() {
            return;
        }
        for block in self.nodes.values_mut() {
            let note = root.run.join(format!("udev/data/b{}", block.number));
            let note = root::text(&note).unwrap_or_default();
            let value = |key: &str| {
                let mut lines = note.lines();
                lines.find_map(|line| {
                    line.strip_prefix("E:")?
                        .strip_prefix(key)?
                        .strip_prefix('=')
                })
            };
            if value("ID_FS_TYPE") == Some("zfs_member") {
                let pool = value("ID_FS_LABEL").map(str::to_owned);
                block.pool = pool.filter(|pool| pools.contains(pool));
            }
        }
    }

    /// btrfs and bcachefs span devices that only their own folders tie together.
    fn read_spanned(&mut self, root: &SysRoot) {
        let btrfs = root.sys.join("fs/btrfs");
        let bcachefs = root.sys.join("fs/bcachefs");
        let of_btrfs = root::names(&btrfs).into_iter();
        let of_btrfs = of_btrfs.map(|uuid| root::names(&btrfs.join(uuid).join("devices")));
        let of_bcachefs = root::names(&bcachefs).into_iter().map(|uuid| {
            let folder = bcachefs.join(uuid);
            let devices = root::names(&folder).into_iter();
            let devices = devices.filter(|name| name.starts_with("dev-"));
            let link = |name: String| root::link_name(&folder.join(name).join("block"));
            devices.filter_map(link).collect::<Vec<_>>()
        });
        for members in of_btrfs.chain(of_bcachefs) {
            for name in &members {
                if let Some(block) = self.nodes.get_mut(name) {
                    block.spanned = members.iter().filter(|m| *m != name).cloned().collect();
                }
            }
        }
    }

    /// Adds the uses of `name` and of all that stands on it. Returns whether there is any.
    fn walk(&self, name: &str, chain: &mut Vec<String>, found: &mut Vec<Usage>) -> bool {
        let Some(block) = self.nodes.get(name) else {
            return false;
        };
        let shown = block.mapped.as_ref().map_or(name, |mapped| &mapped.name);
        if chain.len() >= DEEPEST || chain.iter().any(|below| below == shown) {
            return false;
        }
        // A partition's name says its disk's.
        let disk = if block.partition { chain.pop() } else { None };
        chain.push(shown.to_owned());
        let before = found.len();

        let at = self.mounted(name, block);
        if !at.is_empty() {
            let chain = chain.clone();
            found.push(Usage::Mounted { chain, at });
        }
        if self.mounts.swaps_to(name) {
            let chain = chain.clone();
            let device = block.node(name);
            found.push(Usage::Swap { chain, device });
        }
        for file in &block.swap_files {
            let (chain, device) = (chain.clone(), file.clone());
            found.push(Usage::Swap { chain, device });
        }
        for export in &block.exports {
            let mut chain = chain.clone();
            chain.push(export.shown.clone());
            let release = export.release.clone();
            found.push(Usage::Held { chain, release });
        }
        if let Some(pool) = &block.pool {
            let mut chain = chain.clone();
            chain.push(format!("ZFS {pool}"));
            let at = self.mounts.of_pool(pool);
            found.push(if at.is_empty() {
                let release = Command::new(["zpool", "export"])
                    .end_of_options()
                    .operand(pool);
                let release = Some(release);
                Usage::Held { chain, release }
            } else {
                Usage::Mounted { chain, at }
            });
        }
        for above in &block.above {
            let used = self.walk(above, chain, found);
            let holder = self.nodes.get(above).filter(|block| !block.partition);
            if let (false, Some(holder)) = (used, holder) {
                let name = holder.mapped.as_ref().map_or(above, |m| &m.name);
                // Some things hold each other; nothing real does.
                if chain.contains(name) {
                    continue;
                }
                let mut chain = chain.clone();
                chain.push(name.clone());
                let release = release(above, holder);
                found.push(Usage::Held { chain, release });
            }
        }

        chain.pop();
        chain.extend(disk);
        found.len() > before
    }

    fn mounted(&self, name: &str, block: &Block) -> Vec<PathBuf> {
        let at = self.mounts.at(name, &block.number);
        if !at.is_empty() {
            return at;
        }
        let mut others = block.spanned.iter().filter_map(|other| {
            let number = &self.nodes.get(other)?.number;
            Some(self.mounts.at(other, number))
        });
        others.find(|at| !at.is_empty()).unwrap_or_default()
    }
}

impl Block {
    fn read(root: &SysRoot, path: &Path) -> Option<Self> {
        let number = root::attribute(&path.join("dev"))?;
        let holders = root::names(&path.join("holders")).into_iter();
        let mapped = root::raw_name(&path.join("dm/name")).map(|name| Mapped {
            name: root::one_line(&name.to_string_lossy()),
            raw: name,
            uuid: root::attribute(&path.join("dm/uuid")).unwrap_or_default(),
        });
        Some(Self {
            number,
            mapped,
            owners: owners(root, path),
            above: holders.chain(cached(path)).collect(),
            partition: false,
            spanned: Vec::new(),
            pool: None,
            swap_files: Vec::new(),
            exports: Vec::new(),
        })
    }

    /// Its node, by the name that people know.
    fn node(&self, name: &str) -> PathBuf {
        match &self.mapped {
            Some(mapped) => Path::new("/dev/mapper").join(mangled(&mapped.raw)),
            None => Path::new("/dev").join(name.replace('!', "/")),
        }
    }
}

/// The devices that a block device caches for, where bcache has it as a cache: its set links to each
/// backing device, and that to what is made of it.
fn cached(path: &Path) -> impl Iterator<Item = String> {
    let set = path.join("bcache/set");
    let backing = root::names(&set)
        .into_iter()
        .filter(|name| name.starts_with("bdev"));
    backing.filter_map(move |name| root::link_name(&set.join(name).join("dev")))
}

/// The PCI devices that a block device is on.
pub(crate) fn owners(root: &SysRoot, path: &Path) -> Vec<Bdf> {
    if let Some(owner) = root::innermost_pci(path) {
        return vec![owner];
    }
    // With NVMe multipath a namespace is no child of its controllers but of the subsystem, whose
    // folder links to them: nvme-subsys0/{nvme0 -> …/0000:01:00.0/nvme/nvme0, nvme0n1}.
    let below = |folder: &str| {
        let folder = root.sys.join("devices/virtual").join(folder);
        let mut above = path.ancestors();
        above.find(|above| above.parent() == Some(&folder))
    };
    if let Some(controller) = below("nvme-fabrics/ctl") {
        return fibre_channel_adapter(root, controller)
            .into_iter()
            .collect();
    }
    let Some(subsystem) = below("nvme-subsystem").filter(|folder| *folder != path) else {
        return Vec::new();
    };
    let links = root::names(subsystem)
        .into_iter()
        .map(|name| subsystem.join(name));
    let owner = |link: PathBuf| {
        let controller = link.canonicalize().ok()?;
        let adapter = || fibre_channel_adapter(root, &controller);
        root::innermost_pci(&controller).or_else(adapter)
    };
    let mut owners: Vec<_> = links
        .filter(|link| link.is_symlink())
        .filter_map(owner)
        .collect();
    owners.sort();
    owners.dedup();
    owners
}

/// The adapter by which an NVMe controller is reached over Fibre Channel. It is no child of it, and names
/// its port: `traddr=…,host_traddr=nn-0x20000090fae06325:pn-0x10000090fae06325` (drivers/nvme/host/fc.c).
fn fibre_channel_adapter(root: &SysRoot, controller: &Path) -> Option<Bdf> {
    let transport = root::attribute(&controller.join("transport"))?;
    let address = root::attribute(&controller.join("address")).filter(|_| transport == "fc")?;
    let mut words = address.split(',');
    let port = words.find_map(|word| word.strip_prefix("host_traddr=")?.split_once(":pn-"));
    let (_, port) = port?;
    let class = root.sys.join("class/fc_host");
    let names = root::names(&class).into_iter();
    let mut adapters = names.map(|name| class.join(name));
    let adapter = adapters
        .find(|adapter| root::attribute(&adapter.join("port_name")).as_deref() == Some(port))?;
    root::innermost_pci(&root::target(root, &adapter)?)
}

/// The command that takes a block device that stands on others down, where it is of a known kind.
fn release(name: &str, block: &Block) -> Option<Command> {
    let named = |command: Command, name: &OsStr| command.end_of_options().operand(name);
    Some(match &block.mapped {
        Some(Mapped { uuid, .. }) if uuid.starts_with("LVM-") => {
            Command::new(["lvchange", "--activate", "n"]).operand(block.node(name))
        }
        Some(Mapped { raw, uuid, .. }) if uuid.starts_with("CRYPT-") => {
            named(Command::new(["cryptsetup", "close"]), raw)
        }
        Some(Mapped { raw, uuid, .. }) if uuid.starts_with("mpath-") => {
            named(Command::new(["multipath", "-f"]), raw)
        }
        Some(Mapped { raw, .. }) => named(Command::new(["dmsetup", "remove"]), raw),
        None if name.starts_with("md") => {
            Command::new(["mdadm", "--stop"]).operand(block.node(name))
        }
        None if name.starts_with("loop") => {
            Command::new(["losetup", "--detach"]).operand(block.node(name))
        }
        None if name.starts_with("bcache") => {
            Command::write("1", format!("/sys/block/{name}/bcache/stop"))
        }
        None => return None,
    })
}

/// The name of a mapped device's node: what udev does not let into a node's name stands as `\xNN`
/// (libdm/libdm-common.c, DM_STRING_MANGLING_HEX). A name that has such already is left as it is.
fn mangled(name: &OsStr) -> OsString {
    let bytes = name.as_bytes();
    if bytes.windows(2).any(|two| two == br"\x") {
        return name.to_owned();
    }
    let mut mangled = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        match byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte) {
            true => mangled.push(byte),
            false => mangled.extend(format!("\\x{byte:02x}").bytes()),
        }
    }
    OsString::from_vec(mangled)
}
