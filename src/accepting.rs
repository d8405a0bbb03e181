//! Connections to Unix sockets are accepted also where the process may open no further descriptor: whoever comes then is told
//! so, and is not left waiting for an answer that never comes.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// How long is waited before connections are accepted again where there was no descriptor to turn somebody away with.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// Accepts the connections of one socket. It keeps a descriptor spare, which is given up for who comes when there is no other.
#[derive(Debug)]
pub(crate) struct Acceptor {
    spare: Option<UnixListener>,
}

/// What was accepted.
#[derive(Debug)]
pub(crate) enum Accepted {
    /// A connection.
    Stream(UnixStream),
    /// One that is to be turned away for this error, and closed before the next is accepted: it has the spare descriptor's
    /// place.
    TurnedAway(UnixStream, io::Error),
}

impl Acceptor {
    /// For a socket that does not block.
    pub(crate) fn new(listener: &UnixListener) -> Self {
        Self {
            spare: listener.try_clone().ok(),
        }
    }

    /// Accepts who waits.
    ///
    /// # Errors
    /// accept(2); [`is_shortage`] where another thread of the process, or of the host, has taken the spare descriptor's place.
    pub(crate) fn accept(&mut self, listener: &UnixListener) -> io::Result<Accepted> {
        if self.spare.is_none() {
            self.spare = listener.try_clone().ok();
        }
        match listener.accept() {
            Ok((stream, _)) => Ok(Accepted::Stream(stream)),
            Err(error) if is_shortage(&error) && self.spare.is_some() => {
                self.spare = None;
                let (stream, _) = listener.accept()?;
                Ok(Accepted::TurnedAway(stream, error))
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether there is no descriptor for who waits. accept(2): EMFILE, ENFILE
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}
