//! Who hands a disk on to other machines, or keeps a journal on it, without a word in the disk's own
//! folder: the kernel's storage targets say it in their configuration, jbd2 in its statistics.

use std::path::{Path, PathBuf};

use busway_iommu::Command;

use crate::root::{self, SysRoot};

/// One such use of a disk or of a file on one.
#[derive(Clone, Debug)]
pub(super) struct Export {
    /// The node or file.
    pub(super) of: PathBuf,
    /// What it is used as, in words.
    pub(super) shown: String,
    /// The command that ends it, where one does.
    pub(super) release: Option<Command>,
}

/// All that this host's kernel tells of.
pub(super) fn read(root: &SysRoot) -> Vec<Export> {
    let config = root.sys.join("kernel/config");
    let mut all = targets(&config);
    all.extend(nvme_targets(&config));
    all.extend(nvme_passthru(root, &config));
    all.extend(gadgets(&config));
    all.extend(scst(root));
    all.extend(journals(root));
    all.extend(kernel_logs(root));
    all.extend(flash_on_disks(root));
    all
}

/// The folders below a folder, with their names on one line.
fn folders(of: &Path) -> Vec<(String, PathBuf)> {
    let names = root::names(of).into_iter();
    let folders = names.map(|name| (root::one_line(&name), of.join(name)));
    folders.filter(|(_, folder)| folder.is_dir()).collect()
}

