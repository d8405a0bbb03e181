//! What an `ivshmem-doorbell` is served: its memory, and an eventfd for each of its vectors. QEMU's
//! package has no server, and for a device that is its own and only peer one needs no process: all that
//! there is to say fits into the line before QEMU reads it. QEMU, docs/specs/ivshmem-spec.rst.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};

/// The protocol's version, and the number that announces the memory.
const VERSION: i64 = 0;
const MEMORY: i64 = -1;
/// The device's own number among its peers.
const PEER: i64 = 7;

/// The server's end of a line on which all is said, which has to stay open, and QEMU's.
pub(crate) fn serve(memory: &Path, vectors: u16) -> Result<(UnixStream, UnixStream)> {
    let (server, end) = UnixStream::pair()?;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(memory)
        .with_context(|| format!("opening {}", memory.display()))?;
    let say = |number: i64, descriptor: Option<RawFd>| {
        send(&server, number, descriptor).context("serving a doorbell device")
    };
    say(VERSION, None)?;
    say(PEER, None)?;
    say(MEMORY, Some(memory.as_raw_fd()))?;
    for _ in 0..vectors {
        say(PEER, Some(eventfd()?.as_raw_fd()))?;
    }
    Ok((server, end))
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Room for one descriptor in a message's ancillary data, aligned as its header has to be.
#[repr(C)]
union Ancillary {
    _header: libc::cmsghdr,
    _bytes: [u8; 64],
}

/// Sends a number, and a descriptor with it. unix(7), `SCM_RIGHTS`.
fn send(line: &UnixStream, number: i64, descriptor: Option<RawFd>) -> io::Result<()> {
    let mut bytes = number.to_le_bytes();
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut ancillary = Ancillary { _bytes: [0; 64] };
    // SAFETY: all zeroes is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    if let Some(descriptor) = descriptor {
        message.msg_control = (&raw mut ancillary).cast();
        // SAFETY: these compute from numbers; the room, 64 bytes, is enough for one descriptor.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(header)
                .cast::<RawFd>()
                .write_unaligned(descriptor);
        }
    }
    // SAFETY: the message points to what lives through the call.
    let sent = unsafe { libc::sendmsg(line.as_raw_fd(), &raw const message, 0) };
    match sent {
        8 => Ok(()),
        sent if sent < 0 => Err(io::Error::last_os_error()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
