//! What a driver has set up and a back end is to serve: queues, and where it is in each.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::link::Positions;
use crate::memory::GuestRam;
use crate::virtio::activation::Activation;
use crate::virtio::interrupts::Interrupts;
use crate::virtio::life::QueuePosition;
use crate::virtio::queue::QueueSetup;

/// Queues to be served.
#[derive(Clone, Debug)]
pub(super) struct Run {
    features: u64,
    queues: Vec<QueueSetup>,
    ram: GuestRam,
    interrupts: Arc<Interrupts>,
}

impl Run {
    /// All enabled queues of the first `count`, and of what was negotiated all but `own`, which is the device's.
    pub(super) fn of(activation: &mut Activation, count: u16, own: u64) -> Self {
        let queues = (0..count).filter_map(|index| activation.take_setup(index));
        Self {
            queues: queues.collect(),
            features: activation.features() & !own,
            ram: activation.ram().clone(),
            interrupts: Arc::clone(activation.interrupts()),
        }
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    pub(super) fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where each queue is served from.
    pub(super) fn positions(&self) -> Positions {
        let queues = self.queues.iter();
        queues.map(|queue| (queue.index, queue.position)).collect()
    }

    /// Whether anything was served of it by an earlier run.
    pub(super) fn has_begun(&self) -> bool {
        let mut queues = self.queues.iter();
        queues.any(|queue| queue.position != QueuePosition::default())
    }

    /// The queues are where an earlier run has left them.
    pub(super) fn go_on_from(&mut self, left: &Positions) {
        for queue in &mut self.queues {
            let of_queue = left.iter().find(|(index, _)| *index == queue.index);
            if let Some((_, position)) = of_queue {
                queue.position = *position;
            }
        }
    }

    /// What was not completed is served again: the notes on requests that the next back end gets say what of that is
    /// in the ring's middle.
    pub(super) fn go_on_from_used(&mut self) {
        for at in 0..self.queues.len() {
            let used = self.used(at);
            if let (Some(queue), Some(used)) = (self.queues.get_mut(at), used) {
                queue.position = QueuePosition {
                    next_avail: used,
                    next_used: used,
                };
            }
        }
    }

    /// Whether all that was made available is completed.
    pub(super) fn is_idle(&self) -> bool {
        let at_rest = |at| match (self.available(at), self.used(at)) {
            (Some(available), Some(used)) => available == used,
            _ => false,
        };
        (0..self.queues.len()).all(at_rest)
    }

    /// Whether the driver has not used any of the queues yet. (One that has used each of them a multiple of 65536 times
    /// looks the same.)
    pub(super) fn is_untouched(&self) -> bool {
        let untouched = |at| (self.available(at), self.used(at)) == (Some(0), Some(0));
        !self.has_begun() && (0..self.queues.len()).all(untouched)
    }

    /// Whether all that was taken from the queues up to `positions` is completed; says so in them.
    pub(super) fn is_done(&self, positions: &mut Positions) -> bool {
        let mut done = true;
        for (index, position) in positions {
            let at = self.queues.iter().position(|queue| queue.index == *index);
            if let Some(used) = at.and_then(|at| self.used(at)) {
                position.next_used = used;
                done &= used == position.next_avail;
            }
        }
        done
    }

    /// The driver has to reset the device, for `reason`.
    pub(super) fn needs_reset(&self, described: &str, reason: &dyn Display) {
        self.interrupts.needs_reset(described, reason);
    }

    /// The index in the available ring's head. Virtio 1.3 §2.7.6.
    fn available(&self, at: usize) -> Option<u16> {
        self.index(self.queues.get(at)?.avail)
    }

    /// The index in the used ring's head. Virtio 1.3 §2.7.8.
    fn used(&self, at: usize) -> Option<u16> {
        self.index(self.queues.get(at)?.used)
    }

    fn index(&self, ring: u64) -> Option<u16> {
        let at = GuestAddress(ring.checked_add(2)?);
        let index = self.ram.memory().load(at, Ordering::Acquire);
        index.ok().map(u16::from_le)
    }
}
