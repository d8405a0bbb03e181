//! Requests and answers as they pass over a socket, and what clients demand of an answer's form.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// An answer as it came.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(super) head: String,
    pub(crate) body: Vec<u8>,
    /// All of it came in one piece.
    at_once: bool,
}

impl Answer {
    /// What clients demand of an answer's form.
    pub(super) fn follows(&self, rule: &str) -> bool {
        let line = |start: &str| self.head.split("\r\n").find(|line| line.starts_with(start));
        let length = line("Content-Length: ").map(|line| line["Content-Length: ".len()..].parse());
        match rule {
            "no-reason" => self
                .head
                .split("\r\n")
                .next()
                .is_some_and(|line| line.trim_end().len() == 12),
            "cl-literal" | "cl-present" | "framed" => match self.status {
                204 => length.is_none(),
                _ => length == Some(Ok(self.body.len())),
            },
            "no-body" => self.body.is_empty() && length.is_none(),
            "ct-json" => line("Content-Type: ").is_some_and(|line| line.contains("json")),
            "no-chunked" => line("Transfer-Encoding").is_none(),
            "ascii" => self.head.is_ascii() && self.body.is_ascii(),
            "one-read-1023" => self.at_once && self.head.len() + 4 + self.body.len() <= 1023,
            // Nothing came behind it, or the body had been too long.
            "one-response-per-read" => true,
            other => panic!("no rule is called {other}"),
        }
    }
}

/// Sends bytes with descriptors beside the first of them.
pub(crate) fn send(stream: &UnixStream, text: &str, files: &[BorrowedFd<'_>]) {
    assert!(text.is_empty() || try_send(stream, text, files));
}

/// The same; whether all of it was taken.
pub(crate) fn try_send(stream: &UnixStream, text: &str, files: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    }
    let parts = [IoSlice::new(text.as_bytes())];
    let mut rest = stream;
    sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)
        .is_ok_and(|sent| rest.write_all(&text.as_bytes()[sent..]).is_ok())
}

/// The next answer; none where the connection is closed.
pub(crate) fn receive(stream: &mut UnixStream) -> Option<Answer> {
    let mut bytes = Vec::new();
    let mut reads = 0;
    loop {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let length = head
                .split("\r\n")
                .find_map(|line| line.strip_prefix("Content-Length: "));
            let length = length.map_or(0, |length| length.parse().unwrap());
            let body = &bytes[end + 4..];
            assert!(body.len() <= length, "something comes behind the answer");
            if body.len() == length {
                let status = head.strip_prefix("HTTP/1.1 ").unwrap()[..3]
                    .parse()
                    .unwrap();
                let (body, at_once) = (body.to_vec(), reads == 1);
                return Some(Answer {
                    status,
                    head,
                    body,
                    at_once,
                });
            }
        }
        let mut part = [0; 1023];
        match stream.read(&mut part) {
            Ok(0) => return None,
            Ok(count) => bytes.extend(&part[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => panic!("{error}"),
        }
        reads += 1;
    }
}
