//! Requests of rtnetlink(7), written and read byte by byte.

mod functions;
mod routes;

use std::fs::File;
use std::io::{self, Read as _, Write as _};

use busway_iommu::info::{u16_at, u32_at};

use crate::sys;

pub use functions::{VfSetting, VfState};
pub(super) use functions::{set, states};
pub(super) use routes::{default_routes, way_to};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// An attribute's type without its flags (linux/netlink.h, `NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;
/// An attribute is no longer than 64 KiB, and no answer has more than a few of that length.
const ANSWER: usize = 256 << 10;

/// How often a dump is asked for that was overtaken by changes.
const DUMPS: u32 = 8;

/// What the kernel answers to a request, in one message.
fn ask(request: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; ANSWER];
    let mut socket = asked(request)?;
    let length = read(&mut socket, &mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

/// Hands over each message that the kernel answers a dump with; some of them again, where what they
/// tell of was changed meanwhile.
fn ask_for_all(request: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut answer = vec![0; ANSWER];
    for _ in 0..DUMPS {
        let mut socket = asked(request)?;
        let mut whole = true;
        loop {
            let length = read(&mut socket, &mut answer)?;
            let seen = each(answer.get(..length).unwrap_or_default(), &mut take)?;
            whole &= seen.whole;
            if seen.last {
                break;
            }
        }
        if whole {
            return Ok(());
        }
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        "it was changed each time that the kernel was asked for it",
    ))
}

/// A socket that was asked this. Without an address, a message goes to the kernel. netlink(7)
fn asked(request: &[u8]) -> io::Result<File> {
    let mut socket: File = sys::route_socket()?;
    socket.write_all(request)?;
    Ok(socket)
}

fn read(socket: &mut File, answer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(answer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// What part of a dump one answer is.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    last: bool,
    /// Nothing was changed while it was made.
    whole: bool,
}

/// Hands over the messages of one answer.
fn each(mut answer: &[u8], take: &mut impl FnMut(&[u8])) -> io::Result<Seen> {
    let mut seen = Seen {
        // An answer that ends here is none, and there would be no end of asking.
        last: answer.is_empty(),
        whole: true,
    };
    while let (Some(length), Some(kind)) = (u32_at(answer, 0), u16_at(answer, 4)) {
        let length = length as usize;
        let message = answer.get(..length).filter(|_| length >= HEADER);
        let message = message.ok_or_else(malformed)?;
        let flags = u16_at(message, 6).unwrap_or_default();
        seen.whole &= flags & NLM_F_DUMP_INTR == 0;
        match kind {
            // Its number is 0, or tells why the dump ends before its time.
            NLMSG_DONE => {
                errno(message)?;
                seen.last = true;
            }
            NLMSG_ERROR => {
                errno(message)?;
                seen.last = true;
                return Ok(seen);
            }
            _ => take(message),
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(seen)
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
    errno(answer)
}

/// The error number that a message begins with; 0 is none.
fn errno(message: &[u8]) -> io::Result<()> {
    match u32_at(message, HEADER).map(u32::cast_signed) {
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
        let seen = |last, whole| Seen { last, whole };
        let two = [&some[..], &some].concat();
        assert_eq!(each(&two, &mut take).unwrap(), seen(false, true));
        let mut end = [&some[..], &done].concat();
        assert_eq!(each(&end, &mut take).unwrap(), seen(true, true));
        assert_eq!(count, 3);
        // Something was changed meanwhile.
        end[6] |= NLM_F_DUMP_INTR as u8;
        assert_eq!(each(&end, &mut |_| ()).unwrap(), seen(true, false));
        // The kernel could not go on.
        let failed = request(NLMSG_DONE, 0, &(-libc::ENOMEM).to_ne_bytes(), &[]);
        let error = each(&failed, &mut |_| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        // A length that leads nowhere.
        assert!(each(&[0; 16], &mut |_| ()).is_err());
    }
}
