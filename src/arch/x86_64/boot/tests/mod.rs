mod room;

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::arch::layout::{MMIO32_START, ram_ranges};
use crate::config::ConsoleConfig;

type Ram = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const RSDP: GuestAddress = GuestAddress(0xe_0000);

/// A guest with so much RAM, and files for it to boot.
struct Guest {
    folder: TempDir,
    ram: Ram,
    map: E820,
}

impl Guest {
    fn new(size: u64) -> Self {
        let ranges: Vec<_> = ram_ranges(size, MMIO32_START, &[])
            .into_iter()
            .map(|range| {
                (
                    GuestAddress(range.start),
                    (range.end - range.start) as usize,
                )
            })
            .collect();
        Self {
            folder: tempfile::tempdir().unwrap(),
            ram: Ram::from_ranges(&ranges).unwrap(),
            map: E820::new(&ram_ranges(size, MMIO32_START, &[])),
        }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn boot(
        &self,
        kernel: &[u8],
        initramfs: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        let kernel = self.file("kernel", kernel);
        let initramfs = initramfs.map(|bytes| self.file("initramfs", bytes));
        let source = BootSource::open(&kernel, initramfs.as_deref(), cmdline)?;
        load(&self.ram, &source, &self.map, RSDP)
    }

    fn error(&self, kernel: &[u8]) -> String {
        let path = self.folder.path().join("kernel").display().to_string();
        let error = self.boot(kernel, None, "").unwrap_err().to_string();
        error.replace(&path, "KERNEL")
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn u32(&self, address: u64) -> u64 {
        u32::from_le_bytes(self.bytes(address, 4).try_into().unwrap()).into()
    }

    fn u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.bytes(address, 8).try_into().unwrap())
    }
}

fn put(file: &mut [u8], offset: usize, bytes: &[u8]) {
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage with the fields that a loader reads, and `code` in place of a kernel.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    put(&mut file, 0x1f1, &[2]);
    put(&mut file, 0x1f4, &(code.len() as u32 / 16).to_le_bytes());
    put(&mut file, 0x1fe, &0xaa55_u16.to_le_bytes());
    // A jump over the header, which has 0x6a bytes from 0x202 on.
    put(&mut file, 0x200, &[0xeb, 0x6a]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x020f_u16.to_le_bytes());
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut file, 0x230, &(2 * MIB as u32).to_le_bytes());
    put(&mut file, 0x234, &[1, 21]);
    put(&mut file, 0x236, &0b1_u16.to_le_bytes());
    put(&mut file, 0x238, &2047_u32.to_le_bytes());
    put(&mut file, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut file, 0x260, &(4 * MIB as u32).to_le_bytes());
    // What lies behind the header is code: none of it may be taken for a field.
    put(&mut file, 0x26c, &[0xcc; 16]);
    file.extend_from_slice(code);
    file
}

/// An ELF with one segment of `code` and `bss` zeros at 16 MiB, and a note that names its entry.
fn pvh_elf(code: &[u8], bss: u64) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2_u16.to_le_bytes());
    put(&mut file, 18, &62_u16.to_le_bytes());
    put(&mut file, 32, &64_u64.to_le_bytes());
    put(&mut file, 54, &56_u16.to_le_bytes());
    put(&mut file, 56, &2_u16.to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: u64, address: u64, in_file: u64, size: u64| {
        put(&mut file, at, &kind.to_le_bytes());
        put(&mut file, at + 8, &offset.to_le_bytes());
        put(&mut file, at + 24, &address.to_le_bytes());
        put(&mut file, at + 32, &in_file.to_le_bytes());
        put(&mut file, at + 40, &size.to_le_bytes());
    };
    let length = code.len() as u64;
    header(64, 1, 0x1000, 16 * MIB, length, length + bss);
    header(120, 4, 0x200, 0, 40, 40);
    // Another note comes first: name "GNU", type 3, a descriptor of three bytes and one of padding.
    put(&mut file, 0x200, &[4, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0]);
    put(&mut file, 0x20c, b"GNU\0\xaa\xbb\xcc\0");
    put(&mut file, 0x214, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut file, 0x220, b"Xen\0");
    put(&mut file, 0x224, &(16 * MIB as u32 + 0x10).to_le_bytes());
    file.extend_from_slice(code);
    file
}

