//! Messages of one number that the `vhost` crate has no call for, or one that means something else: its
//! `get_queue_num` takes a NIC's pairs of queues for queues, and refuses the rings beyond their number.
//! QEMU, docs/interop/vhost-user.rst, "Front-end message types"

use std::io::{self, ErrorKind, Read, Write};

use zerocopy::{FromBytes, IntoBytes};

use super::channel::{Head, NEED_REPLY, Number, REPLY, VERSION};

/// `VHOST_USER_GET_QUEUE_NUM`
pub(super) const GET_QUEUE_NUM: u32 = 17;
/// `VHOST_USER_NET_SET_MTU`
pub(super) const NET_SET_MTU: u32 = 20;

/// Asks for a number.
///
/// # Errors
/// The back end has gone, or its answer is none (`InvalidData`).
pub(super) fn get(mut stream: impl Read + Write, request: u32) -> io::Result<u64> {
    let head = Head {
        request: request.into(),
        flags: VERSION.into(),
        size: 0.into(),
    };
    stream.write_all(head.as_bytes())?;
    answer(stream, request)
}

/// Says a number, and waits until the back end has it, where it `acknowledges` that.
///
/// # Errors
/// As [`get`], or the back end has refused it (`Unsupported`).
pub(super) fn set(
    mut stream: impl Read + Write,
    request: u32,
    value: u64,
    acknowledges: bool,
) -> io::Result<()> {
    let wanted = if acknowledges { NEED_REPLY } else { 0 };
    let message = Number {
        head: Head {
            request: request.into(),
            flags: (VERSION | wanted).into(),
            size: (size_of::<u64>() as u32).into(),
        },
        value: value.into(),
    };
    stream.write_all(message.as_bytes())?;
    if acknowledges && answer(stream, request)? != 0 {
        let refused = format!("the back end refuses {value}");
        return Err(io::Error::new(ErrorKind::Unsupported, refused));
    }
    Ok(())
}

fn answer(mut stream: impl Read, request: u32) -> io::Result<u64> {
    let mut bytes = [0; size_of::<Number>()];
    stream.read_exact(&mut bytes)?;
    let expected = [request, VERSION | REPLY, size_of::<u64>() as u32];
    let number = Number::read_from_bytes(&bytes).ok().filter(|number| {
        let Head {
            request,
            flags,
            size,
        } = number.head;
        [request.get(), flags.get() & (3 | REPLY), size.get()] == expected
    });
    let number = number
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "what came is no answer to that"))?;
    Ok(number.value.get())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;

    fn message(words: [u32; 3], value: Option<u64>) -> Vec<u8> {
        let value = value.map(u64::to_ne_bytes);
        let value = value.iter().flatten().copied();
        let words = words.map(u32::to_ne_bytes).concat();
        words.into_iter().chain(value).collect()
    }

    /// What is sent where the back end's word is `answer`, and what comes of it.
    fn with<T>(
        answer: &[u8],
        ask: impl FnOnce(&UnixStream) -> io::Result<T>,
    ) -> (Vec<u8>, io::Result<T>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let result = ask(&ours);
        drop(ours);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).unwrap();
        (sent, result)
    }

    #[test]
    fn a_number_is_asked_for_and_said_as_the_protocol_has_it() {
        let three = message([17, 5, 8], Some(3));
        let (sent, got) = with(&three, |stream| get(stream, GET_QUEUE_NUM));
        assert_eq!(sent, message([17, 1, 0], None));
        assert_eq!(got.unwrap(), 3);
        let done = message([20, 5, 8], Some(0));
        let (sent, said) = with(&done, |stream| set(stream, NET_SET_MTU, 9000, true));
        assert_eq!(sent, message([20, 9, 8], Some(9000)));
        said.unwrap();
        let refused = message([20, 5, 8], Some(1));
        let (_, said) = with(&refused, |stream| set(stream, NET_SET_MTU, 9000, true));
        assert_eq!(said.unwrap_err().kind(), ErrorKind::Unsupported);
        let (sent, said) = with(&[], |stream| set(stream, NET_SET_MTU, 9000, false));
        assert_eq!(sent, message([20, 1, 8], Some(9000)));
        said.unwrap();
    }

    proptest! {
        #[test]
        fn what_is_no_answer_to_the_question_is_refused(
            words in any::<[u32; 3]>(), value: u64, cut in 0_usize..20,
        ) {
            prop_assume!(words[0] != 17 || words[2] != 8 || words[1] & 7 != 5);
            let whole = message(words, Some(value));
            let (_, got) = with(&whole, |stream| get(stream, GET_QUEUE_NUM));
            prop_assert_eq!(got.unwrap_err().kind(), ErrorKind::InvalidData);
            let right = message([17, 5, 8], Some(value));
            let (_, got) = with(&right[..cut], |stream| get(stream, GET_QUEUE_NUM));
            prop_assert_eq!(got.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }
}
