//! Rings in a back end's hands: how they are handed over and taken back.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_vfio::EventFd;
use vhost::VringConfigData;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::memory::{Follower, MemoryTable};
use super::{Addresses, BackEnd, VhostError};
use crate::kvm::lend;
use crate::memory::{GuestRam, Region};
use crate::virtio::life::QueuePosition;
use crate::virtio::queue::QueueSetup;

/// Queues to be handed over.
#[derive(Debug)]
pub(crate) struct Handed {
    /// The device's name.
    pub(crate) name: String,
    /// The number that the back end's ring 0 has among the device's queues.
    pub(crate) first: u16,
    /// The queues, each as [`Activation::take_setup`](crate::virtio::Activation::take_setup) gives it.
    pub(crate) queues: Vec<QueueSetup>,
    /// What to set at the back end: of what was negotiated, and of what it offers, that which is its business.
    pub(crate) features: u64,
    /// Queues from this number on are set up and lie, until [`serve_up_to`](Rings::serve_up_to) has them served.
    pub(crate) active: u16,
}

/// Queues that a back end serves, until it is told to [stop](Self::stop) or this is dropped.
#[derive(Debug)]
pub(crate) struct Rings<B: BackEnd> {
    name: String,
    back_end: Arc<B>,
    first: u16,
    rings: Vec<Vring>,
    ram: GuestRam,
    memory: Arc<MemoryTable>,
    /// Signalled when a queue's vector may have another eventfd.
    vectors_changed: EventFd,
    service: Mutex<Service>,
}

/// Which of the rings the back end serves.
#[derive(Clone, Copy, Debug)]
struct Service {
    life: Life,
    /// The number of the first queue that lies.
    active: u16,
}

/// Whether the back end serves the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// It does.
    Served,
    /// It has them, and lets them lie.
    Held,
    /// It has them no more.
    Stopped,
}

/// A queue that was handed over.
#[derive(Debug)]
struct Vring {
    setup: QueueSetup,
    /// Signalled by the back end that cannot go on with the ring.
    error: EventFd,
    /// Signalled by the back end to interrupt, while the vector has no eventfd.
    call: EventFd,
    /// The vector's eventfd that the back end has; `None`: it has `call`.
    given: Mutex<Option<Arc<OwnedFd>>>,
}

