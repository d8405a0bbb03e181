//! The devices that a machine has open, for who wants to name them on any thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_vfio::{Claimed, Opener};

/// The devices that a machine has opened, opens or closes now, for who wants to name them on any thread.
#[derive(Clone, Debug, Default)]
pub(in crate::machine) struct OpenDevices(Arc<Mutex<Vec<Claimed>>>);

impl OpenDevices {
    /// Their names on the host.
    pub(in crate::machine) fn names(&self) -> Vec<String> {
        let openers = self.openers();
        let names = openers.iter().flat_map(Claimed::names);
        names.map(|name| name.to_string()).collect()
    }

    pub(super) fn watch(&self, opener: &Opener) {
        let mut openers = self.openers();
        openers.retain(|one| !one.is_over());
        openers.push(opener.claimed());
    }

    fn openers(&self) -> MutexGuard<'_, Vec<Claimed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
