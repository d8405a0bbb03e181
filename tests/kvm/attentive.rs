//! What kernels of a few instructions hear: a non-maskable interrupt, the power button, and that a device is wanted
//! back.

use crate::bare::{ENTRY, outw, power_off};

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
    let [wanted, eject] = [4, 8].map(|offset| (0xfec8_0000_u32 + offset).to_le_bytes());
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
