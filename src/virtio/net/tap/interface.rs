//! What an interface is asked for by its name: whether it is up, and how long its packets are. netdevice(7)

use std::ffi::c_char;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

/// The bytes of `ifr_name`, with its final zero.
pub(super) const NAME_SIZE: usize = libc::IFNAMSIZ;

/// An interface of this network namespace.
#[derive(Debug)]
pub(super) struct Interface {
    name: String,
    /// Any socket: it stands for the namespace.
    socket: OwnedFd,
}

impl Interface {
    /// # Errors
    /// socket(2)
    pub(super) fn new(name: &str) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            socket: match KEPT.get() {
                Some(kept) => kept.try_clone()?,
                None => socket()?,
            },
        })
    }

    fn ask(&self, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: each request of `SIOC[GS]IF*` reads or writes an ifreq, which `request` is, and nothing beyond it.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), what, request as *mut _) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Its flags, `IFF_*`.
    ///
    /// # Errors
    /// `SIOCGIFFLAGS`
    pub(super) fn flags(&self) -> io::Result<libc::c_short> {
        let mut request = request(&self.name, 0);
        self.ask(libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in the flags.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    /// # Errors
    /// `SIOCSIFFLAGS`
    pub(super) fn set_flags(&self, flags: libc::c_short) -> io::Result<()> {
        let mut request = request(&self.name, flags.into());
        self.ask(libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
    }

    /// Bytes of its longest packet, without the Ethernet header.
    ///
    /// # Errors
    /// `SIOCGIFMTU`
    pub(super) fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.name, 0);
        self.ask(libc::SIOCGIFMTU as libc::Ioctl, &mut request)?;
        // SAFETY: SIOCGIFMTU has filled in the MTU.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u32::try_from(mtu).unwrap_or(0))
    }

    /// # Errors
    /// `SIOCSIFMTU`: a right is missing (CAP_NET_ADMIN), or the interface takes no such MTU.
    pub(super) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = request(&self.name, 0);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.ask(libc::SIOCSIFMTU as libc::Ioctl, &mut request)
    }
}

/// A socket of the host's network namespace, in a process that has left it.
static KEPT: OnceLock<OwnedFd> = OnceLock::new();

/// Has interfaces be asked for in the network namespace that the process is in now.
///
/// # Errors
/// socket(2)
pub(super) fn keep_socket() -> io::Result<()> {
    let _already = KEPT.set(socket()?);
    Ok(())
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointer; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A request about interface `name`, with `flags`.
pub(super) fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zeros is a valid ifreq, which is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.iter_mut().take(NAME_SIZE - 1);
    for (to, from) in room.zip(name.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}
