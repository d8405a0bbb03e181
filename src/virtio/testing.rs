//! What the tests drive devices with: a guest's memory, a driver in a few lines that reaches the
//! function only as a guest does, and interrupt routes that count.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use busway_pci::{
    BarIndex, ConfigRead, InterruptRoute, InterruptRoutes, MsiMessage, PciFunction, RouteError,
    capabilities,
};
use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::spec::{self, pci::common, status};
use super::{VirtioDevice, VirtioPci};
use crate::memory::{GuestRam, RamMap};

/// How long a test waits for what should happen at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits to see that nothing happens.
const SILENCE: Duration = Duration::from_millis(50);

/// Bytes of the test guest's RAM, from address 0.
pub(crate) const RAM_SIZE: u64 = 4 << 20;

pub(crate) fn ram() -> GuestRam {
    GuestRam::new(RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).unwrap())
}

/// Routes that end in the test.
#[derive(Debug, Default)]
pub(crate) struct CountingRoutes {
    routes: Mutex<Vec<Arc<CountingRoute>>>,
}

impl CountingRoutes {
    /// The route that was connected last with this message data.
    pub(crate) fn route(&self, data: u32) -> Option<Arc<CountingRoute>> {
        let routes = self.routes.lock().unwrap();
        routes
            .iter()
            .rev()
            .find(|route| route.message.lock().unwrap().data == data)
            .cloned()
    }
}

impl CountingRoutes {
    /// All signals that a vector has had by its present route and that a test has taken or sees now.
    pub(crate) fn signals(&self, vector: u16) -> u64 {
        let route = self.route(message_data(vector)).expect("connected");
        route.take();
        route.taken.load(Ordering::SeqCst)
    }
}

impl InterruptRoutes for CountingRoutes {
    fn connect(&self, _: u16, message: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        let route = Arc::new(CountingRoute {
            message: Mutex::new(message),
            masked: AtomicBool::new(false),
            event: EventFd::new().unwrap(),
            taken: AtomicU64::new(0),
        });
        self.routes.lock().unwrap().push(Arc::clone(&route));
        Ok(route)
    }
}

#[derive(Debug)]
pub(crate) struct CountingRoute {
    message: Mutex<MsiMessage>,
    masked: AtomicBool,
    event: EventFd,
    /// Signals that have been taken.
    taken: AtomicU64,
}

impl CountingRoute {
    /// How many signals have come since the last call.
    pub(crate) fn take(&self) -> u64 {
        let count = self.event.take();
        self.taken.fetch_add(count, Ordering::SeqCst);
        count
    }

    /// Waits for a signal and takes all there are.
    pub(crate) fn wait(&self) -> u64 {
        assert!(readable(self.event.as_fd(), PATIENCE), "no interrupt");
        self.take()
    }

    /// Waits a while and says whether nothing came.
    pub(crate) fn silent(&self) -> bool {
        !readable(self.event.as_fd(), SILENCE)
    }
}

impl InterruptRoute for CountingRoute {
    fn update(&self, message: MsiMessage) -> Result<(), RouteError> {
        *self.message.lock().unwrap() = message;
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), RouteError> {
        self.masked.store(masked, Ordering::SeqCst);
        Ok(())
    }

    fn pending(&self) -> bool {
        self.masked.load(Ordering::SeqCst) && readable(self.event.as_fd(), Duration::ZERO)
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn trigger(&self) {
        self.event.signal();
    }
}

/// Whether `fd` can be read within `patience`.
pub(crate) fn readable(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)) == Ok(1)
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The message data of a vector, as the test driver programs it.
pub(crate) fn message_data(vector: u16) -> u32 {
    0x4000 + u32::from(vector)
}

/// A buffer of a chain: address, length, and whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

/// A driver.
pub(crate) struct Driver {
    pub(crate) function: Arc<VirtioPci>,
    pub(crate) ram: GuestRam,
    pub(crate) routes: Arc<CountingRoutes>,
    pub(crate) common: u64,
    pub(crate) notify: u64,
    pub(crate) isr: u64,
    pub(crate) device: u64,
    pub(crate) msix_table: u64,
    pub(crate) msix_capability: u16,
    pub(crate) access_capability: u16,
    notify_multiplier: u64,
    next_page: u64,
}

impl ConfigRead for Driver {
    fn read_dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

pub(crate) fn function(
    device: impl VirtioDevice + 'static,
    ram: &GuestRam,
    routes: &Arc<CountingRoutes>,
) -> Arc<VirtioPci> {
    VirtioPci::new(Box::new(device), ram.clone(), Arc::clone(routes) as _).unwrap()
}

impl Driver {
    /// Has the driver find itself on another function, which has the state that the one before had when
    /// it was saved to a file. It is paused.
    pub(crate) fn move_to(&mut self, device: impl VirtioDevice + 'static) {
        self.function.pause();
        let saved = serde_json::to_string(&self.function.state().unwrap()).unwrap();
        self.function = function(device, &self.ram, &self.routes);
        let state = serde_json::from_str(&saved).unwrap();
        self.function.restore(&state).unwrap();
        assert_eq!(self.function.state(), Some(state));
    }