#[test]
fn smbios_is_where_a_kernel_looks_for_it() {
    let guest = Guest::new(64 * MIB);
    let board = crate::smbios::Board {
        cpus: 1,
        memory: 64 * MIB,
        identity: crate::smbios::Identity {
            serial_number: Some("bw-0001".into()),
            oem_strings: vec!["x".repeat(100); 255],
            ..Default::default()
        },
    };
    let tables = crate::smbios::tables(&board, crate::smbios::FirmwareTable::Ours);
    tell_identity(&guest.ram, &tables).unwrap();
    assert_eq!(guest.bytes(0xf_0000, 5), b"_SM3_");
    assert_eq!(guest.u32(0xf_000c), tables.bytes.len() as u64);
    let at = guest.u64(0xf_0010);
    assert_eq!(guest.bytes(at, tables.bytes.len()), tables.bytes);
    assert!(at + (tables.bytes.len() as u64) < 0x10_0000);
    // Firmware's own structure is the first, as there is no firmware.
    assert_eq!(tables.bytes[0], 0);
}

#[test]
fn a_bzimage_is_loaded_by_the_64_bit_protocol() {
    let guest = Guest::new(128 * MIB);
    let code: Vec<u8> = (0..0x10000_u32).map(|n| (n / 7) as u8).collect();
    let initramfs = [0x5a; 5000];
    let entry = guest
        .boot(&bzimage(&code), Some(&initramfs), "console=ttyS0")
        .unwrap();
    assert_eq!(
        (entry.protocol, entry.address),
        (BootProtocol::Linux64, GuestAddress(16 * MIB + 0x200))
    );
    assert!(guest.bytes(16 * MIB, code.len()) == code);

    let mut sregs = kvm_bindings::kvm_sregs::default();
    let regs = entry.apply(&mut sregs);
    assert_eq!((regs.rip, regs.rflags), (16 * MIB + 0x200, 2));
    let page = regs.rsi;
    assert_eq!(guest.bytes(page + 0x202, 4), b"HdrS");
    assert_eq!(guest.bytes(page + 0x26c, 16), [0; 16], "code is no field");
    assert_eq!(guest.bytes(page + 0x210, 1), [0xff], "type of loader");
    assert_eq!(guest.u64(page + 0x70), RSDP.0);
    let cmdline = guest.u32(page + 0x228);
    assert_eq!(guest.bytes(cmdline, 14), b"console=ttyS0\0");
    let (at, size) = (guest.u32(page + 0x218), guest.u32(page + 0x21c));
    assert_eq!(size, 5000);
    assert_eq!(at, 128 * MIB - 0x2000);
    assert_eq!(guest.bytes(at, 5000), initramfs);
    let count = guest.bytes(page + 0x1e8, 1)[0];
    let e820: Vec<_> = (0..u64::from(count))
        .map(|entry| page + 0x2d0 + entry * 20)
        .map(|at| (guest.u64(at), guest.u64(at + 8), guest.u32(at + 16)))
        .collect();
    let expected = guest.map.regions().iter().map(|region| {
        let E820Region { range, kind } = region;
        (range.start, range.end - range.start, *kind as u64)
    });
    assert_eq!(e820, expected.collect::<Vec<_>>());
}

