//! Where programs on the host listen for the guest: the socket's path with `_PORT` behind it, as Firecracker and Cloud
//! Hypervisor have it (firecracker, docs/vsock.md).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread;

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::sandbox::{self, Kind};
use crate::unix_socket::{PATH_MOST, connect_at_once};

/// Bytes of the stack of the thread that connects.
const STACK_SIZE: usize = 128 << 10;

type Asked = (u32, SyncSender<io::Result<UnixStream>>);

/// A thread that connects to programs on the host for a device's worker: `vsock-out`.
///
/// The worker is started by a vCPU, whose filter it has. So it cannot be allowed to connect without allowing that to the
/// thread on which the guest's accesses are served. Who has the worker gets a connection to a port of this device, and
/// to nothing else. The thread ends when this is dropped.
#[derive(Debug)]
pub(super) struct Ports {
    asks: Sender<Asked>,
}

impl Ports {
    /// Starts the thread, for the ports beside `socket`.
    ///
    /// # Errors
    /// There can be no further thread, or open(2) of the folder.
    pub(super) fn of(socket: &Path) -> io::Result<Self> {
        let (asks, asked) = channel::<Asked>();
        let beside = Beside::of(socket)?;
        let body = move || {
            sandbox::enter(Kind::VsockPorts);
            for (port, answer) in asked {
                // Who asked waits for it, unless the VM is at its end.
                let _nobody = answer.send(beside.connect(port));
            }
        };
        thread::Builder::new()
            .name("vsock-out".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(body)?;
        Ok(Self { asks })
    }

    /// Connects to who listens for the guest at `port`. The thread does not wait for who listens, so that this is over at
    /// once.
    ///
    /// # Errors
    /// connect(2): nobody listens there, or as many wait as may.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let gone = || io::Error::other("the thread that connects to programs has ended");
        let (answer, answered) = sync_channel(1);
        self.asks.send((port, answer)).map_err(|_unsent| gone())?;
        answered.recv().map_err(|_ended| gone())?
    }
}

/// The path that ports are beside.
#[derive(Debug)]
struct Beside {
    socket: PathBuf,
    /// Its folder, where a port's path has no room in a socket's address.
    folder: Option<OwnedFd>,
}

impl Beside {
    /// # Errors
    /// open(2) of the folder
    fn of(socket: &Path) -> io::Result<Self> {
        let longest = with_port(socket, u32::MAX);
        let folder = match (longest.as_os_str().len() > PATH_MOST, longest.parent()) {
            (true, Some(folder)) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Some(openat(CWD, folder, flags, Mode::empty())?)
            }
            _ => None,
        };
        Ok(Self {
            socket: socket.to_owned(),
            folder,
        })
    }

    /// Connects to who listens for the guest at `port`, without waiting. A path that no socket's address has room for is
    /// gone by the descriptor of its folder. The stream does not block.
    ///
    /// # Errors
    /// connect(2): nobody listens there, or as many wait as may.
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let path = with_port(&self.socket, port);
        match (&self.folder, path.file_name()) {
            (Some(folder), Some(name)) => {
                let by_number = format!("/proc/self/fd/{}", folder.as_raw_fd());
                connect_at_once(&Path::new(&by_number).join(name))
            }
            _ => connect_at_once(&path),
        }
    }
}

fn with_port(socket: &Path, port: u32) -> PathBuf {
    let mut path = OsString::from(socket);
    path.push(format!("_{port}"));
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_port_is_found_beside_a_socket_whose_own_path_is_as_long_as_can_be() {
        let folder = tempfile::tempdir().unwrap();
        let used = folder.path().as_os_str().len() + 1;
        let deep = folder.path().join("d".repeat(PATH_MOST - used - 3));
        std::fs::create_dir(&deep).unwrap();
        let socket = deep.join("s");
        assert!(socket.as_os_str().len() <= PATH_MOST);
        let ports = Ports::of(&socket).unwrap();
        assert_eq!(
            ports.connect(4_000_000_000).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        // bind(2) has no more room than connect(2).
        let short = folder.path().join("l");
        std::os::unix::fs::symlink(&deep, &short).unwrap();
        let listener = UnixListener::bind(short.join("s_4000000000")).unwrap();
        ports.connect(4_000_000_000).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_listener_that_has_no_room_refuses_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(folder.path().join("s_5")).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let ports = Ports::of(&socket).unwrap();
        let mut held = Vec::new();
        let refused = loop {
            match ports.connect(5) {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
            assert!(held.len() < 10);
        };
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
