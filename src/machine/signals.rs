//! The signals that end a VM, each once.

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use super::RunError;
use crate::sandbox;
use crate::signals::{self, SignalFd};

/// What ends a VM: asked to by a service manager or a person, or its terminal is gone.
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// How long a signal to a whole group of processes may be on its way by the one that waits outside of a jail.
const ON_ITS_WAY: Duration = Duration::from_secs(2);

/// Keeps the signals that end a VM from the calling thread and from all that it will start, so that
/// they come to [`run`](super::run). Call it before the first thread is started.
pub fn block_signals() {
    signals::block(&ENDING);
}

/// Where the signals arrive.
#[derive(Debug)]
pub(crate) struct Signals {
    arriving: SignalFd,
    last: Cell<Option<Arrival>>,
}

/// A signal, by which way it came, and when.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    number: i32,
    is_told_on: bool,
    at: Instant,
}

impl Arrival {
    /// Whether it is the same signal as the one that came `before` by the other way. Ctrl-C and a service manager that
    /// ends all of a unit's processes send it to both processes of a VM in a jail, and the outer one tells it on.
    fn is_copy_of(&self, before: &Self) -> bool {
        self.number == before.number
            && self.is_told_on != before.is_told_on
            && self.at.saturating_duration_since(before.at) < ON_ITS_WAY
    }
}

impl Signals {
    /// Those that end a process, which from now on end this one no more.
    ///
    /// # Errors
    /// [`RunError::System`], of signalfd(2)
    pub(crate) fn new() -> Result<Self, RunError> {
        let arriving = SignalFd::new(&ENDING).map_err(RunError::system("signalfd"))?;
        Ok(Self {
            arriving,
            last: Cell::new(None),
        })
    }

    /// The number of a signal that has come.
    pub(crate) fn take(&self) -> Option<i32> {
        loop {
            let signal = self.arriving.take()?;
            let arrival = Arrival {
                number: signal.number,
                is_told_on: sandbox::is_told_on(&signal),
                at: Instant::now(),
            };
            let before = self.last.take();
            if !before.is_some_and(|before| arrival.is_copy_of(&before)) {
                self.last.set(Some(arrival));
                return Some(signal.number);
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.arriving.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.arriving.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_comes_by_both_ways_is_one_and_two_by_one_way_are_two() {
        let now = Instant::now();
        let arrival = |number, is_told_on, at| Arrival {
            number,
            is_told_on,
            at: now + Duration::from_millis(at),
        };
        let direct = arrival(libc::SIGTERM, false, 0);
        let told_on = arrival(libc::SIGTERM, true, 5);
        assert!(told_on.is_copy_of(&direct));
        assert!(
            arrival(libc::SIGTERM, false, 6).is_copy_of(&told_on),
            "whichever is first"
        );
        assert!(!arrival(libc::SIGTERM, false, 5).is_copy_of(&direct));
        assert!(!arrival(libc::SIGINT, true, 5).is_copy_of(&direct));
        assert!(!arrival(libc::SIGTERM, true, 2000).is_copy_of(&direct));
    }

    #[test]
    fn a_signal_of_this_process_s_own_is_read_each_time() {
        let signals = Signals::new().unwrap();
        for _ in 0..2 {
            // SAFETY: the signal is blocked in this thread, which is the one it goes to.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) };
            assert_eq!((signals.take(), signals.take()), (Some(libc::SIGHUP), None));
        }
    }
}
