//! Processors start, are held, and start again.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use busway::arch::CpuFeatures;
use busway::kvm::VcpuEvent;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::guest::{AP_CODE, Guest, SPIN, STOP, TELL_AL, al, guest, guest_with, wrmsr, x2apic};

/// A guest whose boot processor wakes the others, each of which tells its APIC id.
fn many(cpus: u8) -> Option<Guest> {
    // IA32_X2APIC_ICR: INIT, then start-up with vector 2, to all but oneself.
    let [init, startup] = [0xc_4500, 0xc_4602].map(|command| wrmsr(0x830, 0, command));
    let guest = guest(
        cpus,
        &[&x2apic(), &init, &startup, &al(0xb0), TELL_AL, STOP],
    )?;
    // mov eax, 1; cpuid; shr ebx, 24; mov al, bl
    let id = [
        0x66, 0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0x66, 0xc1, 0xeb, 24, 0x88, 0xd8,
    ];
    guest.write(AP_CODE.into(), &[&id[..], TELL_AL, STOP].concat());
    Some(guest)
}

fn everybody(guest: &Guest, cpus: u8) -> Vec<u8> {
    let mut told: Vec<u8> = (0..cpus).map(|_| guest.next()).collect();
    told.sort_unstable();
    told
}

#[test]
fn application_processors_wait_for_the_boot_processor_and_know_their_ids() {
    for cpus in [1, 2, 4, 64] {
        let Some(guest) = many(cpus) else { return };
        guest.vcpus.resume();
        let mut expected: Vec<u8> = (1..cpus).collect();
        expected.push(0xb0);
        assert_eq!(everybody(&guest, cpus), expected);
    }
}

#[test]
fn after_a_reset_all_of_it_happens_again() {
    let Some(guest) = many(4) else { return };
    for _ in 0..5 {
        guest.vcpus.resume();
        assert_eq!(everybody(&guest, 4), [1, 2, 3, 0xb0]);
        guest.vcpus.hold();
        guest.vcpus.reset().unwrap();
        guest.vm.reset_chips().unwrap();
        guest.enter().unwrap();
    }
}

#[test]
fn a_spinning_guest_is_held_and_goes_on_where_it_was() {
    // mov al, 0; again: inc al; tell; mov cx, 0; loop $; jmp again
    let Some(guest) = guest(
        1,
        &[
            &al(0),
            &[0xfe, 0xc0],
            TELL_AL,
            &[0xb9, 0, 0, 0xe2, 0xfe, 0xeb, 0xf5],
        ],
    ) else {
        return;
    };
    guest.vcpus.resume();
    let mut expected = 1_u8;
    for _ in 0..50 {
        assert_eq!(guest.next(), expected);
        expected = expected.wrapping_add(1);
        guest.vcpus.hold();
        guest.vcpus.resume();
    }
}

#[test]
fn held_at_once_and_ended_at_once_is_no_race() {
    for _ in 0..20 {
        let Some(guest) = guest(4, &[SPIN]) else {
            return;
        };
        guest.vcpus.resume();
        guest.vcpus.hold();
        guest.vcpus.resume();
    }
}

#[test]
fn no_instruction_retires_once_the_guest_is_said_to_be_stopped() {
    // inc dword [0x400]; jmp back to it
    let Some(guest) = guest(2, &[&[0x66, 0xff, 0x06, 0x00, 0x04, 0xeb, 0xf9]]) else {
        return;
    };
    let counted = || {
        let memory = guest.ram.guest().memory();
        let count: u32 = memory.read_obj(GuestAddress(0x400)).unwrap();
        count
    };
    let (stopped, heard) = mpsc::channel();
    let mut last = 0;
    for round in 0..300 {
        guest.vcpus.resume();
        // In some rounds it is stopped before it has run at all.
        while round % 3 == 0 && counted() == last {
            thread::yield_now();
        }
        let stopped = stopped.clone();
        guest.vcpus.stop_then(move || stopped.send(round).unwrap());
        assert_eq!(heard.recv_timeout(Duration::from_secs(20)), Ok(round));
        last = counted();
        for _ in 0..1000 {
            assert_eq!(counted(), last, "round {round}");
        }
    }
    assert!(last > 0);
    assert!(heard.try_recv().is_err(), "each is said once");
}

