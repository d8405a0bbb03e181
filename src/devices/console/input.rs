//! A console's input: a descriptor to wait for, with the escape key taken out of what comes from
//! Busway's own terminal.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::ahead::Ahead;
use super::escape::Escape;
use super::socket::SocketServer;
use crate::devices::terminal::RawMode;

/// Gives a console's input. As a descriptor it is readable when there may be some.
#[derive(Debug)]
pub struct Reader {
    source: Source,
    /// Of the terminal: what hears the escape key. It ends before the terminal is given back.
    _ahead: Option<Ahead>,
    /// Given back when the reader drops.
    _raw: Option<RawMode>,
}

#[derive(Debug)]
enum Source {
    File {
        file: File,
        /// A pseudo-terminal's other side.
        _slave: Option<File>,
    },
    Socket(SocketServer),
}

/// What [`Reader::read`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// So many bytes are in the buffer.
    Bytes(usize),
    /// Nothing for the guest; wait again.
    Nothing,
    /// Nothing will ever come again.
    Closed,
}

impl Reader {
    /// Of Busway's own terminal, or of what stands in its place. The escape key is heard from now on,
    /// whether anybody reads or not.
    pub(super) fn terminal(fd: OwnedFd, escape: Escape, raw: Option<RawMode>) -> io::Result<Self> {
        let (file, ahead) = Ahead::start(fd, escape)?;
        Ok(Self {
            source: Source::File { file, _slave: None },
            _ahead: Some(ahead),
            _raw: raw,
        })
    }

    #[cfg(any(test, feature = "hostile"))]
    pub(super) fn file(file: File) -> Self {
        Self {
            source: Source::File { file, _slave: None },
            _ahead: None,
            _raw: None,
        }
    }

    pub(super) fn pty(master: File, slave: File) -> Self {
        Self {
            source: Source::File {
                file: master,
                _slave: Some(slave),
            },
            _ahead: None,
            _raw: None,
        }
    }

    pub(super) fn socket(server: SocketServer) -> Self {
        Self {
            source: Source::Socket(server),
            _ahead: None,
            _raw: None,
        }
    }

    /// Reads what there is, up to `buffer.len()` bytes. Call it when the descriptor is readable; it may
    /// block otherwise. `buffer` must not be empty.
    pub fn read(&mut self, buffer: &mut [u8]) -> Input {
        let result = match &mut self.source {
            Source::File { file, .. } => file.read(buffer).map(|count| match count {
                0 => Input::Closed,
                count => Input::Bytes(count),
            }),
            Source::Socket(server) => server
                .read(buffer)
                .map(|count| count.map_or(Input::Nothing, Input::Bytes)),
        };
        result.unwrap_or_else(|error| match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Input::Nothing,
            _ => {
                log::warn!("the console's input ended: {error}");
                Input::Closed
            }
        })
    }
}

impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        match &self.source {
            Source::File { file, .. } => file.as_raw_fd(),
            Source::Socket(server) => server.as_raw_fd(),
        }
    }
}
