//! That somebody wants a device removed, other than the host, and what they are told of it.
//!
//! There are two ways to ask. Who waits is answered when it is known what became of the device: the host has it back, or
//! the guest keeps it, and why. Who does not is answered as soon as the guest has been asked, as clients of Cloud
//! Hypervisor's API expect, and takes the device for gone from then on: it is not shown among the VM's any more, unless
//! the guest turns out to keep it. Either way whoever reads events is told when the host has it back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::requests::{Answer, Asker, RequestError};
use crate::monitor::{self, Source};

/// A request to remove a device.
#[derive(Debug)]
pub(super) struct Removal {
    /// Nobody, once they have been answered.
    asker: Option<Asker>,
    wait: bool,
    /// Whoever does not wait has been answered.
    told: bool,
    /// Where the guest does not release it, it loses the device.
    force: bool,
    /// How long the guest has for it.
    limit: Duration,
}

impl Removal {
    pub(super) fn new(asker: Asker, wait: bool, force: bool, limit: Duration) -> Self {
        Self {
            asker: Some(asker),
            wait,
            told: false,
            force,
            limit,
        }
    }

    /// Whether the guest loses the device where it does not release it.
    pub(super) const fn force(&self) -> bool {
        self.force
    }

    /// How long the guest has to release it.
    pub(super) const fn limit(&self) -> Duration {
        self.limit
    }

    /// The guest is asked: who does not wait for what comes of it is answered.
    pub(super) fn asked(&mut self) {
        if !self.wait
            && let Some(asker) = self.asker.take()
        {
            asker.answer(Ok(Answer::Done));
            self.told = true;
        }
    }

    /// Whether who asked waits for what comes of it.
    pub(super) const fn waits(&self) -> bool {
        self.wait
    }

    /// Whether somebody has been told that the device goes, and takes it for gone.
    pub(super) const fn is_told(&self) -> bool {
        self.told
    }

    /// Somebody else wants the same device removed, about which the guest has been asked.
    pub(super) fn join(&mut self, mut other: Self) {
        if other.wait && self.asker.is_some() {
            let already = RequestError::State("about to release it already");
            return other.end("", Err(already));
        }
        other.asked();
        self.force |= other.force;
        if let Some(asker) = other.asker {
            self.asker = Some(asker);
        }
    }

    /// It is known what became of the device, which is called `name`.
    pub(super) fn end(self, name: &str, answer: Result<Answer, RequestError>) {
        match (self.asker, answer) {
            (Some(asker), answer) => asker.answer(answer),
            (None, Err(error)) => log::warn!("{name}: {error}"),
            (None, Ok(_)) => {}
        }
    }
}

/// Devices that the guest has released, and that are still being closed beside the event loop: what comes in the place of
/// one that somebody takes for gone waits until that is done.
#[derive(Clone, Debug)]
pub(super) struct Closing<T>(Arc<Mutex<Vec<T>>>);

impl<T> Default for Closing<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: PartialEq> Closing<T> {
    pub(super) fn begin(&self, one: T) {
        self.lock().push(one);
    }

    pub(super) fn end(&self, one: &T) {
        self.lock().retain(|other| other != one);
    }

    pub(super) fn any(&self, is: impl Fn(&T) -> bool) -> bool {
        self.lock().iter().any(is)
    }

    pub(super) fn each<R>(&self, what: impl Fn(&T) -> R) -> Vec<R> {
        self.lock().iter().map(what).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells whoever reads events that the host has a device back, which was at `address` in the guest.
pub(super) fn tell_of(id: &str, address: Option<&str>) {
    let properties = [Some(("id", id)), address.map(|address| ("bdf", address))];
    let properties: Vec<_> = properties.into_iter().flatten().collect();
    monitor::tell(Source::Vm, "device-removed", &properties);
}
