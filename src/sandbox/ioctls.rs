//! The requests of ioctl(2) that Busway makes, by what they are made of.
//!
//! linux/ioctl.h, `_IOC`: two bits say which way the argument goes, fourteen its size, eight each the kind and the
//! number. KVM: linux/kvm.h; VFIO: linux/vfio.h; iommufd: linux/iommufd.h; vhost: linux/vhost.h; tun: linux/if_tun.h.

use kvm_bindings as kvm;

const WRITE: u32 = 1;
const READ: u32 = 2;

const fn request(direction: u32, kind: u8, number: u8, size: usize) -> u32 {
    direction << 30 | (size as u32 & 0x3fff) << 16 | (kind as u32) << 8 | number as u32
}

const fn none(kind: u8, number: u8) -> u32 {
    request(0, kind, number, 0)
}

const fn to<T>(kind: u8, number: u8) -> u32 {
    request(WRITE, kind, number, size_of::<T>())
}

const fn from<T>(kind: u8, number: u8) -> u32 {
    request(READ, kind, number, size_of::<T>())
}

const fn both<T>(kind: u8, number: u8) -> u32 {
    request(READ | WRITE, kind, number, size_of::<T>())
}

const KVM: u8 = 0xae;
const VHOST: u8 = 0xaf;
/// VFIO's and iommufd's.
const VFIO: u8 = b';';
const VFIO_BASE: u8 = 100;

/// What a vCPU's thread asks of KVM. `KVM_RUN` is first, for it is looked for most often.
pub(super) const KVM_RUNNING: &[u32] = &[
    none(KVM, 0x80),                                   // KVM_RUN
    to::<kvm::kvm_irqfd>(KVM, 0x76),                   // KVM_IRQFD
    to::<kvm::kvm_irq_routing>(KVM, 0x6a),             // KVM_SET_GSI_ROUTING
    to::<kvm::kvm_ioeventfd>(KVM, 0x79),               // KVM_IOEVENTFD
    to::<kvm::kvm_userspace_memory_region>(KVM, 0x46), // KVM_SET_USER_MEMORY_REGION
    to::<kvm::kvm_irq_level>(KVM, 0x61),               // KVM_IRQ_LINE
    from::<kvm::kvm_regs>(KVM, 0x81),                  // KVM_GET_REGS
    from::<kvm::kvm_sregs>(KVM, 0x83),                 // KVM_GET_SREGS
];

/// What the thread of a vCPU asks that is put aside while the guest runs, which puts it into its state at power-on.
pub(super) const KVM_PARKING: &[u32] = &[
    to::<kvm::kvm_regs>(KVM, 0x82),        // KVM_SET_REGS
    to::<kvm::kvm_sregs>(KVM, 0x84),       // KVM_SET_SREGS
    to::<kvm::kvm_msrs>(KVM, 0x89),        // KVM_SET_MSRS
    to::<kvm::kvm_fpu>(KVM, 0x8d),         // KVM_SET_FPU
    to::<kvm::kvm_lapic_state>(KVM, 0x8f), // KVM_SET_LAPIC
    to::<kvm::kvm_mp_state>(KVM, 0x99),    // KVM_SET_MP_STATE
    to::<kvm::kvm_vcpu_events>(KVM, 0xa0), // KVM_SET_VCPU_EVENTS
    to::<kvm::kvm_debugregs>(KVM, 0xa2),   // KVM_SET_DEBUGREGS
    to::<kvm::kvm_xcrs>(KVM, 0xa7),        // KVM_SET_XCRS
];

