//! The bytes of one connection, with limits on how long they may take.

use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most descriptors that come with one message, those of a NIC with a pair of queues for each vCPU; what
/// is beyond them is closed.
const FILES_MOST: usize = 64;

/// How many bytes are read at once.
const STEP: usize = 64 << 10;

/// How long a connection's other end may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Between two bytes of a message that it sends, or takes.
    pub(super) between: Duration,
    /// For the whole of a message.
    pub(super) whole: Duration,
    /// For closing its end, when the server has closed this one.
    pub(super) linger: Duration,
}

impl Limits {
    /// Those of a server.
    pub(super) const SERVER: Self = Self {
        between: Duration::from_secs(10),
        whole: Duration::from_secs(60),
        linger: Duration::from_secs(1),
    };
}

/// A connection with the bytes that have come and are still to be looked at.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    limits: Limits,
    /// By when the message that is being received has to be complete.
    deadline: Option<Instant>,
    bytes: Vec<u8>,
    /// How many of `bytes` have been taken.
    taken: usize,
    /// The descriptors that came beside them.
    files: Vec<OwnedFd>,
    /// Others came, and this process had no descriptor for them.
    lost_files: bool,
}

impl Wire {
    pub(super) fn new(stream: UnixStream, limits: Limits) -> Self {
        Self {
            stream,
            limits,
            deadline: None,
            bytes: Vec::new(),
            taken: 0,
            files: Vec::new(),
            lost_files: false,
        }
    }

    /// Takes the descriptors that have come.
    pub(super) fn take_files(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.files)
    }

    /// Whether descriptors came that this process had no room for.
    pub(super) fn has_lost_files(&self) -> bool {
        self.lost_files
    }

    /// By which the connection can be ended from another thread.
    ///
    /// # Errors
    /// dup(2)
    pub(super) fn handle(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// The bytes that have come and were not taken.
    pub(super) fn rest(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }

    /// Takes the first `count` bytes of the rest.
    pub(super) fn take(&mut self, count: usize) {
        self.taken = self.taken.saturating_add(count).min(self.bytes.len());
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        }
    }

    /// Waits for the first byte of a message, for as long as it takes; `false` where the other end has
    /// closed the connection.
    ///
    /// # Errors
    /// read(2)
    pub(super) fn wait(&mut self) -> io::Result<bool> {
        self.deadline = None;
        Ok(self.read(None)? > 0)
    }

    /// The time for a message begins.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now().checked_add(self.limits.whole);
    }

    /// Waits for more bytes of a message.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] beyond the limits, [`io::ErrorKind::UnexpectedEof`] at the
    /// connection's end; read(2)
    pub(super) fn more(&mut self) -> io::Result<()> {
        let limit = time_left(self.deadline, self.limits.between)?;
        match self.read(Some(limit))? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    fn read(&mut self, limit: Option<Duration>) -> io::Result<usize> {
        self.stream.set_read_timeout(limit)?;
        self.bytes.drain(..self.taken);
        self.taken = 0;
        let before = self.bytes.len();
        self.bytes.resize(before.saturating_add(STEP), 0);
        let room = self.bytes.get_mut(before..).unwrap_or_default();
        let result = loop {
            match receive(&self.stream, room, &mut self.files) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(timed_out),
            }
        };
        let result = result.map(|(count, truncated)| {
            self.lost_files |= truncated && self.files.len() < FILES_MOST;
            count
        });
        let count = result.as_ref().copied().unwrap_or(0);
        self.bytes.truncate(before.saturating_add(count));
        result
    }

    /// Sends a message, in one write where the kernel has room for it.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] where the other end does not take it; write(2)
    pub(super) fn send(&mut self, mut message: &[u8]) -> io::Result<()> {
        let deadline = Instant::now().checked_add(self.limits.whole);
        while !message.is_empty() {
            let limit = time_left(deadline, self.limits.between)?;
            self.stream.set_write_timeout(Some(limit))?;
            match self.stream.write(message) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => message = message.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(timed_out(error)),
            }
        }
        Ok(())
    }

    /// The same, with a descriptor beside the message's first byte.
    ///
    /// # Errors
    /// As for [`send`](Self::send); sendmsg(2)
    pub(super) fn send_with(&mut self, message: &[u8], file: &OwnedFd) -> io::Result<()> {
        let Some((first, rest)) = message.split_at_checked(1) else {
            return Ok(());
        };
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.stream.set_write_timeout(Some(self.limits.between))?;
        let parts = [IoSlice::new(first)];
        sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)
            .map_err(|error| timed_out(error.into()))?;
        self.send(rest)
    }

    /// Closes this end, and drops what the other end still sends until it closes as well, or time is
    /// up: one that is closed while it writes would not read what it was answered.
    pub(super) fn finish(mut self) {
        self.deadline = Instant::now().checked_add(self.limits.linger);
        if self.stream.shutdown(Shutdown::Write).is_err() {
            return;
        }
        while self.more().is_ok() {
            self.take(usize::MAX);
        }
    }
}

/// Reads bytes, and the descriptors that come beside them (SCM_RIGHTS, unix(7)). What finds no room is closed.
fn receive(
    stream: &UnixStream,
    bytes: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(come) = message {
            let room = FILES_MOST.saturating_sub(files.len());
            files.extend(come.take(room));
        }
    }
    Ok((received.bytes, received.flags.contains(ReturnFlags::CTRUNC)))
}

/// As much of `most` as is left before the deadline.
fn time_left(deadline: Option<Instant>, most: Duration) -> io::Result<Duration> {
    let left = match deadline {
        Some(deadline) => deadline.saturating_duration_since(Instant::now()),
        None => most,
    };
    match left.min(most) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// A socket's time limit shows as `EAGAIN`. socket(7)
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}
