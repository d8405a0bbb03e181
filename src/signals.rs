//! Signals that come as data: signalfd(2).

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::ptr;

/// Where in `struct signalfd_siginfo` members are that are read here: the signal's number, why it was sent, and the
/// value that was sent with it. linux/signalfd.h
const NUMBER: usize = 0;
const CODE: usize = 8;
const VALUE: usize = 44;

/// Keeps signals from the calling thread and from all that it will start, so that they wait for a [`SignalFd`].
pub(crate) fn block(signals: &[libc::c_int]) {
    mask(libc::SIG_BLOCK, signals);
}

/// Lets signals reach the calling thread.
pub(crate) fn unblock(signals: &[libc::c_int]) {
    mask(libc::SIG_UNBLOCK, signals);
}

fn mask(how: libc::c_int, signals: &[libc::c_int]) {
    let set = set(signals);
    // SAFETY: the set is initialised, and the call keeps no pointer.
    unsafe { libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) };
}

fn set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, and a number that is no signal's is refused.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// A signal that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signal {
    /// Which.
    pub(crate) number: i32,
    /// The value that was sent with it, by sigqueue(3) or its like.
    pub(crate) value: Option<i32>,
}

/// Where signals arrive.
#[derive(Debug)]
pub(crate) struct SignalFd {
    file: File,
}

impl SignalFd {
    /// Of `signals`, which are blocked from now on.
    ///
    /// # Errors
    /// signalfd(2)
    pub(crate) fn new(signals: &[libc::c_int]) -> io::Result<Self> {
        block(signals);
        let set = set(signals);
        // SAFETY: the set is initialised, and the call keeps no pointer.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// One that has come.
    pub(crate) fn take(&self) -> Option<Signal> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        // Nonblocking: an error says that there is none.
        let read = (&self.file).read(&mut info).ok()?;
        let member = |place: usize| {
            let bytes = info.get(..read)?.get(place..)?.first_chunk()?;
            Some(i32::from_ne_bytes(*bytes))
        };
        let value = member(VALUE)?;
        Some(Signal {
            number: member(NUMBER)?,
            value: (member(CODE)? == libc::SI_QUEUE).then_some(value),
        })
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read_once_by_its_number_and_with_what_was_sent_with_it() {
        let signals = SignalFd::new(&[libc::SIGHUP, libc::SIGUSR1]).unwrap();
        assert_eq!(signals.take(), None);
        // SAFETY: the signal is blocked in this thread, which is the one it goes to.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) };
        let plain = Signal {
            number: libc::SIGHUP,
            value: None,
        };
        assert_eq!((signals.take(), signals.take()), (Some(plain), None));
        let value = libc::sigval {
            sival_ptr: ptr::without_provenance_mut(77),
        };
        // SAFETY: as before.
        unsafe { libc::pthread_sigqueue(libc::pthread_self(), libc::SIGUSR1, value) };
        let with = Signal {
            number: libc::SIGUSR1,
            value: Some(77),
        };
        assert_eq!((signals.take(), signals.take()), (Some(with), None));
    }
}