#[test]
fn the_page_tables_map_the_first_4_gib_to_themselves() {
    let guest = Guest::new(64 * MIB);
    let entry = guest.boot(&bzimage(&[0; 4096]), None, "").unwrap();
    let mut sregs = kvm_bindings::kvm_sregs::default();
    let _ = entry.apply(&mut sregs);
    let walk = |address: u64| {
        let mut table = sregs.cr3;
        for shift in [39, 30, 21] {
            let found = guest.u64(table + (address >> shift & 0x1ff) * 8);
            assert_eq!(found & 3, 3, "{address:#x} is present and writable");
            table = found & 0x000f_ffff_ffff_f000;
            if shift == 21 {
                assert_ne!(found & 1 << 7, 0, "a large page");
            }
        }
        table | address & 0x1f_ffff
    };
    for address in [
        0,
        0x7000,
        16 * MIB + 0x200,
        0x7fff_ffff,
        0xfee0_0000,
        0xffff_ffff,
    ] {
        assert_eq!(walk(address), address);
    }
    assert_eq!(
        guest.u64(sregs.gdt.base + u64::from(sregs.cs.selector)),
        0x00af_9b00_0000_ffff
    );
}

#[test]
fn an_elf_is_loaded_by_its_pvh_entry() {
    let guest = Guest::new(128 * MIB);
    let code: Vec<u8> = (0..0x3000_u32).map(|n| n as u8).collect();
    // What an earlier boot left where zeros belong.
    guest
        .ram
        .write_slice(&[0xee; 0x4000], GuestAddress(16 * MIB))
        .unwrap();
    let entry = guest
        .boot(&pvh_elf(&code, 0x1000), Some(&[3; 100]), "quiet")
        .unwrap();
    assert_eq!(
        (entry.protocol, entry.address),
        (BootProtocol::Pvh, GuestAddress(16 * MIB + 0x10))
    );
    assert!(guest.bytes(16 * MIB, 0x3000) == code);
    assert_eq!(guest.bytes(16 * MIB + 0x3000, 0x1000), [0; 0x1000]);

    let mut sregs = kvm_bindings::kvm_sregs::default();
    let regs = entry.apply(&mut sregs);
    assert_eq!(
        (sregs.cr0 & 0x8000_0001, sregs.efer),
        (1, 0),
        "protected, unpaged"
    );
    let info = regs.rbx;
    assert_eq!(guest.u32(info), 0x336e_c578);
    assert_eq!(guest.u32(info + 4), 1);
    assert_eq!(guest.u32(info + 12), 1, "one module");
    let module = guest.u64(info + 16);
    assert_eq!(guest.u64(module + 8), 100);
    assert_eq!(guest.bytes(guest.u64(module), 100), [3; 100]);
    assert_eq!(guest.bytes(guest.u64(info + 24), 6), b"quiet\0");
    assert_eq!(guest.u64(info + 32), RSDP.0);
    let (map, count) = (guest.u64(info + 40), guest.u32(info + 48));
    assert_eq!(count as usize, guest.map.regions().len());
    for (at, region) in (0..count).zip(guest.map.regions()) {
        let entry = map + at * 24;
        assert_eq!(guest.u64(entry), region.range.start);
        assert_eq!(guest.u64(entry + 8), region.range.end - region.range.start);
        assert_eq!(guest.u32(entry + 16), region.kind as u64);
    }
}

#[test]
fn loading_again_after_a_reset_writes_the_same() {
    let guest = Guest::new(64 * MIB);
    for (kernel, length) in [
        (bzimage(&[7; 8192]), 0x2000),
        (pvh_elf(&[9; 8192], 64), 0x2040),
    ] {
        let path = guest.file("again", &kernel);
        let source = BootSource::open(&path, None, "x").unwrap();
        let first = load(&guest.ram, &source, &guest.map, RSDP).unwrap();
        let low = guest.bytes(0, MIB as usize);
        let high = guest.bytes(16 * MIB, length);
        guest
            .ram
            .write_slice(&vec![0xaa; MIB as usize], GuestAddress(16 * MIB))
            .unwrap();
        // The file may be gone by then; the open one serves.
        fs::remove_file(path).unwrap();
        let second = load(&guest.ram, &source, &guest.map, RSDP).unwrap();
        assert_eq!(first, second);
        assert!(guest.bytes(0, MIB as usize) == low);
        assert!(guest.bytes(16 * MIB, length) == high);
    }
}

