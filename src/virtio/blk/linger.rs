//! Requests that the host has had for longer than a stop waits. A run ends without them; the thread that
//! sent them waits for them, and what they are for stays mapped and open. The next start of the same
//! queue takes them over; after a reset nobody does.

use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_vfio::EventFd;

use super::engine::{Engine, Returned};
use crate::memory::RamMap;
use crate::virtio::worker::Rest;

/// How many requests are named where some are told of.
const NAMED: usize = 3;

/// All requests of a disk's earlier runs that were not back when those ended.
#[derive(Debug, Default)]
pub(super) struct Lingerers(Mutex<Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    queue: u16,
    /// The driver has reset the device: nobody asks for them any more.
    forgotten: bool,
    requests: Arc<Lingering>,
}

/// One queue's requests that a run has left with the host.
#[derive(Debug)]
pub(super) struct Lingering {
    state: Mutex<State>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    /// What the host has: the first descriptor of each, and what it is, in words.
    open: Vec<(u16, String)>,
    /// What it has given back, and nobody has taken.
    back: Vec<Returned>,
}

impl Lingering {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is signalled when something has come back.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }

    /// Requests that nobody has taken.
    pub(super) fn count(&self) -> usize {
        let state = self.state();
        state.open.len() + state.back.len()
    }

    /// Those requests, by their first descriptors.
    pub(super) fn heads(&self) -> Vec<u16> {
        let state = self.state();
        let open = state.open.iter().map(|(head, _)| *head);
        let back = state.back.iter().map(|(flight, _)| flight.head());
        open.chain(back).collect()
    }

    /// Takes what has come back.
    pub(super) fn collect(&self, done: &mut Vec<Returned>) {
        done.append(&mut self.state().back);
    }

    /// Waits for all that `engine` has out.
    /// `memory` is what they are for.
    fn wait(&self, mut engine: Engine, memory: Arc<RamMap>) {
        let mut done = Vec::new();
        while engine.in_flight() > 0 {
            engine.wait(None);
            if let Err(error) = engine.enter(None) {
                log::error!("a disk's requests cannot be waited for: io_uring_enter: {error}");
                // The host has it for good.
                std::mem::forget(memory);
                return;
            }
            engine.reap(&mut done);
            let mut state = self.state();
            for (flight, result) in done.drain(..) {
                let head = flight.head();
                if let Some(at) = state.open.iter().position(|(open, _)| *open == head) {
                    state.open.swap_remove(at);
                }
                state.back.push((flight, result));
            }
            drop(state);
            self.event.signal();
        }
    }
}

impl Lingerers {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|entry| {
            let state = entry.requests.state();
            !state.open.is_empty() || (!entry.forgotten && !state.back.is_empty())
        });
        entries
    }

    /// Keeps what `engine` has out, and `memory`, which it is for; and gives what its thread has to do from now on.
    pub(super) fn keep(
        &self,
        queue: u16,
        engine: Engine,
        memory: Arc<RamMap>,
    ) -> std::io::Result<Rest> {
        let requests = Arc::new(Lingering {
            state: Mutex::new(State {
                open: engine.outstanding(),
                back: Vec::new(),
            }),
            event: EventFd::new()?,
        });
        self.entries().push(Entry {
            queue,
            forgotten: false,
            requests: Arc::clone(&requests),
        });
        Ok(Box::new(move || requests.wait(engine, memory)))
    }

    /// What a start of `queue` carries on with.
    pub(super) fn of_queue(&self, queue: u16) -> Vec<Arc<Lingering>> {
        let entries = self.entries();
        let of_queue = entries
            .iter()
            .filter(|entry| entry.queue == queue && !entry.forgotten);
        of_queue.map(|entry| Arc::clone(&entry.requests)).collect()
    }

    /// The driver has reset the device, and asks for none of them any more.
    pub(super) fn forget(&self) {
        for entry in self.entries().iter_mut() {
            entry.forgotten = true;
        }
    }

    /// What the host has, in words; `None` where it has nothing.
    pub(super) fn describe(&self) -> Option<String> {
        let entries = self.entries();
        let open: Vec<String> = entries
            .iter()
            .flat_map(|entry| entry.requests.state().open.clone())
            .map(|(_, what)| what)
            .collect();
        drop(entries);
        (!open.is_empty()).then(|| describe(&open))
    }
}

/// Requests in words, the first few by name.
pub(super) fn describe(requests: &[String]) -> String {
    let mut text = match requests {
        [_] => "1 request: ".to_owned(),
        _ => format!("{} requests: ", requests.len()),
    };
    text.push_str(&requests.get(..NAMED).unwrap_or(requests).join(", "));
    if let Some(more) = requests.len().checked_sub(NAMED).filter(|more| *more > 0) {
        // Writing to a String does not fail.
        let _written = write!(text, " and {more} more");
    }
    text
}
