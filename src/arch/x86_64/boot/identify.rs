//! What a file is that was given as a kernel and is none, so that the message can say it.

use super::error::BootError;
use super::input::Input;

/// Bytes from the file's start that are looked at: an ISO image's mark lies farthest.
const HEAD: usize = 0x9000;

const GIVE_BZIMAGE: &str = "give a bzImage (/boot/vmlinuz-…) or an ELF vmlinux with a PVH entry";
const GIVE_X86: &str = "give a kernel built for x86-64";
const UNPACK: &str = "unpack it first; what it holds may be a kernel";
const UNPACK_PACKAGE: &str = "unpack it and give the boot/vmlinuz-… in it";
const DISK: &str = "give a disk to --disk, and a kernel from it to --kernel";

/// What a file looks like, and what to do about it.
type Looks = (String, &'static str);

/// The error for a file that is neither bzImage nor PVH ELF.
pub(super) fn no_kernel(kernel: &Input) -> BootError {
    let mut head = vec![0; HEAD];
    match kernel.read_at(&mut head, 0) {
        Ok(read) => head.truncate(read),
        Err(error) => return error,
    }
    let (looks, remedy) = identify(&head);
    BootError::NotAKernel {
        path: kernel.path.clone(),
        looks,
        remedy,
    }
}

/// Marks at fixed offsets, the first that matches. Not for x86 kernels: those have been ruled out.
const MARKS: &[(usize, &[u8], &str, &str)] = &[
    (0x38, b"ARM\x64", "an arm64 kernel Image", GIVE_X86),
    (0x38, b"RSC\x05", "a RISC-V kernel Image", GIVE_X86),
    (0, b"\x1f\x8b", "a gzip file", UNPACK),
    (0, b"\xfd7zXZ\0", "an xz file", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", UNPACK),
    (0, b"BZh", "a bzip2 file", UNPACK),
    (0, b"\x02\x21\x4c\x18", "an lz4 file", UNPACK),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", UNPACK),
    (0, b"\x5d\0\0", "an lzma file", UNPACK),
    (0, b"PK\x03\x04", "a zip file", UNPACK),
    (
        0,
        b"070701",
        "a cpio archive, as an initramfs is",
        "give it to --initramfs, and a kernel to --kernel",
    ),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", GIVE_BZIMAGE),
    (
        0,
        b"!<arch>\n",
        "a Debian package or ar archive",
        UNPACK_PACKAGE,
    ),
    (0, b"\xed\xab\xee\xdb", "an RPM package", UNPACK_PACKAGE),
    (0, b"QFI\xfb", "a qcow2 disk image", DISK),
    (0x8001, b"CD001", "an ISO 9660 image", DISK),
    (0x200, b"EFI PART", "a disk image with a GPT", DISK),
    (0, b"#!", "a script", GIVE_BZIMAGE),
];

fn identify(head: &[u8]) -> Looks {
    if head.is_empty() {
        return ("an empty file".into(), GIVE_BZIMAGE);
    }
    for &(offset, mark, looks, remedy) in MARKS {
        if head
            .get(offset..)
            .is_some_and(|rest| rest.starts_with(mark))
        {
            return (looks.into(), remedy);
        }
    }
    if head.starts_with(b"\x7fELF") {
        return elf(head);
    }
    if head.starts_with(b"MZ") {
        return efi(head);
    }
    if head.get(0x1fe..0x200) == Some(b"\x55\xaa") {
        return ("a disk image with a boot sector".into(), DISK);
    }
    let start: Vec<_> = head
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let text = head
        .iter()
        .take(512)
        .all(|&byte| byte >= b' ' || byte.is_ascii_whitespace());
    if text && std::str::from_utf8(&head[..head.len().min(512)]).is_ok() {
        return ("a text file".into(), GIVE_BZIMAGE);
    }
    (
        format!("nothing known (it starts with {})", start.join(" ")),
        GIVE_BZIMAGE,
    )
}

/// An ELF that is not a 64-bit x86 kernel. System V ABI, ELF header.
fn elf(head: &[u8]) -> Looks {
    const ELFCLASS32: u8 = 1;
    const EM_386: u16 = 3;
    const EM_X86_64: u16 = 62;
    const ET_REL: u16 = 1;
    let word = |offset| {
        head.get(offset..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .map(u16::from_le_bytes)
    };
    let (kind, machine) = (word(16), word(18));
    match machine {
        Some(EM_386) => ("a 32-bit x86 ELF".into(), GIVE_X86),
        Some(EM_X86_64) if head.get(4) == Some(&ELFCLASS32) => ("an x32 ELF".into(), GIVE_X86),
        Some(EM_X86_64) if kind == Some(ET_REL) => {
            ("an ELF object file or kernel module".into(), GIVE_BZIMAGE)
        }
        Some(EM_X86_64) => ("an ELF program or library".into(), GIVE_BZIMAGE),
        Some(machine) => (
            format!("an ELF for {}", architecture(machine, ELF_MACHINES)),
            GIVE_X86,
        ),
        None => ("the start of an ELF file".into(), GIVE_BZIMAGE),
    }
}

/// A portable executable that has no Linux setup header.
fn efi(head: &[u8]) -> Looks {
    const IMAGE_FILE_MACHINE_AMD64: u16 = 0x8664;
    // The DOS header's `e_lfanew` leads to "PE\0\0" and the COFF header's machine.
    let machine = head
        .get(0x3c..)
        .and_then(|rest| rest.first_chunk())
        .and_then(|&offset| head.get(u32::from_le_bytes(offset) as usize..))
        .and_then(|rest| rest.strip_prefix(b"PE\0\0"))
        .and_then(|rest| rest.first_chunk())
        .map(|&machine| u16::from_le_bytes(machine));
    match machine {
        Some(IMAGE_FILE_MACHINE_AMD64) => (
            "an EFI application, perhaps a unified kernel image".into(),
            "give the kernel in it: objcopy -O binary -j .linux FILE bzImage",
        ),
        Some(machine) => (
            format!(
                "an EFI application for {}",
                architecture(machine, PE_MACHINES)
            ),
            GIVE_X86,
        ),
        None => ("a DOS program".into(), GIVE_BZIMAGE),
    }
}

/// `e_machine`
const ELF_MACHINES: &[(u16, &str)] = &[
    (8, "MIPS"),
    (20, "32-bit PowerPC"),
    (21, "PowerPC"),
    (22, "s390"),
    (40, "32-bit Arm"),
    (183, "arm64"),
    (243, "RISC-V"),
    (258, "LoongArch"),
];

/// `IMAGE_FILE_HEADER.Machine`
const PE_MACHINES: &[(u16, &str)] = &[
    (0x014c, "32-bit x86"),
    (0x01c4, "32-bit Arm"),
    (0xaa64, "arm64"),
    (0x5064, "RISC-V"),
    (0x6264, "LoongArch"),
];

fn architecture(machine: u16, known: &[(u16, &str)]) -> String {
    known
        .iter()
        .find(|(number, _)| *number == machine)
        .map_or_else(
            || format!("machine {machine:#x}"),
            |(_, name)| (*name).to_owned(),
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn looks(head: &[u8]) -> String {
        identify(head).0
    }

    #[test]
    fn what_people_give_by_mistake_is_named() {
        assert_eq!(looks(b""), "an empty file");
        assert_eq!(looks(b"\x1f\x8b\x08"), "a gzip file");
        assert_eq!(looks(b"070701000"), "a cpio archive, as an initramfs is");
        assert_eq!(looks(b"#!/bin/sh\n"), "a script");
        assert_eq!(looks(b"hello\n"), "a text file");
        assert_eq!(
            looks(&[0x12, 0, 0xff]),
            "nothing known (it starts with 12 00 ff)"
        );
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(18, 0);
        elf.extend(183_u16.to_le_bytes());
        assert_eq!(looks(&elf), "an ELF for arm64");
        let mut efi = b"MZ".to_vec();
        efi.resize(0x3c, 0);
        efi.extend(0x40_u32.to_le_bytes());
        efi.extend(b"PE\0\0\x64\x86");
        assert_eq!(
            looks(&efi),
            "an EFI application, perhaps a unified kernel image"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_look_like_something(head in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(!looks(&head).is_empty());
        }
    }
}
