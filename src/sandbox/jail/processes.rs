//! The two processes of a VM in a jail.
//!
//! A process cannot enter another PID namespace: its children are in it. So the process that was started stays outside,
//! where whoever started it knows it, and its child, the first process of the namespace, has the VM. The outer one
//! opens nothing and has nothing open of the VM's. It tells signals on, and what the inner one says to the service manager, and
//! ends as the inner one does. Where either is killed, the kernel ends the other.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal as Ending, WaitId, WaitIdOptions, getpid, pidfd_open,
    set_parent_process_death_signal, waitid,
};
use vmm_sys_util::signal::register_signal_handler;

use super::calls;
use crate::devices::terminal::give_back;
use crate::exit::{HOST, RUNTIME};
use crate::notify;
use crate::signals::{self, Signal, SignalFd};

/// What would end a process, and is told on.
const ENDS: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// Of those, what a machine reads itself.
const VMS: [libc::c_int; 3] = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM];
/// What stops a process. The first one of a namespace does not stop by them, and does by SIGSTOP from outside.
const STOPS: [libc::c_int; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

/// The value that a signal has which was told on. sigqueue(3)
const TOLD_ON: i32 = 0x6275_7377;
/// What a status that says "by this signal" begins with, as shells have it.
const BY_SIGNAL: i32 = 128;
/// Bytes of one message to a service manager, which has a few lines.
const MESSAGE: usize = 4096;

/// The number by which the host knows this process, where that is not the one by which it knows itself.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The number by which the host knows this process: in a jail it knows itself by another one.
#[must_use]
pub fn process_id() -> u32 {
    match NUMBER.load(Ordering::Relaxed) {
        0 => process::id(),
        number => number,
    }
}

/// Whether the outer process of a jail has sent a signal that it was sent itself.
#[must_use]
pub(crate) fn is_told_on(signal: &Signal) -> bool {
    signal.value == Some(TOLD_ON)
}

/// Which of the two a process is.
#[derive(Debug)]
pub(in crate::sandbox) enum Side {
    Outer(Outer),
    Inner(Inner),
}

/// Makes the inner process, in the namespaces that this one's children are to have. There has to be one thread.
///
/// # Errors
/// fork(2), and what the two need to know of each other
pub(super) fn divide() -> io::Result<Side> {
    let all: Vec<_> = ENDS
        .into_iter()
        .chain(STOPS)
        .chain([libc::SIGCONT])
        .collect();
    let signals = SignalFd::new(&all)?;
    let outer = pidfd_open(getpid(), PidfdFlags::empty())?;
    let (above, below) = UnixDatagram::pair()?;
    above.set_nonblocking(true)?;
    below.set_nonblocking(true)?;
    match calls::fork()? {
        Some(pid) => Ok(Side::Outer(Outer {
            inner: pidfd_open(pid, PidfdFlags::empty())?,
            pid,
            signals,
            messages: above,
        })),
        None => {
            // Those that end a VM stay: they are read when it is put together.
            let own: Vec<_> = all
                .into_iter()
                .filter(|signal| !VMS.contains(signal))
                .collect();
            signals::unblock(&own);
            Ok(Side::Inner(Inner {
                outer,
                messages: below,
            }))
        }
    }
}

/// The process that was started.
#[derive(Debug)]
pub(in crate::sandbox) struct Outer {
    inner: OwnedFd,
    pid: Pid,
    signals: SignalFd,
    /// What the inner one says to the service manager.
    messages: UnixDatagram,
}

impl Outer {
    /// Closes all that is not this process's own, such as what the VM was handed.
    ///
    /// # Errors
    /// close_range(2)
    pub(in crate::sandbox) fn close_others(&self) -> io::Result<Option<UnixDatagram>> {
        let manager = notify::take_socket();
        let mut kept = vec![
            // For what is said of a violation.
            libc::STDERR_FILENO,
            self.inner.as_raw_fd(),
            self.signals.as_raw_fd(),
            self.messages.as_raw_fd(),
        ];
        kept.extend(manager.as_ref().map(|manager| manager.as_raw_fd()));
        calls::close_all_but(kept)?;
        Ok(manager)
    }

    /// Lets the inner process begin, and ends as it does.
    pub(in crate::sandbox) fn wait(self, manager: Option<UnixDatagram>) -> ! {
        let number = self.pid.as_raw_nonzero().get().to_ne_bytes();
        let told = self.messages.send(&number);
        let told = told.and_then(|_| self.tell_on(manager.as_ref()));
        // Where it cannot wait any more it ends, and the kernel ends the inner one.
        match told.and_then(|()| self.status()) {
            Ok(status) => process::exit(status),
            Err(error) => {
                eprintln!("busway: error: the process outside of the jail cannot go on: {error}");
                process::exit(RUNTIME.into())
            }
        }
    }

    /// Until the inner process has ended.
    fn tell_on(&self, manager: Option<&UnixDatagram>) -> io::Result<()> {
        // A message that the service manager has no room for yet.
        let mut waiting: Option<Vec<u8>> = None;
        loop {
            let messages = match (&waiting, manager) {
                (Some(_), Some(manager)) => PollFd::new(manager, PollFlags::OUT),
                _ => PollFd::new(&self.messages, PollFlags::IN),
            };
            let mut ready = [
                PollFd::new(&self.signals, PollFlags::IN),
                PollFd::new(&self.inner, PollFlags::IN),
                messages,
            ];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let [_, ended, _] = ready.map(|one| !one.revents().is_empty());
            // As many as there are kinds of them wait at most.
            while let Some(signal) = self.signals.take() {
                self.on_signal(signal.number)?;
            }
            self.pass(manager, &mut waiting);
            if ended {
                return Ok(());
            }
        }
    }

    /// Gives the service manager what waits for it, as far as it has room. Where there is none, nobody hears it.
    fn pass(&self, manager: Option<&UnixDatagram>, waiting: &mut Option<Vec<u8>>) {
        let mut text = [0; MESSAGE];
        // As many as a socket holds at most; what comes meanwhile comes again.
        for _ in 0..64 {
            let message = match waiting.take() {
                Some(message) => message,
                None => match self.messages.recv(&mut text) {
                    Ok(length) => text.get(..length).unwrap_or_default().to_vec(),
                    Err(_) => return,
                },
            };
            match manager.map(|manager| manager.send(&message)) {
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    *waiting = Some(message);
                    return;
                }
                // A service manager that is gone hears nothing.
                _ => {}
            }
        }
    }

    fn on_signal(&self, number: libc::c_int) -> io::Result<()> {
        if !STOPS.contains(&number) {
            return calls::send(self.inner.as_fd(), number, TOLD_ON);
        }
        calls::send(self.inner.as_fd(), libc::SIGSTOP, TOLD_ON)?;
        // Until somebody has this one go on: the signal for that is told on then.
        calls::stop();
        Ok(())
    }

    /// How the inner process has ended. One that a signal ended has this one end by it.
    fn status(&self) -> io::Result<i32> {
        let ended = waitid(WaitId::PidFd(self.inner.as_fd()), WaitIdOptions::EXITED)?;
        let Some(ended) = ended else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if let Some(status) = ended.exit_status() {
            return Ok(status);
        }
        let signal = ended.terminating_signal().unwrap_or(libc::SIGKILL);
        signals::unblock(&[signal]);
        calls::end_by(signal);
        Ok(BY_SIGNAL.saturating_add(signal))
    }
}