/// What making, restarting and ending a VM asks of KVM besides.
pub(super) const KVM_MAKING: &[u32] = &[
    none(KVM, 0x00),                           // KVM_GET_API_VERSION
    none(KVM, 0x01),                           // KVM_CREATE_VM
    both::<kvm::kvm_msr_list>(KVM, 0x02),      // KVM_GET_MSR_INDEX_LIST
    none(KVM, 0x03),                           // KVM_CHECK_EXTENSION
    none(KVM, 0x04),                           // KVM_GET_VCPU_MMAP_SIZE
    both::<kvm::kvm_cpuid2>(KVM, 0x05),        // KVM_GET_SUPPORTED_CPUID
    none(KVM, 0x41),                           // KVM_CREATE_VCPU
    none(KVM, 0x47),                           // KVM_SET_TSS_ADDR
    to::<u64>(KVM, 0x48),                      // KVM_SET_IDENTITY_MAP_ADDR
    none(KVM, 0x60),                           // KVM_CREATE_IRQCHIP
    both::<kvm::kvm_irqchip>(KVM, 0x62),       // KVM_GET_IRQCHIP
    from::<kvm::kvm_irqchip>(KVM, 0x63),       // KVM_SET_IRQCHIP
    to::<kvm::kvm_pit_config>(KVM, 0x77),      // KVM_CREATE_PIT2
    from::<kvm::kvm_pit_state2>(KVM, 0x9f),    // KVM_GET_PIT2
    to::<kvm::kvm_pit_state2>(KVM, 0xa0),      // KVM_SET_PIT2
    to::<kvm::kvm_enable_cap>(KVM, 0xa3),      // KVM_ENABLE_CAP
    to::<kvm::kvm_msi>(KVM, 0xa5),             // KVM_SIGNAL_MSI
    both::<kvm::kvm_msrs>(KVM, 0x88),          // KVM_GET_MSRS
    from::<kvm::kvm_lapic_state>(KVM, 0x8e),   // KVM_GET_LAPIC
    to::<kvm::kvm_cpuid2>(KVM, 0x90),          // KVM_SET_CPUID2
    from::<kvm::kvm_debugregs>(KVM, 0xa1),     // KVM_GET_DEBUGREGS
    none(KVM, 0xa2),                           // KVM_SET_TSC_KHZ
    none(KVM, 0xa3),                           // KVM_GET_TSC_KHZ
    from::<kvm::kvm_xcrs>(KVM, 0xa6),          // KVM_GET_XCRS
    none(KVM, 0xad),                           // KVM_KVMCLOCK_CTRL
    none(KVM, 0xce),                           // KVM_GET_STATS_FD
    both::<kvm::kvm_create_device>(KVM, 0xe0), // KVM_CREATE_DEVICE
    to::<kvm::kvm_device_attr>(KVM, 0xe1),     // KVM_SET_DEVICE_ATTR
];

/// What has memory mapped for host devices and unmapped while the guest runs.
pub(super) const VFIO_MAPPING: &[u32] = &[
    none(VFIO, VFIO_BASE + 12), // VFIO_IOMMU_GET_INFO
    none(VFIO, VFIO_BASE + 13), // VFIO_IOMMU_MAP_DMA
    none(VFIO, VFIO_BASE + 14), // VFIO_IOMMU_UNMAP_DMA
    none(VFIO, 0x84),           // IOMMU_IOAS_IOVA_RANGES
    none(VFIO, 0x85),           // IOMMU_IOAS_MAP
    none(VFIO, 0x86),           // IOMMU_IOAS_UNMAP
];

/// What a guest's accesses have a host device and its IOMMU do.
pub(super) const VFIO_RUNNING: &[u32] = &[
    none(VFIO, VFIO_BASE + 10), // VFIO_DEVICE_SET_IRQS
    none(VFIO, VFIO_BASE + 11), // VFIO_DEVICE_RESET
    none(VFIO, VFIO_BASE + 12), // VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, VFIO_IOMMU_GET_INFO
    none(VFIO, VFIO_BASE + 13), // VFIO_DEVICE_PCI_HOT_RESET, VFIO_IOMMU_MAP_DMA
    none(VFIO, VFIO_BASE + 14), // VFIO_IOMMU_UNMAP_DMA
    none(VFIO, VFIO_BASE + 17), // VFIO_DEVICE_FEATURE
    none(VFIO, 0x86),           // IOMMU_IOAS_UNMAP
    none(VFIO, 0x8f),           // IOMMU_IOAS_MAP_FILE
];

