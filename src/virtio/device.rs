//! What a kind of virtio device is to the transport: what it offers, and the workers that serve its
//! queues.

use std::fmt::Debug;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::queue::{QueueError, Virtqueue};
use crate::memory::GuestRam;

/// A kind of virtio device, apart from the transport that carries it.
///
/// The transport negotiates, validates the queues and runs the workers; the device knows what a
/// request means. Between [`activate`](Self::activate) and the workers' end only the workers touch
/// guest memory; what has to outlive them the device keeps a share of.
pub trait VirtioDevice: Send + Debug {
    /// The device's name in this VM: in messages and as its threads' name.
    fn name(&self) -> &str;

    /// Its type. Virtio 1.3 §5.
    fn device_type(&self) -> u16;

    /// Its PCI class code: base class, sub-class and programming interface, as Linux writes them.
    fn class(&self) -> u32;

    /// The features it offers, without those that the transport and the rings add.
    fn features(&self) -> u64;

    /// The most descriptors of each of its queues; powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Its configuration, as the guest reads it.
    fn config(&self) -> Arc<DeviceConfig>;

    /// Whether the driver's choice among the features can be served.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// The driver is ready. Makes the workers, which the transport then runs each on a thread.
    ///
    /// # Errors
    /// The host refused something; the guest is told that the device needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<Vec<Box<dyn Worker>>>;
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// What was negotiated.
    pub(crate) features: u64,
    /// Guest RAM.
    pub(crate) ram: GuestRam,
    /// The queues, by their number; `None` where the driver has left one disabled.
    pub(crate) queues: Vec<Option<Virtqueue>>,
}

impl Activation {
    /// Takes queue `index`, where the driver has enabled it.
    pub(crate) fn take_queue(&mut self, index: usize) -> Option<Virtqueue> {
        self.queues.get_mut(index)?.take()
    }
}

/// What one thread of a device does: it waits for its sources and is woken with their number.
pub trait Worker: Send + Debug {
    /// Its thread's name, of which Linux keeps 15 bytes.
    fn name(&self) -> String;

    /// What wakes it: descriptors that it keeps open, level- or edge-triggered as the event set says.
    /// Asked at the start.
    fn sources(&self) -> Vec<(RawFd, EventSet)>;

    /// Source number `source` is ready. Each is also woken once at the start, for what came before.
    ///
    /// # Errors
    /// The driver broke a queue's rules. The worker ends, and the device needs a reset.
    fn wake(&mut self, source: usize) -> Result<(), QueueError>;
}

/// The events of a doorbell: each notification wakes once.
pub(crate) fn doorbell_events() -> EventSet {
    EventSet::IN | EventSet::EDGE_TRIGGERED
}

/// A device's configuration structure: bytes that the guest reads. None changes while it runs.
///
/// Virtio 1.3 §2.5.
#[derive(Debug)]
pub struct DeviceConfig(Vec<u8>);

impl DeviceConfig {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(bytes))
    }

    /// Bytes.
    pub(crate) fn size(&self) -> usize {
        self.0.len()
    }

    /// Reads at `offset`; all ones beyond the end.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.0.get(start..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(i).copied().unwrap_or(0xff);
        }
    }
}
