//! Which function is in which slot of bus 0, for the vCPU whose guest releases one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{FunctionId, PciFunction, Topology};

use crate::devices::pci_hotplug::SlotKeeper;
use crate::machine::events::Events;

/// The functions that can leave, and those that have left.
#[derive(Debug)]
pub(super) struct Seats {
    topology: Arc<Topology>,
    events: Arc<Events>,
    taken: Mutex<BTreeMap<u8, FunctionId>>,
    /// Until the event loop takes them.
    left: Mutex<Vec<Left>>,
}

/// What was taken out of a slot.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) slot: u8,
    /// Nobody else has them, but for an access that a vCPU began before.
    pub(super) functions: Vec<Arc<dyn PciFunction>>,
}

impl Seats {
    pub(super) fn new(topology: Arc<Topology>, events: Arc<Events>) -> Self {
        Self {
            topology,
            events,
            taken: Mutex::default(),
            left: Mutex::default(),
        }
    }

    /// The function is in `slot` from now on.
    pub(super) fn take(&self, slot: u8, function: FunctionId) {
        lock(&self.taken).insert(slot, function);
    }

    /// Takes out what is in `slot`: when this returns, nothing answers there.
    pub(super) fn empty(&self, slot: u8) {
        let Some(function) = lock(&self.taken).remove(&slot) else {
            return;
        };
        let functions = self.topology.remove(function);
        lock(&self.left).push(Left { slot, functions });
    }

    /// What was taken out since the last time.
    pub(super) fn left(&self) -> Vec<Left> {
        std::mem::take(&mut *lock(&self.left))
    }
}

impl SlotKeeper for Seats {
    fn eject(&self, slot: u8) {
        self.empty(slot);
        self.events.ejected();
    }

    fn refused(&self, slot: u8, status: u8) {
        self.events.refused(slot, status);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
