//! The signals that end a VM, read as data.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::ptr;

use super::RunError;

/// What ends a VM: asked to by a service manager or a person, or its terminal is gone.
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Keeps the signals that end a VM from the calling thread and from all that it will start, so that
/// they come to [`run`](super::run). Call it before the first thread is started.
pub fn block_signals() {
    let set = ending();
    // SAFETY: the set is initialised, and the call keeps no pointer.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
}

fn ending() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, and the numbers added are those of signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in ENDING {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Where the signals arrive.
#[derive(Debug)]
pub(crate) struct Signals {
    file: File,
}

impl Signals {
    /// Those that end a process, which from now on end this one no more.
    ///
    /// # Errors
    /// [`RunError::System`], of signalfd(2)
    pub(crate) fn new() -> Result<Self, RunError> {
        block_signals();
        let set = ending();
        // SAFETY: the set is initialised, and the call keeps no pointer.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(RunError::system("signalfd")(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// The number of a signal that has come.
    pub(crate) fn take(&self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        // Nonblocking: an error says that there is none.
        let read = (&self.file).read(&mut info).ok()?;
        // The number is the structure's first member. signalfd(2)
        let number = info.get(..read)?.first_chunk()?;
        Some(i32::from_ne_bytes(*number))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read_once_by_its_number() {
        let signals = Signals::new().unwrap();
        assert_eq!(signals.take(), None);
        // SAFETY: the signal is blocked in this thread, which is the one it goes to.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) };
        assert_eq!((signals.take(), signals.take()), (Some(libc::SIGHUP), None));
    }
}
