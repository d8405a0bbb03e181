//! Requests of rtnetlink(7), written and read byte by byte.

mod functions;
mod routes;

use std::fs::File;
use std::io::{self, Read as _, Write as _};

use busway_iommu::info::{u16_at, u32_at};

use crate::sys;

pub use functions::{Mac, VfSetting, VfState};
pub(super) use functions::{set, states};
pub(super) use routes::{default_routes, way_to};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// An attribute's type without its flags (linux/netlink.h, `NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;
/// An attribute is no longer than 64 KiB, and no answer has more than a few of that length.
const ANSWER: usize = 256 << 10;

/// What the kernel answers to a request, in one message.
fn ask(request: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; ANSWER];
    let mut socket: File = sys::route_socket()?;
    // Without an address, a message goes to the kernel. netlink(7)
    socket.write_all(request)?;
    let length = socket.read(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

/// Hands over each message that the kernel answers a dump with.
fn ask_for_all(request: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut answer = vec![0; ANSWER];
    let mut socket: File = sys::route_socket()?;
    socket.write_all(request)?;
    loop {
        let length = socket.read(&mut answer)?;
        if each(answer.get(..length).unwrap_or_default(), &mut take)? {
            return Ok(());
        }
    }
}

/// Hands over the messages of one answer. Returns whether they are the last.
fn each(mut answer: &[u8], take: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    // An answer that ends here is none, and there would be no end of asking.
    let mut last = answer.is_empty();
    while let (Some(length), Some(kind)) = (u32_at(answer, 0), u16_at(answer, 4)) {
        let length = length as usize;
        let message = answer.get(..length).filter(|_| length >= HEADER);
        let message = message.ok_or_else(malformed)?;
        match kind {
            NLMSG_DONE => last = true,
            NLMSG_ERROR => return acknowledged(message).map(|()| true),
            _ => take(message),
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(last)
}

/// A message to the kernel: what each of its kind begins with, and attributes.
fn request(kind: u16, flags: u16, head: &[u8], attributes: &[u8]) -> Vec<u8> {
    let length = (HEADER + head.len() + attributes.len()) as u32;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // One request to a socket, so that neither number tells anything.
    bytes.extend([0; 8]);
    bytes.extend(head);
    bytes.extend(attributes);
    bytes
}

/// struct nlattr: length and type before the value, and the next on a multiple of four.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes in these bytes, up to the first that is cut short.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer makes no sense",
    )
}

/// The kernel's error, where the answer is one. Error 0 is its acknowledgement.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    if u16_at(answer, 4) != Some(NLMSG_ERROR) {
        return Ok(());
    }
    match u32_at(answer, HEADER).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        None => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_refusal_is_its_errno() {
        let mut bytes = request(NLMSG_ERROR, 0, &[0; 16], &[]);
        bytes[HEADER..HEADER + 4].copy_from_slice(&(-libc::EOPNOTSUPP).to_ne_bytes());
        let error = acknowledged(&bytes).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        assert!(each(&bytes, &mut |_| panic!("it is no message")).is_err());
        bytes[HEADER..HEADER + 4].fill(0);
        acknowledged(&bytes).unwrap();
    }

    #[test]
    fn a_dump_ends_with_its_last_message_and_not_before() {
        let some = request(24, 0, &[7; 12], &[]);
        let done = request(NLMSG_DONE, 0, &[0; 4], &[]);
        let mut count = 0;
        let mut take = |message: &[u8]| count += usize::from(message == some);
        assert!(!each(&[&some[..], &some].concat(), &mut take).unwrap());
        assert!(each(&[&some[..], &done].concat(), &mut take).unwrap());
        assert_eq!(count, 3);
        // A length that leads nowhere.
        assert!(each(&[0; 16], &mut |_| ()).is_err());
    }
}
