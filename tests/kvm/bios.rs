//! Debian's SeaBIOS, unmodified, and a disk with a boot sector of a few instructions.

use std::fs;
use std::process::{Command, Stdio};

use crate::whole::has_kvm;

/// Of the package seabios.
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// Reads the disk's second sector by the BIOS, and writes its first byte to the BIOS's console. Where that is `<`, writes the
/// sector back with `>` and resets the machine by port 0xcf9; else powers off. Loaded at 0x7c00, in real mode.
const BOOT_SECTOR: &[&[u8]] = &[
    // xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax; mov sp, 0x7c00
    &[
        0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c,
    ],
    // mov ax, 0x0201; mov bx, 0x8000; mov cx, 2; mov dh, 0; int 0x13
    &[
        0xb8, 0x01, 0x02, 0xbb, 0x00, 0x80, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0xcd, 0x13,
    ],
    // mov al, [0x8000]; mov ah, 0x0e; mov bx, 7; int 0x10
    &[0xa0, 0x00, 0x80, 0xb4, 0x0e, 0xbb, 0x07, 0x00, 0xcd, 0x10],
    // The console holds a character back until the next one or the next timer's interrupt.
    // mov ax, 0x0e2e; int 0x10; sti; hlt; hlt
    &[0xb8, 0x2e, 0x0e, 0xcd, 0x10, 0xfb, 0xf4, 0xf4],
    // cmp byte [0x8000], '<'; jne off
    &[0x80, 0x3e, 0x00, 0x80, b'<', 0x75, 0x1a],
    // mov byte [0x8000], '>'; mov ax, 0x0301; mov bx, 0x8000; mov cx, 2; mov dh, 0; int 0x13
    &[
        0xc6, 0x06, 0x00, 0x80, b'>', 0xb8, 0x01, 0x03, 0xbb, 0x00, 0x80, 0xb9, 0x02, 0x00, 0xb6,
        0x00, 0xcd, 0x13,
    ],
    // mov dx, 0xcf9; mov al, 6; out dx, al; jmp $
    &[0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe],
    // off: mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt; jmp off
    &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x34, 0xef, 0xf4, 0xeb, 0xf6],
];

#[test]
fn seabios_boots_a_virtio_disk_reads_and_writes_it_and_does_so_again_after_a_reset() {
    if !has_kvm() {
        return;
    }
    assert!(
        fs::exists(SEABIOS).unwrap(),
        "this test needs the package seabios: apt-get install seabios"
    );
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let mut bytes = BOOT_SECTOR.concat();
    bytes.resize(510, 0);
    bytes.extend([0x55, 0xaa, b'<']);
    bytes.resize(1 << 20, 0);
    fs::write(&disk, &bytes).unwrap();
    // A BIOS that waits for a processor or a device waits for ever.
    let output = Command::new("timeout")
        .args(["600", env!("CARGO_BIN_EXE_busway")])
        .args([
            "run",
            "--seccomp",
            "true",
            "--memory",
            "size=64M",
            "--cpus",
            "boot=2",
        ])
        .args(["--watchdog", "--pvpanic", "--firmware", SEABIOS, "--disk"])
        .arg(format!("path={},boot_index=1", disk.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (said, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{errors}\n{said}");
    assert_eq!(
        said.matches("Booting from Hard Disk").count(),
        2,
        "{errors}\n{said}"
    );
    let [_, first, second] = said.split("Hard Disk").collect::<Vec<_>>()[..] else {
        panic!("{said}");
    };
    assert!(first.contains('<') && second.contains('>'), "{said}");
    assert_eq!(fs::read(&disk).unwrap()[512], b'>');
}
