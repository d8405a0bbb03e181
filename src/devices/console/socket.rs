//! A console's Unix socket, for one client at a time.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use crate::accepting::{Accepted, Acceptor, PAUSE, is_shortage};
use crate::devices::watch;
use crate::shortage;

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
    acceptor: Acceptor,
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
            acceptor: Acceptor::new(&listener),
            listener,
            client: Client::default(),
            events,
            path: path.to_owned(),
        })
    }

    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Reads what the client has written; nothing where there is none, or none any more.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        self.accept()?;
        let Some(client) = self.client.lock().clone() else {
            return Ok(None);
        };
        if !self.readable(client.as_raw_fd())? {
            return Ok(None);
        }
        match (&*client).read(buffer) {
            Ok(0) => {}
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => log::debug!("console input from the socket: {error}"),
        }
        watch(&self.events, ControlOperation::Delete, &*client)?;
        *self.client.lock() = None;
        Ok(None)
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.acceptor.accept(&self.listener) {
            Ok(Accepted::TurnedAway(_stream, error)) => {
                let (path, error) = (self.path.display(), shortage::explained(&error));
                log::warn!("{path}: a client is turned away: {error}");
                Ok(())
            }
            Ok(Accepted::Stream(stream)) => {
                let mut client = self.client.lock();
                if client.is_none() {
                    watch(&self.events, ControlOperation::Add, &stream)?;
                    *client = Some(Arc::new(stream));
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) if is_shortage(&error) => {
                log::debug!("{}: {error}", self.path.display());
                thread::sleep(PAUSE);
                Ok(())
            }
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

/// As a descriptor it is readable when somebody comes, or the client has written.
impl AsRawFd for SocketServer {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}
