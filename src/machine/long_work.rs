//! What the kernel can take long for, done on a thread of its own, while signals, the console and requests are still
//! answered.
//!
//! The kernel waits up to a minute for a device that does not come back from its reset, and is not to be
//! interrupted in that (Linux, drivers/pci/pci.c, `pci_dev_wait`). A machine is put together, restarted and
//! taken apart with such resets in it. What comes meanwhile decides whether they are waited for: where they
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
use crate::notify;
use crate::provoked;

/// What can end or concern the work while it goes on.
pub(super) struct LongWork<'a> {
    pub(super) signals: &'a Signals,
    /// A person at the console, where there is one already, or still.
    pub(super) quit: Option<&'a EventFd>,
    /// Who asks, where anybody is answered.
    pub(super) requests: Option<&'a Requests>,
    /// How long the work may take.
    pub(super) limit: Option<Duration>,
}

/// What came while the work went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkEvent {
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

impl LongWork<'_> {
    /// Has `work` done on a thread called `name`, and gives what came of it. Each time that something comes
    /// meanwhile, `on_event` is called; where it breaks, the work is left to itself.
    ///
    /// # Errors
    /// What `on_event` breaks with, or [`RunError::System`] where there is no thread to be had: `work` is
    /// dropped then.
    pub(super) fn during<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        mut on_event: impl FnMut(WorkEvent) -> ControlFlow<RunError>,
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
            notify::on_time(Instant::now());
            let next = deadline.into_iter().chain(notify::deadline()).min();
            let count = match epoll.wait(timeout(next), &mut ready) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(RunError::system("epoll_wait"))?,
            };
            let [event] = ready;
            let event = match event.data() {
                _ if count == 0 && deadline.is_none_or(|deadline| Instant::now() < deadline) => {
                    continue;
                }
                _ if count == 0 => {
                    deadline = None;
                    Some(WorkEvent::Late)
                }
                SIGNAL => self.signals.take().map(WorkEvent::Signal),
                QUIT => self
                    .quit
                    .filter(|quit| quit.take() > 0)
                    .map(|_| WorkEvent::Quit),
                REQUEST => Some(WorkEvent::Request),
                _ => return Ok(working.join().unwrap_or_else(|panic| resume_unwind(panic))),
            };
            if let Some(ControlFlow::Break(error)) = event.map(&mut on_event) {
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
        let long_work = LongWork {
            signals: &signals,
            quit: Some(&quit),
            requests: None,
            limit: None,
        };
        let nobody = |_| panic!("nobody is there");
        assert_eq!(long_work.during("test", || 7, nobody).unwrap(), 7);
        // Each comes once, and the work is waited for.
        let (go_on, waits) = mpsc::channel::<()>();
        signal(libc::SIGHUP);
        quit.signal();
        let mut events = Vec::new();
        let mut go_on = Some(go_on);
        let result = long_work.during(
            "test",
            move || waits.recv().is_err(),
            |one| {
                events.push(one);
                if events.len() == 2 {
                    go_on = None;
                }
                ControlFlow::Continue(())
            },
        );
        assert!(result.unwrap());
        events.sort_by_key(|one| *one == WorkEvent::Quit);
        assert_eq!(events, [WorkEvent::Signal(libc::SIGHUP), WorkEvent::Quit]);
        // Work that never ends keeps nobody who does not want to wait.
        let (_never, waits) = mpsc::channel::<()>();
        signal(libc::SIGHUP);
        let left = long_work.during(
            "test",
            move || waits.recv().is_err(),
            |one| {
                assert_eq!(one, WorkEvent::Signal(libc::SIGHUP));
                ControlFlow::Break(RunError::Panicked)
            },
        );
        assert!(matches!(left, Err(RunError::Panicked)));
    }

    #[test]
    fn work_that_takes_too_long_is_told_of_once() {
        let signals = Signals::new().unwrap();
        let long_work = LongWork {
            signals: &signals,
            quit: None,
            requests: None,
            limit: Some(Duration::from_millis(20)),
        };
        let (go_on, waits) = mpsc::channel::<()>();
        let (mut go_on, mut events) = (Some(go_on), Vec::new());
        let done = long_work.during(
            "test",
            move || waits.recv().is_err(),
            |one| {
                events.push(one);
                go_on = None;
                ControlFlow::Continue(())
            },
        );
        assert!(done.unwrap());
        assert_eq!(events, [WorkEvent::Late]);
    }
}
