//! The channel on which a back end asks something of its front end, of its own accord.
//! QEMU, docs/interop/vhost-user.rst, "Back-end communication".

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most bytes of a message's body. Nothing that is known has more than a few.
const MOST: usize = 4096;
/// Reads of one turn, so that a back end that never stops talking does not keep its listener from all else.
const READS: usize = 16;

/// The version of the protocol in a message's flags, the flag of an answer, and that of a message that wants one.
pub(super) const VERSION: u32 = 1;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`
const CONFIG_CHANGE: u32 = 2;

/// A message's head.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    pub(super) request: U32,
    pub(super) flags: U32,
    pub(super) size: U32,
}

/// A message of one number. As an answer it is 0 where what was asked for is done.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Number {
    pub(super) head: Head,
    pub(super) value: U64,
}

/// What came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// The configuration is another.
    pub(super) config_changed: bool,
    /// The channel is of no use any more: it was closed, or what came is no message.
    pub(super) over: bool,
}

/// The front end's half of the channel.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// A message's beginning.
    bytes: Vec<u8>,
}

impl Channel {
    /// The channel, and the half that is the back end's.
    ///
    /// # Errors
    /// socketpair(2)'s
    pub(super) fn new() -> std::io::Result<(Self, UnixStream)> {
        let (stream, other) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let bytes = Vec::new();
        Ok((Self { stream, bytes }, other))
    }

    /// Answers what has come, without waiting for more. Descriptors that come along are closed by the kernel, as they
    /// are not asked for.
    pub(super) fn serve(&mut self) -> Said {
        let (mut said, mut piece) = (Said::default(), [0; 512]);
        for _ in 0..READS {
            match self.stream.read(&mut piece) {
                Ok(0) => said.over = true,
                Ok(count) => {
                    self.bytes
                        .extend_from_slice(piece.get(..count).unwrap_or_default());
                    self.take_messages(&mut said);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => said.over = true,
            }
            if said.over {
                break;
            }
        }
        said
    }

    fn take_messages(&mut self, said: &mut Said) {
        while let Ok((head, _)) = Head::read_from_prefix(&self.bytes) {
            let size = usize::try_from(head.size.get()).unwrap_or(usize::MAX);
            if size > MOST || head.flags.get() & 3 != VERSION {
                said.over = true;
                return;
            }
            let whole = size_of::<Head>().saturating_add(size);
            if self.bytes.len() < whole {
                return;
            }
            self.bytes.drain(..whole);
            said.config_changed |= head.request.get() == CONFIG_CHANGE;
            if head.flags.get() & NEED_REPLY != 0 && !self.answer(head) {
                said.over = true;
                return;
            }
        }
    }

    /// Whether the back end was answered: one that does not read is not waited for.
    fn answer(&mut self, asked: Head) -> bool {
        let answer = Number {
            head: Head {
                request: asked.request,
                flags: (VERSION | REPLY).into(),
                size: (size_of::<U64>() as u32).into(),
            },
            value: u64::from(asked.request.get() != CONFIG_CHANGE).into(),
        };
        let bytes = answer.as_bytes();
        matches!(self.stream.write(bytes), Ok(count) if count == bytes.len())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let size = body.len() as u32;
        let head = [request, flags, size].map(u32::to_ne_bytes).concat();
        [&head, body].concat()
    }

    #[test]
    fn a_change_is_heard_in_pieces_and_answered_where_that_is_wanted() {
        let (mut channel, mut back_end) = Channel::new().unwrap();
        assert_eq!(channel.serve(), Said::default());
        for byte in message(CONFIG_CHANGE, VERSION, &[]) {
            assert_eq!(channel.serve(), Said::default());
            back_end.write_all(&[byte]).unwrap();
        }
        assert!(channel.serve().config_changed);
        let two = [
            message(3, VERSION | NEED_REPLY, &[7; 24]),
            message(CONFIG_CHANGE, VERSION | NEED_REPLY, &[]),
        ];
        back_end.write_all(&two.concat()).unwrap();
        assert!(channel.serve().config_changed);
        let mut answers = [0; 40];
        back_end.read_exact(&mut answers).unwrap();
        let done = |request, value: u64| message(request, VERSION | REPLY, &value.to_ne_bytes());
        assert_eq!(
            answers.to_vec(),
            [done(3, 1), done(CONFIG_CHANGE, 0)].concat()
        );
    }

    #[test]
    fn what_is_no_message_ends_the_channel_and_so_does_who_closes_it_or_reads_no_answers() {
        for bytes in [
            message(2, 0, &[]),
            message(2, 2, &[]),
            [2, VERSION, 4097].map(u32::to_ne_bytes).concat(),
            [2, VERSION, u32::MAX].map(u32::to_ne_bytes).concat(),
        ] {
            let (mut channel, mut back_end) = Channel::new().unwrap();
            back_end.write_all(&bytes).unwrap();
            assert!(channel.serve().over, "{bytes:?}");
        }
        let (mut channel, back_end) = Channel::new().unwrap();
        drop(back_end);
        assert!(channel.serve().over);
        let (mut channel, mut back_end) = Channel::new().unwrap();
        let asks = message(9, VERSION | NEED_REPLY, &[]).repeat(10);
        let over = (0..100_000).any(|_| {
            back_end.write_all(&asks).unwrap();
            channel.serve().over
        });
        assert!(over);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_bounded(pieces in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 1..300), 0..20)) {
            let (mut channel, mut back_end) = Channel::new().unwrap();
            for piece in pieces {
                back_end.write_all(&piece).unwrap();
                let over = channel.serve().over;
                prop_assert!(channel.bytes.len() <= MOST + 1024);
                if over {
                    break;
                }
            }
        }
    }
}
