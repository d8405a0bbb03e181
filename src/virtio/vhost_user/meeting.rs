//! Where a device and its back end meet: at a Unix socket, where either of them listens.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::config::VhostMode;
use crate::unix_socket::{Listening, SocketAddress, SocketError};

/// How often it is tried again to reach one that does not listen yet.
const AGAIN: Duration = Duration::from_millis(20);

/// The place of one device. Dropping it removes a socket that was made.
#[derive(Debug)]
pub(super) struct Meeting {
    socket: PathBuf,
    /// Where it is this end that listens.
    listening: Option<Listening>,
}

impl Meeting {
    /// At `socket`, where this end is what `mode` says. A server's is made.
    ///
    /// # Errors
    /// [`SocketError`]: the socket cannot be made.
    pub(super) fn at(socket: &Path, mode: VhostMode) -> Result<Self, SocketError> {
        let listening = match mode {
            VhostMode::Client => None,
            VhostMode::Server => Some(Listening::open(&SocketAddress::Path(socket.to_owned()))?),
        };
        Ok(Self {
            socket: socket.to_owned(),
            listening,
        })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// What a back end does there, for messages: the device waits until another does so.
    pub(super) fn comes_by(&self) -> &'static str {
        match self.listening {
            Some(_) => "connects",
            None => "listens",
        }
    }

    /// A connection with the back end that is there, or comes within `patience`.
    ///
    /// # Errors
    /// Nobody is there; `TimedOut` where nobody has come to this end's socket.
    pub(super) fn reach(&self, patience: Duration) -> io::Result<UnixStream> {
        match &self.listening {
            Some(listening) => accept(listening, patience),
            None => reach(&self.socket, patience),
        }
    }
}

fn accept(listening: &Listening, patience: Duration) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match listening.listener().accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted => {}
                _ => return Err(error),
            },
        }
        let left = patience.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [PollFd::new(listening.listener(), PollFlags::IN)];
        // A signal that interrupts it is as good as a connection: it is looked at again.
        let _ready = poll(&mut fds, Some(&left));
    }
}

/// Connects, without ever waiting for who listens to take the connection.
fn reach(socket: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let start = Instant::now();
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect(&stream, &address) {
            Ok(()) => {
                let stream = UnixStream::from(stream);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) => {
                use rustix::io::Errno;
                let may_come = [Errno::NOENT, Errno::CONNREFUSED, Errno::AGAIN, Errno::INTR];
                if !may_come.contains(&error) || start.elapsed() >= patience {
                    return Err(error.into());
                }
            }
        }
        thread::sleep(AGAIN);
    }
}