/// What connects and releases host devices besides.
pub(super) const VFIO_OPENING: &[u32] = &[
    none(VFIO, VFIO_BASE),      // VFIO_GET_API_VERSION
    none(VFIO, VFIO_BASE + 1),  // VFIO_CHECK_EXTENSION
    none(VFIO, VFIO_BASE + 2),  // VFIO_SET_IOMMU
    none(VFIO, VFIO_BASE + 3),  // VFIO_GROUP_GET_STATUS
    none(VFIO, VFIO_BASE + 4),  // VFIO_GROUP_SET_CONTAINER
    none(VFIO, VFIO_BASE + 5),  // VFIO_GROUP_UNSET_CONTAINER
    none(VFIO, VFIO_BASE + 6),  // VFIO_GROUP_GET_DEVICE_FD
    none(VFIO, VFIO_BASE + 7),  // VFIO_DEVICE_GET_INFO
    none(VFIO, VFIO_BASE + 8),  // VFIO_DEVICE_GET_REGION_INFO
    none(VFIO, VFIO_BASE + 9),  // VFIO_DEVICE_GET_IRQ_INFO
    none(VFIO, VFIO_BASE + 18), // VFIO_DEVICE_BIND_IOMMUFD
    none(VFIO, VFIO_BASE + 19), // VFIO_DEVICE_ATTACH_IOMMUFD_PT
    none(VFIO, 0x80),           // IOMMU_DESTROY
    none(VFIO, 0x81),           // IOMMU_IOAS_ALLOC
    none(VFIO, 0x84),           // IOMMU_IOAS_IOVA_RANGES
];

/// What closing a host device and leaving its IOMMU address space take besides.
pub(super) const CLOSING: &[u32] = &[
    to::<kvm::kvm_device_attr>(KVM, 0xe1), // KVM_SET_DEVICE_ATTR: KVM_DEV_VFIO_FILE_DEL
    none(VFIO, VFIO_BASE + 5),             // VFIO_GROUP_UNSET_CONTAINER
    none(VFIO, 0x80),                      // IOMMU_DESTROY
];

/// Only unmasks a pin.
pub(super) const VFIO_INTERRUPTS: &[u32] = &[none(VFIO, VFIO_BASE + 10)];

/// What hands a device's rings to the kernel's vhost, and takes them back.
pub(super) const VHOST_RINGS: &[u32] = &[
    to::<u64>(VHOST, 0x00),         // VHOST_SET_FEATURES
    to::<u64>(VHOST, 0x03),         // VHOST_SET_MEM_TABLE: the head of a list, 8 bytes
    to::<u64>(VHOST, 0x10),         // VHOST_SET_VRING_NUM: 8 bytes, as the next ones but one
    to::<[u64; 5]>(VHOST, 0x11),    // VHOST_SET_VRING_ADDR: 40 bytes
    to::<u64>(VHOST, 0x12),         // VHOST_SET_VRING_BASE
    both::<u64>(VHOST, 0x12),       // VHOST_GET_VRING_BASE
    to::<u64>(VHOST, 0x20),         // VHOST_SET_VRING_KICK
    to::<u64>(VHOST, 0x21),         // VHOST_SET_VRING_CALL
    to::<u64>(VHOST, 0x22),         // VHOST_SET_VRING_ERR
    to::<u64>(VHOST, 0x30),         // VHOST_NET_SET_BACKEND
    to::<libc::c_int>(VHOST, 0x61), // VHOST_VSOCK_SET_RUNNING
];

/// What a device of the kernel's vhost is opened by.
pub(super) const VHOST_OPENING: &[u32] = &[
    from::<u64>(VHOST, 0x00), // VHOST_GET_FEATURES
    none(VHOST, 0x01),        // VHOST_SET_OWNER
    to::<u64>(VHOST, 0x60),   // VHOST_VSOCK_SET_GUEST_CID
];

/// What vectors that come late ask of vhost.
pub(super) const VHOST_CALLS: &[u32] = &[to::<u64>(VHOST, 0x21)];

/// What a driver's choice of offloads and queues asks of a tap.
pub(super) const TUN_RUNNING: &[u32] = &[
    to::<libc::c_uint>(b'T', 208), // TUNSETOFFLOAD
    to::<libc::c_int>(b'T', 217),  // TUNSETQUEUE
];

/// What a tap is opened and brought up by.
pub(super) const TUN_OPENING: &[u32] = &[
    to::<libc::c_int>(b'T', 202),    // TUNSETIFF
    to::<libc::c_int>(b'T', 216),    // TUNSETVNETHDRSZ
    from::<libc::c_uint>(b'T', 210), // TUNGETIFF
    0x8913,                          // SIOCGIFFLAGS (linux/sockios.h)
    0x8914,                          // SIOCSIFFLAGS
    0x8921,                          // SIOCGIFMTU
    0x8922,                          // SIOCSIFMTU
];

/// What a guest's requests to a block device ask for.
pub(super) const BLOCK_RUNNING: &[u32] = &[
    none(0x12, 119), // BLKDISCARD (linux/fs.h)
];

