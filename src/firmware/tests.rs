//! Firmware on hosts that are made up: which is taken, what is refused, and what becomes of the variables.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Bytes of the code and of the variables of a build of 4 MiB, as Debian's.
const CODE: usize = 0x37_c000;
const VARS: usize = 0x8_4000;

const NV_DATA: [u8; 16] = [
    0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50,
];
const AUTHENTICATED: [u8; 16] = [
    0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92,
];

/// A volume of `size` bytes with this file system.
fn volume(size: usize, file_system: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0xff; size];
    bytes[..16].fill(0);
    bytes[16..32].copy_from_slice(&file_system);
    bytes[32..40].copy_from_slice(&(size as u64).to_le_bytes());
    bytes[40..44].copy_from_slice(b"_FVH");
    bytes[48..50].copy_from_slice(&0x48_u16.to_le_bytes());
    bytes[50..52].fill(0);
    let words = bytes[..0x48].chunks(2);
    let sum = words.fold(0_u16, |sum, word| {
        sum.wrapping_add(u16::from_le_bytes([word[0], word[1]]))
    });
    bytes[50..52].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    bytes
}

fn variables(size: usize) -> Vec<u8> {
    let mut bytes = volume(size, NV_DATA);
    bytes[0x48..0x58].copy_from_slice(&AUTHENTICATED);
    bytes[0x58..0x5c].copy_from_slice(&(size as u32 / 2).to_le_bytes());
    bytes[0x5c..0x5e].copy_from_slice(&[0x5a, 0xfe]);
    bytes
}