impl Vring {
    fn given(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: BackEnd> Rings<B> {
    /// Hands the queues over: the back end serves them when this returns, and looks at each once.
    ///
    /// # Errors
    /// [`VhostError`]: a ring is not in one piece of RAM, or the back end refused a step; it then serves none.
    pub(crate) fn start(
        back_end: Arc<B>,
        handed: Handed,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Arc<Self>, VhostError> {
        let event = || EventFd::new().map_err(vhost::Error::IOError);
        let vring = |setup: QueueSetup| {
            Ok(Vring {
                setup,
                error: event()?,
                call: event()?,
                given: Mutex::default(),
            })
        };
        let rings: Result<_, vhost::Error> = handed.queues.into_iter().map(vring).collect();
        let this = Arc::new(Self {
            name: handed.name,
            back_end,
            first: handed.first,
            rings: rings.map_err(VhostError::at("eventfd"))?,
            ram: ram.clone(),
            memory: Arc::clone(memory),
            vectors_changed: event().map_err(VhostError::at("eventfd"))?,
            service: Mutex::new(Service {
                life: Life::Served,
                active: handed.active,
            }),
        });
        this.hand_over(handed.features)?;
        Ok(this)
    }

    fn hand_over(self: &Arc<Self>, features: u64) -> Result<(), VhostError> {
        let back_end = &*self.back_end;
        let set_features = back_end.set_features(features);
        set_features.map_err(VhostError::at("SET_FEATURES"))?;
        let follower: Arc<dyn Follower> = Arc::clone(self) as _;
        let followed = self.memory.follow(&follower);
        followed.map_err(VhostError::at("SET_MEM_TABLE"))?;
        for ring in &self.rings {
            self.set_up(ring)?;
        }
        let active = self.service().active;
        self.begin(0..active)
            .map_err(VhostError::at("SET_VRING_ENABLE"))
    }

    /// Has the back end serve the queues of these numbers, and look at each: a notification may have come, and been
    /// lost, while nobody listened.
    fn begin(&self, queues: Range<u16>) -> Result<(), vhost::Error> {
        self.back_end.begin(&self.numbers(&queues))?;
        let begun = self.rings.iter().map(|ring| &ring.setup);
        for setup in begun.filter(|setup| queues.contains(&setup.index)) {
            setup.kick.signal();
        }
        Ok(())
    }

    /// Has the back end serve the queues below number `active` from now on, and let the others lie.
    ///
    /// # Errors
    /// [`VhostError`]: the back end serves any of those that this is about.
    pub(crate) fn serve_up_to(&self, active: u16) -> Result<(), VhostError> {
        let mut service = self.service();
        let before = std::mem::replace(&mut service.active, active);
        if service.life != Life::Served {
            return Ok(());
        }
        let changed = match active < before {
            true => self.back_end.end(&self.numbers(&(active..before))),
            false => self.begin(before..active),
        };
        changed.map_err(VhostError::at("SET_VRING_ENABLE"))
    }

    fn set_up(&self, ring: &Vring) -> Result<(), VhostError> {
        let (back_end, setup) = (&*self.back_end, &ring.setup);
        let number = usize::from(self.number(setup));
        let addresses = self.addresses(setup)?;
        let base = setup.position.next_avail;
        let num = back_end.set_vring_num(number, setup.size);
        num.map_err(VhostError::at("SET_VRING_NUM"))?;
        let base = back_end.set_vring_base(number, base);
        base.map_err(VhostError::at("SET_VRING_BASE"))?;
        let addr = back_end.set_vring_addr(number, &addresses);
        addr.map_err(VhostError::at("SET_VRING_ADDR"))?;
        // From here on a change of the vector is heard of.
        setup.call.watch(&self.vectors_changed);
        self.give_call(ring, setup.call.event())?;
        let error = lend(&ring.error, |event| back_end.set_vring_err(number, event));
        error.map_err(VhostError::at("SET_VRING_ERR"))?;
        let kick = lend(&setup.kick, |event| back_end.set_vring_kick(number, event));
        kick.map_err(VhostError::at("SET_VRING_KICK"))
    }

    /// Where a ring is. A back end reaches each part of it by one address, so that all of the part has to be in
    /// one mapping: what it touched beyond that would be anything.
    fn addresses(&self, setup: &QueueSetup) -> Result<VringConfigData, VhostError> {
        let memory = self.ram.memory();
        let size = usize::from(setup.size);
        // Virtio 1.3 §2.7; the last two bytes of both rings are those of VIRTIO_F_EVENT_IDX.
        let place = |guest: u64, bytes: usize| {
            // Refuses what is not in one region.
            let slice = memory.get_slice(GuestAddress(guest), bytes);
            let slice = slice.map_err(|_| VhostError {
                what: "SET_VRING_ADDR",
                source: vhost::Error::InvalidQueue,
            })?;
            Ok(match B::ADDRESSES {
                Addresses::Guest => guest,
                Addresses::Process => slice.ptr_guard().as_ptr() as u64,
            })
        };
        Ok(VringConfigData {
            queue_max_size: setup.size,
            queue_size: setup.size,
            flags: 0,
            desc_table_addr: place(setup.desc, 16 * size)?,
            avail_ring_addr: place(setup.avail, 6 + 2 * size)?,
            used_ring_addr: place(setup.used, 6 + 8 * size)?,
            log_addr: None,
        })
    }

    fn give_call(&self, ring: &Vring, event: Option<Arc<OwnedFd>>) -> Result<(), VhostError> {
        let number = usize::from(self.number(&ring.setup));
        let mut given = ring.given();
        let set = match &event {
            Some(event) => lend(event, |event| self.back_end.set_vring_call(number, event)),
            None => lend(&ring.call, |event| {
                self.back_end.set_vring_call(number, event)
            }),
        };
        set.map_err(VhostError::at("SET_VRING_CALL"))?;
        *given = event;
        Ok(())
    }

    /// The back end's number of a queue.
    fn number(&self, setup: &QueueSetup) -> u16 {
        setup.index.saturating_sub(self.first)
    }

    /// The back end's numbers of those of `queues` that it has.
    fn numbers(&self, queues: &Range<u16>) -> Vec<u16> {
        let rings = self.rings.iter().map(|ring| &ring.setup);
        let of_these = rings.filter(|setup| queues.contains(&setup.index));
        of_these.map(|setup| self.number(setup)).collect()
    }

    /// Stops the back end's service and gives the positions in the queues, each with the queue's number. Nothing
    /// of what it has in its hands is touched afterwards. A second call gives none.
    pub(crate) fn stop(&self) -> Vec<(u16, QueuePosition)> {
        let mut service = self.service();
        if std::mem::replace(&mut service.life, Life::Stopped) == Life::Stopped {
            return Vec::new();
        }
        self.end();
        let rings = self.rings.iter();
        let positions = rings.map(|ring| (ring.setup.index, self.take_back(ring)));
        let positions = positions.collect();
        self.memory.forget(self);
        // Interrupts of the last moment, for vectors without an eventfd.
        self.pass_on_calls();
        positions
    }

    /// The back end is gone: nothing is asked of it any more. In the place of [`stop`](Self::stop).
    pub(crate) fn abandon(&self) {
        if std::mem::replace(&mut self.service().life, Life::Stopped) != Life::Stopped {
            self.memory.forget(self);
            self.pass_on_calls();
        }
    }

    /// Has the back end let the rings lie, or go on with them, until they are stopped.
    pub(crate) fn hold(&self, hold: bool) {
        let mut service = self.service();
        match (service.life, hold) {
            (Life::Served, true) => {
                self.end();
                service.life = Life::Held;
            }
            (Life::Held, false) => {
                if let Err(error) = self.begin(0..service.active) {
                    log::warn!("{}: its back end does not go on: {error}", self.name);
                }
                service.life = Life::Served;
            }
            _ => {}
        }
    }

    fn end(&self) {
        if let Err(error) = self.back_end.end(&self.numbers(&(0..u16::MAX))) {
            log::warn!("{}: its back end did not stop in order: {error}", self.name);
        }
    }

    fn service(&self) -> MutexGuard<'_, Service> {
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_back(&self, ring: &Vring) -> QueuePosition {
        let used = GuestAddress(ring.setup.used.saturating_add(2));
        let used = self.ram.memory().load(used, Ordering::Acquire);
        let used = used.ok().map(u16::from_le);
        let number = usize::from(self.number(&ring.setup));
        let next_avail = match self.back_end.get_vring_base(number) {
            // A packed ring's state has the used ring's in its upper half.
            Ok(base) => base as u16,
            // What it had taken and not completed by then is taken again.
            Err(error) => {
                log::warn!(
                    "{}: queue {} goes on after what its back end completed: GET_VRING_BASE: {error}",
                    self.name,
                    ring.setup.index
                );
                used.unwrap_or(ring.setup.position.next_avail)
            }
        };
        QueuePosition {
            next_avail,
            next_used: used.unwrap_or(next_avail),
        }
    }

    /// What [`update_calls`](Self::update_calls) is called for.
    pub(super) fn vectors_changed(&self) -> &EventFd {
        &self.vectors_changed
    }

    /// For each ring, what the back end signals where it cannot go on, and where it interrupts by way of
    /// [`pass_on_calls`](Self::pass_on_calls).
    pub(super) fn events(&self) -> impl Iterator<Item = (&EventFd, &EventFd)> {
        self.rings.iter().map(|ring| (&ring.error, &ring.call))
    }

    /// The first queue whose back end has said that it cannot go on with it.
    pub(super) fn broken(&self) -> Option<u16> {
        let mut rings = self.rings.iter();
        let broken = rings.find(|ring| ring.error.take() > 0);
        broken.map(|ring| ring.setup.index)
    }

    /// Interrupts for what was signalled to this process.
    pub(super) fn pass_on_calls(&self) {
        for ring in self.rings.iter().filter(|ring| ring.call.take() > 0) {
            ring.setup.call.signal();
        }
    }

    /// Gives the back end the eventfds that the vectors have now.
    ///
    /// # Errors
    /// [`VhostError`]
    pub(super) fn update_calls(&self) -> Result<(), VhostError> {
        let _signals = self.vectors_changed.take();
        for ring in &self.rings {
            let now = ring.setup.call.event();
            let same = match (&*ring.given(), &now) {
                (Some(given), Some(now)) => Arc::ptr_eq(given, now),
                (None, None) => true,
                _ => false,
            };
            if !same {
                self.give_call(ring, now)?;
                // The back end may have signalled the one before when nobody heard it any more.
                ring.setup.call.signal();
            }
        }
        Ok(())
    }
}

impl<B: BackEnd> Follower for Rings<B> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory_is(&self, regions: &[Arc<Region>]) -> Result<(), vhost::Error> {
        self.back_end.set_memory(regions)
    }
}

impl<B: BackEnd> Drop for Rings<B> {
    fn drop(&mut self) {
        self.stop();
    }
}
