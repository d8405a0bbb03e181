//! What a device is started with: the queues as the driver has set them up, each with the device's
//! position in it, and what the last run left.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use busway_vfio::EventFd;
use virtio_queue::{Queue, QueueState, QueueT};

use super::interrupts::Interrupts;
use super::life::{DeviceState, Progress, QueuePosition, Running};
use super::queue::Virtqueue;
use super::worker::{Worker, Workers};
use crate::memory::{GuestRam, RamMap};
use vm_memory::GuestAddressSpace;

/// Why a device did not start, though its driver is ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// queue {index}: {source}
    #[error("queue {index}: {source}")]
    Queue {
        /// The queue's number.
        index: u16,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// The host refused something that the device needs to run.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// One enabled queue: all that somebody needs to serve it, in this process or in another.
///
/// A device of Busway's own builds a [`Virtqueue`] from it. A back end elsewhere is given the addresses,
/// the position and the two events.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// The queue's number.
    pub index: u16,
    /// Descriptors: a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Where the device is in the rings.
    pub position: QueuePosition,
    /// Signalled by the driver's notifications.
    pub kick: EventFd,
    /// Interrupts the driver.
    pub call: Call,
}

impl QueueSetup {
    /// The ring, where all of it lies in `memory`.
    ///
    /// # Errors
    /// [`StartError::Queue`]: a size or an address that no queue can have, or a ring outside of RAM.
    pub(super) fn ring(&self, memory: &RamMap) -> Result<Queue, StartError> {
        let failed = |source| StartError::Queue {
            index: self.index,
            source,
        };
        let queue = Queue::try_from(QueueState {
            max_size: self.size,
            size: self.size,
            next_avail: self.position.next_avail,
            next_used: self.position.next_used,
            event_idx_enabled: self.event_idx,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        })
        .map_err(failed)?;
        if !queue.is_valid(memory) {
            return Err(failed(virtio_queue::Error::FindMemoryRegion));
        }
        Ok(queue)
    }
}

/// How the driver is told that a queue has used buffers.
#[derive(Clone, Debug)]
pub struct Call {
    interrupts: Arc<Interrupts>,
    queue: u16,
}

impl Call {
    pub(super) fn new(interrupts: Arc<Interrupts>, queue: u16) -> Self {
        Self { interrupts, queue }
    }

    /// Interrupts the driver by the queue's vector. Whether the driver wants that is the caller's to
    /// find out.
    pub fn signal(&self) {
        self.interrupts.queue(self.queue);
    }

    /// The eventfd that does the same without this process, for a back end in another. `None` while
    /// the driver has never unmasked the vector, or has none: then [`signal`](Self::signal) is the only
    /// way, and whoever has an eventfd of a back end's waits for it and calls that.
    #[must_use]
    pub fn event(&self) -> Option<Arc<OwnedFd>> {
        self.interrupts.queue_event(self.queue)
    }
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    features: u64,
    ram: GuestRam,
    queues: Vec<Option<QueueSetup>>,
    progress: Progress,
    interrupts: Arc<Interrupts>,
    stop: Arc<AtomicBool>,
}

impl Activation {
    /// For a device whose driver agreed on `features` and enabled those of `queues` that are there.
    ///
    /// # Errors
    /// [`StartError::Queue`], where a ring does not lie in RAM.
    pub(super) fn new(
        features: u64,
        ram: GuestRam,
        queues: Vec<Option<QueueSetup>>,
        progress: Progress,
        interrupts: Arc<Interrupts>,
    ) -> Result<Self, StartError> {
        let memory = ram.memory();
        for setup in queues.iter().flatten() {
            setup.ring(&memory)?;
        }
        drop(memory);
        Ok(Self {
            features,
            ram,
            queues,
            progress,
            interrupts,
            stop: Arc::default(),
        })
    }

    /// What was negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What the last run left of the device's own state.
    #[must_use]
    pub fn state(&self) -> &DeviceState {
        &self.progress.device
    }

    /// Takes queue `index` for who serves it; `None` where the driver has left it disabled. Its rings
    /// lie in RAM.
    pub fn take_setup(&mut self, index: u16) -> Option<QueueSetup> {
        self.queues.get_mut(usize::from(index))?.take()
    }

    /// Takes queue `index` for a worker in this process, which stops with the device.
    pub(super) fn take_queue(&mut self, index: u16) -> Result<Option<Virtqueue>, StartError> {
        let Some(setup) = self.take_setup(index) else {
            return Ok(None);
        };
        let ring = setup.ring(&self.ram.memory())?;
        Ok(Some(Virtqueue::new(setup, ring, Arc::clone(&self.stop))))
    }

    /// Runs `workers`, each on a thread of its own. What they do not say of their own when they stop
    /// is left as `device` has it, and as it was in the queues that none of them took.
    ///
    /// # Errors
    /// A thread or a descriptor could not be made; none runs then.
    pub(super) fn run(
        self,
        workers: Vec<Box<dyn Worker>>,
        device: DeviceState,
    ) -> Result<Box<dyn Running>, StartError> {
        let progress = Progress {
            device,
            ..self.progress
        };
        let running = Workers::start(workers, self.stop, self.interrupts, progress)?;
        Ok(Box::new(running))
    }
}
