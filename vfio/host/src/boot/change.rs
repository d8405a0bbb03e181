//! How a word of the kernel's command line is added and removed, for each loader.

use std::path::{Path, PathBuf};

use busway_iommu::Command;

use super::{Loader, sed};
use crate::finding::Remedy;
use crate::root::{self, SysRoot};

/// The file that has nothing but the command line: kernel-install(8), and Proxmox's tool.
const KERNEL_CMDLINE: &str = "/etc/kernel/cmdline";

/// The file that grub-mkconfig takes the command line from.
pub(super) const DEFAULT_GRUB: &str = "/etc/default/grub";

/// Further such files, which some distributions read after it.
const MORE_OF_GRUB: &str = "default/grub.d";

/// Where a command line is kept.
enum Kept {
    /// In shell variables of [`DEFAULT_GRUB`]; the command writes GRUB's configuration anew.
    Grub(fn() -> Command),
    /// In [`KERNEL_CMDLINE`]; the command has the loader take it over.
    Line(fn() -> Command),
    /// By a program: its options that add and remove a word.
    Program([&'static str; 2], fn() -> Command),
    /// Where a person changes it: the place, and what follows.
    Hand(&'static str, &'static str),
    /// Nobody knows.
    Unknown,
}

impl Loader {
    /// How a word is added.
    pub(in super::super) fn add(self, word: &str) -> Vec<Remedy> {
        let grub = |mkconfig: fn() -> Command| {
            let line = format!("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {word}\"");
            Command::append(line, DEFAULT_GRUB).then(mkconfig())
        };
        vec![match self.kept() {
            Kept::Grub(mkconfig) => Remedy::command(self.what(), grub(mkconfig)),
            Kept::Line(refresh) => {
                let line = Command::new(["sed", "-i"])
                    .operand(sed::append(word))
                    .operand(KERNEL_CMDLINE);
                Remedy::command(self.what(), line.then(refresh()))
            }
            Kept::Program([add, _], program) => {
                Remedy::command(self.what(), program().setting(add, word))
            }
            Kept::Hand(place, then) => Remedy::words(format!("add {word} to {place}, then {then}")),
            Kept::Unknown => {
                let rhel = grubby().setting(GRUBBY[0], word);
                return vec![
                    Remedy::command(
                        "on Debian and Ubuntu with GRUB, then reboot",
                        grub(update_grub),
                    ),
                    Remedy::command("on Fedora and RHEL, then reboot", rhel),
                ];
            }
        }]
    }

    /// How a word, as it stands on the command line, is removed.
    pub(in super::super) fn remove(self, root: &SysRoot, word: &str) -> Remedy {
        let what = |how: &str| format!("boot the kernel without {word} ({how})");
        let grub = |mkconfig: fn() -> Command| {
            Command::new(["sed", "-i", "-E"])
                .operand(sed::without(word))
                .operands(grub_files(root, word))
                .then(mkconfig())
        };
        match self.kept() {
            Kept::Grub(mkconfig) => Remedy::command(what(self.what()), grub(mkconfig)),
            Kept::Line(refresh) => {
                let line = Command::new(["sed", "-i", "-E"])
                    .operand(sed::without_in_line(word))
                    .operand(KERNEL_CMDLINE);
                Remedy::command(what(self.what()), line.then(refresh()))
            }
            Kept::Program([_, remove], program) => {
                Remedy::command(what(self.what()), program().setting(remove, word))
            }
            Kept::Hand(place, then) => {
                Remedy::words(what(&format!("it is in {place}; then {then}")))
            }
            Kept::Unknown => Remedy::command(
                what("on Debian and Ubuntu with GRUB, then reboot"),
                grub(update_grub),
            ),
        }
    }

    fn kept(self) -> Kept {
        match self {
            Self::ProxmoxBootTool => Kept::Line(|| Command::new(["proxmox-boot-tool", "refresh"])),
            // kernel-install(8)
            Self::KernelInstall => Kept::Line(|| Command::new(["kernel-install", "add-all"])),
            // /etc/initramfs/post-update.d/systemd-boot of Debian's package systemd-boot
            Self::UpdateInitramfs => {
                Kept::Line(|| Command::new(["update-initramfs", "-u", "-k", "all"]))
            }
            Self::Sdbootutil => Kept::Line(|| Command::new(["sdbootutil", "update-all-entries"])),
            Self::ReinstallKernels => Kept::Line(|| Command::new(["reinstall-kernels"])),
            Self::Mkinitcpio => Kept::Line(|| Command::new(["mkinitcpio", "-P"])),
            Self::UpdateGrub => Kept::Grub(update_grub),
            Self::Grub2Mkconfig => {
                Kept::Grub(|| Command::new(["grub2-mkconfig", "-o", "/boot/grub2/grub.cfg"]))
            }
            Self::GrubMkconfig => {
                Kept::Grub(|| Command::new(["grub-mkconfig", "-o", "/boot/grub/grub.cfg"]))
            }
            Self::Grubby => Kept::Program(GRUBBY, grubby),
            Self::RpmOstree => Kept::Program(["--append=", "--delete="], || {
                Command::new(["rpm-ostree", "kargs"])
            }),
            Self::Kernelstub => Kept::Program(["--add-options=", "--delete-options="], || {
                Command::new(["kernelstub"])
            }),
            Self::SystemdBoot => Kept::Hand(
                "the line `options` of the entry that bootctl shows as the default",
                "reboot",
            ),
            Self::SdbootManage => Kept::Hand(
                "LINUX_OPTIONS in /etc/sdboot-manage.conf",
                "run sdboot-manage gen, and reboot",
            ),
            Self::Limine => Kept::Hand(
                "KERNEL_CMDLINE[default] in /etc/default/limine (then run limine-update), or the line \
                 `cmdline` of limine.conf where that is written by hand",
                "reboot",
            ),
            Self::Refind => Kept::Hand(
                "each line of refind_linux.conf, which is beside the kernel",
                "reboot",
            ),
            Self::UpdateExtlinux => Kept::Hand(
                "default_kernel_opts in /etc/update-extlinux.conf",
                "run update-extlinux, and reboot",
            ),
            Self::Talos => Kept::Hand(
                "machine.install.extraKernelArgs (or to the kernel arguments of the image factory's \
                 schematic)",
                "upgrade the node",
            ),
            Self::NixOs => Kept::Hand("boot.kernelParams", "nixos-rebuild boot, and reboot"),
            Self::Guix => Kept::Hand(
                "kernel-arguments of the operating-system's declaration",
                "guix system reconfigure, and reboot",
            ),
            Self::TrueNas => Kept::Hand(
                "kernel_extra_options of midclt call system.advanced.config, by midclt call \
                 system.advanced.update",
                "reboot",
            ),
            Self::Unraid => Kept::Hand(
                "the line `append` of the flash drive's Syslinux configuration (Main, Flash)",
                "reboot",
            ),
            Self::Unknown => Kept::Unknown,
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::ProxmoxBootTool => "by Proxmox's boot tool, then reboot",
            Self::KernelInstall | Self::UpdateInitramfs => "by kernel-install, then reboot",
            Self::Sdbootutil => "by sdbootutil, then reboot",
            Self::ReinstallKernels => "by EndeavourOS's reinstall-kernels, then reboot",
            Self::Mkinitcpio => "by mkinitcpio, then reboot",
            Self::Kernelstub => "by kernelstub, then reboot",
            Self::RpmOstree => "by rpm-ostree, then reboot",
            Self::Grubby => "by grubby, then reboot",
            _ => "by GRUB, then reboot",
        }
    }
}

/// grubby's options that add and remove a word.
const GRUBBY: [&str; 2] = ["--args=", "--remove-args="];

fn grubby() -> Command {
    Command::new(["grubby", "--update-kernel=ALL"])
}

fn update_grub() -> Command {
    Command::new(["update-grub"])
}

/// The files that GRUB's configuration has `word` from; where none says so, the first.
fn grub_files(root: &SysRoot, word: &str) -> Vec<PathBuf> {
    let more = root.etc.join(MORE_OF_GRUB);
    let names = root::names(&more).into_iter();
    let names = names.filter(|name| name.ends_with(".cfg"));
    let more = names.map(|name| Path::new(MORE_OF_GRUB).join(name));
    let first = [PathBuf::from("default/grub")];
    let all = first.into_iter().chain(more);
    let has = |below: &PathBuf| {
        let text = root::text(&root.etc.join(below));
        text.is_some_and(|text| text.contains(word))
    };
    let having: Vec<_> = all
        .filter(has)
        .map(|below| Path::new("/etc").join(below))
        .collect();
    match having.is_empty() {
        true => vec![DEFAULT_GRUB.into()],
        false => having,
    }
}
