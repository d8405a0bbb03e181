//! What a device and the thread of its link share: what is to be served, and whether that is in the thread's hands.

use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use busway_vfio::EventFd;

use super::Positions;
use crate::virtio::vhost_user::run::Run;

/// How long a stop waits for the back end.
pub(super) const STOP: Duration = Duration::from_secs(1);

/// What the device and the thread share.
#[derive(Debug)]
pub(in crate::virtio::vhost_user) struct Shared {
    pub(super) described: String,
    pub(super) state: Mutex<State>,
    /// The thread has given up what it had.
    pub(super) free: Condvar,
    pub(super) wake: EventFd,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// To be handed over when the thread has nothing and there is a back end.
    pub(super) waiting: Option<Run>,
    /// The thread has a run in hand: it hands it over, serves it or takes it back.
    pub(super) held: bool,
    /// What is in hand is to be taken back.
    pub(super) stop: bool,
    /// And nobody wants its positions: the driver resets the device.
    pub(super) drop: bool,
    /// What was left where nobody waited for it any more.
    pub(super) left: Option<Positions>,
    /// The driver begins anew: the notes on requests are of the past.
    pub(super) fresh: bool,
    /// The socket of the thread's connection, from before anything is said on it: whoever shuts it down ends a call.
    pub(super) stream: Option<UnixStream>,
    pub(super) quit: bool,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `run` served, as soon as there is a back end. Does not wait.
    pub(in crate::virtio::vhost_user) fn serve(&self, run: Run) {
        self.state().waiting = Some(run);
        self.wake.signal();
    }

    /// Takes back what is served, and gives the positions in its queues. Where the back end keeps them for longer than a
    /// second, none are given, and the next run goes on with what comes of it.
    pub(in crate::virtio::vhost_user) fn stop(&self) -> Positions {
        let mut state = self.state();
        if let Some(mut run) = state.waiting.take() {
            if let Some(left) = state.left.take() {
                run.go_on_from(&left);
            }
            return run.positions();
        }
        if !state.held {
            return state.left.take().unwrap_or_default();
        }
        state.stop = true;
        self.wake.signal();
        let waited = self
            .free
            .wait_timeout_while(state, STOP, |state| state.held);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() && state.held {
            log::warn!(
                "{}: its back end does not give the queues back within {} s; it may use guest memory until it does",
                self.described,
                STOP.as_secs()
            );
            return Positions::new();
        }
        state.left.take().unwrap_or_default()
    }

    /// The driver resets the device. Does not wait: [`outstanding`](Self::outstanding) says when that is over.
    pub(in crate::virtio::vhost_user) fn reset(&self) {
        let mut state = self.state();
        state.waiting = None;
        state.left = None;
        state.fresh = true;
        if state.held {
            state.stop = true;
            state.drop = true;
            self.wake.signal();
        }
    }

    /// What is still waited for after a stop, in words.
    pub(in crate::virtio::vhost_user) fn outstanding(&self) -> Option<String> {
        let state = self.state();
        let waits = state.held && state.stop;
        waits.then(|| "its queues, which its back end has not given back".to_owned())
    }
}
