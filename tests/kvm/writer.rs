//! A guest that writes to its disk: a driver of a few instructions for virtio-blk behind PCI, without interrupts.
//! Virtio 1.3 §2.7, §4.1.4, §5.2.6.

use crate::bare::{power_off, say};

/// Where the disk is on bus 0: `pci_device_id=`.
pub(crate) const SLOT: u32 = 5;

/// The function's configuration space. PCIe 6.0 §7.2.2; docs/design.md has where it is.
const CONFIG: u32 = 0xe000_0000 + (SLOT << 15);
const COMMAND: u32 = CONFIG + 4;
/// The first BAR, of 64 bits.
const BAR: u32 = CONFIG + 0x10;

/// Where the guest puts that BAR: the end of the window for it, which nothing else is given from that side.
const REGISTERS: u32 = 0xdff0_0000;
/// `struct virtio_pci_common_cfg`. Virtio 1.3 §4.1.4.3.
const DRIVER_FEATURE_SELECT: u32 = REGISTERS + 8;
const DRIVER_FEATURE: u32 = REGISTERS + 12;
const STATUS: u32 = REGISTERS + 20;
const QUEUE_SELECT: u32 = REGISTERS + 22;
const QUEUE_SIZE: u32 = REGISTERS + 24;
const QUEUE_ENABLE: u32 = REGISTERS + 28;
const QUEUE_DESC: u32 = REGISTERS + 32;
const QUEUE_DRIVER: u32 = REGISTERS + 40;
const QUEUE_DEVICE: u32 = REGISTERS + 48;
/// `src/virtio/pci/layout.rs`
const NOTIFY: u32 = REGISTERS + 0x3000;

/// The queue's three parts, and a request's.
const DESC: u32 = 0x30_0000;
const AVAIL: u32 = 0x30_1000;
const USED: u32 = 0x30_2000;
const HEADER: u32 = 0x30_3000;
const DATA: u32 = 0x30_4000;
const DONE: u32 = 0x30_5000;

/// `mov dword [address], value`
fn dword(address: u32, value: u32) -> Vec<u8> {
    [
        &[0xc7, 0x05][..],
        &address.to_le_bytes(),
        &value.to_le_bytes(),
    ]
    .concat()
}

/// `mov word [address], value`
fn word(address: u32, value: u16) -> Vec<u8> {
    [
        &[0x66, 0xc7, 0x05][..],
        &address.to_le_bytes(),
        &value.to_le_bytes(),
    ]
    .concat()
}

/// `mov byte [address], value`
fn byte(address: u32, value: u8) -> Vec<u8> {
    [&[0xc6, 0x05][..], &address.to_le_bytes(), &[value]].concat()
}

/// VIRTIO_BLK_F_FLUSH: writes may stay in a cache until the driver has it flushed.
const CACHED: u32 = 1 << 9;

/// Resets the disk, and has it serve a queue of four descriptors, of which three are a write of the first sector.
pub(crate) fn bring_up() -> Vec<u8> {
    bring_up_with(0)
}

/// The same, with these of the features below 32.
fn bring_up_with(features: u32) -> Vec<u8> {
    let mut code = Vec::new();
    let mut add = |part: Vec<u8>| code.extend(part);
    for (address, value) in [(COMMAND, 0), (BAR, REGISTERS), (BAR + 4, 0), (COMMAND, 6)] {
        add(dword(address, value));
    }
    // Reset; ACKNOWLEDGE; DRIVER
    for status in [0, 1, 3] {
        add(byte(STATUS, status));
    }
    // VIRTIO_F_VERSION_1, bit 32
    for (half, features) in [(0, features), (1, 1)] {
        add(dword(DRIVER_FEATURE_SELECT, half));
        add(dword(DRIVER_FEATURE, features));
    }
    // FEATURES_OK
    add(byte(STATUS, 11));
    add(word(QUEUE_SELECT, 0));
    add(word(QUEUE_SIZE, 4));
    for (register, address) in [
        (QUEUE_DESC, DESC),
        (QUEUE_DRIVER, AVAIL),
        (QUEUE_DEVICE, USED),
    ] {
        add(dword(register, address));
        add(dword(register + 4, 0));
    }
    add(word(QUEUE_ENABLE, 1));
    // VIRTIO_BLK_T_OUT, sector 0
    for (offset, value) in [(0, 1), (4, 0), (8, 0), (12, 0)] {
        add(dword(HEADER + offset, value));
    }
    // NEXT, NEXT, WRITE
    for (number, (address, length, flags, next)) in
        (0..).zip([(HEADER, 16, 1, 1), (DATA, 512, 1, 2), (DONE, 1, 2, 0)])
    {
        let descriptor = DESC + 16 * number;
        add(dword(descriptor, address));
        add(dword(descriptor + 4, 0));
        add(dword(descriptor + 8, length));
        add(word(descriptor + 12, flags));
        add(word(descriptor + 14, next));
    }
    // Flags and index of both rings
    add(dword(AVAIL, 0));
    add(dword(USED, 0));
    // DRIVER_OK
    add(byte(STATUS, 15));
    code
}

