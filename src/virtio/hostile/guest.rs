//! A guest with one device, which reaches it as guests do: by its RAM, by the function's configuration space and by
//! its BAR.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use busway_pci::{BarIndex, InterruptRoute, InterruptRoutes, MsiMessage, PciFunction, RouteError};
use busway_vfio::EventFd;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::devices::{Kind, Outside};
use super::stage::Stage;
use crate::memory::{GuestRam, RamMap};
use crate::virtio::VirtioPci;
use crate::virtio::spec::{DESC_F_NEXT, DESC_F_WRITE, pci::common, status};

/// RAM is in two parts, with a hole between them.
const RAM: [(u64, usize); 2] = [(0, 0x2_0000), (0x4_0000, 0x2_0000)];
/// The rings of a queue begin at the product of its number and this.
const RINGS: u64 = 0x800;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x600;
/// Where indirect tables are.
pub(super) const INDIRECT: u64 = 0x6000;
/// Where the buffers of well-behaved requests are.
pub(super) const DATA: u64 = 0x8000;
/// Most descriptors of a queue that are used here.
pub(super) const QUEUE_SIZE: u16 = 32;
/// Most queues that are set up.
const QUEUES: u16 = 8;

/// Places in the function's BAR, as its capabilities have them.
const NOTIFY: u64 = 0x3000;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    address: u64,
    len: u32,
    flags: u16,
}

impl Buffer {
    /// One that the device reads.
    pub(super) const fn read(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            flags: 0,
        }
    }

    /// One that it writes.
    pub(super) const fn written(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            flags: DESC_F_WRITE,
        }
    }
}

/// Routes for interrupts that nobody takes.
#[derive(Debug)]
struct Nowhere;

#[derive(Debug)]
struct Lost(EventFd);

impl InterruptRoutes for Nowhere {
    fn connect(&self, _: u16, _message: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        Ok(Arc::new(Lost(EventFd::new().expect("an eventfd"))))
    }
}

impl InterruptRoute for Lost {
    fn update(&self, _message: MsiMessage) -> Result<(), RouteError> {
        Ok(())
    }

    fn set_masked(&self, _masked: bool) -> Result<(), RouteError> {
        Ok(())
    }

    fn pending(&self) -> bool {
        false
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn trigger(&self) {
        self.0.signal();
    }
}

/// A guest and its device.
pub(super) struct Guest {
    pub(super) kind: Kind,
    pub(super) function: Arc<VirtioPci>,
    pub(super) outside: Outside,
    stage: Stage,
    ram: GuestRam,
}

impl Drop for Guest {
    fn drop(&mut self) {
        Stage::unset();
    }
}

impl Guest {
    pub(super) fn new(kind: Kind) -> Self {
        let ranges = RAM.map(|(start, size)| (GuestAddress(start), size));
        let ram = GuestRam::new(RamMap::from_ranges(&ranges).expect("memory"));
        let stage = Stage::set();
        let (device, outside) = kind.make(&ram).expect("a device");
        let function = VirtioPci::new(device, ram.clone(), Arc::new(Nowhere));
        Self {
            kind,
            function: function.expect("a function"),
            outside,
            stage,
            ram,
        }
    }

    /// Writes to RAM, where there is RAM.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        let _outside = self.ram.memory().write(bytes, GuestAddress(address));
    }

