//! The kernel's command line: where this host's boot loader has it from, and how it is changed for good.
//!
//! Told by the files of the loaders and distributions, by what the firmware was told, and by what the
//! kernel was given. The commands change whole words only.

use std::fmt::Write as _;

use busway_iommu::Command;

use super::finding::Remedy;
use super::root::{self, SysRoot};

/// What `loader.conf` of systemd-boot is to the firmware: who loaded the kernel, in UTF-16
/// (systemd, <https://systemd.io/BOOT_LOADER_INTERFACE>).
const LOADER_INFO: &str = "firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// The file that systemd's kernel-install takes the command line from (kernel-install(8)).
const KERNEL_CMDLINE: &str = "/etc/kernel/cmdline";

/// The file that grub-mkconfig takes the command line from.
const DEFAULT_GRUB: &str = "/etc/default/grub";

/// What gives the kernel its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loader {
    /// Proxmox VE's tool, which copies kernels to systemd-boot's partitions.
    ProxmoxBootTool,
    /// `/etc/kernel/cmdline` and systemd's kernel-install.
    KernelInstall,
    /// systemd-boot, with entries written by hand.
    SystemdBoot,
    /// GRUB with Debian's `update-grub`, also Ubuntu's and Proxmox VE's.
    UpdateGrub,
    /// GRUB or any other of Fedora's and RHEL's, by `grubby`.
    Grubby,
    /// GRUB with its configuration made by `grub2-mkconfig`: SUSE.
    Grub2Mkconfig,
    /// GRUB with its configuration made by `grub-mkconfig`: Arch, Gentoo and others.
    GrubMkconfig,
    /// A system of images, whose kernel arguments rpm-ostree keeps.
    RpmOstree,
    /// Talos, whose command line is of its machine configuration.
    Talos,
    /// NixOS, whose command line is of its configuration.
    NixOs,
    /// Nothing on the host says which it is.
    Unknown,
}

