//! A card whose packets pass in the host's kernel: vhost-net between the guest's queues and the tap. This
//! process serves the control queue and looks after the rest. linux/vhost.h; Linux, drivers/vhost/net.c.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use vhost::net::VhostNet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VringConfigData};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::cable::Cable;
use super::control::Control;
use super::tap::Tap;
use crate::memory::GuestRam;
use crate::virtio::activation::Activation;
use crate::virtio::error::{QueueError, StartError};
use crate::virtio::life::Progress;
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::{feature, net};
use crate::virtio::vhost::kernel::{KernelError, NET};
use crate::virtio::vhost::{Addresses, BackEnd, Handed, MemoryTable, Rings, Watch};
use crate::virtio::worker::{Worker, doorbell_events};

/// The features that are the kernel's business; the others are the tap's, or this process's.
const OWN_FEATURES: u64 =
    feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | net::F_MRG_RXBUF;

/// A pair of queues in the kernel: ring 0 receives, ring 1 transmits.
pub(super) struct KernelPair {
    vhost: vhost::vhost_kern::net::Net<GuestRam>,
    tap: Arc<File>,
}

impl std::fmt::Debug for KernelPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelPair")
            .field("vhost", &self.vhost.as_raw_fd())
            .field("tap", &self.tap)
            .finish()
    }
}

impl AsRawFd for KernelPair {
    fn as_raw_fd(&self) -> RawFd {
        self.vhost.as_raw_fd()
    }
}

impl VhostKernBackend for KernelPair {
    type AS = GuestRam;

    fn mem(&self) -> &GuestRam {
        self.vhost.mem()
    }

    /// [`Rings`] has looked: each part of a ring is in one region, which may also be its end.
    fn is_valid(&self, _config_data: &VringConfigData) -> bool {
        true
    }
}

impl BackEnd for KernelPair {
    const ADDRESSES: Addresses = Addresses::Guest;

    fn begin(&self, rings: &[u16]) -> Result<(), vhost::Error> {
        let tap = Some(&*self.tap);
        let mut rings = rings.iter();
        rings.try_for_each(|&ring| self.vhost.set_backend(ring.into(), tap))
    }

    /// Waits for what the kernel does with the ring's buffers at that moment.
    fn end(&self, rings: &[u16]) -> Result<(), vhost::Error> {
        let ended = rings
            .iter()
            .map(|&ring| self.vhost.set_backend(ring.into(), None));
        ended.fold(Ok(()), Result::and)
    }
}

/// The kernel's part of a card.
#[derive(Debug)]
pub(super) struct Kernel {
    pairs: Vec<Arc<KernelPair>>,
    features: u64,
    memory: Arc<MemoryTable>,
}

impl Kernel {
    /// A back end for each of the tap's pairs of queues.
    ///
    /// # Errors
    /// [`KernelError`]
    pub(super) fn open(
        tap: &Tap,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, KernelError> {
        let mut this = Self {
            pairs: Vec::new(),
            features: u64::MAX,
            memory: Arc::clone(memory),
        };
        for queue in (0..).map_while(|pair| tap.queue(pair)) {
            let vhost = vhost::vhost_kern::net::Net::new(ram.clone());
            let pair = KernelPair {
                vhost: vhost.map_err(|error| NET.not_opened(error))?,
                tap: Arc::clone(queue),
            };
            pair.set_owner().map_err(NET.refused("VHOST_SET_OWNER"))?;
            let features = pair.get_features();
            this.features &= features.map_err(NET.refused("VHOST_GET_FEATURES"))?;
            NET.ring_features(this.features)?;
            this.pairs.push(Arc::new(pair));
        }
        Ok(this)
    }

    /// Of `features`, of a card, those that this one has.
    pub(super) fn card_features(&self, features: u64) -> u64 {
        features & (self.features | !OWN_FEATURES)
    }

    /// Of the rings' features, those that the kernel has.
    pub(super) fn ring_features(&self) -> u64 {
        NET.ring_features(self.features).unwrap_or_default()
    }

    /// Hands the first `pairs` pairs of queues over, those of which both are enabled.
    ///
    /// # Errors
    /// [`StartError`]; the kernel has none of them then.
    pub(super) fn start(
        &self,
        name: &str,
        pairs: u16,
        activation: &mut Activation,
    ) -> Result<Vec<Arc<Rings<KernelPair>>>, StartError> {
        let features = activation.features() & self.features & OWN_FEATURES;
        let mut started = Vec::new();
        for (index, pair) in (0..pairs).zip(&self.pairs) {
            let first = 2 * index;
            let queues = [first, first + 1].map(|queue| activation.take_setup(queue));
            let [Some(receive), Some(transmit)] = queues else {
                continue;
            };
            let handed = Handed {
                name: format!("net {name}"),
                first,
                queues: vec![receive, transmit],
                features,
                active: u16::MAX,
            };
            let ram = activation.ram();
            started.push(Rings::start(Arc::clone(pair), handed, ram, &self.memory)?);
        }
        Ok(started)
    }
}

/// Has `rings` lie while `cable` is pulled. What waits in the tap by the time when it is plugged in again is lost.
pub(super) fn follow(cable: &Cable, rings: &[Arc<Rings<KernelPair>>], tap: &Arc<Tap>) {
    let rings: Vec<_> = rings.iter().map(Arc::downgrade).collect();
    let (tap, pulled) = (Arc::clone(tap), AtomicBool::new(false));
    cable.follow(move |plugged| {
        if plugged && pulled.load(Ordering::Relaxed) {
            tap.discard_waiting();
        }
        pulled.store(!plugged, Ordering::Relaxed);
        for rings in rings.iter().filter_map(Weak::upgrade) {
            rings.hold(!plugged);
        }
    });
}

/// What this process does for a card of the kernel's.
#[derive(Debug)]
pub(super) struct KernelWorker {
    pub(super) name: String,
    pub(super) ram: GuestRam,
    pub(super) watch: Watch<KernelPair>,
    pub(super) control: Option<(Virtqueue, Control)>,
}

impl Worker for KernelWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "vhost"
    }

    /// The control queue is the first, where there is one.
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let control = self.control.iter();
        let control = control.map(|(queue, _)| (queue.doorbell(), doorbell_events()));
        control.chain(self.watch.sources()).collect()
    }

    fn wake(&mut self, source: usize) -> Result<(), QueueError> {
        match (source, &mut self.control) {
            (0, Some((queue, control))) => {
                let memory = self.ram.memory();
                queue.drain(&memory, |chain| control.serve(chain))
            }
            _ => self.watch.wake(),
        }
    }

    fn leave(&mut self, progress: &mut Progress) {
        super::leave_control(self.control.as_ref(), progress);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_has_of_what_is_the_kernels_business_what_the_kernel_has() {
        let of = |features| Kernel {
            pairs: Vec::new(),
            features,
            memory: Arc::default(),
        };
        let card = net::F_MAC | net::F_MRG_RXBUF | net::F_GUEST_TSO4;
        let all = of(feature::VERSION_1 | feature::EVENT_IDX | net::F_MRG_RXBUF);
        assert_eq!(all.card_features(card), card);
        assert_eq!(all.ring_features(), feature::EVENT_IDX);
        let few = of(feature::VERSION_1 | feature::INDIRECT_DESC);
        assert_eq!(few.card_features(card), net::F_MAC | net::F_GUEST_TSO4);
        assert_eq!(few.ring_features(), feature::INDIRECT_DESC);
    }
}
