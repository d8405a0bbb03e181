//! The kernel's command line: where this host's boot loader has it from, and how it is changed for good.
//!
//! Told by the files of the loaders and distributions, by what the firmware was told, and by what the
//! kernel was given and is called. The commands change whole words only.

mod change;
mod sed;
#[cfg(test)]
mod tests;

use super::root::{self, SysRoot};

/// What systemd-boot and others tell the firmware: who loaded the kernel, in UTF-16
/// (systemd, <https://systemd.io/BOOT_LOADER_INTERFACE>).
const LOADER_INFO: &str = "firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// What gives the kernel its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loader {
    /// Proxmox VE's tool, which copies kernels to systemd-boot's partitions.
    ProxmoxBootTool,
    /// `/etc/kernel/cmdline` and systemd's kernel-install.
    KernelInstall,
    /// The same on Debian, where kernel-install is run for each initial RAM disk that is made, and finds
    /// no kernels by itself.
    UpdateInitramfs,
    /// The same on openSUSE, by a program of its own.
    Sdbootutil,
    /// The same on EndeavourOS, by a program of its own.
    ReinstallKernels,
    /// `/etc/kernel/cmdline` and mkinitcpio, which puts it into one file with the kernel: Arch.
    Mkinitcpio,
    /// systemd-boot, with entries written by hand.
    SystemdBoot,
    /// systemd-boot, with entries that CachyOS's program writes.
    SdbootManage,
    /// systemd-boot, with entries that Pop!_OS's program writes.
    Kernelstub,
    /// GRUB with Debian's `update-grub`, also Ubuntu's and Proxmox VE's.
    UpdateGrub,
    /// GRUB or any other of Fedora's and RHEL's, by `grubby`.
    Grubby,
    /// GRUB with its configuration made by `grub2-mkconfig`: SUSE.
    Grub2Mkconfig,
    /// GRUB with its configuration made by `grub-mkconfig`: Arch, Gentoo and others.
    GrubMkconfig,
    /// Limine.
    Limine,
    /// rEFInd.
    Refind,
    /// Syslinux as Alpine has it.
    UpdateExtlinux,
    /// A system of images, whose kernel arguments rpm-ostree keeps.
    RpmOstree,
    /// Talos, whose command line is of its machine configuration.
    Talos,
    /// NixOS, whose command line is of its configuration.
    NixOs,
    /// Guix, whose command line is of its configuration.
    Guix,
    /// TrueNAS, which keeps the command line in its own database.
    TrueNas,
    /// Unraid, which starts by Syslinux from its USB drive.
    Unraid,
    /// Nothing tells.
    Unknown,
}

impl Loader {
    /// Looks at the host's files.
    pub(super) fn read(root: &SysRoot) -> Self {
        let signs = Signs::read(root);
        let by_system = signs.of_system();
        by_system.unwrap_or_else(|| signs.of_loader())
    }
}

/// What tells a loader.
struct Signs<'a> {
    root: &'a SysRoot,
    /// The running kernel's command line.
    given: String,
    /// The distribution, in the words of os-release(5).
    release: String,
    /// The running kernel's release, which in a container says more of the host than its files.
    kernel: String,
    /// Who loaded it, as the firmware was told.
    loaded_by: String,
}

impl<'a> Signs<'a> {
    fn read(root: &'a SysRoot) -> Self {
        let proc = |name: &str| root::text(&root.proc.join(name)).unwrap_or_default();
        let info = std::fs::read(root.sys.join(LOADER_INFO)).unwrap_or_default();
        // The letters that matter are ASCII, with a zero byte behind each.
        let letters: Vec<_> = info.into_iter().filter(|byte| *byte != 0).collect();
        Self {
            root,
            given: proc("cmdline"),
            release: root::text(&root.etc.join("os-release")).unwrap_or_default(),
            kernel: proc("sys/kernel/osrelease"),
            loaded_by: String::from_utf8_lossy(&letters).into_owned(),
        }
    }

    fn etc(&self, name: &str) -> bool {
        self.root.etc.join(name).exists()
    }

    fn given(&self, start: &str) -> bool {
        let mut words = self.given.split_whitespace();
        words.any(|word| word.starts_with(start))
    }

