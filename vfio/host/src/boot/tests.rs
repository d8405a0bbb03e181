use super::change::DEFAULT_GRUB;
use super::*;
use crate::finding::Remedy;
use std::fs;

const KERNEL_CMDLINE: &str = "/etc/kernel/cmdline";

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
    assert_eq!(read(&[LINE, DEBIAN]), Loader::UpdateInitramfs);
    assert_eq!(read(&[LINE]), Loader::KernelInstall);
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
    let tumbleweed = "ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse suse\"\n";
    assert_eq!(read(&[os(tumbleweed), info, LINE]), Loader::Sdbootutil);
    assert_eq!(read(&[os("ID=arch\n"), info, LINE]), Loader::KernelInstall);
    let preset = |text| ("etc/mkinitcpio.d/linux.preset", text);
    for (text, loader) in [
        ("#default_uki=\"/efi/a.efi\"\n", Loader::KernelInstall),
        ("default_uki=\"/efi/a.efi\"\n", Loader::Mkinitcpio),
    ] {
        let files = [os("ID=arch\n"), info, LINE, preset(text)];
        assert_eq!(read(&files), loader, "{text}");
    }
    let endeavour = os("ID=\"endeavouros\"\nID_LIKE=\"arch\"\n");
    assert_eq!(read(&[endeavour, info, LINE]), Loader::ReinstallKernels);
    let manage = ("etc/sdboot-manage.conf", "");
    assert_eq!(
        read(&[os("ID=cachyos\n"), info, manage]),
        Loader::SdbootManage
    );
    let pop = os("ID=pop\nID_LIKE=\"ubuntu debian\"\n");
    let stub = ("etc/kernelstub/configuration", "{}");
    assert_eq!(read(&[pop, info, stub]), Loader::Kernelstub);
    assert_eq!(read(&[("etc/default/limine", "")]), Loader::Limine);
    let alpine = ("etc/update-extlinux.conf", "");
    assert_eq!(read(&[os("ID=alpine\n"), alpine]), Loader::UpdateExtlinux);
    assert_eq!(read(&[("etc/unraid-version", "")]), Loader::Unraid);
    let truenas = "BOOT_IMAGE=/ROOT/25.04/boot/vmlinuz root=ZFS=boot-pool/ROOT/25.04 ro";
    assert_eq!(read(&[DEBIAN, ("proc/cmdline", truenas)]), Loader::TrueNas);
    assert_eq!(
        read(&[("proc/cmdline", "talos.platform=metal pti=on")]),
        Loader::Talos
    );
    // Where there are no files, as in a container, the kernel's name says whose it is.
    let kernel = |text| ("proc/sys/kernel/osrelease", text);
    for (release, loader) in [
        ("5.14.0-427.el9.x86_64\n", Loader::Grubby),
        ("6.11.4-201.fc40.x86_64\n", Loader::Grubby),
        ("6.12.57-amd64\n", Loader::UpdateGrub),
        ("6.8.0-45-generic\n", Loader::UpdateGrub),
        ("6.4.0-150600.23.25-default\n", Loader::Grub2Mkconfig),
        ("6.18.48-talos\n", Loader::Talos),
        ("6.12.1\n", Loader::Unknown),
    ] {
        assert_eq!(read(&[BY_GRUB, kernel(release)]), loader, "{release}");
    }
}

#[test]
fn every_loader_says_where_a_word_is_added_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let root = SysRoot::under(folder.path());
    for (loader, added, removed) in [
        (
            Loader::UpdateInitramfs,
            "/etc/kernel/cmdline && update-initramfs -u -k all",
            "/etc/kernel/cmdline && update-initramfs -u -k all",
        ),
        (
            Loader::Mkinitcpio,
            "/etc/kernel/cmdline && mkinitcpio -P",
            "mkinitcpio -P",
        ),
        (
            Loader::Kernelstub,
            "kernelstub --add-options=a=b",
            "kernelstub --delete-options=a=b",
        ),
        (
            Loader::Grubby,
            "grubby --update-kernel=ALL --args=a=b",
            "grubby --update-kernel=ALL --remove-args=a=b",
        ),
        (
            Loader::RpmOstree,
            "rpm-ostree kargs --append=a=b",
            "rpm-ostree kargs --delete=a=b",
        ),
        (
            Loader::Unraid,
            "add a=b to the line `append`",
            "without a=b (it is in the line `append`",
        ),
        (Loader::Refind, "refind_linux.conf", "refind_linux.conf"),
    ] {
        let text = |remedy: &Remedy| format!("{remedy}");
        let [add] = &loader.add("a=b")[..] else {
            panic!("{loader:?}");
        };
        assert!(text(add).contains(added), "{loader:?}: {add}");
        let remove = loader.remove(&root, "a=b");
        assert!(text(&remove).contains(removed), "{loader:?}: {remove}");
    }
}

#[test]
fn a_word_is_removed_from_the_file_that_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = SysRoot::under(folder.path());
    let more = root.etc.join("default/grub.d");
    fs::create_dir_all(&more).unwrap();
    fs::write(
        root.etc.join("default/grub"),
        "GRUB_CMDLINE_LINUX=\"quiet\"\n",
    )
    .unwrap();
    let line = "GRUB_CMDLINE_LINUX_DEFAULT=\"console=tty1 iommu=off\"\n";
    fs::write(more.join("50-cloud image.cfg"), line).unwrap();
    fs::write(more.join("note.txt"), line).unwrap();
    let lines = |word| Loader::UpdateGrub.remove(&root, word).to_string();
    let remedy = lines("iommu=off");
    let file = "' '/etc/default/grub.d/50-cloud image.cfg' && update-grub";
    assert!(remedy.ends_with(file), "{remedy}");
    let remedy = lines("elsewhere");
    assert!(
        remedy.ends_with("' /etc/default/grub && update-grub"),
        "{remedy}"
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
    let folder = tempfile::tempdir().unwrap();
    let root = SysRoot::under(folder.path());
    let grub = "GRUB_TIMEOUT=5\n\
                GRUB_CMDLINE_LINUX_DEFAULT=\"quiet a.b=1,x a.b=1,x a.b=1,xy za.b=1,x\"\n\
                GRUB_CMDLINE_LINUX='a.b=1,x'\n#a.b=1,x\nGRUB_CMDLINE_XEN=a.b=1,x\n";
    let remedy = Loader::UpdateGrub.remove(&root, "a.b=1,x");
    assert_eq!(
        edited(&remedy, DEFAULT_GRUB, grub),
        "GRUB_TIMEOUT=5\n\
         GRUB_CMDLINE_LINUX_DEFAULT=\"quiet   a.b=1,xy za.b=1,x\"\n\
         GRUB_CMDLINE_LINUX=''\n#a.b=1,x\nGRUB_CMDLINE_XEN=\n"
    );
    let line = "pcie_acs_override=downstream,multifunction intel_iommu=on=downstream x\n";
    let word = "pcie_acs_override=downstream,multifunction";
    let remedy = Loader::ProxmoxBootTool.remove(&root, word);
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
            let remedy = loader.remove(&root, word);
            let text = edited(&remedy, KERNEL_CMDLINE, &format!("a {word} {word}b\n"));
            assert_eq!(text, format!("a  {word}b\n"), "{word}");
        }
    }
}