    /// Reads from RAM; zeros where there is none.
    pub(super) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _outside = self.ram.memory().read(&mut bytes, GuestAddress(address));
        bytes
    }

    pub(super) fn bar_write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(BarIndex::Bar(0), offset, data);
    }

    pub(super) fn bar_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.bar_read(BarIndex::Bar(0), offset, &mut data);
        data
    }

    pub(super) fn status(&self) -> u8 {
        let [status] = self.bar_read(common::DEVICE_STATUS);
        status
    }

    /// Resets the device.
    pub(super) fn reset(&self) {
        self.bar_write(common::DEVICE_STATUS, &[0]);
    }

    /// Resets the device and agrees on those of `features` that it offers.
    pub(super) fn negotiate(&self, features: u64) {
        self.reset();
        let mut so_far = status::ACKNOWLEDGE | status::DRIVER;
        self.bar_write(common::DEVICE_STATUS, &[so_far]);
        for half in [0_u32, 1] {
            self.bar_write(common::DEVICE_FEATURE_SELECT, &half.to_le_bytes());
            let offered = u32::from_le_bytes(self.bar_read(common::DEVICE_FEATURE));
            self.bar_write(common::DRIVER_FEATURE_SELECT, &half.to_le_bytes());
            let chosen = offered & (features >> (32 * half)) as u32;
            self.bar_write(common::DRIVER_FEATURE, &chosen.to_le_bytes());
        }
        so_far |= status::FEATURES_OK;
        self.bar_write(common::DEVICE_STATUS, &[so_far]);
    }

    /// Sets up and enables queue `index`.
    pub(super) fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
        self.bar_write(common::QUEUE_SELECT, &index.to_le_bytes());
        self.bar_write(common::QUEUE_SIZE, &size.to_le_bytes());
        self.bar_write(common::QUEUE_MSIX_VECTOR, &index.to_le_bytes());
        let [desc, avail, used] = rings;
        self.bar_write(common::QUEUE_DESC, &desc.to_le_bytes());
        self.bar_write(common::QUEUE_DRIVER, &avail.to_le_bytes());
        self.bar_write(common::QUEUE_DEVICE, &used.to_le_bytes());
        self.bar_write(common::QUEUE_ENABLE, &[1, 0]);
    }

    /// Sets up all queues where they are expected, with empty rings.
    pub(super) fn set_queues(&self, size: u16) {
        for queue in 0..QUEUES {
            let rings = rings(queue);
            let [_, avail, used] = rings;
            self.write(avail, &[0; 6 + 2 * QUEUE_SIZE as usize]);
            self.write(used, &[0; 6 + 8 * QUEUE_SIZE as usize]);
            self.set_queue(queue, size, rings);
        }
    }

    /// The driver is ready.
    pub(super) fn ready(&self) {
        let status = self.status() | status::DRIVER_OK;
        self.bar_write(common::DEVICE_STATUS, &[status]);
    }

    /// Writes a descriptor of the table at `table`.
    pub(super) fn describe(&self, table: u64, index: u16, raw: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = raw;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table.saturating_add(16 * u64::from(index)), &bytes);
    }

    /// Makes a chain available in queue `queue`, with descriptors from `first` on.
    pub(super) fn submit(&self, queue: u16, first: u16, chain: &[Buffer]) {
        let [desc, ..] = rings(queue);
        for (index, buffer) in (first..).zip(chain) {
            let is_last = usize::from(index - first) + 1 == chain.len();
            let more = if is_last { 0 } else { DESC_F_NEXT };
            let raw = (buffer.address, buffer.len, buffer.flags | more, index + 1);
            self.describe(desc, index, raw);
        }
        self.offer(queue, first);
    }

    /// Puts `head` into the next entry of queue `queue`.
    pub(super) fn offer(&self, queue: u16, head: u16) {
        let [_, avail, _] = rings(queue);
        let index = u16::from_le_bytes(self.read(avail + 2));
        let slot = avail + 4 + 2 * u64::from(index % QUEUE_SIZE);
        self.write(slot, &head.to_le_bytes());
        self.write(avail + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Notifies queue `queue`, and has the device's workers have their turn.
    pub(super) fn notify(&self, queue: u16) {
        self.bar_write(NOTIFY + 4 * u64::from(queue), &queue.to_le_bytes());
        self.stage.play();
    }

    /// What the used ring of queue `queue` has: its index and the length of the first entry.
    pub(super) fn used(&self, queue: u16) -> (u16, u32) {
        let [_, _, used] = rings(queue);
        let index = u16::from_le_bytes(self.read(used + 2));
        (index, u32::from_le_bytes(self.read(used + 8)))
    }
}

/// Where the rings of queue `queue` are: descriptors, available and used.
pub(super) fn rings(queue: u16) -> [u64; 3] {
    let start = RINGS * u64::from(queue);
    [start, start + AVAIL, start + USED]
}
