//! Exits reach the device that they are for.

use std::sync::{Arc, Mutex};

use busway::kvm::{BusDevice, ExitKind, VcpuEvent};
use busway_vfio::EventFd;

use crate::guest::{CODE, SPIN, STOP, TELL_AL, al, ds, guest};

/// Remembers what is written and answers with what it was given.
#[derive(Default)]
struct Scratch {
    answer: u8,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl BusDevice for Scratch {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (0..).zip(data) {
            *byte = self.answer + offset as u8 + index;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.written.lock().unwrap().push((offset, data.to_vec()));
    }
}

#[test]
fn port_and_memory_accesses_arrive_with_address_width_and_data() {
    let Some(guest) = guest(
        1,
        &[
            // in al, 0x31; tell; in ax, 0x32; out 0x30, ax
            &[0xe4, 0x31],
            TELL_AL,
            &[0xe5, 0x32, 0xe7, 0x30],
            // mov al, [0x2_0003]; tell; mov dword [0x2_0004], 0x11223344
            &ds(0x2000),
            &[0xa0, 0x03, 0x00],
            TELL_AL,
            &[0x66, 0xc7, 0x06, 0x04, 0x00, 0x44, 0x33, 0x22, 0x11],
            // in al, 0x70, where nothing is
            &[0xe4, 0x70],
            TELL_AL,
            STOP,
        ],
    ) else {
        return;
    };
    let device = |answer| {
        Arc::new(Scratch {
            answer,
            ..Default::default()
        })
    };
    let (ports, memory) = (device(0x40), device(0x80));
    guest
        .buses
        .ports
        .insert("ports", 0x30, 4, ports.clone())
        .unwrap();
    guest
        .buses
        .mmio
        .insert("memory", 0x2_0000, 0x1000, memory.clone())
        .unwrap();
    guest.vcpus.resume();
    assert_eq!(
        [guest.next(), guest.next(), guest.next()],
        [0x41, 0x83, 0xff]
    );
    assert_eq!(*ports.written.lock().unwrap(), [(0, vec![0x42, 0x43])]);
    assert_eq!(
        *memory.written.lock().unwrap(),
        [(4, vec![0x44, 0x33, 0x22, 0x11])]
    );
    assert_eq!(guest.vcpus.exits(ExitKind::MmioRead), 1);
    assert_eq!(guest.vcpus.exits(ExitKind::MmioWrite), 1);
    assert_eq!(guest.vcpus.exits(ExitKind::PortRead), 3);
}

#[test]
fn a_string_of_port_writes_is_as_many_accesses() {
    let Some(guest) = guest(
        1,
        &[
            // mov si, 0x1000; mov cx, 3; mov dx, 0x30; cld; rep outsw
            &[
                0xbe, 0x00, 0x10, 0xb9, 0x03, 0x00, 0xba, 0x30, 0x00, 0xfc, 0xf3, 0x6f,
            ],
            &al(1),
            TELL_AL,
            STOP,
        ],
    ) else {
        return;
    };
    let ports = Arc::new(Scratch::default());
    guest
        .buses
        .ports
        .insert("ports", 0x30, 2, ports.clone())
        .unwrap();
    guest.vcpus.resume();
    assert_eq!(guest.next(), 1);
    assert_eq!(
        *ports.written.lock().unwrap(),
        [
            (0, vec![0xbe, 0x00]),
            (0, vec![0x10, 0xb9]),
            (0, vec![0x03, 0x00])
        ]
    );
}

#[test]
fn a_doorbell_signals_for_any_width_and_makes_no_exit_to_user_space() {
    let Some(guest) = guest(
        1,
        &[
            &ds(0x2000),
            // mov byte [0], 1; mov word [0], 1; mov dword [0], 1
            &[0xc6, 0x06, 0, 0, 1, 0xc7, 0x06, 0, 0, 1, 0],
            &[0x66, 0xc7, 0x06, 0, 0, 1, 0, 0, 0],
            TELL_AL,
            // again: cmp byte cs:[0x500], 0; je again
            &[0x2e, 0x80, 0x3e, 0x00, 0x05, 0x00, 0x74, 0xf8],
            // mov byte [0], 1, once it is gone
            &[0xc6, 0x06, 0, 0, 1],
            TELL_AL,
            STOP,
        ],
    ) else {
        return;
    };
    let event = EventFd::new().unwrap();
    let ring = || guest.vm.doorbells().ring(0x2_0000, &event.shared());
    let doorbell = ring().unwrap();
    ring().unwrap_err();
    guest.vcpus.resume();
    guest.next();
    assert_eq!(
        (event.take(), guest.vcpus.exits(ExitKind::MmioWrite)),
        (3, 0)
    );
    drop(doorbell);
    guest.write(0x500, &[1]);
    guest.next();
    assert_eq!(
        (event.take(), guest.vcpus.exits(ExitKind::MmioWrite)),
        (0, 1)
    );
    ring().unwrap();
}

#[test]
fn a_triple_fault_is_named() {
    let Some(guest) = guest(1, &[SPIN]) else {
        return;
    };
    // ud2, in 32-bit protected mode, without an interrupt descriptor table.
    guest.write(CODE.into(), &[0x0f, 0x0b]);
    let flat = |type_| kvm_bindings::kvm_segment {
        limit: 0xffff_ffff,
        selector: 8,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    guest
        .vcpus
        .enter(|sregs| {
            (sregs.cr0, sregs.idt.limit) = (0x11, 0);
            sregs.cs = flat(0xb);
            (sregs.ds, sregs.es, sregs.ss) = (flat(3), flat(3), flat(3));
            kvm_bindings::kvm_regs {
                rip: CODE.into(),
                rflags: 2,
                ..Default::default()
            }
        })
        .unwrap();
    guest.vcpus.resume();
    let event = guest.event();
    assert!(
        matches!(event, VcpuEvent::TripleFault { id: 0, .. }),
        "{event:?}"
    );
    guest.vcpus.hold();
}

/// A device with a fault in it.
struct Faulty;

impl BusDevice for Faulty {
    fn read(&self, _offset: u64, _data: &mut [u8]) {
        panic!("the fault that this test is about");
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[test]
fn a_vcpu_whose_thread_panics_is_told_of_and_nobody_waits_for_it() {
    // in al, 0x30
    let Some(guest) = guest(2, &[&[0xe4, 0x30], STOP]) else {
        return;
    };
    let ports = &guest.buses.ports;
    ports.insert("faulty", 0x30, 1, Arc::new(Faulty)).unwrap();
    guest.vcpus.resume();
    let event = guest.event();
    assert!(
        matches!(&event, VcpuEvent::Failed { id: 0, reason } if reason.contains("panicked")),
        "{event:?}"
    );
    guest.vcpus.hold();
}
