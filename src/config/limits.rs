//! The most and the least that there can be of things.

use std::ops::RangeInclusive;

/// How many vCPUs a VM can have, where KVM gives so many: as many as there are APIC ids that the IOAPIC can send to. KVM's
/// has 8 bits for a destination, of which 255 is all processors. Intel 82093AA §3.2.4; linux/arch/x86/kvm/ioapic.h,
/// `kvm_ioapic_redirect_entry`.
pub const MAX_CPUS: u8 = 255;

/// How many queues, or pairs of them, a virtio device can have.
pub const MAX_QUEUES: u16 = 64;

/// The least RAM that a guest can have; a kernel with its initial RAM file system needs more.
pub const MIN_MEMORY: u64 = 16 << 20;

/// What RAM comes in multiples of.
pub const MEMORY_STEP: u64 = 1 << 20;

/// The descriptors that a disk's queue can have, a power of two: a request's header and status beside
/// its data, and no more than one chain may have.
pub const DISK_QUEUE_SIZES: RangeInclusive<u16> = 4..=1024;

/// The descriptors that a NIC's queue can have, a power of two: a packet of 64 KiB fits into the least.
pub const NET_QUEUE_SIZES: RangeInclusive<u16> = 32..=4096;

/// The descriptors that a shared folder's queue can have, a power of two: what back ends take at most.
pub const FS_QUEUE_SIZES: RangeInclusive<u16> = 16..=1024;

/// The most bytes of a shared folder's tag. Virtio 1.3 §5.11.4.
pub(super) const TAG_SIZE: usize = 36;

/// The most bytes of a file that a console's output goes to, and of the file before it.
pub const CONSOLE_FILE_SIZE: u64 = 16 << 20;

/// The least that the size of such a file can be: what is written at once.
pub const MIN_CONSOLE_FILE_SIZE: u64 = 4096;

/// The most seconds that a guest can be given to release a device.
pub const MAX_REMOVAL_TIMEOUT: u32 = 3600;

/// The seconds that it has where nothing else was said. Linux waits five of these after the button of a slot was
/// pressed, for it could be pressed again to take that back (drivers/pci/hotplug/pciehp_ctrl.c,
/// `pciehp_handle_button_press`).
pub const DEFAULT_REMOVAL_TIMEOUT: u32 = 30;

/// The most seconds that a guest can be given to power off when it was asked to by a signal.
pub const MAX_POWER_OFF_TIMEOUT: u32 = 3600;

/// The seconds that it has where nothing else was said.
pub const DEFAULT_POWER_OFF_TIMEOUT: u32 = 20;

/// The least MTU that a NIC can have; bytes. Virtio 1.3 §5.1.4.1.
pub(super) const MIN_MTU: u16 = 68;

/// The longest name of a network interface. linux/if.h, `IFNAMSIZ` less its zero byte.
pub(super) const INTERFACE_NAME: usize = 15;

/// Queues of as many pairs as there can be.
pub(super) const MAX_NET_QUEUES: u16 = 2 * MAX_QUEUES;

/// How many slots bus 0 has for root ports beside the functions that come first.
pub(super) const MAX_HOTPLUG_SLOTS: u8 = 15;

/// How many strings a machine can tell its guest: they are counted by a byte. DMTF DSP0134, SMBIOS 3.0 §7.12.
pub(super) const MAX_OEM_STRINGS: usize = u8::MAX as usize;

/// The most bytes of what tells machines apart, all together: the tables that it stands in have 64 KiB below 1 MiB.
pub(super) const MAX_IDENTITY: usize = 32 << 10;

/// Bytes of a disk's serial number. Virtio 1.3 §5.2.6.
pub(super) const SERIAL_SIZE: usize = 20;
