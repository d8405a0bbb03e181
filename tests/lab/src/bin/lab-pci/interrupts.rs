//! Interrupts, each waited for and counted.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Result, bail, ensure};

/// How often an eventfd is asked before the program sleeps on it: most interrupts have come by then.
const ASKED: u32 = 2000;
/// How long a sent interrupt may be on its way, on a slow machine that has stalled.
const PATIENCE_MS: libc::c_int = 20_000;

/// An eventfd that reads without waiting.
pub(crate) fn event() -> Result<File> {
    // SAFETY: takes numbers only.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    ensure!(
        descriptor >= 0,
        "eventfd: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: it was just made, for us alone.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// How often an eventfd was signalled since it was asked last.
pub(crate) fn signals(mut event: &File) -> Result<u64> {
    let mut count = [0; 8];
    match event.read_exact(&mut count) {
        Ok(()) => Ok(u64::from_ne_bytes(count)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Waits until an eventfd was signalled, and says how often.
pub(crate) fn wait(event: &File) -> Result<u64> {
    for _ in 0..ASKED {
        let count = signals(event)?;
        if count > 0 {
            return Ok(count);
        }
    }
    let mut poll = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one writable element, as the count says.
    match unsafe { libc::poll(&raw mut poll, 1, PATIENCE_MS) } {
        0 => bail!("the interrupt did not come"),
        _ => signals(event),
    }
}

/// How many interrupts the kernel has counted for a device that VFIO has, on every line and processor.
pub(crate) fn kernel_count(address: &str) -> Result<u64> {
    let table = fs::read_to_string("/proc/interrupts")?;
    let name = format!("({address})");
    let lines = table.lines().filter(|line| line.contains(&name));
    let counts = lines.flat_map(|line| {
        let words = line.split_ascii_whitespace().skip(1);
        words.map_while(|word| word.parse::<u64>().ok())
    });
    Ok(counts.sum())
}
