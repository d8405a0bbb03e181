//! Child processes that cannot outlive this one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

type Order = (Command, Sender<io::Result<Child>>);

/// Starts a process that inherits these descriptors under the numbers that they have, and that the
/// kernel kills when this process dies, however it dies.
///
/// The kernel sends the signal when the *thread* that started the child ends, so one thread that
/// never ends starts them all.
pub(crate) fn spawn_bound(mut command: Command, inherited: Vec<OwnedFd>) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let check = |outcome| match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: between fork and exec the closure makes system calls only, which are
    // async-signal-safe, and allocates nothing. The descriptors live as long as the closure.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            inherited
                .iter()
                .try_for_each(|fd| check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0)))
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in orders {
                // Whoever asked may have gone; then there is nobody to tell.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (reply, child) = channel();
    let died = || io::Error::other("the thread that starts processes has died");
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_| died())?;
    child.recv().map_err(|_| died())?
}