#[test]
fn a_deadline_timer_comes_when_it_is_due_after_each_reset_too() {
    let Some(guest) = guest(
        1,
        &[
            &x2apic(),
            // IA32_X2APIC_LVT_TIMER: deadline mode, vector 0x40
            &wrmsr(0x832, 0, 0x4_0040),
            // rdtsc; add eax, 0x100_0000; adc edx, 0; mov ecx, 0x6e0; wrmsr
            &[0x0f, 0x31, 0x66, 0x05, 0, 0, 0, 1, 0x66, 0x83, 0xd2, 0],
            &[0x66, 0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x30],
            // sti; again: hlt; jmp again
            &[0xfb, 0xf4, 0xeb, 0xfd],
        ],
    ) else {
        return;
    };
    guest.write(
        0x3000,
        &[&al(0x40)[..], TELL_AL, &[0xfa, 0xf4, 0xeb, 0xfd]].concat(),
    );
    guest.write(0x100, &[0x00, 0x30, 0, 0]);
    for round in 0..6 {
        let start = Instant::now();
        guest.vcpus.resume();
        assert_eq!(guest.next(), 0x40);
        let took = start.elapsed();
        // 16 Mi ticks are some milliseconds at any frequency that there is.
        assert!(took < Duration::from_secs(2), "round {round}: {took:?}");
        guest.vcpus.hold();
        guest.vcpus.reset().unwrap();
        guest.vm.reset_chips().unwrap();
        guest.enter().unwrap();
    }
}

/// A guest whose boot processor starts the others again and again, each of which tells its APIC id whenever it starts.
fn restless(cpus: u8) -> Option<Guest> {
    let [init, startup] = [0xc_4500, 0xc_4602].map(|command| wrmsr(0x830, 0, command));
    let guest = guest(
        cpus,
        &[
            &x2apic(),
            // again: mov cx, 0; loop $; init; start-up; jmp again
            &[0xb9, 0, 0, 0xe2, 0xfe],
            &init,
            &startup,
            &[
                0xeb,
                u8::try_from(256 - (2 + 5 + init.len() + startup.len())).unwrap(),
            ],
        ],
    )?;
    let id = [
        0x66, 0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0x66, 0xc1, 0xeb, 24, 0x88, 0xd8,
    ];
    guest.write(AP_CODE.into(), &[&id[..], TELL_AL, STOP].concat());
    Some(guest)
}

/// Until the guest has told each of `ids`, and nothing else.
fn hears(guest: &Guest, ids: &[u8]) {
    let mut missing = ids.to_vec();
    while !missing.is_empty() {
        let id = guest.next();
        assert!(ids.contains(&id), "{id} is not in the guest");
        missing.retain(|one| *one != id);
    }
}

#[test]
fn a_processor_that_is_put_aside_executes_nothing_and_comes_back_as_after_power_on() {
    let Some(mut guest) = restless(3) else { return };
    // What the guest told before.
    let forget = |guest: &Guest| while !guest.is_silent() {};
    guest.vcpus.resume();
    hears(&guest, &[1, 2]);
    for _ in 0..5 {
        guest.vcpus.put_aside(2);
        assert_eq!(guest.event(), VcpuEvent::Parked { id: 2 });
        guest.vcpus.hold();
        forget(&guest);
        guest.vcpus.resume();
        for _ in 0..10 {
            hears(&guest, &[1]);
        }
        let seen: Vec<_> = guest.vcpus.seen().iter().map(|vcpu| vcpu.id).collect();
        assert_eq!(seen, [0, 1]);
        guest.vcpus.bring(2).unwrap();
        hears(&guest, &[1, 2]);
    }
    // While the guest is held as well; and it stays out when that starts anew.
    guest.vcpus.hold();
    guest.vcpus.put_aside(1);
    assert_eq!(guest.event(), VcpuEvent::Parked { id: 1 });
    guest.vcpus.hold();
    forget(&guest);
    guest.vcpus.reset().unwrap();
    guest.vm.reset_chips().unwrap();
    guest.enter().unwrap();
    guest.vcpus.resume();
    for _ in 0..10 {
        hears(&guest, &[2]);
    }
}

