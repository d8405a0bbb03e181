//! The host's side of a tap: a packet socket on the interface.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::virtio::testing::readable;

/// An EtherType for experiments, so that nobody else's packets count. IEEE 802 §9.2.4.
pub(super) const ETHERTYPE: u16 = 0x88b5;

/// The host's side of the interface.
pub(super) struct Wire {
    socket: OwnedFd,
}

impl Wire {
    pub(super) fn new(tap: &str) -> Self {
        Self::of(tap, ETHERTYPE)
    }

    /// Of packets of another type.
    pub(super) fn of(tap: &str, kind: u16) -> Self {
        let ethertype = kind.to_be();
        // With a type it would hear all interfaces until it is bound to one. packet(7)
        let none_yet = 0;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket takes no pointer; the descriptor is new and ours.
        let socket = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, kind, none_yet)) };
        let name = std::ffi::CString::new(tap).unwrap();
        // SAFETY: all zeros is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ethertype;
        // SAFETY: `name` is a C string.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        // SAFETY: `address` is a sockaddr_ll of the size given.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        Self { socket }
    }

    pub(super) fn set_mtu(&self, tap: &str, mtu: i32) {
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(tap.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_mtu = mtu;
        // SAFETY: SIOCSIFMTU reads an ifreq.
        let result = unsafe {
            libc::ioctl(
                self.socket.as_raw_fd(),
                libc::SIOCSIFMTU,
                &raw const request,
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    pub(super) fn send(&self, packet: &[u8]) {
        // SAFETY: `packet` is alive and of the length given.
        let sent = unsafe {
            libc::write(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
            )
        };
        assert_eq!(
            sent,
            packet.len() as isize,
            "{}",
            io::Error::last_os_error()
        );
    }

    pub(super) fn receive(&self) -> Vec<u8> {
        let mut packet = vec![0; 70_000];
        let socket = self.socket.as_fd();
        assert!(
            readable(socket, std::time::Duration::from_secs(10)),
            "no packet"
        );
        // SAFETY: `packet` is alive and of the length given.
        let size =
            unsafe { libc::read(socket.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len()) };
        packet.truncate(usize::try_from(size).unwrap());
        packet
    }
}

pub(super) fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: u8) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend(from);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend((0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed)));
    frame
}