    /// Finds the device's registers by its capabilities and turns memory decoding on.
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_ram(device, ram())
    }

    /// The same of a guest with this RAM.
    pub(crate) fn with_ram(device: impl VirtioDevice + 'static, ram: GuestRam) -> Self {
        let routes = Arc::new(CountingRoutes::default());
        let function = function(device, &ram, &routes);
        let mut driver = Self {
            function,
            ram,
            routes,
            common: u64::MAX,
            notify: u64::MAX,
            isr: u64::MAX,
            device: u64::MAX,
            msix_table: u64::MAX,
            msix_capability: 0,
            access_capability: 0,
            notify_multiplier: 0,
            next_page: 0x10_000,
        };
        for capability in capabilities(&driver) {
            let at = capability.offset;
            match capability.id {
                busway_pci::spec::CAP_MSIX => {
                    driver.msix_capability = at;
                    driver.msix_table = u64::from(driver.read_dword(at + 4) & !7);
                }
                busway_pci::spec::CAP_VENDOR => {
                    let [_, _, _, kind] = driver.read_dword(at).to_le_bytes();
                    let offset = u64::from(driver.read_dword(at + 8));
                    match kind {
                        spec::pci::CAP_COMMON_CFG => driver.common = offset,
                        spec::pci::CAP_ISR_CFG => driver.isr = offset,
                        spec::pci::CAP_DEVICE_CFG => driver.device = offset,
                        spec::pci::CAP_PCI_CFG => driver.access_capability = at,
                        spec::pci::CAP_NOTIFY_CFG => {
                            driver.notify = offset;
                            driver.notify_multiplier = driver.read_dword(at + 16).into();
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        driver.function.config_write(4, &[6, 0]);
        driver
    }

    pub(crate) fn bar_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.bar_read(BarIndex::Bar(0), offset, &mut data);
        data
    }

    pub(crate) fn bar_write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(BarIndex::Bar(0), offset, data);
    }

    pub(crate) fn set_common(&self, offset: u64, data: &[u8]) {
        self.bar_write(self.common + offset, data);
    }

    pub(crate) fn common<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.bar_read(self.common + offset)
    }

    pub(crate) fn status(&self) -> u8 {
        let [status] = self.common(common::DEVICE_STATUS);
        status
    }

    pub(crate) fn offered(&self) -> u64 {
        [0_u32, 1].into_iter().fold(0, |features, half| {
            self.set_common(common::DEVICE_FEATURE_SELECT, &half.to_le_bytes());
            let bits = u32::from_le_bytes(self.common(common::DEVICE_FEATURE));
            features | u64::from(bits) << (32 * half)
        })
    }

    /// Resets the device and agrees on those of `wanted` that it offers, and on VERSION_1.
    pub(crate) fn negotiate(&self, wanted: u64) -> u64 {
        self.set_common(common::DEVICE_STATUS, &[0]);
        assert_eq!(self.status(), 0);
        let status = status::ACKNOWLEDGE | status::DRIVER;
        self.set_common(common::DEVICE_STATUS, &[status]);
        let features = self.offered() & (wanted | spec::feature::VERSION_1);
        for half in [0_u32, 1] {
            self.set_common(common::DRIVER_FEATURE_SELECT, &half.to_le_bytes());
            let bits = (features >> (32 * half)) as u32;
            self.set_common(common::DRIVER_FEATURE, &bits.to_le_bytes());
        }
        self.set_common(common::DEVICE_STATUS, &[status | status::FEATURES_OK]);
        assert!(self.status() & status::FEATURES_OK != 0);
        features
    }

    /// Enables MSI-X with the first `vectors` vectors unmasked.
    pub(crate) fn enable_msix(&self, vectors: u16) {
        let control = self.msix_capability + 2;
        self.function.config_write(control, &[0x00, 0x80]);
        for vector in 0..vectors {
            self.set_vector(vector, false);
        }
    }

    /// Writes a vector's entry.
    pub(crate) fn set_vector(&self, vector: u16, masked: bool) {
        let entry = self.msix_table + u64::from(vector) * 16;
        self.bar_write(entry, &0xfee0_0000_u64.to_le_bytes());
        self.bar_write(entry + 8, &message_data(vector).to_le_bytes());
        self.bar_write(entry + 12, &u32::from(masked).to_le_bytes());
    }

    pub(crate) fn route(&self, vector: u16) -> Arc<CountingRoute> {
        self.routes.route(message_data(vector)).expect("connected")
    }

    /// Sets up and enables a queue, with the vector that has its number.
    pub(crate) fn queue(&mut self, index: u16, size: u16) -> Ring {
        let ring = Ring {
            index,
            size,
            desc: self.alloc(u64::from(size) * 16),
            avail: self.alloc(u64::from(size) * 2 + 6),
            used: self.alloc(u64::from(size) * 8 + 6),
            ram: self.ram.clone(),
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
            doorbell: 0,
        };
        self.set_common(common::QUEUE_SELECT, &index.to_le_bytes());
        self.set_common(common::QUEUE_SIZE, &size.to_le_bytes());
        self.set_common(common::QUEUE_MSIX_VECTOR, &index.to_le_bytes());
        self.set_common(common::QUEUE_DESC, &ring.desc.to_le_bytes());
        self.set_common(common::QUEUE_DRIVER, &ring.avail.to_le_bytes());
        self.set_common(common::QUEUE_DEVICE, &ring.used.to_le_bytes());
        self.set_common(common::QUEUE_ENABLE, &[1, 0]);
        let notify_off = u16::from_le_bytes(self.common(common::QUEUE_NOTIFY_OFF));
        Ring {
            doorbell: self.notify + u64::from(notify_off) * self.notify_multiplier,
            ..ring
        }
    }

    pub(crate) fn ready(&self) {
        let status = self.status() | status::DRIVER_OK;
        self.set_common(common::DEVICE_STATUS, &[status]);
    }

    pub(crate) fn notify(&self, ring: &Ring) {
        self.bar_write(ring.doorbell, &ring.index.to_le_bytes());
    }

    /// Zeroed guest memory of its own pages.
    pub(crate) fn alloc(&mut self, size: u64) -> u64 {
        let address = self.next_page;
        self.next_page += size.next_multiple_of(4096);
        assert!(self.next_page <= RAM_SIZE);
        address
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let memory = self.ram.memory();
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let memory = self.ram.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Submits a chain, notifies, and waits for its completion; gives the length in the used ring.
    pub(crate) fn run(&self, ring: &mut Ring, chain: &[Buffer]) -> u32 {
        let head = ring.submit(chain);
        self.notify(ring);
        let (used, len) = ring.wait_used();
        assert_eq!(used, u32::from(head));
        len
    }
}

/// The driver's side of a split virtqueue.
pub(crate) struct Ring {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    ram: GuestRam,
    next_desc: u16,
    avail_idx: u16,
    used_idx: u16,
    doorbell: u64,
}

impl Ring {
    fn put(&self, address: u64, bytes: &[u8]) {
        let memory = self.ram.memory();
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.put(self.desc + u64::from(index % self.size) * 16, &raw);
    }

    /// Makes a chain available and gives its head. Does not notify.
    pub(crate) fn submit(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.enter(chain);
        self.publish();
        head
    }

    /// Submits chains so that the device sees all of them or none, whenever it looks.
    pub(crate) fn submit_together(&mut self, chains: &[Vec<Buffer>]) {
        for chain in chains {
            self.enter(chain);
        }
        self.publish();
    }

    /// Writes a chain and its place among those that are available, which the device is not told of.
    fn enter(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.next_desc;
        for (i, &(address, len, write)) in chain.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (self.next_desc + 1) % self.size;
            let last = i + 1 == chain.len();
            let flags = u16::from(!last) | u16::from(write) << 1;
            self.describe(index, address, len, flags, self.next_desc);
        }
        self.offer(head);
        head
    }

    pub(crate) fn make_available(&mut self, head: u16) {
        self.offer(head);
        self.publish();
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.put(self.avail + 4 + slot * 2, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    fn publish(&mut self) {
        let memory = self.ram.memory();
        memory
            .store(
                self.avail_idx,
                GuestAddress(self.avail + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    /// Asks for no interrupts, or for them again.
    pub(crate) fn set_no_interrupt(&self, no: bool) {
        self.put(self.avail, &u16::from(no).to_le_bytes());
    }

    /// Writes `used_event`: the completion after which to interrupt.
    pub(crate) fn set_used_event(&self, event: u16) {
        let at = self.avail + 4 + u64::from(self.size) * 2;
        self.put(at, &event.to_le_bytes());
    }

    /// The next completion, where there is one: its head and length.
    pub(crate) fn poll_used(&mut self) -> Option<(u32, u32)> {
        let memory = self.ram.memory();
        let index: u16 = memory
            .load(GuestAddress(self.used + 2), Ordering::SeqCst)
            .unwrap();
        if index == self.used_idx {
            return None;
        }
        let slot = u64::from(self.used_idx % self.size);
        let entry = GuestAddress(self.used + 4 + slot * 8);
        self.used_idx = self.used_idx.wrapping_add(1);
        let [head, len]: [u32; 2] = memory.read_obj(entry).unwrap();
        Some((head, len))
    }

    pub(crate) fn wait_used(&mut self) -> (u32, u32) {
        let mut found = None;
        eventually("no completion", || {
            found = self.poll_used();
            found.is_some()
        });
        found.unwrap()
    }
}
