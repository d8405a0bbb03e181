//! Which paths a VM needs: what its configuration names, and what of the host belongs to that.
//!
//! A VM that can be asked for more (it has a control socket) also needs what devices that are added are opened by, and the
//! images that lie beside its own, where their folder is one for images ([`images_in`]). Other files are in no
//! configuration: they come by descriptor, or `--landlock-rules` names them.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::config::{
    ConsoleConfig, DiskConfig, ImageType, LandlockAccess, LandlockRule, NetConfig, VhostMode,
    VirtioConfig, VmConfig,
};
use crate::virtio::blk::backing_files;

use LandlockAccess::{Read, ReadWrite};

/// Some paths of a process's, and what may be done with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    paths: Vec<LandlockRule>,
    /// Folders whose sockets are connected to.
    connects: Vec<PathBuf>,
    /// Folders in which files and sockets are made, renamed and removed while the guest runs.
    made: Vec<PathBuf>,
    /// Folders whose files are opened, to be read or to be read and written, and neither listed, made nor removed.
    images: Vec<LandlockRule>,
}

/// What every VM opens or reads.
///
/// Of `/proc` a few files are read at any time: what threads have used, what the host's interrupts are.
const ALWAYS: &[(&str, LandlockAccess)] = &[
    ("/dev/kvm", ReadWrite),
    ("/dev/null", ReadWrite),
    ("/dev/urandom", Read),
    ("/proc", Read),
    // Standard input is opened anew, so that it can be read without waiting, and the log writes to what it was given.
    ("/proc/self/fd/0", ReadWrite),
    ("/proc/self/fd/1", ReadWrite),
    ("/proc/self/fd/2", ReadWrite),
];

/// What of sysfs is read at any time: which devices there are, with their drivers, errors and resets, what a tap has
/// counted, how large pages can be. Which files these are depends on devices that come later. What other kernel
/// interfaces have below `/sys` (debugfs, tracefs, cgroups, BPF's, EFI's variables) is not among them.
const SYSFS: &[&str] = &[
    "/sys/block",
    "/sys/bus",
    "/sys/class",
    "/sys/dev",
    "/sys/devices",
    "/sys/firmware/acpi/tables",
    "/sys/kernel/iommu_groups",
    "/sys/kernel/irq",
    "/sys/kernel/mm",
    "/sys/module",
];

/// What a NIC is opened by.
const NET: &[&str] = &["/dev/net/tun", "/dev/vhost-net"];
/// What a host device is opened by: groups, character devices, containers.
const DEVICE: &[&str] = &["/dev/vfio", "/dev/iommu"];
/// What a pseudo-terminal is made of.
const PTY: &[&str] = &["/dev/ptmx", "/dev/pts"];
/// Where distributions have firmware, and say what it is.
const FIRMWARE: &[&str] = &["/etc/qemu/firmware", "/usr/share"];

impl Rules {
    /// Those of a VM. `can_be_asked`: devices may be added while it runs.
    #[must_use]
    pub fn of(config: &VmConfig, can_be_asked: bool) -> Self {
        let mut rules = Self::default();
        for (path, access) in ALWAYS {
            rules.allow(path, *access);
        }
        rules.allow_all(SYSFS, Read);
        for path in [&config.kernel, &config.initramfs].into_iter().flatten() {
            rules.allow(path, Read);
        }
        if let Some(firmware) = &config.firmware {
            rules.allow_all(FIRMWARE, Read);
            if let Some(path) = &firmware.path {
                rules.allow(path, Read);
                // A template of the variables lies beside the code.
                rules.allow(folder(path), Read);
            }
            if let Some(vars) = &firmware.vars {
                rules.allow(folder(vars), ReadWrite);
            }
        }
        rules.allow(&config.rng.src, Read);
        rules.console(&config.serial);
        rules.console(&config.console);
        for (_, device) in config.virtio() {
            rules.virtio(&device);
        }
        if can_be_asked {
            for disk in config.disk.iter().filter(|disk| is_opened(disk)) {
                rules.beside(disk);
            }
        }
        if let Some(tpm) = &config.tpm {
            rules.connects.push(folder(&tpm.socket).to_owned());
        }
        if can_be_asked || config.net.iter().any(opens_tap) {
            rules.allow_all(NET, ReadWrite);
        }
        if can_be_asked || !config.device.is_empty() {
            rules.allow_all(DEVICE, ReadWrite);
        }
        if config.cpus.dedicated {
            // Where the host takes devices' interrupts.
            rules.allow("/proc/irq", ReadWrite);
        }
        for file in config.device.iter().filter_map(|one| one.romfile.as_ref()) {
            rules.allow(file, Read);
        }
        rules.with(&config.landlock_rules)
    }

    /// Leaves more in reach.
    #[must_use]
    pub fn with(mut self, more: &[LandlockRule]) -> Self {
        for rule in more {
            self.allow(&rule.path, rule.access);
        }
        self
    }

    /// Has files and sockets made in the folder that `path` is in.
    #[must_use]
    pub fn with_made(mut self, path: Option<&Path>) -> Self {
        if let Some(path) = path {
            self.makes(path);
        }
        self
    }

