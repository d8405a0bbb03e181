//! Where a console's output goes and where its input comes from, for the serial port and the virtio
//! console alike: terminal, pseudo-terminal, file, socket, or nowhere.
//!
//! [`Writer`] never keeps its caller waiting for long, and [`Reader`] is a descriptor to wait for. On
//! Busway's own terminal Ctrl-A is the escape key: `x` after it quits, `a` sends it, `h` shows help. It is
//! heard whether the guest takes input or not.

mod ahead;
mod escape;
mod input;
mod kept;
mod output;
mod socket;

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use busway_host::files::{OutputError, is_no_room, no_room};
use busway_vfio::EventFd;

pub use input::{Input, Reader};
pub use output::Writer;

use self::escape::Escape;
use self::kept::KeptFile;
use self::socket::SocketServer;
use super::terminal::{Pty, RawMode};
use crate::config::ConsoleConfig;

/// A console's backend could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// two consoles want the terminal; give it to one of --serial and --console
    #[error("two consoles want the terminal; give it to one of --serial and --console")]
    TerminalTaken,
    /// cannot use the terminal: {0}
    #[error("cannot use the terminal: {0}")]
    Terminal(io::Error),
    /// cannot make a pseudo-terminal: {0}; is /dev/pts mounted?
    #[error("cannot make a pseudo-terminal: {0}; is /dev/pts mounted?")]
    Pty(io::Error),
    /// cannot write the console's output to {path}: {source}
    #[error("cannot write the console's output to {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: OutputError,
    },
    /// cannot listen at {path}: {source}; a socket that an earlier run has left must be removed first
    #[error("cannot listen at {}: {source}{}", path.display(), socket_remedy(source))]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// cannot start the console's thread: {0}
    #[error("cannot start the console's thread: {0}")]
    Thread(io::Error),
}

impl ConsoleError {
    /// Whether it is room that the host has not, and not what was asked for.
    pub(crate) fn is_want(&self) -> bool {
        match self {
            Self::File { source, .. } => source.is_want(),
            Self::Socket { source, .. } => is_no_room(source),
            _ => false,
        }
    }
}

fn socket_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; a socket that an earlier run has left must be removed first",
        _ => no_room(error),
    }
}

/// Both directions of a console.
#[derive(Debug)]
pub struct Endpoint {
    /// Takes the guest's output.
    pub writer: Writer,
    /// Gives the guest's input; absent where there can be none.
    pub reader: Option<Reader>,
    /// Where users find it: the pseudo-terminal's device or the socket.
    pub location: Option<PathBuf>,
}

impl Endpoint {
    /// Opens what `config` says; `None` for [`ConsoleConfig::Off`]. `quit` is signalled when Ctrl-A x is
    /// pressed on Busway's terminal.
    ///
    /// # Errors
    /// [`ConsoleError`]
    pub fn open(config: &ConsoleConfig, quit: &EventFd) -> Result<Option<Self>, ConsoleError> {
        match config {
            ConsoleConfig::Off => Ok(None),
            ConsoleConfig::Null => Ok(Some(Self {
                writer: Writer::null(),
                reader: None,
                location: None,
            })),
            ConsoleConfig::Tty => Self::terminal(quit).map(Some),
            ConsoleConfig::Pty => {
                let pty = Pty::open().map_err(ConsoleError::Pty)?;
                Self::at_pty(pty).map(Some)
            }
            ConsoleConfig::File { path, size } => Self::file(path, *size).map(Some),
            ConsoleConfig::Socket(path) => Self::socket(path).map(Some),
        }
    }

    /// What can be read from `input` is typed, and output goes nowhere.
    #[cfg(any(test, feature = "hostile"))]
    pub(crate) fn typed_from(input: OwnedFd) -> Self {
        Self {
            writer: Writer::null(),
            reader: Some(Reader::file(input.into())),
            location: None,
        }
    }

    /// Standard input and output, whatever they are.
    fn terminal(quit: &EventFd) -> Result<Self, ConsoleError> {
        let claim = Claim::take().ok_or(ConsoleError::TerminalTaken)?;
        let output = io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .map_err(ConsoleError::Terminal)?;
        let writer = Writer::to_terminal(output.into(), claim).map_err(ConsoleError::Thread)?;
        let escape = Escape::new(quit.clone(), writer.clone());
        let reader = standard_input(escape).map_err(ConsoleError::Terminal)?;
        Ok(Self {
            writer,
            reader,
            location: None,
        })
    }

    /// At a pseudo-terminal that there is already.
    ///
    /// # Errors
    /// [`ConsoleError::Pty`], [`ConsoleError::Thread`]
    pub(crate) fn at_pty(pty: Pty) -> Result<Self, ConsoleError> {
        let Pty {
            master,
            slave,
            path,
        } = pty;
        let output = master.try_clone().map_err(ConsoleError::Pty)?;
        Ok(Self {
            writer: Writer::to_file(output).map_err(ConsoleError::Thread)?,
            reader: Some(Reader::pty(master, slave)),
            location: Some(path),
        })
    }

    fn file(path: &Path, size: u64) -> Result<Self, ConsoleError> {
        let file = KeptFile::open(path, size).map_err(|source| ConsoleError::File {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            writer: Writer::to_kept_file(file).map_err(ConsoleError::Thread)?,
            reader: None,
            location: None,
        })
    }

    fn socket(path: &Path) -> Result<Self, ConsoleError> {
        let server = SocketServer::listen(path).map_err(|source| ConsoleError::Socket {
            path: path.to_owned(),
            source,
        })?;
        let writer = Writer::to_client(server.client()).map_err(ConsoleError::Thread)?;
        Ok(Self {
            writer,
            reader: Some(Reader::socket(server)),
            location: Some(path.to_owned()),
        })
    }
}

/// That the process' terminal is one console's, which it can be of one at a time.
#[derive(Debug)]
struct Claim(());

static CLAIMED: AtomicBool = AtomicBool::new(false);

impl Claim {
    fn take() -> Option<Self> {
        (!CLAIMED.swap(true, Ordering::Relaxed)).then_some(Self(()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.store(false, Ordering::Relaxed);
    }
}

/// Standard input as a reader, or `None` where nothing can come from it.
fn standard_input(escape: Escape) -> io::Result<Option<Reader>> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    if stdin.is_terminal() {
        return match RawMode::enter(stdin.as_fd()) {
            Ok(raw) => Reader::terminal(unshared(stdin), escape, Some(raw)).map(Some),
            Err(error) => {
                log::warn!("the guest gets no input from the terminal: {error}");
                Ok(None)
            }
        };
    }
    let file = File::from(stdin);
    let kind = file.metadata()?.file_type();
    if kind.is_fifo() || kind.is_socket() {
        Reader::terminal(unshared(file.into()), escape, None).map(Some)
    } else if kind.is_file() {
        Reader::terminal(file.into(), escape, None).map(Some)
    } else {
        Ok(None)
    }
}

/// The same input, opened anew to be read without waiting: another process that has it too may read what
/// was there, and whoever then waited for more could not be stopped. What cannot be opened anew, such as
/// a socket, stays as it is: its flags are the other process's as well.
fn unshared(input: OwnedFd) -> OwnedFd {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", input.as_raw_fd()));
    match opened {
        Ok(file) => file.into(),
        Err(error) => {
            log::debug!("standard input cannot be opened anew: {error}");
            input
        }
    }
}

#[cfg(test)]
mod tests;
