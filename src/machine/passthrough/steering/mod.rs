//! Where the host takes a device's interrupts, for a VM whose vCPUs have processors of their own (`--cpus dedicated=on`):
//! on the processors of the vCPU that is to hear of them.
//!
//! A message's route says which vCPU that is, and says so anew when the guest moves the interrupt. The vCPU's thread
//! only notes it; a thread of the VM's own then finds the host's interrupt and moves that. A host whose IOMMU posts
//! interrupts to processors does without, and it does no harm there.

mod host;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use busway_pci::{InterruptLines, InterruptRoute, InterruptRoutes, MsiMessage, RouteError};

use self::host::HostInterrupts;
use super::attach::Wires;
use crate::arch::msi::Target;
use crate::config::CpusConfig;
use crate::kvm::{IrqRouter, VectorCount};
use crate::sandbox::{self, Kind};

/// How long after a vector was routed its host interrupt is looked for: VFIO makes it after that. Each wait is twice the
/// one before it.
const FIRST_WAIT: Duration = Duration::from_millis(2);

/// How often it is looked for: for two seconds in all.
const TRIES: u32 = 10;

/// How long the thread rests after each try: a guest that moves its interrupts without end has the host move a thousand a
/// second at most.
const PACE: Duration = Duration::from_millis(1);

/// What steers the interrupts of a VM's devices. Dropping it ends its thread.
#[derive(Debug)]
pub(super) struct Steering {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    places: Places,
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

/// The host's processors that vCPUs run on.
#[derive(Debug, Default)]
struct Places {
    by_number: BTreeMap<u16, Vec<usize>>,
    by_apic_id: BTreeMap<u32, Vec<usize>>,
}

impl Places {
    fn of(cpus: &CpusConfig) -> Self {
        let topology = cpus.grouped();
        let mut places = Self::default();
        for place in &cpus.affinity {
            let Ok(number) = u8::try_from(place.vcpu) else {
                continue;
            };
            let host = place.host_cpus.clone();
            places.by_number.insert(place.vcpu, host.clone());
            places.by_apic_id.insert(topology.apic_id(number), host);
        }
        places
    }

    /// Those on which a message's interrupt is to be taken; none where it is for nobody in particular.
    fn of_message(&self, message: MsiMessage) -> Vec<usize> {
        match Target::of(message) {
            Target::Apic(id) => self.by_apic_id.get(&id).cloned().unwrap_or_default(),
            Target::Logical(bits) => {
                let named = (0..8).filter(|number| bits & 1 << number != 0);
                let places = named.filter_map(|number| self.by_number.get(&number));
                let all: BTreeSet<_> = places.flatten().copied().collect();
                all.into_iter().collect()
            }
            Target::Nobody => Vec::new(),
        }
    }
}

/// A message-signalled vector of a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Vector {
    /// The device's PCI address on the host.
    device: Arc<str>,
    number: u16,
}

/// Where a vector's interrupt is to be taken.
#[derive(Debug)]
struct Wish {
    cpus: Vec<usize>,
    tried: u32,
    due: Instant,
}

/// One for each vector at most, the newest.
#[derive(Debug, Default)]
struct Wishes {
    ended: bool,
    by_vector: BTreeMap<Vector, Wish>,
}

impl Steering {
    /// Nothing where the vCPUs have no processors of their own, and where there is no thread to be had, which is said.
    pub(super) fn begin(cpus: &CpusConfig) -> Option<Self> {
        if !cpus.dedicated {
            return None;
        }
        Self::with(Places::of(cpus), HostInterrupts::default())
            .inspect_err(|error| {
                log::warn!(
                    "--cpus dedicated=on: no thread that has the host take devices' interrupts on the vCPUs' \
                     processors: {error}"
                );
            })
            .ok()
    }