impl Loader {
    /// Looks at the host's files.
    pub(super) fn read(root: &SysRoot) -> Self {
        let etc = |name: &str| root.etc.join(name).exists();
        let given = root::text(&root.proc.join("cmdline")).unwrap_or_default();
        let begins = |start: &str| given.split_whitespace().any(|word| word.starts_with(start));
        let release = root::text(&root.etc.join("os-release")).unwrap_or_default();
        let is = |names: &[&str]| is_like(&release, names);
        if begins("talos.platform=") || is(&["talos"]) {
            return Self::Talos;
        }
        if root.run.join("ostree-booted").exists() || begins("ostree=") {
            return Self::RpmOstree;
        }
        if is(&["nixos"]) {
            return Self::NixOs;
        }
        // GRUB gives every Linux kernel this word (grub-core/loader).
        let by_grub = begins("BOOT_IMAGE=");
        // The entries that Proxmox's tool writes name the initial RAM disk in a folder of its own.
        let by_proxmox = begins(r"initrd=\EFI\proxmox\");
        if by_proxmox || (!by_grub && etc("kernel/proxmox-boot-uuids") && etc("kernel/cmdline")) {
            return Self::ProxmoxBootTool;
        }
        if is(&["fedora", "rhel", "centos"]) {
            return Self::Grubby;
        }
        let by_systemd = std::fs::read(root.sys.join(LOADER_INFO)).is_ok_and(|bytes| {
            let letters: Vec<_> = bytes.into_iter().filter(|byte| *byte != 0).collect();
            String::from_utf8_lossy(&letters).contains("systemd-boot")
        });
        if !by_grub && (by_systemd || !etc("default/grub")) {
            if etc("kernel/cmdline") {
                return Self::KernelInstall;
            }
            if by_systemd {
                return Self::SystemdBoot;
            }
        }
        if !etc("default/grub") && release.is_empty() {
            return Self::Unknown;
        }
        if is(&["debian", "ubuntu"]) {
            Self::UpdateGrub
        } else if is(&["suse", "opensuse", "sles"]) {
            Self::Grub2Mkconfig
        } else if etc("default/grub") && !release.is_empty() {
            Self::GrubMkconfig
        } else {
            Self::Unknown
        }
    }

    /// How a word is added.
    pub(super) fn add(self, word: &str) -> Vec<Remedy> {
        let grub = || {
            let line = format!("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {word}\"");
            Command::append(line, DEFAULT_GRUB)
        };
        let line = || {
            Command::new(["sed", "-i"])
                .operand(format!("1s/$/ {}/", replacement(word)))
                .operand(KERNEL_CMDLINE)
        };
        if self == Self::Unknown {
            return vec![
                Remedy::command(
                    "on Debian and Ubuntu with GRUB, then reboot",
                    grub().then(mkconfig(Self::UpdateGrub)),
                ),
                Remedy::command("on Fedora and RHEL, then reboot", grubby("--args=", word)),
            ];
        }
        vec![match self {
            Self::ProxmoxBootTool | Self::KernelInstall => {
                Remedy::command(self.what(), line().then(refresh(self)))
            }
            Self::Grubby => Remedy::command(self.what(), grubby("--args=", word)),
            Self::RpmOstree => Remedy::command(self.what(), kargs("--append=", word)),
            Self::SystemdBoot => Remedy::words(format!(
                "add {word} to the line `options` of the entry that bootctl shows as the default, then reboot"
            )),
            Self::Talos => Remedy::words(format!(
                "add {word} to machine.install.extraKernelArgs (or to the kernel arguments of the image \
                 factory's schematic), and upgrade the node"
            )),
            Self::NixOs => Remedy::words(format!(
                "add \"{word}\" to boot.kernelParams, then nixos-rebuild boot, and reboot"
            )),
            Self::UpdateGrub | Self::Grub2Mkconfig | Self::GrubMkconfig | Self::Unknown => {
                Remedy::command(self.what(), grub().then(mkconfig(self)))
            }
        }]
    }

    /// How a word, as it stands on the command line, is removed.
    pub(super) fn remove(self, word: &str) -> Remedy {
        let what = |how: &str| format!("boot the kernel without {word} ({how})");
        let grub = |loader| {
            Command::new(["sed", "-i", "-E"])
                .operand(without(word))
                .operand(DEFAULT_GRUB)
                .then(mkconfig(loader))
        };
        match self {
            Self::ProxmoxBootTool | Self::KernelInstall => Remedy::command(
                what(self.what()),
                Command::new(["sed", "-i", "-E"])
                    .operand(without_in_line(word))
                    .operand(KERNEL_CMDLINE)
                    .then(refresh(self)),
            ),
            Self::Grubby => Remedy::command(what(self.what()), grubby("--remove-args=", word)),
            Self::RpmOstree => Remedy::command(what(self.what()), kargs("--delete=", word)),
            Self::SystemdBoot => Remedy::words(what(
                "it stands in the line `options` of the entry that bootctl shows as the default",
            )),
            Self::Talos => Remedy::words(what(
                "it is of machine.install.extraKernelArgs or of the image factory's schematic",
            )),
            Self::NixOs => Remedy::words(what("it is of boot.kernelParams")),
            Self::UpdateGrub | Self::Grub2Mkconfig | Self::GrubMkconfig => {
                Remedy::command(what(self.what()), grub(self))
            }
            Self::Unknown => Remedy::command(
                what("on Debian and Ubuntu with GRUB, then reboot"),
                grub(Self::UpdateGrub),
            ),
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::ProxmoxBootTool => "by Proxmox's boot tool, then reboot",
            Self::KernelInstall => "by kernel-install, then reboot",
            Self::RpmOstree => "by rpm-ostree, then reboot",
            Self::Grubby => "by grubby, then reboot",
            _ => "by GRUB, then reboot",
        }
    }
}

/// Whether os-release(5) says that the system is one of these, or like one.
fn is_like(release: &str, names: &[&str]) -> bool {
    let value = |key: &str| {
        let mut lines = release.lines();
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

/// Writes GRUB's configuration anew.
fn mkconfig(loader: Loader) -> Command {
    match loader {
        Loader::Grub2Mkconfig => Command::new(["grub2-mkconfig", "-o", "/boot/grub2/grub.cfg"]),
        Loader::GrubMkconfig => Command::new(["grub-mkconfig", "-o", "/boot/grub/grub.cfg"]),
        _ => Command::new(["update-grub"]),
    }
}

/// Has the loader take over a changed `/etc/kernel/cmdline`.
fn refresh(loader: Loader) -> Command {
    match loader {
        Loader::ProxmoxBootTool => Command::new(["proxmox-boot-tool", "refresh"]),
        _ => Command::new(["kernel-install", "add-all"]),
    }
}

fn grubby(change: &'static str, word: &str) -> Command {
    Command::new(["grubby", "--update-kernel=ALL"]).setting(change, word)
}

fn kargs(change: &'static str, word: &str) -> Command {
    Command::new(["rpm-ostree", "kargs"]).setting(change, word)
}

/// A sed script that takes `word` out of the lines of /etc/default/grub that have the command line: where
/// it stands between white space, quotes, the sign of equality behind the variable, and the line's end.
fn without(word: &str) -> String {
    let word = pattern(word);
    format!(
        "/^[[:space:]]*GRUB_CMDLINE_/{{:a;\
         s/(^[[:space:]]*GRUB_CMDLINE_[A-Z_]*=|[\"'[:space:]]){word}([\"'[:space:]]|$)/\\1\\2/;ta}}"
    )
}

/// The same for a file that has nothing but the command line.
fn without_in_line(word: &str) -> String {
    let word = pattern(word);
    format!(":a;s/(^|[[:space:]]){word}([[:space:]]|$)/\\1\\2/;ta")
}

/// An extended regular expression (XBD 9.4) that matches `word` and nothing else, for sed's `s/…/…/`.
fn pattern(word: &str) -> String {
    let mut pattern = String::with_capacity(word.len());
    for c in word.chars() {
        match c {
            '.' | '[' | ']' | '\\' | '(' | ')' | '*' | '+' | '?' | '{' | '}' | '|' | '^' | '$'
            | '/' => {
                let _infallible = write!(pattern, "\\{c}");
            }
            c => pattern.push(c),
        }
    }
    pattern
}

/// `word` as the right side of sed's `s/…/…/`.
fn replacement(word: &str) -> String {
    let mut text = String::with_capacity(word.len());
    for c in word.chars() {
        if matches!(c, '/' | '\\' | '&') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read(files: &[(&str, &str)]) -> Loader {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Loader::read(&root)
    }

    #[test]
    fn a_loader_is_told_by_its_files() {
        const UUIDS: (&str, &str) = ("etc/kernel/proxmox-boot-uuids", "A1B2-C3D4\n");
        const LINE: (&str, &str) = ("etc/kernel/cmdline", "root=ZFS=rpool/ROOT/pve-1 boot=zfs\n");
        const GRUB: (&str, &str) = ("etc/default/grub", "GRUB_CMDLINE_LINUX=\"\"\n");
        const BY_GRUB: (&str, &str) = ("proc/cmdline", "BOOT_IMAGE=/vmlinuz ro\n");
        const DEBIAN: (&str, &str) = ("etc/os-release", "NAME=\"Debian\"\nID=debian\n");
        let os = |text| ("etc/os-release", text);
        assert_eq!(read(&[]), Loader::Unknown);
        assert_eq!(read(&[UUIDS, LINE, DEBIAN, GRUB]), Loader::ProxmoxBootTool);
        assert_eq!(
            read(&[UUIDS, LINE, DEBIAN, GRUB, BY_GRUB]),
            Loader::UpdateGrub
        );
        let by_tool = r"initrd=\EFI\proxmox\6.8.12-4-pve\initrd.img-6.8.12-4-pve quiet";
        assert_eq!(read(&[("proc/cmdline", by_tool)]), Loader::ProxmoxBootTool);
        assert_eq!(read(&[DEBIAN, GRUB]), Loader::UpdateGrub);
        assert_eq!(read(&[LINE, DEBIAN]), Loader::KernelInstall);
        let rocky = "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n";
        assert_eq!(read(&[os(rocky), GRUB, BY_GRUB]), Loader::Grubby);
        assert_eq!(
            read(&[os(rocky), ("run/ostree-booted", "")]),
            Loader::RpmOstree
        );
        let leap = "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n";
        assert_eq!(read(&[os(leap), GRUB]), Loader::Grub2Mkconfig);
        assert_eq!(read(&[os("ID=arch\n"), GRUB]), Loader::GrubMkconfig);
        assert_eq!(read(&[os("ID=nixos\n")]), Loader::NixOs);
        let info: String = "systemd-boot 257".chars().flat_map(|c| [c, '\0']).collect();
        let info = (&*format!("sys/{LOADER_INFO}"), &*info);
        assert_eq!(read(&[os("ID=arch\n"), info]), Loader::SystemdBoot);
        assert_eq!(
            read(&[("proc/cmdline", "talos.platform=metal pti=on")]),
            Loader::Talos
        );
    }

    /// Runs a remedy's sed on a file.
    fn edited(command: &Remedy, file: &str, text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, text).unwrap();
        let line = command.command.as_ref().unwrap().to_string();
        let (first, _) = line.split_once(" && ").unwrap();
        let line = first.replace(file, path.to_str().unwrap());
        let run = std::process::Command::new("sh")
            .arg("-c")
            .arg(&line)
            .output()
            .unwrap();
        assert!(run.status.success(), "{line}: {run:?}");
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn whole_words_are_added_and_removed() {
        let grub = "GRUB_TIMEOUT=5\n\
                    GRUB_CMDLINE_LINUX_DEFAULT=\"quiet a.b=1,x a.b=1,x a.b=1,xy za.b=1,x\"\n\
                    GRUB_CMDLINE_LINUX='a.b=1,x'\n#a.b=1,x\nGRUB_CMDLINE_XEN=a.b=1,x\n";
        let remedy = Loader::UpdateGrub.remove("a.b=1,x");
        assert_eq!(
            edited(&remedy, DEFAULT_GRUB, grub),
            "GRUB_TIMEOUT=5\n\
             GRUB_CMDLINE_LINUX_DEFAULT=\"quiet   a.b=1,xy za.b=1,x\"\n\
             GRUB_CMDLINE_LINUX=''\n#a.b=1,x\nGRUB_CMDLINE_XEN=\n"
        );
        let line = "pcie_acs_override=downstream,multifunction intel_iommu=on=downstream x\n";
        let word = "pcie_acs_override=downstream,multifunction";
        let remedy = Loader::ProxmoxBootTool.remove(word);
        assert_eq!(
            edited(&remedy, KERNEL_CMDLINE, line),
            " intel_iommu=on=downstream x\n"
        );
        let remedy = Loader::ProxmoxBootTool.add("intel_iommu=on");
        assert_eq!(
            edited(&remedy[0], KERNEL_CMDLINE, "root=/dev/x quiet\n"),
            "root=/dev/x quiet intel_iommu=on\n"
        );
        let remedy = Loader::UpdateGrub.add("a/b&c");
        assert_eq!(
            edited(&remedy[0], DEFAULT_GRUB, "X=1\n"),
            "X=1\nGRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX a/b&c\"\n"
        );
        // What the kernel was given is any text.
        for word in ["a[b]*", "x/y\\z", "p(q)|r", "it's", "$(id)", "^a.+?{2}$"] {
            for loader in [Loader::KernelInstall, Loader::ProxmoxBootTool] {
                let remedy = loader.remove(word);
                let text = edited(&remedy, KERNEL_CMDLINE, &format!("a {word} {word}b\n"));
                assert_eq!(text, format!("a  {word}b\n"), "{word}");
            }
        }
    }
}
