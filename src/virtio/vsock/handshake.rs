//! What a program on the host says first: which port of the guest's it wants. `CONNECT port\n`, as Firecracker and Cloud
//! Hypervisor have it (firecracker, docs/vsock.md).

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// The most bytes of the line, with its end.
const LINE_MOST: usize = 32;

/// A program that has connected and has not said yet what it wants.
#[derive(Debug)]
pub(super) struct Caller {
    stream: UnixStream,
    line: Vec<u8>,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Not all of its line.
    Partly,
    /// The port.
    Port(u32),
    /// What is no such line; or nothing, and it is gone.
    Nonsense,
}

impl Caller {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Reads what it has said, and nothing beyond the line, for that is for the guest.
    pub(super) fn read(&mut self) -> Said {
        loop {
            let mut there = [0; LINE_MOST];
            let count = match recv(&self.stream, &mut there, RecvFlags::PEEK) {
                Ok((0, _)) => return Said::Nonsense,
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Said::Partly,
                Err(_) => return Said::Nonsense,
            };
            let there = there.get(..count).unwrap_or_default();
            let end = there.iter().position(|&byte| byte == b'\n');
            let taken = end.map_or(count, |end| end + 1);
            // What was looked at is there to be read.
            let mut piece = [0; LINE_MOST];
            let Some(room) = piece.get_mut(..taken) else {
                return Said::Nonsense;
            };
            match recv(&self.stream, &mut *room, RecvFlags::empty()) {
                Ok((count, _)) if count == taken => {}
                _ => return Said::Nonsense,
            }
            self.line.extend_from_slice(room);
            if self.line.len() > LINE_MOST {
                return Said::Nonsense;
            }
            if end.is_some() {
                return port(&self.line).map_or(Said::Nonsense, Said::Port);
            }
            if self.line.len() == LINE_MOST {
                return Said::Nonsense;
            }
        }
    }
}

/// The port of a line.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let verb = words.next()?;
    let port = words.next()?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let right = verb.eq_ignore_ascii_case("connect") && digits && words.next().is_none();
    // All ones is any port, which nobody listens at. linux/vm_sockets.h, VMADDR_PORT_ANY
    let port = port.parse().ok().filter(|&port| port != u32::MAX);
    port.filter(|_| right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read as _, Write as _};

    fn pair() -> (UnixStream, Caller) {
        let (program, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        (program, Caller::new(stream))
    }

    #[test]
    fn a_line_in_pieces_is_one_and_what_follows_it_is_left_for_the_guest() {
        let (mut program, mut caller) = pair();
        for byte in b"CONNECT 1024" {
            assert_eq!(caller.read(), Said::Partly);
            program.write_all(&[*byte]).unwrap();
        }
        assert_eq!(caller.read(), Said::Partly);
        program.write_all(b"\nhello\n").unwrap();
        assert_eq!(caller.read(), Said::Port(1024));
        let mut rest = [0; 6];
        caller.into_stream().read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello\n");
    }

    #[test]
    fn a_half_closed_stream_has_said_what_it_said() {
        let (mut program, mut caller) = pair();
        program.write_all(b"CONNECT 5\n").unwrap();
        program.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(caller.read(), Said::Port(5));
    }

    #[test]
    fn a_port_is_a_number_that_a_port_can_have() {
        for (line, expected) in [
            ("CONNECT 0\n", Some(0)),
            ("connect 52\r\n", Some(52)),
            ("CONNECT 4294967294\n", Some(u32::MAX - 1)),
            ("CONNECT 4294967295\n", None),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +5\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT\n", None),
            ("CONNECT 5 6\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(port(line.as_bytes()), expected, "{line}");
        }
    }

    proptest! {
        /// Nothing that a program says is more than one line's memory, or anything but a port or nonsense.
        #[test]
        fn whatever_is_said_ends_in_a_port_or_in_nonsense(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let (mut program, mut caller) = pair();
            program.write_all(&bytes).unwrap();
            drop(program);
            let mut said = caller.read();
            if said == Said::Partly {
                said = caller.read();
            }
            prop_assert!(matches!(said, Said::Nonsense | Said::Port(_)));
            prop_assert!(caller.line.len() <= LINE_MOST);
        }
    }
}
