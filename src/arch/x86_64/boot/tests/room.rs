//! Whether kernel and initramfs find room, and what is said where they do not.

use super::*;

#[test]
fn what_does_not_fit_into_ram_says_how_much_it_needs() {
    let small = Guest::new(18 * MIB);
    let needs = "the kernel KERNEL needs RAM from 0x1000000 to 0x1400000, but the guest's low RAM ends at 0x1200000; give the guest more memory, at least 20 MiB";
    assert_eq!(small.error(&bzimage(&[0; 4096])), needs);
    assert_eq!(small.error(&pvh_elf(&[0; 4096], 4 * MIB - 4096)), needs);
    let guest = Guest::new(32 * MIB);
    for kernel in [bzimage(&[0; 4096]), pvh_elf(&[0; 4096], 4 * MIB - 4096)] {
        let initramfs = vec![1; 13 * MIB as usize];
        let error = guest.boot(&kernel, Some(&initramfs), "").unwrap_err();
        let path = guest.folder.path().join("initramfs");
        assert_eq!(
            error.to_string(),
            format!(
                "the initramfs {} of 13631488 bytes does not fit: above the kernel's end at 0x1400000 there are 12582912 bytes of RAM in one piece where this kernel can have it; give the guest at least 33 MiB of memory, or a smaller initramfs",
                path.display()
            )
        );
        guest
            .boot(&kernel, Some(&initramfs[..12 << 20]), "")
            .unwrap();
    }
}

/// Leaves no RAM between the kernel's end and 4 GiB free for an initramfs.
fn fill_low_ram(kernel: &mut [u8]) {
    put(
        kernel,
        0x260,
        &(0xc000_0000_u32 - (16 << 20) - 4096).to_le_bytes(),
    );
}

#[test]
fn an_initramfs_is_above_4_gib_where_the_kernel_says_that_it_can_be() {
    let guest = Guest::new(6 << 30);
    let mut kernel = bzimage(&[0; 4096]);
    fill_low_ram(&mut kernel);
    let error = guest.boot(&kernel, Some(&[1; 8192]), "").unwrap_err();
    let reported = error.to_string();
    assert!(reported.contains("more memory does not help"), "{reported}");
    // XLF_KERNEL_64 and XLF_CAN_BE_LOADED_ABOVE_4G
    put(&mut kernel, 0x236, &0b11_u16.to_le_bytes());
    guest.boot(&kernel, Some(&[1; 8192]), "").unwrap();
    let halves = |low, high| {
        let page = low_memory::ZERO_PAGE;
        guest.u32(page + low) | guest.u32(page + high) << 32
    };
    // ramdisk_image and ext_ramdisk_image, ramdisk_size and ext_ramdisk_size
    let (at, size) = (halves(0x218, 0xc0), halves(0x21c, 0xc4));
    assert_eq!((at, size), ((7 << 30) - 8192, 8192));
    assert_eq!(guest.bytes(at, 8192), [1; 8192]);
    // The next boot of one that fits below leaves nothing of it.
    guest
        .boot(&bzimage(&[0; 4096]), Some(&[2; 4096]), "")
        .unwrap();
    assert_eq!(halves(0x218, 0xc0), (2 << 30) - 4096);
}

#[test]
fn an_initramfs_of_a_pvh_kernel_stays_below_4_gib() {
    let guest = Guest::new(6 << 30);
    let kernel = pvh_elf(&[0; 4096], 0);
    guest.boot(&kernel, Some(&[1; 4096]), "").unwrap();
    assert_eq!(guest.u64(low_memory::PVH_MODULES), (2 << 30) - 4096);
    // Sparse, and refused before it is read.
    let pvh = guest.file("pvh", &pvh_elf(&[0; 4096], 0));
    let initramfs = guest.folder.path().join("large");
    fs::File::create(&initramfs)
        .unwrap()
        .set_len(3 << 30)
        .unwrap();
    let source = BootSource::open(&pvh, Some(&initramfs), "").unwrap();
    let reported = load(&guest.ram, &source, &guest.map, RSDP)
        .unwrap_err()
        .to_string();
    assert!(
        reported.contains("give the bzImage of this kernel"),
        "{reported}"
    );
}

#[test]
fn a_kernel_where_no_guest_has_ram_is_not_told_to_ask_for_more() {
    let guest = Guest::new(64 * MIB);
    let mut high = bzimage(&[0; 4096]);
    put(&mut high, 0x258, &0xc000_0000_u64.to_le_bytes());
    let reported = guest.error(&high);
    assert!(
        reported.contains("low RAM of any guest ends at 0xc0000000"),
        "{reported}"
    );
    assert!(!reported.contains("more memory"), "{reported}");
}

#[test]
fn an_initramfs_stays_below_what_the_kernel_takes() {
    let guest = Guest::new(128 * MIB);
    let mut kernel = bzimage(&[0; 4096]);
    put(&mut kernel, 0x22c, &(64 * MIB as u32 - 1).to_le_bytes());
    guest.boot(&kernel, Some(&[1; 4096]), "").unwrap();
    assert_eq!(guest.u32(low_memory::ZERO_PAGE + 0x218), 64 * MIB - 4096);
}