    fn with(places: Places, host: HostInterrupts) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            places,
            wishes: Mutex::default(),
            changed: Condvar::new(),
        });
        let thread = {
            let shared = shared.clone();
            thread::Builder::new()
                .name("steer".to_owned())
                .spawn(move || {
                    sandbox::enter(Kind::Steer);
                    shared.work(&host);
                })?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The ways of a device's messages to the guest: those of `inner`, steered.
    fn routes(&self, device: &str, inner: Arc<dyn InterruptRoutes>) -> Arc<dyn InterruptRoutes> {
        Arc::new(SteeredRoutes {
            shared: self.shared.clone(),
            device: device.into(),
            inner,
        })
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        self.shared.wishes().ended = true;
        self.shared.changed.notify_all();
        // Its panic has been told of.
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    /// Has the host take a vector's interrupt where its message goes.
    fn steer(&self, vector: Vector, message: MsiMessage) {
        let cpus = self.places.of_message(message);
        if cpus.is_empty() {
            return;
        }
        let wish = Wish {
            cpus,
            tried: 0,
            due: Instant::now(),
        };
        self.wishes().by_vector.insert(vector, wish);
        self.changed.notify_all();
    }

    fn forget(&self, vector: &Vector) {
        self.wishes().by_vector.remove(vector);
    }

    /// Carries wishes out until all is over.
    fn work(&self, host: &HostInterrupts) {
        let mut refused = false;
        while let Some((vector, wish)) = self.next() {
            match host.steer(&vector.device, vector.number, &wish.cpus) {
                Ok(true) => log::debug!(
                    "{}: vector {} is taken on the host's processors {:?}",
                    vector.device,
                    vector.number,
                    wish.cpus
                ),
                Ok(false) => self.later(vector, wish),
                Err(error) if !std::mem::replace(&mut refused, true) => log::warn!(
                    "--cpus dedicated=on: {}: its interrupts stay where the host takes them: {error}; root may move them",
                    vector.device
                ),
                Err(error) => log::debug!("{}: vector {}: {error}", vector.device, vector.number),
            }
            thread::sleep(PACE);
        }
    }

    /// The next wish that is due; nothing at the end.
    fn next(&self) -> Option<(Vector, Wish)> {
        let mut wishes = self.wishes();
        loop {
            if wishes.ended {
                return None;
            }
            let first = wishes.by_vector.iter().min_by_key(|(_, wish)| wish.due);
            let first = first.map(|(vector, wish)| (vector.clone(), wish.due));
            let Some((vector, due)) = first else {
                let waited = self.changed.wait(wishes);
                wishes = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            match due.checked_duration_since(Instant::now()) {
                Some(time) if !time.is_zero() => {
                    let waited = self.changed.wait_timeout(wishes, time);
                    wishes = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                _ => return wishes.by_vector.remove_entry(&vector),
            }
        }
    }

    /// The host has no such interrupt yet, or cannot move it now.
    fn later(&self, vector: Vector, wish: Wish) {
        let tried = wish.tried + 1;
        if tried >= TRIES {
            log::debug!(
                "{}: the host has no interrupt for vector {}",
                vector.device,
                vector.number
            );
            return;
        }
        let due = Instant::now() + FIRST_WAIT * (1 << tried);
        // What was wished meanwhile is newer.
        let wishes = &mut self.wishes().by_vector;
        wishes.entry(vector).or_insert(Wish { tried, due, ..wish });
    }

    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// KVM's ways to the guest, the messages' steered.
#[derive(Debug)]
pub(super) struct Steered {
    pub(super) router: IrqRouter,
    pub(super) steering: Steering,
}

impl Wires for Steered {
    fn routes(&self, device: &str) -> Arc<dyn InterruptRoutes> {
        self.steering.routes(device, self.router.routes(device))
    }

    fn lines(&self, gsis: [u32; 4]) -> Arc<dyn InterruptLines> {
        Wires::lines(&self.router, gsis)
    }

    fn vectors(&self) -> VectorCount {
        self.router.vectors()
    }
}

#[derive(Debug)]
struct SteeredRoutes {
    shared: Arc<Shared>,
    device: Arc<str>,
    inner: Arc<dyn InterruptRoutes>,
}

impl InterruptRoutes for SteeredRoutes {
    fn connect(
        &self,
        vector: u16,
        message: MsiMessage,
    ) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        let inner = self.inner.connect(vector, message)?;
        let vector = Vector {
            device: self.device.clone(),
            number: vector,
        };
        self.shared.steer(vector.clone(), message);
        Ok(Arc::new(SteeredRoute {
            shared: self.shared.clone(),
            vector,
            inner,
        }))
    }
}

/// One vector's way.
#[derive(Debug)]
struct SteeredRoute {
    shared: Arc<Shared>,
    vector: Vector,
    inner: Arc<dyn InterruptRoute>,
}

impl InterruptRoute for SteeredRoute {
    fn update(&self, message: MsiMessage) -> Result<(), RouteError> {
        self.inner.update(message)?;
        self.shared.steer(self.vector.clone(), message);
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), RouteError> {
        self.inner.set_masked(masked)
    }

    fn pending(&self) -> bool {
        self.inner.pending()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn trigger(&self) {
        self.inner.trigger();
    }
}

impl Drop for SteeredRoute {
    fn drop(&mut self) {
        self.shared.forget(&self.vector);
    }
}
