//! HTTP/1.1 (RFC 9112) as far as clients of a VMM's control socket speak it: requests with a bounded
//! head and body, answers with a length.
//!
//! An answer's head is byte for byte what Cloud Hypervisor's is, for its clients read it literally: no
//! reason phrase, these names in this case, `Content-Length` wherever there is a body.

use std::io;

use httparse::{EMPTY_HEADER, Header, Status};

use super::wire::Wire;
use crate::machine::Files;
use crate::shortage;

/// The most bytes of a request's head, and of the trailers behind a chunked body.
pub(super) const HEAD_MOST: usize = 16 << 10;
/// The most bytes of a request's body.
pub(super) const BODY_MOST: usize = 4 << 20;
/// The most header lines of a request.
const HEADERS_MOST: usize = 64;
/// The most bytes of the line before a chunk.
const CHUNK_LINE_MOST: usize = 256;

/// Sent to a client that asks before it sends a body. RFC 9110 §10.1.1
const CONTINUE: &[u8] = b"HTTP/1.1 100 \r\n\r\n";

/// A request that has come whole.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// The target without scheme and host.
    pub(super) path: String,
    /// Empty where there is none.
    pub(super) body: Vec<u8>,
    /// The client wants the connection to be closed after the answer.
    pub(super) close: bool,
    /// The descriptors that came beside it.
    pub(super) files: Files,
}

/// What a request is answered with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// None: an answer without a length, as 204 has to be.
    pub(super) body: Option<Vec<u8>>,
    /// What the body is; JSON is in ASCII.
    pub(super) content_type: &'static str,
}

/// What nearly every body is.
pub(super) const JSON: &str = "application/json";

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// The connection is of no use any more.
    #[error(transparent)]
    Gone(io::Error),
    /// What came is no request that is taken.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Why what came is no request that is taken. The connection ends with it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// this is no HTTP/1.1 request: {0}
    #[error("this is no HTTP/1.1 request: {0}")]
    Syntax(httparse::Error),
    /// {0}
    #[error("this is no HTTP/1.1 request: {0}")]
    Framing(&'static str),
    /// the request's head is too long
    #[error("the request's head has more than {HEAD_MOST} bytes, or {HEADERS_MOST} header lines")]
    Head,
    /// the request's body is too long
    #[error("the request's body has more than {BODY_MOST} bytes")]
    Body,
    /// the request did not come whole in time
    #[error("the request did not come whole in time")]
    Slow,
    /// descriptors that came with the request could not be taken
    #[error(
        "descriptors that came with the request could not be taken: {}",
        shortage::explained(&io::Error::from_raw_os_error(libc::EMFILE))
    )]
    Files,
}

impl Refusal {
    /// RFC 9110 §15.5, RFC 6585 §5
    pub(super) fn status(&self) -> u16 {
        match self {
            Self::Syntax(_) | Self::Framing(_) => 400,
            Self::Slow => 408,
            Self::Body => 413,
            Self::Head => 431,
            Self::Files => 503,
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Refusal::Slow.into(),
            _ => Self::Gone(error),
        }
    }
}

/// Receives a request, of which the first bytes may be there already.
pub(super) fn receive(wire: &mut Wire) -> Result<Request, Trouble> {
    let head = receive_head(wire)?;
    let mut request = head.request;
    // Whoever has begun to send does not wait for the word.
    if head.expects && wire.rest().is_empty() {
        wire.send(CONTINUE).map_err(Trouble::Gone)?;
    }
    match head.length {
        Length::Bytes(count) => receive_bytes(wire, count, &mut request.body)?,
        Length::Chunked => receive_chunks(wire, &mut request.body)?,
    }
    if wire.has_lost_files() {
        return Err(Refusal::Files.into());
    }
    request.files = wire.take_files().into();
    Ok(request)
}

/// What a request's first lines say.
#[derive(Debug)]
struct Head {
    request: Request,
    length: Length,
    /// The client waits for [`CONTINUE`] before it sends the body.
    expects: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Bytes(usize),
    Chunked,
}

fn receive_head(wire: &mut Wire) -> Result<Head, Trouble> {
    loop {
        let mut headers = [EMPTY_HEADER; HEADERS_MOST];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(wire.rest()) {
            Ok(Status::Complete(length)) if length <= HEAD_MOST => {
                let head = Head::of(&request)?;
                wire.take(length);
                return Ok(head);
            }
            Ok(Status::Complete(_)) | Err(httparse::Error::TooManyHeaders) => {
                return Err(Refusal::Head.into());
            }
            Ok(Status::Partial) if wire.rest().len() >= HEAD_MOST => {
                return Err(Refusal::Head.into());
            }
            Ok(Status::Partial) => wire.more()?,
            Err(error) => return Err(Refusal::Syntax(error).into()),
        }
    }
}

