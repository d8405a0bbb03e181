//! The Unix sockets that Busway listens at, for the control of a VM and for programs that reach into its guest: where
//! one is, whose it is, and how it goes.
//!
//! A lock beside it (`PATH.lock`) says whose it is, and holds the owner's process id. A socket that
//! nobody listens at any more is replaced; one that somebody listens at never is.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use busway_host::files::{is_no_room, no_room};
use busway_iommu::{effective_user, process_name};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};

/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;
/// How often a lock that its owner is just removing is tried anew.
const TRIES: usize = 8;
/// The most bytes of a socket's path. unix(7): `sun_path` and a zero.
pub(crate) const PATH_MOST: usize = 107;
/// How long is waited before a socket whose connections are not accepted is tried anew.
const PAUSE: Duration = Duration::from_millis(20);

/// `--api-socket`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// A path that is made.
    Path(PathBuf),
    /// A descriptor of a socket that listens already, which the process inherits.
    Fd(u32),
}

impl SocketAddress {
    /// Where it is made, if it is.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Fd(_) => None,
        }
    }
}

/// The control socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// somebody listens there
    #[error(
        "{} is a socket of {owner}, which listens there: give this VM another one, or end that one",
        path.display()
    )]
    Live {
        /// The socket.
        path: PathBuf,
        /// Who has it.
        owner: String,
    },
    /// what is there is no socket
    #[error("{} is there, and no socket: remove it, or name another path", .0.display())]
    NoSocket(PathBuf),
    /// its path is too long
    #[error(
        "{}: a socket's path has {PATH_MOST} bytes at most, and this one {}",
        .0.display(), .0.as_os_str().len()
    )]
    Long(PathBuf),
    /// the lock beside it is not used
    #[error(
        "{} locks the socket beside it, and is {what}: remove it, or name another socket",
        path.display()
    )]
    NoLock {
        /// The lock.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// cannot {what} {path}: {source}
    #[error("cannot {what} {}: {source}{}", path.display(), remedy(source))]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// descriptor {number} is {what}
    #[error(
        "descriptor {number} is {what}: whoever starts Busway opens a Unix socket that listens \
         (SOCK_STREAM), without close-on-exec, and says its number"
    )]
    Fd {
        /// The descriptor.
        number: u32,
        /// What is wrong with it.
        what: String,
    },
}

impl SocketError {
    /// Whether it is room that the host has not, and not what was asked for.
    pub(crate) fn is_want(&self) -> bool {
        match self {
            Self::System { source, .. } => is_no_room(source),
            _ => false,
        }
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; make the folder first",
        io::ErrorKind::PermissionDenied => {
            "; name a folder that you can write, such as one in /run"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "; that file system is only read: name a folder on another one, such as one in /run"
        }
        _ => no_room(error),
    }
}

/// A socket that listens. Dropping it removes what was made for it.
#[derive(Debug)]
pub(crate) struct Listening {
    listener: UnixListener,
    /// In order: the socket goes before its lock.
    made: Option<(SocketFile, Lock)>,
}

impl Listening {
    /// Makes the socket, in the place of one that nobody listens at any more, or takes over one that was inherited.
    ///
    /// # Errors
    /// [`SocketError`]
    pub(crate) fn open(address: &SocketAddress) -> Result<Self, SocketError> {
        let this = match address {
            SocketAddress::Path(path) => Self::make(path)?,
            SocketAddress::Fd(number) => Self {
                listener: take_over(*number)?,
                made: None,
            },
        };
        // Whoever waits for connections waits for its own end as well.
        this.listener
            .set_nonblocking(true)
            .map_err(|source| SocketError::System {
                what: "use",
                path: PathBuf::from(format!("{address:?}")),
                source,
            })?;
        Ok(this)
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is, if it was inherited and has a name.
    pub(crate) fn inherited_at(&self) -> Option<PathBuf> {
        if self.made.is_some() {
            return None;
        }
        let address = self.listener.local_addr().ok()?;
        address.as_pathname().map(Path::to_owned)
    }

    fn make(path: &Path) -> Result<Self, SocketError> {
        let address = match SocketAddrUnix::new(path) {
            Ok(address) if path.as_os_str().len() <= PATH_MOST => address,
            _ => return Err(SocketError::Long(path.to_owned())),
        };
        let lock = Lock::take(path)?;
        remove_stale(path)?;
        let failed = |what, error: Errno| SocketError::System {
            what,
            path: path.to_owned(),
            source: error.into(),
        };
        let socket = unix_socket(SocketFlags::CLOEXEC).map_err(|error| failed("make", error))?;
        // The kernel makes the file with the socket's own mode, less the umask: it is nobody else's from
        // its first moment on. linux/net/unix/af_unix.c, unix_bind_bsd
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|error| failed("make", error))?;
        bind(&socket, &address).map_err(|error| failed("make", error))?;
        let file = SocketFile::of(path);
        listen(&socket, BACKLOG).map_err(|error| failed("listen at", error))?;
        Ok(Self {
            listener: socket.into(),
            made: Some((file, lock)),
        })
    }
}

