//! What the kernel can take long for, done on a thread of its own, with an ear for who wants the VM to end.
//!
//! The kernel waits up to a minute for a device that does not come back from its reset, and is not to be
//! interrupted in that (Linux, drivers/pci/pci.c, `pci_dev_wait`). A machine is put together, restarted and
//! taken apart with such resets in it. Who is heard meanwhile decides whether they are waited for: where they
//! are not, the thread is left to itself, and the process ends without it.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::RunError;
use super::requests::Requests;
use super::signals::Signals;
use crate::provoked;

/// Who is listened to.
pub(super) struct Ears<'a> {
    pub(super) signals: &'a Signals,
    /// A person at the console, where there is one already, or still.
    pub(super) quit: Option<&'a EventFd>,
    /// Who asks, where anybody is answered.
    pub(super) requests: Option<&'a Requests>,
    /// How long the work may take.
    pub(super) limit: Option<Duration>,
}

/// Who wants something while work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// A signal that ends a VM, by its number.
    Signal(i32),
    /// The console was left.
    Quit,
    /// Requests wait.
    Request,
    /// The time is up.
    Late,
}

// What is waited for.
const SIGNAL: u64 = 0;
const QUIT: u64 = 1;
const REQUEST: u64 = 2;
const DONE: u64 = 3;

/// Signals when it is dropped, in a panic too.
struct Done(EventFd);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.signal();
    }
}

impl Ears<'_> {
    /// Has `work` done on a thread called `name`, and gives what came of it. Each time that somebody is heard
    /// meanwhile, `on_heard` is called; where it breaks, the work is left to itself.
    ///
    /// # Errors
    /// What `on_heard` breaks with, or [`RunError::System`] where there is no thread to be had: `work` is
    /// dropped then.
    pub(super) fn during<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        mut on_heard: impl FnMut(Heard) -> ControlFlow<RunError>,
    ) -> Result<T, RunError> {
        let done = EventFd::new().map_err(RunError::system("eventfd"))?;
        let epoll = self.epoll(&done)?;
        let last = Done(done.clone());
        let working = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _last = last;
                provoked::here();
                work()
            })
            .map_err(RunError::system(
                "a thread for what the kernel may take long for",
            ))?;
        let mut deadline = self
            .limit
            .and_then(|limit| Instant::now().checked_add(limit));
        let mut ready = [EpollEvent::default()];
        loop {
            let count = match epoll.wait(timeout(deadline), &mut ready) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(RunError::system("epoll_wait"))?,
            };
            let [event] = ready;
            let heard = match event.data() {
                _ if count == 0 => {
                    deadline = None;
                    Some(Heard::Late)
                }
                SIGNAL => self.signals.take().map(Heard::Signal),
                QUIT => self
                    .quit
                    .filter(|quit| quit.take() > 0)
                    .map(|_| Heard::Quit),
                REQUEST => Some(Heard::Request),
                _ => return Ok(working.join().unwrap_or_else(|panic| resume_unwind(panic))),
            };
            if let Some(ControlFlow::Break(error)) = heard.map(&mut on_heard) {
                return Err(error);
            }
        }
    }

    fn epoll(&self, done: &EventFd) -> Result<Epoll, RunError> {
        let epoll = Epoll::new().map_err(RunError::system("epoll_create"))?;
        let sources = [
            (Some(self.signals.as_raw_fd()), SIGNAL),
            (self.quit.map(AsRawFd::as_raw_fd), QUIT),
            (self.requests.map(AsRawFd::as_raw_fd), REQUEST),
            (Some(done.as_raw_fd()), DONE),
        ];
        for (fd, source) in sources {
            let Some(fd) = fd else { continue };
            let event = EpollEvent::new(EventSet::IN, source);
            epoll
                .ctl(ControlOperation::Add, fd, event)
                .map_err(RunError::system("epoll_ctl"))?;
        }
        Ok(epoll)
    }
}

/// Milliseconds until `deadline`, rounded up; -1 where there is none. epoll_wait(2)
pub(super) fn timeout(deadline: Option<Instant>) -> i32 {
    let Some(deadline) = deadline else {
        return -1;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn signal(number: libc::c_int) {
        // SAFETY: the signal is blocked in this thread, which is the one it goes to.
        unsafe { libc::pthread_kill(libc::pthread_self(), number) };
    }

    #[test]
    fn who_is_heard_decides_whether_the_work_is_waited_for() {
        let (signals, quit) = (Signals::new().unwrap(), EventFd::new().unwrap());
        let ears = Ears {
            signals: &signals,
            quit: Some(&quit),
            requests: None,
            limit: None,
        };
        let nobody = |_| panic!("nobody is there");
        assert_eq!(ears.during("test", || 7, nobody).unwrap(), 7);
        // Each is heard once, and the work is waited for.
        let (go_on, waits) = mpsc::channel::<()>();
        signal(libc::SIGHUP);
        quit.signal();
        let mut heard = Vec::new();
        let mut go_on = Some(go_on);
        let result = ears.during(
            "test",
            move || waits.recv().is_err(),
            |one| {
                heard.push(one);
                if heard.len() == 2 {
                    go_on = None;
                }
                ControlFlow::Continue(())
            },
        );
        assert!(result.unwrap());
        heard.sort_by_key(|one| *one == Heard::Quit);
        assert_eq!(heard, [Heard::Signal(libc::SIGHUP), Heard::Quit]);
        // Work that never ends keeps nobody who does not want to wait.
        let (_never, waits) = mpsc::channel::<()>();
        signal(libc::SIGHUP);
        let left = ears.during(
            "test",
            move || waits.recv().is_err(),
            |one| {
                assert_eq!(one, Heard::Signal(libc::SIGHUP));
                ControlFlow::Break(RunError::Panicked)
            },
        );
        assert!(matches!(left, Err(RunError::Panicked)));
    }

    #[test]
    fn work_that_takes_too_long_is_told_of_once() {
        let signals = Signals::new().unwrap();
        let ears = Ears {
            signals: &signals,
            quit: None,
            requests: None,
            limit: Some(Duration::from_millis(20)),
        };
        let (go_on, waits) = mpsc::channel::<()>();
        let (mut go_on, mut heard) = (Some(go_on), Vec::new());
        let done = ears.during(
            "test",
            move || waits.recv().is_err(),
            |one| {
                heard.push(one);
                go_on = None;
                ControlFlow::Continue(())
            },
        );
        assert!(done.unwrap());
        assert_eq!(heard, [Heard::Late]);
    }
}
