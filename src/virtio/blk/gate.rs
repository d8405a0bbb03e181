//! A host whose calls take as long as a test wants them to.

use std::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
pub(in crate::virtio::blk) struct Gate {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// Calls that wait.
    waiting: usize,
}

impl Gate {
    /// Waits while it is closed.
    pub(super) fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        let mut state = self.news.wait_while(state, |state| state.closed).unwrap();
        state.waiting -= 1;
    }

    pub(super) fn set_closed(&self, closed: bool) {
        self.state.lock().unwrap().closed = closed;
        self.news.notify_all();
    }

    pub(super) fn waiting(&self) -> usize {
        self.state.lock().unwrap().waiting
    }
}
