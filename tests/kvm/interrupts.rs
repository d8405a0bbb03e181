//! A route's signal reaches the guest, when it may.

use busway_pci::{InterruptRoutes, MsiMessage};

use crate::guest::{Guest, TELL_AL, al, guest, x2apic};

/// A guest that tells the vector of each interrupt, for vectors 0x40 and 0x41.
fn interruptible() -> Option<Guest> {
    // sti; tell 1; again: hlt; jmp again
    let guest = guest(
        1,
        &[&x2apic(), &al(1), &[0xfb], TELL_AL, &[0xf4, 0xeb, 0xfd]],
    )?;
    for (vector, handler) in [(0x40_u8, 0x3000_u16), (0x41, 0x3100)] {
        // push ax, cx, dx by `pushad`; tell the vector; IA32_X2APIC_EOI = 0; popad; iret
        let eoi = crate::guest::wrmsr(0x80b, 0, 0);
        let code = [
            &[0x66, 0x60],
            &al(vector)[..],
            TELL_AL,
            &eoi,
            &[0x66, 0x61, 0xcf],
        ]
        .concat();
        guest.write(handler.into(), &code);
        let entry = [handler.to_le_bytes(), [0, 0]].concat();
        guest.write(u64::from(vector) * 4, &entry);
    }
    guest.vcpus.resume();
    assert_eq!(guest.next(), 1);
    Some(guest)
}

fn message(vector: u8) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

#[test]
fn a_masked_signal_is_kept_as_one_and_delivered_when_the_mask_goes() {
    let Some(guest) = interruptible() else { return };
    let route = guest.router.connect(0, message(0x40)).unwrap();
    route.trigger();
    assert_eq!(guest.next(), 0x40);
    assert!(!route.pending());

    route.set_masked(true).unwrap();
    route.set_masked(true).unwrap();
    assert!(!route.pending());
    route.trigger();
    route.trigger();
    assert!(route.pending() && guest.is_silent());
    route.set_masked(false).unwrap();
    assert_eq!(guest.next(), 0x40);
    assert!(guest.is_silent() && !route.pending());

    // Nothing came while masked, so nothing comes after.
    route.set_masked(true).unwrap();
    route.set_masked(false).unwrap();
    assert!(guest.is_silent());
}

#[test]
fn a_route_follows_its_message_also_while_masked() {
    let Some(guest) = interruptible() else { return };
    let route = guest.router.connect(0, message(0x40)).unwrap();
    let other = guest.router.connect(0, message(0x40)).unwrap();
    route.update(message(0x41)).unwrap();
    route.trigger();
    assert_eq!(guest.next(), 0x41);
    other.trigger();
    assert_eq!(guest.next(), 0x40);
    route.set_masked(true).unwrap();
    route.trigger();
    route.update(message(0x40)).unwrap();
    route.set_masked(false).unwrap();
    assert_eq!(guest.next(), 0x40);
    // Two messages were changed, and the table was changed twice for it.
    route.update(message(0x40)).unwrap();
    assert_eq!(guest.router.vectors().updates, 2);
}

#[test]
fn a_dropped_route_gives_its_gsi_back_and_the_count_tells() {
    let Some(guest) = interruptible() else { return };
    let routes: Vec<_> = (0..100)
        .map(|_| guest.router.connect(0, message(0x40)).unwrap())
        .collect();
    routes[50].set_masked(true).unwrap();
    assert_eq!(guest.router.vectors().now, 100);
    drop(routes);
    let route = guest.router.connect(0, message(0x41)).unwrap();
    route.trigger();
    assert_eq!(guest.next(), 0x41);
    let count = guest.router.vectors();
    assert_eq!((count.now, count.most), (1, 100));
}

#[test]
fn a_legacy_line_reaches_the_pic() {
    let Some(guest) = interruptible() else { return };
    guest.vcpus.hold();
    // The PIC set up for vectors 0x40 on, all masked but line 1; then as before.
    let mut code = Vec::new();
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x40),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfd),
    ] {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code.extend([&[0xfb], &al(2)[..], TELL_AL, &[0xf4, 0xeb, 0xfd]].concat());
    guest.write(crate::guest::CODE.into(), &code);
    // out 0x20, 0x20 is the PIC's end of interrupt
    let handler = [&al(0x99)[..], TELL_AL, &al(0x20), &[0xe6, 0x20, 0xcf]].concat();
    guest.write(0x3100, &handler);
    guest.vcpus.reset().unwrap();
    guest.vm.reset_chips().unwrap();
    guest.enter().unwrap();
    let edge = guest.router.edge_line(1).unwrap();
    guest.vcpus.resume();
    assert_eq!(guest.next(), 2);
    edge.signal();
    assert_eq!(guest.next(), 0x99);
    assert!(guest.is_silent());
}