    /// Whether os-release(5) says that the system is one of these, or like one.
    fn is(&self, names: &[&str]) -> bool {
        let value = |key: &str| {
            let mut lines = self.release.lines();
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let all = [value("ID"), value("ID_LIKE")];
        let mut words = all.iter().flatten().flat_map(|value| {
            let value = value.trim_matches(['"', '\'']);
            value.split_whitespace()
        });
        words.any(|word| {
            names
                .iter()
                .any(|name| word == *name || word.starts_with(&format!("{name}-")))
        })
    }

    /// GRUB gives every Linux kernel this word (grub-core/loader).
    fn is_by_grub(&self) -> bool {
        self.given("BOOT_IMAGE=")
    }

    /// Systems that leave no choice of what keeps the command line.
    fn of_system(&self) -> Option<Loader> {
        let is_talos =
            self.given("talos.platform=") || self.is(&["talos"]) || self.kernel.ends_with("-talos");
        let is_ostree = self.root.run.join("ostree-booted").exists() || self.given("ostree=");
        Some(if is_talos {
            Loader::Talos
        } else if is_ostree {
            Loader::RpmOstree
        } else if self.is(&["nixos"]) {
            Loader::NixOs
        } else if self.is(&["guix"]) {
            Loader::Guix
        } else if self.etc("unraid-version") || self.kernel.ends_with("-Unraid") {
            Loader::Unraid
        } else if self.given("root=ZFS=boot-pool/ROOT/") {
            Loader::TrueNas
        } else {
            return None;
        })
    }

    fn of_loader(&self) -> Loader {
        let by_grub = self.is_by_grub();
        // The entries that Proxmox's tool writes name the initial RAM disk in a folder of its own.
        let by_proxmox = self.given(r"initrd=\EFI\proxmox\");
        let has_line = self.etc("kernel/cmdline");
        if by_proxmox || (!by_grub && self.etc("kernel/proxmox-boot-uuids") && has_line) {
            return Loader::ProxmoxBootTool;
        }
        if self.is(&["fedora", "rhel", "centos"]) {
            return Loader::Grubby;
        }
        let other = if by_grub {
            None
        } else {
            self.other_than_grub()
        };
        other.unwrap_or_else(|| self.grub())
    }

    fn other_than_grub(&self) -> Option<Loader> {
        let loaded_by = |name: &str| self.loaded_by.contains(name);
        if self.is(&["pop"]) && self.etc("kernelstub/configuration") {
            return Some(Loader::Kernelstub);
        }
        if loaded_by("Limine") || self.etc("default/limine") {
            return Some(Loader::Limine);
        }
        if loaded_by("rEFInd") {
            return Some(Loader::Refind);
        }
        let has_grub = self.etc("default/grub");
        if self.etc("update-extlinux.conf") && !has_grub {
            return Some(Loader::UpdateExtlinux);
        }
        let by_systemd = loaded_by("systemd-boot");
        if !by_systemd && has_grub {
            return None;
        }
        if self.etc("sdboot-manage.conf") {
            return Some(Loader::SdbootManage);
        }
        match self.etc("kernel/cmdline") {
            true => Some(self.kernel_install()),
            false => by_systemd.then_some(Loader::SystemdBoot),
        }
    }

    /// What has `/etc/kernel/cmdline` taken over.
    fn kernel_install(&self) -> Loader {
        if self.is(&["endeavouros"]) {
            Loader::ReinstallKernels
        } else if self.is(&["debian", "ubuntu"]) {
            Loader::UpdateInitramfs
        } else if self.is(&["suse", "opensuse", "sles"]) {
            Loader::Sdbootutil
        } else if self.has_unified_presets() {
            Loader::Mkinitcpio
        } else {
            Loader::KernelInstall
        }
    }

    /// Whether mkinitcpio makes unified kernel images: a line such as `default_uki="/efi/…"` of a preset
    /// (mkinitcpio's `mkinitcpio.d/linux.preset`).
    fn has_unified_presets(&self) -> bool {
        let folder = self.root.etc.join("mkinitcpio.d");
        let names = root::names(&folder).into_iter();
        let mut presets = names.filter(|name| name.ends_with(".preset"));
        presets.any(|name| {
            let text = root::text(&folder.join(name)).unwrap_or_default();
            let mut lines = text.lines().map(str::trim_start);
            lines.any(|line| {
                let key = line.split_once('=').map_or("", |(key, _)| key);
                !line.starts_with('#') && key.ends_with("_uki")
            })
        })
    }

    fn grub(&self) -> Loader {
        let has_grub = self.etc("default/grub");
        if self.is(&["debian", "ubuntu"]) {
            Loader::UpdateGrub
        } else if self.is(&["suse", "opensuse", "sles"]) {
            Loader::Grub2Mkconfig
        } else if has_grub && !self.release.is_empty() {
            Loader::GrubMkconfig
        } else if self.release.is_empty() && self.is_by_grub() {
            self.of_kernel()
        } else {
            Loader::Unknown
        }
    }

    /// By the names that distributions give their kernels.
    fn of_kernel(&self) -> Loader {
        let release = self.kernel.as_str();
        let ends = |names: &[&str]| names.iter().any(|name| release.ends_with(name));
        if release.contains(".el") || release.contains(".fc") {
            Loader::Grubby
        } else if ends(&["-generic", "-amd64", "-arm64", "-pve"]) {
            Loader::UpdateGrub
        } else if ends(&["-default"]) {
            Loader::Grub2Mkconfig
        } else {
            Loader::Unknown
        }
    }
}