fn code(size: usize) -> Vec<u8> {
    let mut bytes = volume(size, [0x78; 16]);
    let end = bytes.len() - 16;
    bytes[end..].copy_from_slice(&[0x90, 0x90, 0xe9, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// A host with the packages' files.
struct Host {
    folder: TempDir,
}

impl Host {
    fn bare() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// As Debian 13's package has them: builds for Secure Boot first.
    fn debian() -> Self {
        let host = Self::bare();
        for (name, features) in [
            (
                "40-edk2-x86_64-secure-enrolled",
                "\"secure-boot\", \"requires-smm\"",
            ),
            ("60-edk2-x86_64", "\"acpi-s3\", \"verbose-dynamic\""),
        ] {
            let kind = if name.starts_with("40") {
                ".secboot"
            } else {
                ""
            };
            host.write(
                &format!("usr/share/qemu/firmware/{name}.json"),
                descriptor(&format!("OVMF_CODE_4M{kind}.fd"), features).as_bytes(),
            );
        }
        host.write("usr/share/OVMF/OVMF_CODE_4M.fd", &code(CODE));
        host.write("usr/share/OVMF/OVMF_CODE_4M.secboot.fd", &code(CODE));
        host.write("usr/share/OVMF/OVMF_VARS_4M.fd", &variables(VARS));
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn open(&self, path: Option<&Path>, vars: Option<&Path>) -> Result<Firmware, FirmwareError> {
        let config = FirmwareConfig {
            path: path.map(Path::to_owned),
            vars: vars.map(Path::to_owned),
        };
        Firmware::open(&config, &FirmwareRoots::under(self.folder.path()))
    }

    #[track_caller]
    fn refusal(&self, path: Option<&Path>, vars: Option<&Path>) -> String {
        let error = self.open(path, vars).unwrap_err().to_string();
        error.replace(&self.folder.path().display().to_string(), "HOST")
    }
}

fn descriptor(code: &str, features: &str) -> String {
    format!(
        r#"{{
            "description": "UEFI", "interface-types": ["uefi"],
            "mapping": {{
                "device": "flash",
                "executable": {{"filename": "/usr/share/OVMF/{code}", "format": "raw"}},
                "nvram-template": {{"filename": "/usr/share/OVMF/OVMF_VARS_4M.fd", "format": "raw"}}
            }},
            "targets": [{{"architecture": "x86_64", "machines": ["pc-q35-*"]}}],
            "features": [{features}], "tags": []
        }}"#
    )
}

#[test]
fn auto_takes_the_first_build_that_works_without_system_management_mode() {
    let host = Host::debian();
    let firmware = host.open(None, None).unwrap();
    assert_eq!(firmware.path, host.path("usr/share/OVMF/OVMF_CODE_4M.fd"));
    assert_eq!(firmware.code().0, 0xffc8_4000);
    assert_eq!(firmware.variables().0, 0xffc0_0000);
    assert!(firmware.store().is_none());
}

#[test]
fn an_administrators_descriptor_comes_before_the_packages() {
    let host = Host::debian();
    host.write("usr/share/OVMF/OVMF_CODE_mine.fd", &code(CODE));
    let mine = descriptor("OVMF_CODE_mine.fd", "");
    host.write("etc/qemu/firmware/60-edk2-x86_64.json", mine.as_bytes());
    let firmware = host.open(None, None).unwrap();
    assert!(firmware.path.ends_with("OVMF_CODE_mine.fd"));
    // An empty one hides the package's.
    host.write("etc/qemu/firmware/60-edk2-x86_64.json", b"");
    assert!(host.open(None, None).is_err());
}

#[test]
fn where_none_is_installed_the_package_is_named() {
    let host = Host::bare();
    assert_eq!(
        host.refusal(None, None),
        "no UEFI firmware for this kind of machine is installed (no descriptor in \
         HOST/etc/qemu/firmware, HOST/usr/share/qemu/firmware): install the package `ovmf` (Debian, \
         Ubuntu) or `edk2-ovmf` (Fedora, Arch), name a file with --firmware FILE, or give a kernel with \
         --kernel FILE"
    );
    for wrong in ["{", "[]", "{\"mapping\": 7}"] {
        host.write("usr/share/qemu/firmware/50-wrong.json", wrong.as_bytes());
        assert!(host.refusal(None, None).starts_with("no UEFI firmware"));
    }
}

#[test]
fn a_build_that_needs_system_management_mode_is_refused_by_what_its_package_says_and_by_name() {
    let host = Host::debian();
    let secboot = host.path("usr/share/OVMF/OVMF_CODE_4M.secboot.fd");
    let link = host.path("usr/share/OVMF/OVMF_CODE_4M.ms.fd");
    std::os::unix::fs::symlink("OVMF_CODE_4M.secboot.fd", &link).unwrap();
    let copy = host.write("mine/OVMF_CODE_4M.secboot.strictnx.fd", &code(CODE));
    for path in [&secboot, &link, &copy] {
        let refusal = host.refusal(Some(path), None);
        assert!(
            refusal.contains("needs system management mode")
                && refusal.contains("such as HOST/usr/share/OVMF/OVMF_CODE_4M.fd"),
            "{refusal}"
        );
    }
}

#[test]
fn a_store_is_made_from_the_template_and_what_is_written_is_there_the_next_time() {
    let host = Host::debian();
    let vars = host.path("vm.vars");
    let firmware = host.open(None, Some(&vars)).unwrap();
    assert_eq!(fs::read(&vars).unwrap(), variables(VARS));
    let store = firmware.store().unwrap();
    store.write(0x1234, b"BootOrder").unwrap();
    store.sync();
    // As when the process was killed: nothing is closed in order before the file is read.
    assert_eq!(&fs::read(&vars).unwrap()[0x1234..][..9], b"BootOrder");
    let locked = host.refusal(None, Some(&vars));
    assert!(
        locked.starts_with("vars=HOST/vm.vars is in use by "),
        "{locked}"
    );
    drop((store, firmware));
    let firmware = host.open(None, Some(&vars)).unwrap();
    assert_eq!(&firmware.variables().1[0x1234..][..9], b"BootOrder");
    let names = fs::read_dir(host.folder.path()).unwrap().flatten();
    assert_eq!(names.count(), 2, "nothing is left beside it");
}

#[test]
fn a_store_that_is_damaged_short_or_something_else_is_refused_and_left_as_it_is() {
    let host = Host::debian();
    let good = variables(VARS);
    let mut checksum = good.clone();
    checksum[33] ^= 1;
    let mut header = good.clone();
    header[0x5c] = 0;
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("empty", Vec::new(), "it is empty"),
        (
            "short",
            good[..VARS / 2].to_vec(),
            "it has 270336 bytes, and says that it has 540672",
        ),
        (
            "zeros",
            vec![0; VARS],
            "it does not begin with a firmware volume",
        ),
        (
            "length",
            checksum,
            "it has 540672 bytes, and says that it has 540928",
        ),
        ("header", header, "the header of its variables is damaged"),
        ("code", code(CODE), "it is firmware's code"),
        (
            "qcow2",
            b"QFI\xfb\0\0\0\x03".to_vec(),
            "qemu-img convert -O raw",
        ),
        (
            "other size",
            variables(0x2_0000),
            "the two were not made for each other",
        ),
        (
            "text",
            b"hello".to_vec(),
            "it does not begin with a firmware volume",
        ),
    ];
    for (name, bytes, why) in cases {
        let vars = host.write(name, &bytes);
        let refusal = host.refusal(None, Some(&vars));
        assert!(refusal.contains(&format!("HOST/{name}")), "{refusal}");
        assert!(refusal.contains(why), "{name}: {refusal}");
        assert_eq!(fs::read(&vars).unwrap(), bytes, "{name}");
    }
    let mut sum = good;
    sum[50] ^= 1;
    let vars = host.write("sum", &sum);
    assert!(host.refusal(None, Some(&vars)).contains("(checksum)"));
    let folder = host.refusal(None, Some(host.folder.path()));
    assert!(folder.contains("it is no regular file"), "{folder}");
    let nowhere = host.refusal(None, Some(&host.path("no/such/place")));
    assert!(
        nowhere.contains("it cannot be made: No such file"),
        "{nowhere}"
    );
}

#[test]
fn a_place_that_is_only_read_is_named_and_has_no_store() {
    let host = Host::debian();
    // The kernel's own file systems take nobody's files, root's neither.
    let refusal = host.refusal(None, Some(Path::new("/proc/self/vm.vars")));
    assert!(
        refusal.starts_with("vars=/proc/self/vm.vars: it cannot be made: "),
        "{refusal}"
    );
    // A link to nowhere is not written through.
    let link = host.path("link");
    std::os::unix::fs::symlink(host.path("gone/vm.vars"), &link).unwrap();
    let refusal = host.refusal(None, Some(&link));
    assert!(refusal.starts_with("vars=HOST/link: it "), "{refusal}");
    assert!(!host.path("gone").exists());
    let left = fs::read_dir(host.folder.path()).unwrap().flatten();
    let mut left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["link", "usr"]);
}