    /// Folders in which files and sockets are made, renamed and removed while the guest runs.
    #[must_use]
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// Folders with images, and how these are opened.
    pub(in crate::sandbox) fn images(&self) -> &[LandlockRule] {
        &self.images
    }

    pub(in crate::sandbox) fn iter(&self) -> impl Iterator<Item = &LandlockRule> {
        self.paths.iter()
    }

    /// Folders whose sockets are connected to.
    pub(in crate::sandbox) fn connects(&self) -> &[PathBuf] {
        &self.connects
    }

    fn allow(&mut self, path: impl Into<PathBuf>, access: LandlockAccess) {
        let rule = LandlockRule {
            path: path.into(),
            access,
        };
        if !self.paths.contains(&rule) {
            self.paths.push(rule);
        }
    }

    /// What is at `path` is made there.
    fn makes(&mut self, path: &Path) {
        let folder = folder(path).to_owned();
        self.allow(&folder, ReadWrite);
        if !self.made.contains(&folder) {
            self.made.push(folder);
        }
    }

    fn allow_all(&mut self, paths: &[&str], access: LandlockAccess) {
        for path in paths {
            self.allow(path, access);
        }
    }

    fn console(&mut self, console: &ConsoleConfig) {
        match console {
            // When it is full it gets another name, and a new one is made.
            ConsoleConfig::File { path, .. } | ConsoleConfig::Socket(path) => {
                self.allow(path, ReadWrite);
                self.makes(path);
            }
            ConsoleConfig::Pty => self.allow_all(PTY, ReadWrite),
            ConsoleConfig::Off | ConsoleConfig::Null | ConsoleConfig::Tty => {}
        }
    }

    /// Leaves in reach the images that lie beside that of a disk: to be written, where one of them is.
    fn beside(&mut self, disk: &DiskConfig) {
        let Some(folder) = images_in(&disk.path) else {
            return;
        };
        let access = if disk.readonly { Read } else { ReadWrite };
        let known = self.images.iter_mut().find(|rule| rule.path == folder);
        match known {
            Some(rule) if access == ReadWrite => rule.access = access,
            Some(_) => {}
            None => self.images.push(LandlockRule {
                path: folder,
                access,
            }),
        }
    }

    fn disk(&mut self, disk: &DiskConfig) {
        let access = if disk.readonly { Read } else { ReadWrite };
        self.allow(&disk.path, access);
        if disk.image_type == ImageType::Qcow2 && disk.backing_files {
            for path in backing_files(&disk.path) {
                self.allow(path, Read);
            }
        }
    }

    fn virtio(&mut self, device: &VirtioConfig) {
        // Where another process serves it, its socket is all that there is. The folder, for a rule is of the file that is
        // there, and a back end that comes back makes another.
        if let Some(socket) = device.socket() {
            if is_made(device) {
                self.makes(socket);
            }
            return self.connects.push(folder(socket).to_owned());
        }
        match device {
            VirtioConfig::Disk(disk) => self.disk(disk),
            VirtioConfig::Vsock(vsock) => match &vsock.socket {
                // It is made there, and those that the guest connects to are beside it.
                Some(socket) => self.makes(socket),
                None => self.allow("/dev/vhost-vsock", ReadWrite),
            },
            VirtioConfig::Pmem(pmem) if pmem.discard_writes => self.allow(&pmem.file, Read),
            VirtioConfig::Pmem(pmem) => self.allow(&pmem.file, ReadWrite),
            VirtioConfig::Net(_) | VirtioConfig::Fs(_) | VirtioConfig::Generic(_) => {}
        }
    }
}

fn opens_tap(net: &NetConfig) -> bool {
    net.fd.is_empty() && !net.vhost_user
}

/// Whether a disk's image is opened here, by its path.
fn is_opened(disk: &DiskConfig) -> bool {
    disk.fd.is_none() && !disk.vhost_user
}

/// The folder that an image is in, where that is one for images, and not one that has everything else in it as well.
fn images_in(image: &Path) -> Option<PathBuf> {
    let folder = fs::canonicalize(folder(image)).ok()?;
    is_for_images(&folder, env::var_os("HOME").as_deref().map(Path::new)).then_some(folder)
}

/// Whether a folder, without links in its path, can be one for images: it lies two levels below the root or deeper, is
/// nobody's home, and is none of the system's own.
fn is_for_images(folder: &Path, home: Option<&Path>) -> bool {
    const SYSTEM: &[&str] = &["/boot", "/dev", "/etc", "/proc", "/sys", "/usr"];
    let is_home = home == Some(folder) || folder.parent() == Some(Path::new("/home"));
    // The root is a component.
    folder.components().count() > 2
        && !is_home
        && !SYSTEM.iter().any(|system| folder.starts_with(system))
}

/// Whether the socket where a device meets its back end is made on this side.
fn is_made(device: &VirtioConfig) -> bool {
    matches!(device, VirtioConfig::Net(net) if net.vhost_mode == VhostMode::Server)
}

