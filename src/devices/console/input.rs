//! A console's input: a descriptor to wait for, with the escape key taken out of what comes from
//! Busway's own terminal.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::ahead::Ahead;
use super::output::Writer;
use crate::devices::terminal::RawMode;
use crate::devices::watch;

/// Ctrl-A
const ESCAPE: u8 = 1;
const HELP: &[u8] = b"\r\nbusway: Ctrl-A x quits, Ctrl-A a sends Ctrl-A, Ctrl-A h shows this\r\n";

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
            Source::Socket(server) => server.read(buffer),
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
            Source::Socket(server) => server.events.as_raw_fd(),
        }
    }
}

/// The escape key's state.
#[derive(Debug)]
pub(super) struct Escape {
    quit: EventFd,
    output: Writer,
    /// The last byte was the escape key.
    pressed: bool,
}

impl Escape {
    pub(super) fn new(quit: EventFd, output: Writer) -> Self {
        Self {
            quit,
            output,
            pressed: false,
        }
    }

    /// Takes the escape key and what follows it out of `bytes`, and says how many bytes are left at
    /// their front. A key that means nothing after the escape key is dropped with it.
    pub(super) fn filter(&mut self, bytes: &mut [u8]) -> usize {
        let mut kept = 0;
        for at in 0..bytes.len() {
            let byte = bytes.get(at).copied().unwrap_or_default();
            if !self.pressed && byte == ESCAPE {
                self.pressed = true;
                continue;
            }
            let keep = if std::mem::take(&mut self.pressed) {
                match byte {
                    b'x' | b'X' => {
                        self.quit.signal();
                        None
                    }
                    b'h' | b'H' | b'?' => {
                        // A writer never fails.
                        let _ = self.output.write(HELP);
                        None
                    }
                    b'a' | b'A' | ESCAPE => Some(ESCAPE),
                    _ => None,
                }
            } else {
                Some(byte)
            };
            if let (Some(byte), Some(slot)) = (keep, bytes.get_mut(kept)) {
                *slot = byte;
                kept += 1;
            }
        }
        kept
    }
}

/// The one client of a listening socket, if it is there.
#[derive(Clone, Debug, Default)]
pub(super) struct Client(Arc<Mutex<Option<Arc<UnixStream>>>>);

impl Client {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to the client. Without one, output is dropped; a client that has gone is the reader's
    /// business.
    pub(super) fn write_all(&self, bytes: &[u8]) {
        // Not under the lock: it may block.
        let client = self.lock().clone();
        if let Some(client) = client
            && let Err(error) = (&*client).write_all(bytes)
        {
            log::debug!("console output to the socket: {error}");
        }
    }
}

/// A listening Unix socket, one client at a time; a second one is turned away.
#[derive(Debug)]
pub(super) struct SocketServer {
    listener: UnixListener,
    client: Client,
    /// Watches both, so that there is one descriptor to wait for.
    events: Epoll,
    path: PathBuf,
}

impl SocketServer {
    pub(super) fn listen(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let events = Epoll::new()?;
        watch(&events, ControlOperation::Add, &listener)?;
        Ok(Self {
            listener,
            client: Client::default(),
            events,
            path: path.to_owned(),
        })
    }

    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        self.accept()?;
        let Some(client) = self.client.lock().clone() else {
            return Ok(Input::Nothing);
        };
        if !self.readable(client.as_raw_fd())? {
            return Ok(Input::Nothing);
        }
        match (&*client).read(buffer) {
            Ok(0) => {}
            Ok(count) => return Ok(Input::Bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Input::Nothing),
            Err(error) => log::debug!("console input from the socket: {error}"),
        }
        watch(&self.events, ControlOperation::Delete, &*client)?;
        *self.client.lock() = None;
        Ok(Input::Nothing)
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                let mut client = self.client.lock();
                if client.is_none() {
                    watch(&self.events, ControlOperation::Add, &stream)?;
                    *client = Some(Arc::new(stream));
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether reading from `fd` would not block.
    fn readable(&self, fd: RawFd) -> io::Result<bool> {
        let mut ready = [EpollEvent::default(); 2];
        let count = self.events.wait(0, &mut ready)?;
        Ok(ready.iter().take(count).any(|event| event.fd() == fd))
    }
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}
