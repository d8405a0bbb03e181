//! The control socket: an HTTP API whose paths and JSON are Cloud Hypervisor's v1, so that its clients drive
//! a VM of Busway's as they are; and the client that `busway ctl` is.
//!
//! [`v1`] says what each request means; [`http`] what a request is; [`connections`] who is served;
//! [`socket`] where. What is asked goes to the machine by its [`Control`], and nothing here knows more of it.

pub mod client;
mod connections;
#[cfg(test)]
pub(crate) mod description;
mod given_up;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod http;
mod json;
mod metrics;
#[cfg(test)]
mod tests;
mod threads;
mod v1;
mod wire;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use busway_vfio::EventFd;

use crate::exit::{HOST, RUNTIME, USAGE};
use crate::machine::{Control, Extent, Request};
use crate::sandbox::{self, Kind};
use crate::unix_socket::Listening;
pub use crate::unix_socket::{SocketAddress, SocketError};
use connections::{Connections, Service};
use given_up::Names;
use wire::Limits;

/// How long the end waits for answers to be taken.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket cannot be had.
    #[error("--api-socket: {0}")]
    Socket(#[from] SocketError),
    /// cannot serve the control socket: {0}
    #[error("cannot serve the control socket: {0}")]
    System(#[from] io::Error),
}

impl ServerError {
    /// The status to exit with, of [`crate::exit`].
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Socket(error) if error.is_want() => HOST,
            Self::Socket(_) => USAGE,
            Self::System(_) => RUNTIME,
        }
    }
}

/// Serves a control socket on threads of its own (`http`), from before the VM is put together until after its end.
#[derive(Debug)]
pub struct Server {
    connections: Arc<Connections>,
    end: Arc<End>,
    stop: Arc<EventFd>,
    /// Gives the socket back when it ends: its name is removed with the main thread's rights.
    acceptor: Option<JoinHandle<Listening>>,
    /// Where the socket is, if another program made it.
    inherited: Option<PathBuf>,
}

impl Server {
    /// Makes or takes over the socket, and answers from now on. Call it when the signals that the machine
    /// reads are blocked.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn start(socket: &SocketAddress, control: Control) -> Result<Self, ServerError> {
        let end = Arc::new(End::default());
        let service = v1::Api::new(control, Arc::clone(&end));
        Self::serve(socket, Arc::new(service), end, Limits::SERVER)
    }

    fn serve(
        socket: &SocketAddress,
        service: Arc<dyn Service>,
        end: Arc<End>,
        limits: Limits,
    ) -> Result<Self, ServerError> {
        let listening = Listening::open(socket)?;
        let inherited = listening.inherited_at();
        let connections = Connections::new(limits);
        let stop = Arc::new(EventFd::new()?);
        let (accepting, stopped) = (Arc::clone(&connections), Arc::clone(&stop));
        let accept = move || {
            sandbox::enter(Kind::Http);
            let result = accepting.accept(listening.listener(), &stopped, &service);
            if let Err(error) = result {
                log::error!("the control socket takes no more connections: {error}");
            }
            listening
        };
        let acceptor = thread::Builder::new()
            .name("http".to_owned())
            .spawn(accept)?;
        Ok(Self {
            connections,
            end,
            stop,
            acceptor: Some(acceptor),
            inherited,
        })
    }

    /// Ends the process when it is given up: when neither the socket, if it was inherited, nor the pipe at `events`, by
    /// which whoever started the process hears of it, has its name any more, and nobody is connected.
    pub fn end_when_given_up(&self, events: &Path, control: Control) {
        let Some(socket) = &self.inherited else {
            return;
        };
        let names = match Names::watch(&[socket, events]) {
            Ok(Some(names)) => names,
            Ok(None) => return,
            Err(error) => {
                log::warn!("that the process is given up would not be noticed: {error}");
                return;
            }
        };
        let (connections, stop) = (Arc::clone(&self.connections), Arc::clone(&self.stop));
        let end = move || {
            sandbox::enter(Kind::GivenUp);
            match names.wait_gone(&stop) {
                Ok(true) => {
                    connections.wait_empty();
                    log::warn!(
                        "the control socket and the pipe of events were removed, and nobody can reach this process any \
                     more: it ends, and its VM with it"
                    );
                    // It fails where the process ends already.
                    let _ended = control.ask(Request::End(Extent::Process));
                }
                Ok(false) => {}
                Err(error) => log::warn!("that the process is given up is not noticed: {error}"),
            }
        };
        let started = thread::Builder::new()
            .name("given-up".to_owned())
            .spawn(end);
        if let Err(error) = started {
            log::warn!("that the process is given up would not be noticed: {error}");
        }
    }

    /// The VM has ended, and all that it had is given back. Those who asked for its end are answered now, for
    /// some kill the process as soon as they are; nobody else is let in, and the socket is removed. Takes 5 s
    /// at most, and as a rule no time.
    pub fn finish(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.come();
        self.connections.finish(FINISH_LIMIT);
        // It fails only where the count would overflow, and then a signal is there already.
        self.stop.signal();
        if let Some(acceptor) = self.acceptor.take() {
            // Its panic has been told of.
            let _ = acceptor.join();
        }
    }
}

/// The VM's end, which whoever asked for it waits for.
#[derive(Debug, Default)]
struct End {
    here: Mutex<bool>,
    changed: Condvar,
}

impl End {
    fn here(&self) -> MutexGuard<'_, bool> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn come(&self) {
        *self.here() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let waited = self.changed.wait_while(self.here(), |here| !*here);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}
