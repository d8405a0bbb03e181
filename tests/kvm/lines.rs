//! An interrupt pin's level: up by one eventfd, down at the guest's end of interrupt, which the
//! source hears of by the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use busway_pci::{InterruptLine, InterruptLines, InterruptPin, InterruptRoutes, MsiMessage};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::guest::{CODE, Guest, TELL_AL, al, guest, wrmsr, x2apic};

/// The pin of the IOAPIC that the tests use.
const GSI: u8 = 16;
/// How long something may take that happens, in milliseconds.
const PATIENCE: i32 = 20_000;

/// `mov dword ptr [address], value`, with segments of 4 GiB
fn store(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0x67, 0x66, 0xc7, 0x05];
    code.extend(address.to_le_bytes());
    code.extend(value.to_le_bytes());
    code
}

/// The pin's entry: vector 0x40 for processor 0, level-triggered, active low, not masked. 82093AA §3.2
fn unmask_pin() -> Vec<u8> {
    let register =
        |number: u8, value| [store(0xfec0_0000, number.into()), store(0xfec0_0010, value)].concat();
    [
        register(0x11 + 2 * GSI, 0),
        register(0x10 + 2 * GSI, 0xa040),
    ]
    .concat()
}

/// A guest that tells 0x40 for each interrupt of the pin, once an interrupt 0x41 made it unmask it.
fn interruptible() -> Option<Guest> {
    let idle = &[0xf4, 0xeb, 0xfd];
    let guest = guest(1, &[&x2apic(), &al(1), &[0xfb], TELL_AL, idle])?;
    let end = [wrmsr(0x80b, 0, 0), vec![0x66, 0x61, 0xcf]].concat();
    let handlers = [
        (0x40_u8, 0x3000_u16, Vec::new()),
        (0x41, 0x3100, unmask_pin()),
    ];
    for (vector, address, work) in handlers {
        // pushad; the work; tell the vector; IA32_X2APIC_EOI = 0; popad; iret
        let code = [&[0x66, 0x60], &work[..], &al(vector), TELL_AL, &end].concat();
        guest.write(address.into(), &code);
        let entry = [address.to_le_bytes(), [0, 0]].concat();
        guest.write(u64::from(vector) * 4, &entry);
    }
    let entered = guest.vcpus.enter(|sregs| {
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        (sregs.ds.limit, sregs.ds.g) = (u32::MAX, 1);
        kvm_bindings::kvm_regs {
            rip: CODE.into(),
            rsp: 0x8000,
            rflags: 2,
            ..Default::default()
        }
    });
    entered.unwrap();
    guest.vcpus.resume();
    assert_eq!(guest.next(), 1);
    Some(guest)
}

/// Has the guest unmask the pin.
fn unmask(guest: &Guest) {
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };
    guest.router.connect(0, message).unwrap().trigger();
    assert_eq!(guest.next(), 0x41);
}

fn connect(guest: &Guest, pin: InterruptPin) -> Arc<dyn InterruptLine> {
    guest.router.pins([GSI.into(); 4]).connect(pin).unwrap()
}

fn signal(event: BorrowedFd<'_>) {
    let mut file = File::from(event.try_clone_to_owned().unwrap());
    file.write_all(&1_u64.to_ne_bytes()).unwrap();
}

/// Waits for a signal and takes it.
fn take(event: BorrowedFd<'_>) {
    let epoll = Epoll::new().unwrap();
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), readable)
        .unwrap();
    let mut ready = [EpollEvent::default()];
    assert_eq!(epoll.wait(PATIENCE, &mut ready).unwrap(), 1, "no signal");
    let mut file = File::from(event.try_clone_to_owned().unwrap());
    file.read_exact(&mut [0; 8]).unwrap();
}

#[test]
fn sources_on_one_line_all_hear_of_the_end_of_interrupt_and_none_is_lost() {
    let Some(guest) = interruptible() else { return };
    unmask(&guest);
    let [a, b] = [InterruptPin::A, InterruptPin::B].map(|pin| connect(&guest, pin));
    for _ in 0..100 {
        signal(a.event());
        assert_eq!(guest.next(), 0x40);
        // Both look whether they still want something, and the other one does.
        take(a.resample());
        take(b.resample());
        signal(b.event());
        assert_eq!(guest.next(), 0x40);
        take(a.resample());
        take(b.resample());
    }
    assert!(guest.is_silent());
    drop(a);
    signal(b.event());
    assert_eq!(guest.next(), 0x40);
    take(b.resample());
}

#[test]
fn a_line_that_goes_lets_its_level_down() {
    let Some(guest) = interruptible() else { return };
    let line = connect(&guest, InterruptPin::A);
    signal(line.event());
    drop(line);
    unmask(&guest);
    assert!(guest.is_silent());
    let line = connect(&guest, InterruptPin::A);
    signal(line.event());
    assert_eq!(guest.next(), 0x40);
    take(line.resample());
}