/// What a block device is asked for when it is opened, and when it is looked at anew.
pub(super) const BLOCK_OPENING: &[u32] = &[
    request(READ, 0x12, 114, 8), // BLKGETSIZE64 (linux/fs.h)
    none(0x12, 104),             // BLKSSZGET
    none(0x12, 120),             // BLKIOMIN
    none(0x12, 121),             // BLKIOOPT
    none(0x12, 123),             // BLKPBSZGET
];

/// What a terminal is put into raw mode by, and given back, at any end and on any thread. TIOCSTI, which types for
/// whoever reads the terminal next, is not among them. asm-generic/ioctls.h, asm-generic/termbits.h
pub(super) const TERMINAL: &[u32] = &[
    0x5401,                         // TCGETS
    0x5402,                         // TCSETS
    0x5403,                         // TCSETSW
    0x5404,                         // TCSETSF
    request(READ, b'T', 0x2a, 44),  // TCGETS2
    request(WRITE, b'T', 0x2b, 44), // TCSETS2
    request(WRITE, b'T', 0x2c, 44), // TCSETSW2
    request(WRITE, b'T', 0x2d, 44), // TCSETSF2
    0x540f,                         // TIOCGPGRP
    0x5413,                         // TIOCGWINSZ
];

/// What makes a pseudo-terminal.
pub(super) const PSEUDO_TERMINAL: &[u32] = &[
    from::<libc::c_uint>(b'T', 0x30), // TIOCGPTN
    to::<libc::c_int>(b'T', 0x31),    // TIOCSPTLCK
    none(b'T', 0x41),                 // TIOCGPTPEER
];

/// What any descriptor can be told: FIONBIO, FIOCLEX and FIONREAD.
pub(super) const ANY: &[u32] = &[0x5421, 0x5451, 0x541b];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_that_libc_and_the_kernels_headers_have() {
        for (list, number) in [
            (TUN_OPENING, libc::TUNSETIFF),
            (TUN_OPENING, libc::TUNGETIFF),
            (TUN_OPENING, libc::SIOCGIFFLAGS),
            (TUN_OPENING, libc::SIOCSIFFLAGS),
            (TUN_OPENING, libc::SIOCGIFMTU),
            (TUN_OPENING, libc::SIOCSIFMTU),
            (TUN_RUNNING, libc::TUNSETOFFLOAD),
            (TUN_OPENING, libc::TUNSETVNETHDRSZ),
            (TUN_RUNNING, libc::TUNSETQUEUE),
            (TERMINAL, libc::TCGETS),
            (TERMINAL, libc::TCSETS),
            (TERMINAL, libc::TCSETSW),
            (TERMINAL, libc::TCSETSF),
            (TERMINAL, libc::TIOCGPGRP),
            (TERMINAL, libc::TIOCGWINSZ),
            (PSEUDO_TERMINAL, libc::TIOCGPTN),
            (PSEUDO_TERMINAL, libc::TIOCSPTLCK),
            (PSEUDO_TERMINAL, libc::TIOCGPTPEER),
            (BLOCK_OPENING, libc::BLKSSZGET),
            (BLOCK_OPENING, libc::BLKPBSZGET),
            (BLOCK_OPENING, libc::BLKIOMIN),
            (BLOCK_OPENING, libc::BLKIOOPT),
            (ANY, libc::FIONBIO),
            (ANY, libc::FIOCLEX),
            (ANY, libc::FIONREAD),
            // linux/kvm.h, linux/vfio.h, linux/vhost.h, as strace shows them
            (KVM_RUNNING, 0xae80),
            (KVM_RUNNING, 0x4020_ae46),
            (KVM_RUNNING, 0x4020_ae76),
            (KVM_RUNNING, 0x4008_ae6a),
            (KVM_RUNNING, 0x4040_ae79),
            (KVM_MAKING, 0xc208_ae62),
            (KVM_PARKING, 0x4090_ae82),
            (KVM_PARKING, 0x4400_ae8f),
            (VFIO_RUNNING, 0x3b6e),
            (VFIO_RUNNING, 0x3b71),
            (VFIO_OPENING, 0x3b64),
            (VHOST_RINGS, 0x4028_af11),
            (VHOST_RINGS, 0x4008_af30),
        ] {
            let number = u32::try_from(number).unwrap();
            assert!(list.contains(&number), "{number:#x}");
        }
    }
}
