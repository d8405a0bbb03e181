//! The kernel's calls by which a jail's processes are made, signalled and ended.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread, which is to be the only one, namespaces of its own.
///
/// # Errors
/// unshare(2)
pub(super) fn leave(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: of the flags, those are dangerous that give a thread a table of descriptors of its own: there is one thread,
    // and the callers name namespaces alone.
    unsafe { unshare_unsafe(namespaces) }.map_err(Into::into)
}

/// Makes a process of the calling thread, which is to be the only one. Its number; none in the new one.
///
/// # Errors
/// fork(2)
pub(super) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: there is one thread, so that nothing that another one holds is held for ever in the new process.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        number => Ok(Pid::from_raw(number)),
    }
}

/// Sends a process a signal with a value. One that has ended hears nothing.
///
/// # Errors
/// pidfd_send_signal(2)
pub(super) fn send(process: BorrowedFd<'_>, signal: libc::c_int, value: i32) -> io::Result<()> {
    // `siginfo_t` has 128 bytes: number, error, code, then, aligned to 8 bytes, the sender's process and user, and the value.
    // sigaction(2); asm-generic/siginfo.h, `_rt`. The kernel takes the sender for what is said here.
    let mut info = [0_i32; 32];
    info[0] = signal;
    info[2] = libc::SI_QUEUE;
    info[6] = value;
    let no_flags: libc::c_uint = 0;
    // SAFETY: the kernel reads one `siginfo_t`, which is as long as the array, and keeps nothing of it.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            info.as_ptr(),
            no_flags,
        )
    };
    match sent {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Stops the process, until another one has it go on.
pub(super) fn stop() {
    // SAFETY: the call has no conditions; nothing handles this signal.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Ends the process by a signal that is not blocked. It returns where the signal does not end it.
pub(super) fn end_by(signal: libc::c_int) {
    // What a filter refuses keeps its handler.
    if signal == libc::SIGSYS {
        return;
    }
    // SAFETY: no handler is set, and there is one thread, which does nothing but this any more.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Ends the process where it stands, as a signal's handler may.
pub(super) fn exit_at_once(status: libc::c_int) -> ! {
    // SAFETY: it ends the process, without what is done at other exits.
    unsafe { libc::_exit(status) }
}

/// Closes all descriptors but these.
///
/// # Errors
/// close_range(2), which came with Linux 5.9
pub(super) fn close_all_but(mut kept: Vec<RawFd>) -> io::Result<()> {
    kept.sort_unstable();
    let kept: Vec<_> = kept.into_iter().map(RawFd::cast_unsigned).collect();
    let mut first = 0;
    for last in kept.into_iter().chain([libc::c_uint::MAX]) {
        // Those between two that are kept. The highest number is no descriptor's.
        if let Some(before) = last.checked_sub(1).filter(|before| first <= *before) {
            close(first, before)?;
        }
        first = last.saturating_add(1);
    }
    Ok(())
}

fn close(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    let no_flags: libc::c_uint = 0;
    // SAFETY: the caller goes on with those that it keeps and with nothing else that this process had open: what owns the
    // others is not used any more until the process ends.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, no_flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