impl Head {
    fn of(request: &httparse::Request<'_, '_>) -> Result<Self, Refusal> {
        let is_1_1 = request.version == Some(1);
        let (mut keep, mut close, mut expects) = (false, false, false);
        let mut length: Option<Length> = None;
        for header in request.headers.iter() {
            let named = |name| header.name.eq_ignore_ascii_case(name);
            if named("Content-Length") {
                let this = Length::Bytes(content_length(header)?);
                if length.is_some_and(|length| length != this) {
                    return Err(Refusal::Framing("it has two lengths"));
                }
                length = Some(this);
            } else if named("Transfer-Encoding") {
                if length.is_some() {
                    return Err(Refusal::Framing("it has two lengths"));
                }
                if !is_1_1 || !header.value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                    return Err(Refusal::Framing("a Transfer-Encoding other than chunked"));
                }
                length = Some(Length::Chunked);
            } else if named("Expect") {
                expects = header
                    .value
                    .trim_ascii()
                    .eq_ignore_ascii_case(b"100-continue");
                if !expects {
                    return Err(Refusal::Framing("an Expect other than 100-continue"));
                }
            } else if named("Connection") {
                let mut words = header.value.split(|byte| *byte == b',');
                close |= words
                    .clone()
                    .any(|word| word.trim_ascii().eq_ignore_ascii_case(b"close"));
                keep |= words.any(|word| word.trim_ascii().eq_ignore_ascii_case(b"keep-alive"));
            }
        }
        let length = length.unwrap_or(Length::Bytes(0));
        Ok(Self {
            request: Request {
                method: request.method.unwrap_or_default().to_owned(),
                path: path(request.path.unwrap_or_default()).to_owned(),
                body: Vec::new(),
                close: close || !is_1_1 && !keep,
                files: Files::default(),
            },
            length,
            // Where no body comes there is nothing to wait for, and some clients take the first answer
            // for the last.
            expects: expects && is_1_1 && length != Length::Bytes(0),
        })
    }
}

fn content_length(header: &Header<'_>) -> Result<usize, Refusal> {
    let digits = header.value.trim_ascii();
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::Framing("its Content-Length is no number"));
    }
    // All digits: what does not parse is too large.
    let length = std::str::from_utf8(digits)
        .ok()
        .and_then(|d| d.parse().ok());
    length
        .filter(|length| *length <= BODY_MOST)
        .ok_or(Refusal::Body)
}

/// The target without scheme and host, which some clients write as well (RFC 9112 §3.2.2).
fn path(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else {
        return target;
    };
    rest.find('/')
        .and_then(|slash| rest.get(slash..))
        .unwrap_or("/")
}

/// Moves `count` bytes into `body`.
fn receive_bytes(wire: &mut Wire, count: usize, body: &mut Vec<u8>) -> Result<(), Trouble> {
    let mut left = count;
    while left > 0 {
        let there = wire.rest();
        let part = there.get(..left.min(there.len())).unwrap_or_default();
        body.extend_from_slice(part);
        let took = part.len();
        left = left.saturating_sub(took);
        wire.take(took);
        if left > 0 {
            wire.more()?;
        }
    }
    Ok(())
}

/// RFC 9112 §7.1
fn receive_chunks(wire: &mut Wire, body: &mut Vec<u8>) -> Result<(), Trouble> {
    loop {
        let size = receive_chunk_size(wire)?;
        if size == 0 {
            return receive_trailers(wire);
        }
        let room = BODY_MOST.saturating_sub(body.len());
        let size = usize::try_from(size)
            .ok()
            .filter(|size| *size <= room)
            .ok_or(Refusal::Body)?;
        receive_bytes(wire, size, body)?;
        while wire.rest().len() < 2 {
            wire.more()?;
        }
        if !wire.rest().starts_with(b"\r\n") {
            return Err(Refusal::Framing("a chunk is longer than it says").into());
        }
        wire.take(2);
    }
}

fn receive_chunk_size(wire: &mut Wire) -> Result<u64, Trouble> {
    const WRONG: Refusal = Refusal::Framing("a chunk's size is no number");
    loop {
        let there = wire.rest();
        if there.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) {
            return Err(WRONG.into());
        }
        match httparse::parse_chunk_size(there) {
            Ok(Status::Complete((length, size))) => {
                wire.take(length);
                return Ok(size);
            }
            Ok(Status::Partial) if there.len() < CHUNK_LINE_MOST => wire.more()?,
            Ok(Status::Partial) | Err(_) => return Err(WRONG.into()),
        }
    }
}

/// The lines behind the last chunk, of which none means anything here.
fn receive_trailers(wire: &mut Wire) -> Result<(), Trouble> {
    loop {
        let mut headers = [EMPTY_HEADER; HEADERS_MOST];
        match httparse::parse_headers(wire.rest(), &mut headers) {
            Ok(Status::Complete((length, _))) if length <= HEAD_MOST => {
                wire.take(length);
                return Ok(());
            }
            Ok(Status::Partial) if wire.rest().len() < HEAD_MOST => wire.more()?,
            Ok(_) | Err(httparse::Error::TooManyHeaders) => return Err(Refusal::Head.into()),
            Err(error) => return Err(Refusal::Syntax(error).into()),
        }
    }
}

impl Answer {
    /// The bytes that are sent. To `HEAD` an answer has no body. RFC 9110 §9.3.2
    pub(super) fn encode(&self, close: bool, head_only: bool) -> Vec<u8> {
        let connection = if close { "close" } else { "keep-alive" };
        let mut text = format!(
            "HTTP/1.1 {} \r\nServer: Cloud Hypervisor API\r\nConnection: {connection}\r\n",
            self.status
        )
        .into_bytes();
        let body = match &self.body {
            Some(_) if head_only => Some(&[][..]),
            body => body.as_deref(),
        };
        if let Some(body) = body {
            let (kind, length) = (self.content_type, body.len());
            let lines = format!("Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n");
            text.extend_from_slice(lines.as_bytes());
            text.extend_from_slice(body);
        } else {
            text.extend_from_slice(b"\r\n");
        }
        text
    }
}