/// What an attribute says is exported, where it says something.
fn path_in(attribute: &Path) -> Option<PathBuf> {
    let path = root::attribute(attribute)?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// LIO's backstores (drivers/target/target_core_configfs.c): `target/core/iblock_0/NAME/udev_path`.
fn targets(config: &Path) -> Vec<Export> {
    let mut all = Vec::new();
    for (adapter, folder) in folders(&config.join("target/core")) {
        // What targetcli calls them, which is not what the kernel does.
        let kind = match adapter.split('_').next() {
            Some("iblock") => "block",
            Some("fileio") => "fileio",
            Some("pscsi") => "pscsi",
            _ => continue,
        };
        for (name, folder) in folders(&folder) {
            let Some(of) = path_in(&folder.join("udev_path")) else {
                continue;
            };
            let release = Command::new(["targetcli"]).operand(format!("/backstores/{kind}"));
            all.push(Export {
                of,
                shown: format!("LIO {name}"),
                release: Some(release.operand("delete").operand(name)),
            });
        }
    }
    all
}

/// Namespaces of the NVMe target (drivers/nvme/target/configfs.c).
fn nvme_targets(config: &Path) -> Vec<Export> {
    let mut all = Vec::new();
    for (subsystem, folder) in folders(&config.join("nvmet/subsystems")) {
        for (number, namespace) in folders(&folder.join("namespaces")) {
            let is_on = root::attribute(&namespace.join("enable")).is_some_and(|text| text != "0");
            let enable = format!(
                "/sys/kernel/config/nvmet/subsystems/{subsystem}/namespaces/{number}/enable"
            );
            if let (true, Some(of)) = (is_on, path_in(&namespace.join("device_path"))) {
                all.push(Export {
                    of,
                    shown: format!("NVMe target {subsystem}"),
                    release: Some(Command::write("0", enable)),
                });
            }
        }
    }
    all
}

/// Controllers that the NVMe target hands on as they are, with all their namespaces
/// (drivers/nvme/target/passthru.c).
fn nvme_passthru(root: &SysRoot, config: &Path) -> Vec<Export> {
    let mut all = Vec::new();
    for (subsystem, folder) in folders(&config.join("nvmet/subsystems")) {
        let passthru = folder.join("passthru");
        let is_on = root::attribute(&passthru.join("enable")).is_some_and(|text| text != "0");
        let controller = path_in(&passthru.join("device_path")).filter(|_| is_on);
        let Some(controller) = controller.as_deref().and_then(Path::file_name) else {
            continue;
        };
        let children = root::names(&root.sys.join("class/nvme").join(controller)).into_iter();
        for namespace in children.filter_map(|name| namespace(&name)) {
            let enable = format!("/sys/kernel/config/nvmet/subsystems/{subsystem}/passthru/enable");
            all.push(Export {
                of: Path::new("/dev").join(namespace),
                shown: format!("NVMe target {subsystem}"),
                release: Some(Command::write("0", enable)),
            });
        }
    }
    all
}

/// The disk of a controller's child: `nvme0n1`, which with several paths is seen as `nvme0c1n1`.
fn namespace(child: &str) -> Option<String> {
    let rest = child.strip_prefix("nvme")?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (left, number) = rest.split_once('n')?;
    let subsystem = left
        .split_once('c')
        .map_or(left, |(subsystem, _)| subsystem);
    (digits(subsystem) && digits(number)).then(|| format!("nvme{subsystem}n{number}"))
}

/// Mass storage that this host is to another's USB (drivers/usb/gadget/function/f_mass_storage.c).
fn gadgets(config: &Path) -> Vec<Export> {
    let mut all = Vec::new();
    for (gadget, folder) in folders(&config.join("usb_gadget")) {
        let functions = folders(&folder.join("functions")).into_iter();
        let functions = functions.filter(|(name, _)| name.starts_with("mass_storage."));
        for (_, lun) in functions.flat_map(|(_, function)| folders(&function)) {
            if let Some(of) = path_in(&lun.join("file")) {
                let shown = format!("USB gadget {gadget}");
                let release = None;
                all.push(Export { of, shown, release });
            }
        }
    }
    all
}

/// SCST's devices (scst/README, "Sysfs"): the first line of `filename` is a disk or a file, the second
/// whether it was set by hand.
fn scst(root: &SysRoot) -> Vec<Export> {
    let devices = folders(&root.sys.join("kernel/scst_tgt/devices")).into_iter();
    let one = |(name, folder): (String, PathBuf)| {
        let text = root::attribute(&folder.join("filename"))?;
        Some(Export {
            of: PathBuf::from(text.lines().next()?),
            shown: format!("SCST {name}"),
            release: None,
        })
    };
    devices.filter_map(one).collect()
}

/// The disk that the kernel's last words go to (fs/pstore/blk.c).
fn kernel_logs(root: &SysRoot) -> Option<Export> {
    let of = path_in(&root.sys.join("module/pstore_blk/parameters/blkdev"))?;
    Some(Export {
        of,
        shown: "the kernel's log of crashes (pstore)".to_owned(),
        release: Some(Command::new(["modprobe", "-r", "pstore_blk"])),
    })
}

/// Disks that are taken for flash memory, which has the name of its disk
/// (drivers/mtd/devices/block2mtd.c).
fn flash_on_disks(root: &SysRoot) -> Vec<Export> {
    let class = root.sys.join("class/mtd");
    let one = |name: String| {
        let text = root::attribute(&class.join(&name).join("name"))?;
        let disk = text.strip_prefix("block2mtd: ").unwrap_or(&text);
        Some(Export {
            of: disk.starts_with('/').then(|| PathBuf::from(disk))?,
            shown: root::one_line(&name),
            release: Some(Command::new(["modprobe", "-r", "block2mtd"])),
        })
    };
    let names = root::names(&class).into_iter();
    names.filter_map(one).collect()
}

/// The journals that ext4 and OCFS2 have on a device of their own: jbd2 names a journal by its device,
/// and where it is a file, by its inode as well (fs/jbd2/journal.c), which is no device's name.
fn journals(root: &SysRoot) -> Vec<Export> {
    let names = root::names(&root.proc.join("fs/jbd2")).into_iter();
    let one = |name: String| Export {
        of: Path::new("/dev").join(name.replace('!', "/")),
        shown: "the journal of another file system".to_owned(),
        release: None,
    };
    names.map(one).collect()
}