#[test]
fn what_is_no_kernel_is_named_with_a_remedy() {
    let guest = Guest::new(64 * MIB);
    assert_eq!(
        guest.error(b"\x1f\x8b\x08\0"),
        "KERNEL is no kernel that can be booted: it looks like a gzip file; unpack it first; what it holds may be a kernel"
    );
    let mut arm = pvh_elf(&[0; 64], 0);
    put(&mut arm, 18, &183_u16.to_le_bytes());
    assert_eq!(
        guest.error(&arm),
        "KERNEL is no kernel that can be booted: it looks like an ELF for arm64; give a kernel built for x86-64"
    );
    let mut object = pvh_elf(&[0; 64], 0);
    put(&mut object, 16, &1_u16.to_le_bytes());
    assert!(
        guest
            .error(&object)
            .contains("an ELF object file or kernel module")
    );
    let mut no_note = pvh_elf(&[0; 64], 0);
    put(&mut no_note, 0x220, b"Hen\0");
    assert_eq!(
        guest.error(&no_note),
        "the ELF kernel KERNEL has no PVH entry note; build it with CONFIG_PVH=y, or give the bzImage"
    );
    let mut old = bzimage(&[0; 4096]);
    put(&mut old, 0x236, &[0]);
    assert_eq!(
        guest.error(&old),
        "the kernel KERNEL has no 64-bit entry (boot protocol 2.15): it is a 32-bit or very old kernel; give an x86-64 one"
    );
    let error = BootSource::open(guest.folder.path(), None, "").unwrap_err();
    assert!(error.to_string().ends_with("is a folder, not a file"));
    let error = BootSource::open(Path::new("/nowhere/vmlinuz"), None, "").unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot open the kernel /nowhere/vmlinuz: No such file or directory (os error 2); check the path and its permissions"
    );
}

#[test]
fn damaged_kernels_are_named_as_such() {
    let guest = Guest::new(64 * MIB);
    let short = &bzimage(&[0; 8192])[..3000];
    assert_eq!(
        guest.error(short),
        "the kernel KERNEL is damaged: it should hold 8192 bytes of code, but it has 1464; copy or build it again"
    );
    let short = &pvh_elf(&[0; 8192], 0)[..8000];
    assert_eq!(
        guest.error(short),
        "the kernel KERNEL is damaged: a segment of 8192 bytes at 4096 goes beyond its end; copy or build it again"
    );
    let mut low = pvh_elf(&[0; 64], 0);
    put(&mut low, 64 + 24, &0x7000_u64.to_le_bytes());
    put(&mut low, 0x224, &0x7000_u32.to_le_bytes());
    assert!(guest.error(&low).contains("it asks to be loaded at 0x7000"));
    let mut outside = pvh_elf(&[0; 64], 0);
    put(&mut outside, 0x224, &0x20_0000_u32.to_le_bytes());
    assert!(
        guest
            .error(&outside)
            .contains("its entry 0x200000 is in no segment")
    );
}

/// The ELF with a third program header: PT_INTERP, as FreeBSD's kernel has it ("/red/herring").
fn with_interpreter(mut elf: Vec<u8>) -> Vec<u8> {
    put(&mut elf, 56, &3_u16.to_le_bytes());
    put(&mut elf, 176, &3_u32.to_le_bytes());
    put(&mut elf, 176 + 8, &0x300_u64.to_le_bytes());
    put(&mut elf, 176 + 32, &13_u64.to_le_bytes());
    put(&mut elf, 0x300, b"/red/herring\0");
    elf
}

#[test]
fn a_pvh_note_makes_a_kernel_of_an_elf_that_names_an_interpreter() {
    let guest = Guest::new(64 * MIB);
    let entry = guest
        .boot(&with_interpreter(pvh_elf(&[0; 4096], 0)), None, "")
        .unwrap();
    assert_eq!(entry.protocol, BootProtocol::Pvh);
    let mut program = with_interpreter(pvh_elf(&[0; 4096], 0));
    put(&mut program, 0x220, b"Hen\0");
    assert!(guest.error(&program).contains("an ELF program or library"));
}