/// The folder that a path is in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DeviceConfig, DiskConfig, FirmwareConfig};

    fn access(rules: &Rules, path: &str) -> Vec<LandlockAccess> {
        let of_path = rules.iter().filter(|rule| rule.path == Path::new(path));
        of_path.map(|rule| rule.access).collect()
    }

    #[test]
    fn a_vm_has_what_its_configuration_names_and_no_more() {
        let mut config = VmConfig {
            kernel: Some("/boot/vmlinuz".into()),
            serial: ConsoleConfig::file("/var/log/vm/serial"),
            console: ConsoleConfig::Pty,
            ..VmConfig::default()
        };
        let least = Rules::of(&config, false);
        for path in ["/dev/net/tun", "/dev/vfio", "/dev/iommu", "/usr/share", "/"] {
            assert_eq!(access(&least, path), [], "{path}");
        }
        assert_eq!(access(&least, "/boot/vmlinuz"), [Read]);
        assert_eq!(access(&least, "/boot"), []);
        assert_eq!(access(&least, "/var/log/vm"), [ReadWrite]);
        assert_eq!(access(&least, "/dev/ptmx"), [ReadWrite]);
        for path in ["/sys/bus", "/sys/devices", "/proc"] {
            assert_eq!(access(&least, path), [Read], "{path}");
        }
        for path in ["/sys", "/sys/kernel", "/sys/kernel/debug", "/sys/firmware"] {
            assert_eq!(access(&least, path), [], "{path}");
        }

        config.disk = vec![
            DiskConfig {
                readonly: true,
                ..DiskConfig::new("/disks/a")
            },
            DiskConfig::new("b"),
        ];
        config.device = vec![DeviceConfig::new("0000:01:00.0").unwrap()];
        config.firmware = Some(FirmwareConfig {
            path: None,
            vars: Some("/var/lib/vm/vars".into()),
        });
        config.landlock_rules = vec![LandlockRule {
            path: "/srv/more".into(),
            access: LandlockAccess::Write,
        }];
        let rules = Rules::of(&config, false).with_made(Some(Path::new("report.json")));
        assert_eq!(access(&rules, "/disks/a"), [Read]);
        assert_eq!(access(&rules, "b"), [ReadWrite]);
        assert_eq!(access(&rules, "/dev/vfio"), [ReadWrite]);
        assert_eq!(access(&rules, "/usr/share"), [Read]);
        assert_eq!(access(&rules, "/var/lib/vm"), [ReadWrite]);
        assert_eq!(access(&rules, "/srv/more"), [LandlockAccess::Write]);
        assert_eq!(access(&rules, "."), [ReadWrite]);
    }

    #[test]
    fn of_what_another_process_serves_only_its_socket_is_in_reach() {
        let config = VmConfig {
            fs: vec![crate::config::FsConfig::new("tag", "/run/share/socket")],
            tpm: Some(crate::config::TpmConfig {
                socket: "/run/tpm/socket".into(),
            }),
            ..VmConfig::default()
        };
        let rules = Rules::of(&config, false);
        let folders = ["/run/share", "/run/tpm"].map(Path::new);
        assert_eq!(rules.connects(), folders);
        assert_eq!(access(&rules, "/run/share"), []);
    }

    #[test]
    fn images_lie_in_folders_that_have_nothing_else() {
        let home = Some(Path::new("/var/lib/service"));
        for (folder, is) in [
            ("/", false),
            ("/run", false),
            ("/home", false),
            ("/home/somebody", false),
            ("/var/lib/service", false),
            ("/dev/mapper", false),
            ("/etc/vms/images", false),
            ("/usr/local/images", false),
            ("/home/somebody/vms", true),
            ("/var/lib/service/vms", true),
            ("/var/lib/libvirt/images", true),
            ("/srv/vms", true),
        ] {
            assert_eq!(is_for_images(Path::new(folder), home), is, "{folder}");
        }
    }

    #[test]
    fn what_is_added_lies_beside_an_image_that_is_there_where_something_can_be_asked_for() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let folder = root.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder.canonicalize().unwrap()
        };
        let [written, read, inherited] = ["written", "read", "inherited"].map(folder);
        let disk = |folder: &Path, readonly, fd| DiskConfig {
            readonly,
            fd,
            ..DiskConfig::new(folder.join("disk"))
        };
        let config = VmConfig {
            disk: vec![
                disk(&written, true, None),
                disk(&written, false, None),
                disk(&read, true, None),
                disk(&inherited, false, Some(3)),
            ],
            ..VmConfig::default()
        };
        assert_eq!(Rules::of(&config, false).images(), []);
        let rules = Rules::of(&config, true);
        let images = rules.images().iter();
        let images: Vec<_> = images.map(|rule| (&*rule.path, rule.access)).collect();
        assert_eq!(images, [(&*written, ReadWrite), (&*read, Read)]);
        // As a whole it is nobody's.
        assert_eq!(access(&rules, written.to_str().unwrap()), []);
    }

    #[test]
    fn a_vm_that_can_be_asked_for_devices_has_what_they_are_opened_by() {
        let rules = Rules::of(&VmConfig::default(), true);
        for path in NET.iter().chain(DEVICE) {
            assert_eq!(access(&rules, path), [ReadWrite], "{path}");
        }
    }
}