#[test]
fn a_processor_that_was_never_there_comes_to_a_guest_that_runs() {
    let Some(mut guest) = restless(2) else { return };
    guest.vcpus.resume();
    hears(&guest, &[1]);
    // The guest was made for as many as there are: KVM gives more than that all the same.
    guest.vcpus.bring(2).unwrap();
    hears(&guest, &[1, 2]);
    assert_eq!(guest.vcpus.seen().len(), 3);
}

/// What a guest finds in a register of a leaf of CPUID, byte by byte.
fn cpuid(features: CpuFeatures, leaf: u32, register: [u8; 3]) -> Option<u32> {
    let [a, b, c, d] = leaf.to_le_bytes();
    // mov eax, leaf; xor ecx, ecx; cpuid; mov esi, <register>
    let ask = [0x66, 0xb8, a, b, c, d, 0x66, 0x31, 0xc9, 0x0f, 0xa2];
    // mov eax, esi; tell; shr esi, 8
    let next = [&[0x66, 0x89, 0xf0][..], TELL_AL, &[0x66, 0xc1, 0xee, 8]].concat();
    let guest = guest_with(
        features,
        1,
        &[&ask, &register, &next, &next, &next, &next, STOP],
    )?;
    guest.vcpus.resume();
    Some(u32::from_le_bytes([(); 4].map(|()| guest.next())))
}

/// `mov esi, eax` and `mov esi, ecx`
const EAX: [u8; 3] = [0x66, 0x89, 0xc6];
const ECX: [u8; 3] = [0x66, 0x89, 0xce];

#[test]
fn a_guest_without_nesting_finds_neither_vmx_nor_svm() {
    let off = CpuFeatures {
        nested: false,
        ..CpuFeatures::default()
    };
    let Some(one) = cpuid(off, 1, ECX) else {
        return;
    };
    assert_eq!(one & 1 << 5, 0, "VMX");
    assert_eq!(cpuid(off, 0x8000_0001, ECX).unwrap() & 1 << 2, 0, "SVM");
    assert_eq!(cpuid(off, 0x8000_000a, EAX), Some(0));
}

#[test]
fn a_guest_without_counters_finds_none_and_cannot_use_any() {
    let off = CpuFeatures {
        pmu: false,
        ..CpuFeatures::default()
    };
    let Some(leaf) = cpuid(off, 0xa, EAX) else {
        return;
    };
    assert_eq!(leaf, 0);
    let extended = cpuid(off, 0x8000_0001, ECX).unwrap();
    assert_eq!(extended & (1 << 23 | 1 << 24 | 1 << 28), 0, "{extended:#x}");
    // mov ecx, 0; rdpmc: without counters a general protection fault, whose handler tells 0xd.
    let read = [0x66, 0xb9, 0, 0, 0, 0, 0x0f, 0x33];
    let guest = guest_with(off, 1, &[&read, &al(1), TELL_AL, STOP]).unwrap();
    guest.write(0x3000, &[&al(0xd)[..], TELL_AL, STOP].concat());
    guest.write(0xd * 4, &[0x00, 0x30, 0, 0]);
    guest.vcpus.resume();
    assert_eq!(guest.next(), 0xd);
}