/// Makes the write available as request number `number`, from 1 on, and waits until it is done: its status is said as a digit.
/// Where the device needs a reset `broken` follows.
pub(crate) fn write(number: u16, broken: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    code.extend(word(AVAIL + 4 + 2 * u32::from((number - 1) % 4), 0));
    code.extend(word(AVAIL + 2, number));
    code.extend(word(NOTIFY, 0));
    // cmp word [USED + 2], number; je over the rest
    let done = [
        &[0x66, 0x81, 0x3d][..],
        &(USED + 2).to_le_bytes(),
        &number.to_le_bytes(),
    ]
    .concat();
    // test byte [STATUS], DEVICE_NEEDS_RESET; jz to the beginning
    let resets = [&[0xf6, 0x05][..], &STATUS.to_le_bytes(), &[0x40]].concat();
    let back = (done.len() + 6 + resets.len() + 6) as i32;
    code.extend(&done);
    code.extend([0x0f, 0x84]);
    code.extend((resets.len() as u32 + 6 + broken.len() as u32).to_le_bytes());
    code.extend(resets);
    code.extend([0x0f, 0x84]);
    code.extend((-back).to_le_bytes());
    code.extend(broken);
    code.extend(tell());
    code
}

/// `mov al, [DONE]; add al, '0'; mov dx, 0x3f8; out dx, al`
fn tell() -> Vec<u8> {
    let address = DONE.to_le_bytes();
    [
        &[0xa0][..],
        &address,
        &[0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee],
    ]
    .concat()
}

/// Writes twice, says how that went, and powers off.
pub(crate) fn writes_twice() -> Vec<u8> {
    let broken = [&say("broken")[..], &power_off()].concat();
    [
        bring_up(),
        write(1, &broken),
        write(2, &broken),
        power_off(),
    ]
    .concat()
}

/// What [`writes_unflushed`] writes to the disk's beginning.
pub(crate) const WRITTEN: [u8; 4] = *b"kept";

/// Writes once, flushes nothing, says how that went, and powers off.
pub(crate) fn writes_unflushed() -> Vec<u8> {
    let broken = [&say("broken")[..], &power_off()].concat();
    [
        bring_up_with(CACHED),
        dword(DATA, u32::from_le_bytes(WRITTEN)),
        write(1, &broken),
        power_off(),
    ]
    .concat()
}

/// Says "ready", and when something is typed, brings the disk up and writes to it: where the device needs a reset it says
/// "broken" and begins anew, else it says how the write went, and powers off.
pub(crate) fn writes_when_told() -> Vec<u8> {
    // mov dx, 0x3fd; again: in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx
    let typed = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec,
    ];
    let begin = [&typed[..], &bring_up()].concat();
    let write = |distance: i32| {
        // jmp
        let again = [&[0xe9][..], &distance.to_le_bytes()].concat();
        write(1, &[say("broken"), again].concat())
    };
    // From behind the jump to what was typed.
    let back = begin.len() + write(0).len() - tell().len();
    [say("ready"), begin, write(-(back as i32)), power_off()].concat()
}
