//! Who sees to it that no call to a back end lasts for ever, and hears what a back end says meanwhile.
//!
//! The calls of the `vhost` crate wait for an answer without end, and take a time-out of the socket's for a reason to
//! try again. So a thread of the connection's own shuts the socket down when an answer is late: the call fails then,
//! as it does where the back end has died.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::Channel;
use crate::sandbox::{self, Kind};

/// It reads a few bytes and calls nothing deep.
const STACK_SIZE: usize = 128 << 10;

/// The guard of a connection. Dropping it ends the connection.
#[derive(Debug)]
pub(super) struct Guard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    state: Mutex<State>,
    /// Wakes the thread.
    wake: EventFd,
    late: AtomicBool,
    cut: AtomicBool,
    config_changed: AtomicBool,
    /// Signalled when the back end has said something.
    heard: EventFd,
}

#[derive(Debug, Default)]
struct State {
    /// By when the present call has to be answered.
    deadline: Option<Instant>,
    /// When the thread looks at that again by itself.
    next_look: Option<Instant>,
    /// What the back end asks on, from when it has it.
    channel: Option<Channel>,
    quit: bool,
}

impl Guard {
    /// Guards `stream`, which somebody else reads and writes. `heard` is signalled when the back end has said
    /// something by itself.
    ///
    /// # Errors
    /// There is no descriptor or no thread to be had.
    pub(super) fn new(stream: &UnixStream, heard: &EventFd) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            stream: stream.try_clone()?,
            state: Mutex::default(),
            wake: EventFd::new()?,
            late: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            config_changed: AtomicBool::new(false),
            heard: heard.clone(),
        });
        let body = {
            let shared = Arc::clone(&shared);
            move || {
                sandbox::enter(Kind::VhostUser);
                shared.run();
            }
        };
        let thread = Builder::new()
            .name("vhost-user".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(body)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Does `call`, and ends the connection where it is not answered by `deadline`.
    pub(super) fn within<T>(&self, deadline: Instant, call: impl FnOnce() -> T) -> T {
        let early = {
            let mut state = self.shared.state();
            state.deadline = Some(deadline);
            state.next_look.is_none_or(|look| deadline < look)
        };
        if early {
            self.shared.wake.signal();
        }
        let result = call();
        self.shared.state().deadline = None;
        result
    }

    /// Listens on `channel` as well.
    pub(super) fn listen(&self, channel: Channel) {
        self.shared.state().channel = Some(channel);
        self.shared.wake.signal();
    }

    /// Whether the back end has said, since the last time of asking, that its configuration is another.
    pub(super) fn take_config_change(&self) -> bool {
        self.shared.config_changed.swap(false, Ordering::AcqRel)
    }

    /// Whether a call was not answered in time.
    pub(super) fn was_late(&self) -> bool {
        self.shared.late.load(Ordering::Acquire)
    }

    /// Whether the connection has ended.
    pub(super) fn is_cut(&self) -> bool {
        self.shared.cut.load(Ordering::Acquire)
    }

    /// Ends the connection: each call fails from now on.
    pub(super) fn cut(&self) {
        self.shared.cut();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.cut();
        self.shared.state().quit = true;
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // Its panic was reported when it happened.
            let _panicked = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        // It may have ended by itself.
        let _over = self.stream.shutdown(Shutdown::Both);
    }

    fn run(&self) {
        let mut channel = None;
        loop {
            let now = Instant::now();
            let timeout = {
                let mut state = self.state();
                if state.quit {
                    return;
                }
                if state.deadline.is_some_and(|deadline| deadline <= now) {
                    state.deadline = None;
                    self.late.store(true, Ordering::Release);
                    self.cut();
                }
                state.next_look = state.deadline;
                channel = state.channel.take().or(channel);
                let left = state.deadline.map(|deadline| deadline - now);
                left.and_then(|left| Timespec::try_from(left).ok())
            };
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            fds.extend(channel.as_ref().map(|one| PollFd::new(one, PollFlags::IN)));
            if let Err(error) = poll(&mut fds, timeout.as_ref())
                && error != rustix::io::Errno::INTR
            {
                log::error!("a vhost-user back end is not listened to any more: poll: {error}");
                self.cut();
                return;
            }
            let spoke = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            let _signals = self.wake.take();
            if spoke {
                channel = self.hear(channel);
            }
        }
    }

    /// What the back end says; gives back the channel while it is one.
    fn hear(&self, channel: Option<Channel>) -> Option<Channel> {
        let mut channel = channel?;
        let said = channel.serve();
        if said.config_changed {
            self.config_changed.store(true, Ordering::Release);
            self.heard.signal();
        }
        (!said.over).then_some(channel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::Duration;

    #[test]
    fn a_call_that_is_not_answered_in_time_ends_the_connection_and_others_do_not() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let heard = EventFd::new().unwrap();
        let guard = Guard::new(&ours, &heard).unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        let far = Instant::now() + Duration::from_secs(3600);
        assert_eq!(guard.within(far, || 7), 7);
        assert_eq!(guard.within(soon(), || 7), 7);
        std::thread::sleep(Duration::from_millis(40));
        assert!(!guard.is_cut() && !guard.was_late());
        let read = guard.within(soon(), || ours.read(&mut [0; 4]));
        assert_eq!(read.unwrap(), 0, "the socket was shut down");
        assert!(guard.is_cut() && guard.was_late());
        drop(theirs);
    }
}