/// The process that has the VM.
#[derive(Debug)]
pub(in crate::sandbox) struct Inner {
    outer: OwnedFd,
    messages: UnixDatagram,
}

impl Inner {
    /// Waits until the outer process has its walls, and takes it for the service manager. Where the outer process has
    /// ended, it has said why, and this one ends without a word.
    ///
    /// # Errors
    /// poll(2), sigaction(2)
    pub(in crate::sandbox) fn begin(&self) -> io::Result<()> {
        let mut ready = [
            PollFd::new(&self.messages, PollFlags::IN),
            PollFd::new(&self.outer, PollFlags::IN),
        ];
        while let Err(error) = poll(&mut ready, None) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        let mut number = [0; 4];
        if self.messages.recv(&mut number).is_err() {
            process::exit(HOST.into());
        }
        NUMBER.store(u32::from_ne_bytes(number), Ordering::Relaxed);
        notify::tell_by(self.messages.try_clone()?);
        // What a signal does to a process by default, it does not do to the first one of a namespace. pid_namespaces(7)
        for signal in ENDS.into_iter().filter(|signal| !VMS.contains(signal)) {
            register_signal_handler(signal, end_by).map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// From now on the kernel ends this process when the outer one ends. To be called when this one is who it is to be.
    ///
    /// # Errors
    /// prctl(2), or the outer process has ended
    pub(in crate::sandbox) fn end_with_outer(self) -> io::Result<()> {
        set_parent_process_death_signal(Some(Ending::KILL))?;
        let mut ended = [PollFd::new(&self.outer, PollFlags::IN)];
        match poll(&mut ended, Some(&rustix::event::Timespec::default()))? {
            0 => Ok(()),
            _ => Err(io::Error::other("the process outside of it has ended")),
        }
    }
}

/// Ends the process as a signal would. It does only what a signal's handler may.
extern "C" fn end_by(signal: libc::c_int, _info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    give_back();
    calls::exit_at_once(BY_SIGNAL.saturating_add(signal));
}