#[test]
fn a_pvh_note_is_found_among_notes_that_are_padded_to_eight_bytes() {
    let guest = Guest::new(64 * MIB);
    let mut kernel = pvh_elf(&[0; 4096], 0);
    put(&mut kernel, 120 + 32, &64_u64.to_le_bytes());
    put(&mut kernel, 120 + 48, &8_u64.to_le_bytes());
    // Name "GNU" and a descriptor of 4 bytes end at 20, and the next note begins at 24.
    put(&mut kernel, 0x200, &[4, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0]);
    put(&mut kernel, 0x20c, b"GNU\0\xaa\xbb\xcc\xdd\0\0\0\0");
    put(&mut kernel, 0x218, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut kernel, 0x224, b"Xen\0");
    put(&mut kernel, 0x228, &(16 * MIB as u32 + 0x20).to_le_bytes());
    let entry = guest.boot(&kernel, None, "").unwrap();
    assert_eq!(entry.address, GuestAddress(16 * MIB + 0x20));
}

#[test]
fn a_command_line_that_the_kernel_would_cut_is_refused() {
    let guest = Guest::new(64 * MIB);
    for kernel in [bzimage(&[0; 4096]), pvh_elf(&[0; 4096], 0)] {
        guest.boot(&kernel, None, &"x".repeat(2047)).unwrap();
        let error = guest.boot(&kernel, None, &"x".repeat(2048)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the command line has 2048 bytes, but this kernel takes 2047; shorten it"
        );
    }
    let error = guest.boot(&bzimage(&[0; 64]), None, "a\0b").unwrap_err();
    assert!(matches!(error, BootError::CommandLineZero { at: 1 }));
}

#[test]
fn the_default_command_line_follows_the_console_that_is_heard_or_else_there() {
    use ConsoleConfig::{Null, Off, Pty, Socket, Tty};
    let heard = || [Tty, Pty, ConsoleConfig::file("a"), Socket("b".into())];
    let all = || [Off, Null].into_iter().chain(heard());
    for serial in heard() {
        for console in all() {
            assert_eq!(default_cmdline(&serial, &console), "console=ttyS0");
        }
    }
    for console in heard() {
        assert_eq!(default_cmdline(&Off, &console), "console=hvc0");
        assert_eq!(default_cmdline(&Null, &console), "console=hvc0");
    }
    assert_eq!(default_cmdline(&Null, &Off), "console=ttyS0");
    assert_eq!(default_cmdline(&Null, &Null), "console=ttyS0");
    assert_eq!(default_cmdline(&Off, &Null), "console=hvc0");
    assert_eq!(default_cmdline(&Off, &Off), "");
}

/// Loads a file of `bytes`; only that it comes back matters.
fn try_boot(guest: &Guest, bytes: &[u8]) {
    if let Ok(entry) = guest.boot(bytes, Some(&[1; 64]), "x") {
        assert!(guest.map.is_ram(&(entry.address.0..entry.address.0 + 1)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn garbled_and_cut_kernels_never_panic(
        elf in any::<bool>(),
        changes in proptest::collection::vec((0_usize..0x300, any::<u8>()), 0..12),
        cut in proptest::option::of(0_usize..0x1100),
    ) {
        let mut file = if elf { pvh_elf(&[1; 256], 64) } else { bzimage(&[1; 2048]) };
        for (at, value) in changes {
            file[at] = value;
        }
        file.truncate(cut.unwrap_or(file.len()));
        try_boot(&Guest::new(24 * MIB), &file);
    }

    #[test]
    fn fields_with_extreme_values_never_panic(
        elf in any::<bool>(),
        field in 0_usize..80,
        value in prop_oneof![Just(0_u64), Just(u64::MAX), Just(1 << 63), Just(u64::MAX - 4095), Just(1 << 32), any::<u64>()],
    ) {
        let (mut file, start) = if elf {
            (pvh_elf(&[1; 256], 64), 16)
        } else {
            (bzimage(&[1; 2048]), 0x1f0)
        };
        put(&mut file, start + field * 2, &value.to_le_bytes());
        try_boot(&Guest::new(24 * MIB), &file);
    }
}
