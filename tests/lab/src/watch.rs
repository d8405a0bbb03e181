//! Waiting for a folder to change, or for a job to end, without polling.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// An inotify watch on what is written in one folder.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: File,
}

impl Watch {
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        // SAFETY: the call takes no pointer.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nothing else owns it.
        let inotify = unsafe { File::from_raw_fd(fd) };
        let path = CString::new(folder.as_os_str().as_bytes())?;
        // SAFETY: the path is a C string that lives through the call.
        if unsafe { libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_MODIFY) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { inotify })
    }

    /// Returns when something was written, when the other end of `bell` was closed, or with
    /// [`ErrorKind::TimedOut`] at the deadline.
    pub(crate) fn wait(&self, bell: &UnixStream, deadline: Instant) -> io::Result<()> {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [entry(self.inotify.as_raw_fd()), entry(bell.as_raw_fd())];
        let left = deadline.saturating_duration_since(Instant::now());
        let milliseconds = left.min(Duration::from_secs(3600)).as_millis() as i32;
        // SAFETY: the array is writable, its length is given, and both descriptors are open.
        match unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) } {
            0 => Err(ErrorKind::TimedOut.into()),
            count if count < 0 => match io::Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => Ok(()),
                error => Err(error),
            },
            _ => self.drain(),
        }
    }

    fn drain(&self) -> io::Result<()> {
        let mut events = [0; 4096];
        loop {
            match (&self.inotify).read(&mut events) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}
