//! Which paths a VM needs: what its configuration names, and what of the host belongs to that.
//!
//! A VM that can be asked for more (it has a control socket) also needs what devices that are added are opened by. Files
//! and sockets that are added later are in no configuration: they come by descriptor, or `--landlock-rules` names them.

use std::path::{Path, PathBuf};

use crate::config::{
    ConsoleConfig, LandlockAccess, LandlockRule, NetConfig, VhostMode, VirtioConfig, VmConfig,
};

use LandlockAccess::{Read, ReadWrite};

/// Some paths of a process's, and what may be done with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    paths: Vec<LandlockRule>,
    /// Folders whose sockets are connected to.
    connects: Vec<PathBuf>,
}

/// What every VM opens or reads.
///
/// Of `/proc` and `/sys` a few files are read at any time: what a device's driver, its errors and its resets are, what a
/// tap has counted, what threads have used. Which these are depends on devices that come later.
const ALWAYS: &[(&str, LandlockAccess)] = &[
    ("/dev/kvm", ReadWrite),
    ("/dev/null", ReadWrite),
    ("/dev/urandom", Read),
    ("/proc", Read),
    ("/sys", Read),
    // Standard input is opened anew, so that it can be read without waiting, and the log writes to what it was given.
    ("/proc/self/fd/0", ReadWrite),
    ("/proc/self/fd/1", ReadWrite),
    ("/proc/self/fd/2", ReadWrite),
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
        for rule in &config.landlock_rules {
            rules.allow(&rule.path, rule.access);
        }
        rules
    }

    /// Has files and sockets made in the folder that `path` is in.
    #[must_use]
    pub fn with_made(mut self, path: Option<&Path>) -> Self {
        if let Some(path) = path {
            self.allow(folder(path), ReadWrite);
        }
        self
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &LandlockRule> {
        self.paths.iter()
    }

    /// Folders whose sockets are connected to.
    pub(super) fn connects(&self) -> &[PathBuf] {
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
                self.allow(folder(path), ReadWrite);
            }
            ConsoleConfig::Pty => self.allow_all(PTY, ReadWrite),
            ConsoleConfig::Off | ConsoleConfig::Null | ConsoleConfig::Tty => {}
        }
    }

    fn virtio(&mut self, device: &VirtioConfig) {
        // Where another process serves it, its socket is all that there is. The folder, for a rule is of the file that is
        // there, and a back end that comes back makes another.
        if let Some(socket) = device.socket() {
            if is_made(device) {
                self.allow(folder(socket), ReadWrite);
            }
            return self.connects.push(folder(socket).to_owned());
        }
        match device {
            VirtioConfig::Disk(disk) if disk.readonly => self.allow(&disk.path, Read),
            VirtioConfig::Disk(disk) => self.allow(&disk.path, ReadWrite),
            VirtioConfig::Vsock(vsock) => match &vsock.socket {
                // It is made there, and those that the guest connects to are beside it.
                Some(socket) => self.allow(folder(socket), ReadWrite),
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
        assert_eq!(access(&least, "/sys"), [Read]);
        assert_eq!(access(&least, "/proc"), [Read]);

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
    fn a_vm_that_can_be_asked_for_devices_has_what_they_are_opened_by() {
        let rules = Rules::of(&VmConfig::default(), true);
        for path in NET.iter().chain(DEVICE) {
            assert_eq!(access(&rules, path), [ReadWrite], "{path}");
        }
    }
}
