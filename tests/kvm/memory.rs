//! What is memory to the guest follows the list of regions.

use std::sync::Arc;

use busway::config::MemoryConfig;
use busway::kvm::BusDevice;
use busway::memory::{Ram, Region};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::guest::{TELL_AL, ds, guest};

struct Fixed(u8);

impl BusDevice for Fixed {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[test]
fn a_region_takes_precedence_over_a_device_and_gives_the_place_back() {
    let Some(guest) = guest(
        1,
        &[
            &ds(0x2000),
            // again: mov al, [0]; tell; in al, 0x80; jmp again
            &[0xa0, 0, 0],
            TELL_AL,
            &[0xe4, 0x80, 0xeb, 0xf7],
        ],
    ) else {
        return;
    };
    let config = MemoryConfig {
        size: 4096,
        ..Default::default()
    };
    let memory = Ram::new(&config, false).unwrap();
    memory
        .guest()
        .memory()
        .write_obj(0x55_u8, GuestAddress(0))
        .unwrap();
    let host = memory
        .guest()
        .memory()
        .get_host_address(GuestAddress(0))
        .unwrap() as usize;
    guest
        .buses
        .mmio
        .insert("device", 0x2_0000, 0x1000, Arc::new(Fixed(0xaa)))
        .unwrap();

    // SAFETY: the memory is mapped for as long as `memory`, which the region keeps.
    let region = Arc::new(unsafe { Region::device("bar", 0x2_0000, 4096, host, memory) });
    for _ in 0..3 {
        guest.regions.add(region.clone()).unwrap();
        guest.vcpus.resume();
        while guest.next() != 0x55 {}
        guest.vcpus.hold();
        guest.regions.remove(&region);
        guest.vcpus.resume();
        while guest.next() != 0xaa {}
        guest.vcpus.hold();
    }
}

#[test]
fn a_region_may_come_and_go_while_the_guest_runs() {
    let Some(guest) = guest(
        1,
        &[
            &ds(0x2000),
            &[0xa0, 0, 0],
            TELL_AL,
            &[0xe4, 0x80, 0xeb, 0xf7],
        ],
    ) else {
        return;
    };
    let config = MemoryConfig {
        size: 4096,
        ..Default::default()
    };
    let memory = Ram::new(&config, false).unwrap();
    let host = memory
        .guest()
        .memory()
        .get_host_address(GuestAddress(0))
        .unwrap() as usize;
    // SAFETY: as above.
    let region = Arc::new(unsafe { Region::device("bar", 0x2_0000, 4096, host, memory) });
    guest.vcpus.resume();
    for _ in 0..20 {
        guest.regions.add(region.clone()).unwrap();
        while guest.next() != 0x00 {}
        guest.regions.remove(&region);
        while guest.next() != 0xff {}
    }
}
