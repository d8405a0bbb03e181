//! What is memory to the guest follows the list of regions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use busway::config::MemoryConfig;
use busway::kvm::BusDevice;
use busway::memory::{Ram, Region};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestRegionMmap, MmapRegion,
};

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

/// Counts writes, and would read as something that no test has in memory.
#[derive(Default)]
struct Flash(AtomicU64);

impl BusDevice for Flash {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xaa);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        assert_eq!(data, [0x66]);
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn rom_is_read_as_memory_and_written_as_a_device() {
    let Some(guest) = guest(
        1,
        &[
            &ds(0x2000),
            // again: mov byte [0], 0x66; mov al, [0]; tell; jmp again
            &[0xc6, 0x06, 0, 0, 0x66, 0xa0, 0, 0],
            TELL_AL,
            &[0xeb, 0xf4],
        ],
    ) else {
        return;
    };
    let memory = GuestRegionMmap::new(MmapRegion::new(0x1000).unwrap(), GuestAddress(0x2_0000));
    let memory = Arc::new(memory.unwrap());
    memory
        .write_obj(0x55_u8, vm_memory::MemoryRegionAddress(0))
        .unwrap();
    let flash = Arc::new(Flash::default());
    guest
        .buses
        .mmio
        .insert("flash", 0x2_0000, 0x1000, flash.clone())
        .unwrap();
    let rom = Arc::new(Region::rom("firmware", memory));
    guest.regions.add(rom.clone()).unwrap();
    guest.vcpus.resume();
    for _ in 0..5 {
        assert_eq!(guest.next(), 0x55);
    }
    guest.vcpus.hold();
    assert!(flash.0.load(Ordering::SeqCst) >= 5);
    guest.regions.remove(&rom);
}
