//! Kernels of a few instructions, with a PVH entry.

/// Where the kernels are loaded and entered, in 32-bit mode.
const ENTRY: u32 = 0x10_0000;

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

/// Loads a GDT and an IDT by which a non-maskable interrupt is heard: `handler` is what happens at one, and then the
/// code that comes behind begins anew. It does not return from the interrupt, for some hosts that are guests
/// themselves emulate `iret`, and cannot.
pub(crate) fn hears_nmi(handler: &[u8]) -> Vec<u8> {
    // Behind a jump: what LGDT and LIDT load, the tables, and the handler with its jump.
    const POINTERS: u32 = ENTRY + 5;
    const GDT: u32 = POINTERS + 2 * 6;
    const IDT: u32 = GDT + 2 * 8;
    const HANDLER: u32 = IDT + 3 * 8;
    let setup = HANDLER + handler.len() as u32 + 5;
    let next = setup + 5 + 7 + 7 + 7;
    let mut bytes = vec![0xe9];
    bytes.extend((setup - POINTERS).to_le_bytes());
    for (address, size) in [(GDT, 16_u16), (IDT, 24)] {
        bytes.extend((size - 1).to_le_bytes());
        bytes.extend(address.to_le_bytes());
    }
    // Selector 8: code of 4 GiB. Intel SDM vol. 3A §3.4.5
    for descriptor in [0, 0x00cf_9a00_0000_ffff_u64] {
        bytes.extend(descriptor.to_le_bytes());
    }
    // Vector 2: an interrupt gate. §6.11
    let (low, high) = (u64::from(HANDLER & 0xffff), u64::from(HANDLER >> 16));
    for gate in [0, 0, low | 8 << 16 | 0x8e << 40 | high << 48] {
        bytes.extend(gate.to_le_bytes());
    }
    bytes.extend(handler);
    bytes.push(0xe9);
    bytes.extend((next - setup).to_le_bytes());
    // mov esp, 2 MiB; lgdt; lidt; a far jump to what follows
    bytes.extend([0xbc, 0, 0, 0x20, 0]);
    bytes.extend([0x0f, 0x01, 0x15]);
    bytes.extend(POINTERS.to_le_bytes());
    bytes.extend([0x0f, 0x01, 0x1d]);
    bytes.extend((POINTERS + 6).to_le_bytes());
    bytes.push(0xea);
    bytes.extend(next.to_le_bytes());
    bytes.extend([8, 0]);
    bytes
}

/// A guest that lets go of each device on bus 0 that is wanted back, and powers off when it is asked to.
pub(crate) fn attentive() -> Vec<u8> {
    // mov eax, [wanted]; test eax, eax; jz over; mov [wanted], eax; mov [eject], eax
    let [wanted, eject] = [4, 8].map(|offset| (0xfea0_0000_u32 + offset).to_le_bytes());
    let slots = [
        &[0xa1][..],
        &wanted,
        &[0x85, 0xc0, 0x74, 10, 0xa3],
        &wanted,
        &[0xa3],
        &eject,
    ]
    .concat();
    // mov dx, 0x600; in ax, dx; test ah, 1; jz to the beginning
    let button = [0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74];
    let back = (slots.len() + button.len() + 1) as u8;
    [
        &hears_nmi(&[])[..],
        &outw(0x602, 0x100),
        &slots,
        &button,
        &[back.wrapping_neg()],
        &power_off(),
    ]
    .concat()
}
