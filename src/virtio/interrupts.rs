//! How a virtio device interrupts its guest: which vector means what, the ISR register, and the way
//! from a worker to the vector's eventfd that takes no lock.

use std::fmt::Display;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use busway_pci::{InterruptMode, InterruptRoutes, Msix, VectorOwner};

use super::counts::Shown;
use super::spec::{NO_VECTOR, isr};
use busway_pci::Complaints;
use busway_vfio::EventFd;

/// The interrupts of one device, shared by its transport and its workers.
///
/// A vector that is connected is signalled by its eventfd alone; masking is the route's. Only a
/// vector that the guest has never unmasked goes through the MSI-X state's lock, which is the
/// device's own.
#[derive(Debug)]
pub(crate) struct Interrupts {
    msix: Mutex<Msix>,
    events: VectorEvents,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    isr: AtomicU8,
    shown: Arc<Shown>,
    complaints: Complaints,
}

/// Complaints about one device's driver that are warnings; a hostile one could fill the log.
const LOUD_COMPLAINTS: u32 = 8;

impl Interrupts {
    /// For a device with `queues` queues: a vector for each, and one for the configuration.
    pub(crate) fn new(name: &str, queues: u16, routes: Arc<dyn InterruptRoutes>) -> Self {
        let msix = Msix::new(queues.saturating_add(1), routes).named(name);
        Self {
            events: VectorEvents::new(msix.vectors()),
            shown: Arc::new(Shown::new(queues, msix.vectors())),
            msix: Mutex::new(msix),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            complaints: Complaints::first(LOUD_COMPLAINTS),
        }
    }

    /// The MSI-X state, for reading.
    pub(crate) fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the MSI-X state, with what hears of vectors being connected.
    pub(crate) fn with_msix(&self, change: impl FnOnce(&mut Msix, &mut dyn VectorOwner)) {
        let mut msix = self.msix();
        change(&mut msix, &mut &self.events);
        let mode = match msix.enabled() {
            true => InterruptMode::Msix,
            false => InterruptMode::None,
        };
        self.shown.activity.interrupts_by(mode, msix.connected());
    }

    /// What is seen of the device from outside.
    pub(super) fn shown(&self) -> &Arc<Shown> {
        &self.shown
    }

    /// The driver chose the vector for changes of the configuration.
    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::Relaxed);
    }

    /// The driver chose a queue's vector.
    pub(crate) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue))
            && slot.swap(vector, Ordering::AcqRel) != vector
        {
            self.events.changed();
        }
    }

    /// A queue has used buffers.
    pub(crate) fn queue(&self, queue: u16) {
        let slot = self.queue_vectors.get(usize::from(queue));
        let vector = slot.map_or(NO_VECTOR, |slot| slot.load(Ordering::Relaxed));
        self.shown.interrupted(queue);
        self.deliver(vector, isr::QUEUE);
    }

    /// The eventfd of a queue's vector, where it is connected.
    pub(crate) fn queue_event(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        let vector = self.queue_vectors.get(usize::from(queue))?;
        self.events.shared(vector.load(Ordering::Relaxed))
    }

    /// Has `changed` signalled when a queue's vector may have another eventfd, until its last owner drops it.
    pub(crate) fn watch(&self, changed: &EventFd) {
        self.events.watch(changed);
    }

    /// The configuration has changed.
    pub(crate) fn config_changed(&self) {
        self.shown.interrupted(u16::MAX);
        self.isr.fetch_or(isr::CONFIG, Ordering::AcqRel);
        self.deliver(self.config_vector.load(Ordering::Relaxed), 0);
    }

    /// The device cannot go on, for `reason`: its status says so, and the driver is told.
    /// Virtio 1.3 §2.1.2.
    pub(crate) fn needs_reset(&self, name: &str, reason: &dyn Display) {
        log::log!(
            self.complaints.next(log::Level::Warn),
            "virtio device {name} stops until its driver resets it: {reason}"
        );
        self.shown.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }

    /// Whether the device waits for a reset.
    pub(crate) fn is_broken(&self) -> bool {
        self.shown.needs_reset.load(Ordering::Acquire)
    }

    /// Reads the ISR register, which clears it. Virtio 1.3 §4.1.4.5.
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The device was reset, no worker runs: what is virtio's goes back to its start. MSI-X is PCI's
    /// and stays.
    pub(crate) fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        for slot in &self.queue_vectors {
            slot.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.isr.store(0, Ordering::Release);
        self.shown.needs_reset.store(false, Ordering::Release);
    }

    /// Puts it into a state that was saved, of virtio's; MSI-X has its own.
    pub(crate) fn restore(
        &self,
        config_vector: u16,
        queue_vectors: impl Iterator<Item = u16>,
        isr: u8,
        needs_reset: bool,
    ) {
        self.set_config_vector(config_vector);
        for (slot, vector) in self.queue_vectors.iter().zip(queue_vectors) {
            slot.store(vector, Ordering::Relaxed);
        }
        self.isr.store(isr, Ordering::Release);
        self.shown.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// The ISR register, without clearing it.
    pub(crate) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    fn deliver(&self, vector: u16, isr: u8) {
        if self.events.signal(vector) {
            return;
        }
        let mut msix = self.msix();
        if msix.control() & busway_pci::spec::MSIX_CONTROL_ENABLE != 0 {
            msix.trigger(vector);
        } else {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }
}

/// The eventfds of the connected vectors.
#[derive(Debug)]
struct VectorEvents {
    events: Box<[ArcSwapOption<EventFd>]>,
    /// Who wants to know of changes.
    watchers: Mutex<Vec<Weak<OwnedFd>>>,
}

impl VectorEvents {
    fn new(vectors: u16) -> Self {
        Self {
            events: (0..vectors).map(|_| ArcSwapOption::empty()).collect(),
            watchers: Mutex::default(),
        }
    }

    fn shared(&self, vector: u16) -> Option<Arc<OwnedFd>> {
        let event = self.events.get(usize::from(vector))?.load_full()?;
        Some(event.shared())
    }

    fn signal(&self, vector: u16) -> bool {
        let event = self
            .events
            .get(usize::from(vector))
            .map(ArcSwapOption::load);
        match event.as_deref() {
            Some(Some(event)) => {
                event.signal();
                true
            }
            _ => false,
        }
    }

    fn watchers(&self) -> MutexGuard<'_, Vec<Weak<OwnedFd>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, changed: &EventFd) {
        let changed = Arc::downgrade(&changed.shared());
        let mut watchers = self.watchers();
        watchers.retain(|one| one.strong_count() > 0 && !one.ptr_eq(&changed));
        watchers.push(changed);
    }

    fn changed(&self) {
        for watcher in self.watchers().iter().filter_map(Weak::upgrade) {
            EventFd::from(watcher).signal();
        }
    }
}

impl VectorOwner for &VectorEvents {
    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        for (slot, event) in self.events.iter().skip(first.into()).zip(events) {
            slot.store(Some(Arc::new(event.try_clone_to_owned()?.into())));
        }
        self.changed();
        Ok(())
    }

    fn disconnect_all(&mut self) {
        for slot in &self.events {
            slot.store(None);
        }
        self.changed();
    }
}
