//! Input of Busway's own terminal, read ahead of the guest: the escape key is heard also while the guest is
//! paused, stands still, or has no driver yet. What is typed meanwhile waits in a pipe; only behind 64 KiB of
//! that, which a file can be and no person types, is the key not heard.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio};

use super::escape::Escape;
use crate::provoked;
use crate::sandbox::{self, Kind};

/// It reads, looks for one key and writes.
const STACK: usize = 256 << 10;
/// Bytes that are read at once.
const PIECE: usize = 256;

/// The thread that reads. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Ahead {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Reads `source` from now on, with the escape key taken out, and gives where the rest comes out: a pipe
    /// that does not block its reader, and that ends where the source does. It holds 64 KiB (pipe(7)); what
    /// is typed beyond stays in the source, unread, until the guest has taken some.
    ///
    /// # Errors
    /// There is no thread or no descriptor to be had.
    pub(super) fn start(source: OwnedFd, escape: Escape) -> io::Result<(File, Self)> {
        let (out, pipe) = io::pipe()?;
        ioctl_fionbio(&out, true)?;
        ioctl_fionbio(&pipe, true)?;
        let stop = EventFd::new()?;
        let heard = stop.clone();
        let thread = std::thread::Builder::new()
            .name("stdin".into())
            .stack_size(STACK)
            .spawn(move || {
                sandbox::enter(Kind::Input);
                if let Err(error) = read(source.into(), escape, pipe, &heard) {
                    log::warn!("the console's input ended: {error}");
                }
            })?;
        let ahead = Self {
            stop,
            thread: Some(thread),
        };
        Ok((OwnedFd::from(out).into(), ahead))
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.stop.signal();
        // Its panic has been told of.
        let _panicked = self.thread.take().map(JoinHandle::join);
    }
}

/// Reads until the source ends or `stop` is signalled.
fn read(
    mut source: File,
    mut escape: Escape,
    mut pipe: impl Write + AsFd,
    stop: &EventFd,
) -> io::Result<()> {
    let mut buffer = [0; PIECE];
    loop {
        if !ready(source.as_fd(), PollFlags::IN, stop)? {
            return Ok(());
        }
        provoked::here();
        let count = match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if is_for_later(&error) => continue,
            result => result?,
        };
        let bytes = buffer.get_mut(..count).unwrap_or_default();
        let kept = escape.filter(bytes);
        let mut rest = bytes.get(..kept).unwrap_or_default();
        while !rest.is_empty() {
            match pipe.write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if is_for_later(&error) => {
                    if !ready(pipe.as_fd(), PollFlags::OUT, stop)? {
                        return Ok(());
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Another process took what was there, or a signal came.
fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// Waits until `fd` can be used as `how` says, or has ended; `false` where it is to stop before.
fn ready(fd: BorrowedFd<'_>, how: PollFlags, stop: &EventFd) -> io::Result<bool> {
    loop {
        let mut asked = [
            PollFd::from_borrowed_fd(fd, how),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut asked, None) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        let [asked, stop] = asked;
        if !stop.revents().is_empty() {
            return Ok(false);
        }
        if !asked.revents().is_empty() {
            return Ok(true);
        }
    }
}
