//! Kernels of a few instructions, with a PVH entry.

/// Where the kernels are loaded and entered, in 32-bit mode.
pub(crate) const ENTRY: u32 = 0x10_0000;

/// An ELF file of `code` with the note of a PVH entry. Xen docs/misc/pvh; System V ABI, "ELF header".
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const CODE: u64 = 0x1000;
    // PT_NOTE "Xen", type 18: XEN_ELFNOTE_PHYS32_ENTRY.
    let mut note = Vec::new();
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY] {
        note.extend(word.to_le_bytes());
    }
    let size = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ENTRY.into(), 64, 0] {
        elf.extend(u64::to_le_bytes(word));
    }
    for half in [0, 0, 64, 56, 2, 0, 0, 0_u16] {
        elf.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, address: u64, size: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7_u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            elf.extend(word.to_le_bytes());
        }
    };
    segment(1, CODE, ENTRY.into(), size);
    segment(4, HEADERS, 0, note.len() as u64);
    elf.extend(note);
    elf.resize(CODE as usize, 0);
    elf.extend(code);
    elf
}

/// `mov dx, 0x3f8`, then `mov al, byte; out dx, al` for each.
pub(crate) fn say(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    code.extend(text.bytes().flat_map(|byte| [0xb0, byte, 0xee]));
    code
}

/// `mov dx, port; mov ax, value; out dx, ax`
pub(crate) fn outw(port: u16, value: u16) -> Vec<u8> {
    let ([a, b], [c, d]) = (port.to_le_bytes(), value.to_le_bytes());
    vec![0x66, 0xba, a, b, 0x66, 0xb8, c, d, 0x66, 0xef]
}

/// SLP_TYP 5 and SLP_EN to PM1 control, then `hlt`.
pub(crate) fn power_off() -> Vec<u8> {
    [&outw(0x604, 0x3400)[..], &[0xf4, 0xeb, 0xfd]].concat()
}