#[test]
fn what_is_no_firmware_is_refused_with_what_it_is() {
    let host = Host::debian();
    let mut bzimage = vec![0; 0x1000];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let mut disk = vec![0; 0x1000];
    disk[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    let mut cut = code(CODE);
    cut.truncate(CODE / 2);
    let mut odd = code(CODE);
    odd.truncate(CODE - 7);
    for (name, bytes, why) in [
        ("kernel", bzimage, "given with --kernel"),
        ("disk", disk, "given with --disk"),
        ("elf", b"\x7fELF____".to_vec(), "an ELF file"),
        ("cut", cut, "it may have been cut off"),
        ("odd", odd, "no multiple of 4096"),
        ("empty", Vec::new(), "it is empty"),
        ("vars", variables(VARS), "give the code with --firmware"),
        (
            "nothing",
            vec![0; 0x1000],
            "does not begin with a firmware volume",
        ),
    ] {
        let path = host.write(name, &bytes);
        let refusal = host.refusal(Some(&path), None);
        assert!(refusal.contains(why), "{name}: {refusal}");
        assert!(refusal.contains(&format!("HOST/{name}")), "{refusal}");
    }
    assert!(
        host.refusal(Some(&host.path("gone")), None)
            .contains("No such file")
    );
    assert!(
        host.refusal(Some(host.folder.path()), None)
            .contains("it is a folder")
    );
}

#[test]
fn code_alone_has_its_template_beside_it_or_a_store_that_fits() {
    let host = Host::bare();
    let alone = host.write("a/OVMF_CODE_4M.fd", &code(CODE));
    assert!(
        host.refusal(Some(&alone), None)
            .contains("no template of them is known")
    );
    let vars = host.path("vm.vars");
    assert!(
        host.refusal(Some(&alone), Some(&vars))
            .contains("it cannot be made")
    );
    fs::write(&vars, variables(VARS)).unwrap();
    assert_eq!(
        host.open(Some(&alone), Some(&vars))
            .unwrap()
            .variables()
            .1
            .len(),
        VARS
    );
    // That of a build of 2 MiB.
    fs::write(&vars, variables(0x2_0000)).unwrap();
    let refusal = host.refusal(Some(&alone), Some(&vars));
    assert!(
        refusal.contains("has 131072 bytes") && refusal.contains("have 540672"),
        "{refusal}"
    );
    host.write("a/OVMF_VARS_4M.fd", &variables(VARS));
    assert!(host.open(Some(&alone), None).is_ok());
}

#[test]
fn an_image_of_both_is_code_and_variables_and_its_store_has_the_variables() {
    let host = Host::bare();
    let whole = [variables(VARS), code(CODE)].concat();
    let path = host.write("OVMF.fd", &whole);
    let vars = host.path("vm.vars");
    let firmware = host.open(Some(&path), Some(&vars)).unwrap();
    assert_eq!(
        (firmware.code().1.len(), firmware.variables().0),
        (CODE, 0xffc0_0000)
    );
    assert_eq!(fs::read(&vars).unwrap(), variables(VARS));
}

proptest! {
    #[test]
    fn no_bytes_of_a_file_make_it_panic(
        damage in proptest::collection::vec((0_usize..0x100, any::<u8>()), 0..20),
        size in 0_usize..0x2000,
    ) {
        let host = Host::bare();
        let mut bytes = variables(0x2000);
        for (at, byte) in damage {
            bytes[at] = byte;
        }
        bytes.truncate(size);
        let path = host.write("image", &bytes);
        let _refused = host.open(Some(&path), None);
        let whole = host.write("OVMF_CODE.fd", &code(0x2000));
        let _refused = host.open(Some(&whole), Some(&path));
    }
}

#[test]
fn a_bios_is_told_by_its_first_instruction_and_has_its_end_below_1_mib() {
    let host = Host::bare();
    // Debian's bios-256k.bin ends so.
    let mut bios: Vec<u8> = (0..0x4_0000_u32).map(|at| (at >> 12) as u8).collect();
    bios[0x3_fff0..].copy_from_slice(b"\xea\x5b\xe0\0\xf006/23/99\0\xfc\0");
    let path = host.write("bios-256k.bin", &bios);
    let firmware = host.open(Some(&path), None).unwrap();
    assert!(firmware.is_bios());
    assert_eq!(firmware.code(), (0xfffc_0000, &bios[..]));
    assert_eq!(firmware.low_copy(), Some((0xe_0000, &bios[0x2_0000..])));
    let refusal = host.refusal(Some(&path), Some(Path::new("v")));
    assert!(refusal.contains("keeps no variables"), "{refusal}");
    for (name, bytes) in [("small", &bios[0x3_f000..]), ("cut", &bios[..0x3_f000])] {
        let path = host.write(name, bytes);
        let refusal = host.refusal(Some(&path), None);
        assert!(
            refusal.contains("does not begin with a firmware volume"),
            "{refusal}"
        );
    }
}
