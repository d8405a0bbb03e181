//! Who has a file's changes written to the host's storage, on a thread of its own: nobody waits in a call that a file
//! system can keep for ever.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use busway_vfio::EventFd;

use crate::sandbox::{self, Kind};
use crate::virtio::worker::thread_name;

/// It calls nothing deep.
const STACK_SIZE: usize = 128 << 10;
/// How long the end waits for a call that goes on.
const PATIENCE: Duration = Duration::from_secs(1);

/// The thread, for the device whose file it is. Dropping it ends the thread, when the call returns that it is in.
#[derive(Debug)]
pub(super) struct Flusher {
    name: String,
    shared: Arc<Shared>,
}

/// Which flush: they are numbered from 1 on.
pub(super) type Ticket = u64;

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Signalled when a flush is over.
    done: EventFd,
}

#[derive(Debug, Default)]
struct State {
    asked: Ticket,
    done: Ticket,
    failed: bool,
    quit: bool,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flusher {
    /// Starts the thread, which calls `flush`, and signals `done` each time that it has.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn start(
        name: &str,
        done: EventFd,
        flush: impl Fn() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            done,
        });
        let (its, named) = (Arc::clone(&shared), name.to_owned());
        let body = move || {
            sandbox::enter(Kind::Disk);
            run(&its, &named, &flush);
            // The file, and its lock, go before anybody hears of the end.
            drop(flush);
            its.state().ended = true;
            its.changed.notify_all();
        };
        // It is not joined, for the kernel may keep it.
        let _detached = Builder::new()
            .name(format!("{}-io", thread_name("pmem", name)))
            .stack_size(STACK_SIZE)
            .spawn(body)?;
        let name = name.to_owned();
        Ok(Arc::new(Self { name, shared }))
    }

    /// Asks that what has been written by now be on the host's storage. Does not wait.
    pub(super) fn ask(&self) -> Ticket {
        let mut state = self.shared.state();
        state.asked += 1;
        self.shared.changed.notify_all();
        state.asked
    }

    /// What came of it: `None` where it goes on, else whether it is there.
    ///
    /// What could not be written once may be lost, and a later call of the kernel's does not say so (fsync(2)): once
    /// one has failed, all do.
    pub(super) fn outcome(&self, ticket: Ticket) -> Option<bool> {
        let state = self.shared.state();
        (state.done >= ticket).then_some(!state.failed)
    }

    /// Is signalled when something has come of it.
    pub(super) fn done(&self) -> &EventFd {
        &self.shared.done
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.quit = true;
        self.shared.changed.notify_all();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !state.ended);
        let (state, _timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            log::warn!(
                "pmem {}: the host still writes its file, which stays locked until that is done",
                self.name
            );
        }
    }
}

fn run(shared: &Shared, name: &str, flush: &dyn Fn() -> io::Result<()>) {
    loop {
        let state = shared.state();
        let idle = |state: &mut State| state.asked == state.done && !state.quit;
        let state = shared.changed.wait_while(state, idle);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        if state.quit {
            return;
        }
        let asked = state.asked;
        drop(state);
        let result = flush();
        let mut state = shared.state();
        if let Err(error) = result
            && !std::mem::replace(&mut state.failed, true)
        {
            log::error!(
                "pmem {name}: fdatasync: {error}; what the guest has written may be lost, and it is told so from now on"
            );
        }
        state.done = asked;
        drop(state);
        shared.done.signal();
    }
}
