//! What a device and the thread of its link share: what is to be served, and whether that is in the thread's hands.

use std::io;
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
    pub(in crate::virtio::vhost_user) described: String,
    pub(super) state: Mutex<State>,
    /// The thread has given up what it had, or has told the back end of what is active, or is to take it back.
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
    /// The queues below this number are to be served; the others lie.
    pub(super) active: u16,
    /// As the thread has told the back end last.
    pub(super) told_active: u16,
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

    /// Has `run` served, as soon as there is a back end, but for its queues from number `active` on. Does not wait.
    pub(in crate::virtio::vhost_user) fn serve(&self, run: Run, active: u16) {
        let mut state = self.state();
        (state.waiting, state.active) = (Some(run), active);
        drop(state);
        self.wake.signal();
    }

    /// Has the queues below number `active` served from now on, and the others lie. Waits a second for the back end, and
    /// then leaves it as it was.
    ///
    /// # Errors
    /// `TimedOut`
    pub(in crate::virtio::vhost_user) fn serve_up_to(&self, active: u16) -> io::Result<()> {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.active, active);
        self.wake.signal();
        // What is taken back, or has no back end, is not served at all.
        let waits = |state: &mut State| state.held && !state.stop && state.told_active != active;
        let waited = self.free.wait_timeout_while(state, STOP, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if waits(&mut state) {
            state.active = before;
            drop(state);
            self.wake.signal();
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
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
        self.free.notify_all();
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
            self.free.notify_all();
        }
    }

    /// What is still waited for after a stop, in words.
    pub(in crate::virtio::vhost_user) fn outstanding(&self) -> Option<String> {
        let state = self.state();
        let waits = state.held && state.stop;
        waits.then(|| "its queues, which its back end has not given back".to_owned())
    }
}