fn unix_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Removes a socket that nobody listens at.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |what, source| SocketError::System {
        what,
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match try_connect(path).map_err(|error| (error.kind(), error)) {
        // Whoever it is has not locked it. Where it has no room, connections wait to be accepted.
        Ok(_) | Err((io::ErrorKind::WouldBlock, _)) => Err(SocketError::Live {
            path: path.to_owned(),
            owner: "another program (`ss -xlp` names it)".to_owned(),
        }),
        Err((io::ErrorKind::ConnectionRefused, _)) => {
            fs::remove_file(path).map_err(|source| failed("remove", source))
        }
        Err((_, error)) => Err(failed("look who listens at", error)),
    }
}

/// Connects without waiting, to a stream that never blocks. unix(7)
///
/// # Errors
/// `WouldBlock` where as many wait as may; connect(2)
pub(crate) fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = unix_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

/// The same, to a stream that blocks.
fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let stream = connect_at_once(path)?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connects within a time.
///
/// # Errors
/// `WouldBlock` where nobody accepts in time; connect(2)
pub(crate) fn connect_within(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match try_connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < limit => {
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// `process 123 (busway)`
fn process(pid: u32) -> String {
    match process_name(Path::new("/proc"), pid) {
        Some(name) => format!("process {pid} ({name})"),
        None => format!("process {pid}"),
    }
}

/// Takes over the socket that the process has inherited by this number.
fn take_over(number: u32) -> Result<UnixListener, SocketError> {
    let wrong = |what: &str| SocketError::Fd {
        number,
        what: what.to_owned(),
    };
    if number < 3 {
        return Err(wrong("standard input, output or error"));
    }
    // Busway has no listening socket of its own by now, so that one that listens was inherited.
    match fs::metadata(format!("/proc/self/fd/{number}")) {
        Err(_) => return Err(wrong("not open in Busway's process")),
        Ok(there) if !there.file_type().is_socket() => return Err(wrong("no socket")),
        Ok(_) => {}
    }
    // SAFETY: whoever started this process opened it for this: nothing else here uses or closes it.
    let socket = unsafe { busway_vfio::adopt(number) };
    let socket = OwnedFd::from(socket.map_err(|error| wrong(&error.to_string()))?);
    let listens = |socket: &OwnedFd| -> Result<bool, Errno> {
        Ok(sockopt::socket_domain(socket)? == AddressFamily::UNIX
            && sockopt::socket_type(socket)? == SocketType::STREAM
            && sockopt::socket_acceptconn(socket)?)
    };
    match listens(&socket) {
        Ok(true) => Ok(socket.into()),
        Ok(false) => Err(wrong("a socket of another kind, or does not listen")),
        Err(error) => Err(wrong(&io::Error::from(error).to_string())),
    }
}

/// A socket's file, removed in the end unless it has become another.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn of(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            identity: identity(path),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        remove(&self.path, self.identity);
    }
}

/// What tells one file from another of the same name.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let there = fs::symlink_metadata(path).ok()?;
    Some((there.dev(), there.ino()))
}

fn remove(path: &Path, was: Option<(u64, u64)>) {
    if was.is_none() || identity(path) != was {
        return;
    }
    if let Err(error) = fs::remove_file(path) {
        log::debug!("cannot remove {}: {error}", path.display());
    }
}

/// The lock beside a socket: flock(2) on a file that holds the owner's process id.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    /// Held as long as this is open.
    file: File,
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, SocketError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        // The owner before may have removed the file after it was opened here: another process may then
        // have the file that bears the name now.
        for _ in 0..TRIES {
            let file = Self::open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let pid = read_pid(&file);
                    return Err(SocketError::Live {
                        path: socket.to_owned(),
                        owner: pid.map_or_else(|| "another VM".to_owned(), process),
                    });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(Self::failed("lock", &path, source));
                }
            }
            let mut lock = Self {
                path: path.clone(),
                file,
            };
            if identity(&path) == lock.identity() {
                lock.write_pid()
                    .map_err(|source| Self::failed("write to", &path, source))?;
                return Ok(lock);
            }
        }
        let source = io::ErrorKind::WouldBlock.into();
        Err(Self::failed("lock", &path, source))
    }

    fn open(path: &Path) -> Result<File, SocketError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ELOOP) => SocketError::NoLock {
                    path: path.to_owned(),
                    what: "a symbolic link",
                },
                _ => Self::failed("open", path, source),
            })?;
        let there = file
            .metadata()
            .map_err(|source| Self::failed("look at", path, source))?;
        let what = match () {
            () if !there.is_file() => "no regular file",
            () if there.uid() != effective_user() => "somebody else's",
            () if there.nlink() > 1 => "one file under several names (hard links)",
            () => return Ok(file),
        };
        Err(SocketError::NoLock {
            path: path.to_owned(),
            what,
        })
    }

    fn failed(what: &'static str, path: &Path, source: io::Error) -> SocketError {
        SocketError::System {
            what,
            path: path.to_owned(),
            source,
        }
    }

    fn identity(&self) -> Option<(u64, u64)> {
        let there = self.file.metadata().ok()?;
        Some((there.dev(), there.ino()))
    }

    fn write_pid(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        writeln!(self.file, "{}", crate::sandbox::process_id())
    }
}

/// Removed while it is held, so that whoever opened it meanwhile sees that it has lost its name.
impl Drop for Lock {
    fn drop(&mut self) {
        remove(&self.path, self.identity());
    }
}

fn read_pid(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
