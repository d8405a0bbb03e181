//! The other end of a control socket: one request, and its answer.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use busway_iommu::effective_user;
use httparse::{EMPTY_HEADER, Status};
use serde_json::Value;

use super::http::{BODY_MOST, HEAD_MOST};
use super::metrics::PATH as METRICS;
use super::v1::PREFIX;
use super::wire::{Limits, Wire};
use crate::exit::{RUNTIME, USAGE};
use crate::unix_socket::connect_within;

/// The most header lines of an answer.
const HEADERS_MOST: usize = 64;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// there is no such socket
    #[error(
        "{}: there is no such socket: name the one that `busway run --api-socket` was given",
        .0.display()
    )]
    Absent(PathBuf),
    /// it is no socket
    #[error(
        "{}: it is no socket: name the one that `busway run --api-socket` was given", .0.display()
    )]
    NoSocket(PathBuf),
    /// the user may not
    #[error(
        "{}: it belongs to user {owner}, and you are user {user}, who may not use it: run this as \
         the user who runs the VM, or as root",
        path.display()
    )]
    Denied {
        /// The socket.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// The effective user id of this process.
        user: u32,
    },
    /// nobody listens
    #[error(
        "{}: nobody listens there: the VM whose socket it was has ended without removing it; the next \
         VM with this --api-socket takes its place",
        .0.display()
    )]
    Dead(PathBuf),
    /// no answer in time
    #[error(
        "{}: no answer in {} s: the VM is stuck, or stopped by a signal (state T in `ps`); what was asked \
         may still be done",
        path.display(), limit.as_secs()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// the connection failed
    #[error("{}: {source}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// the answer is none
    #[error("{}: what listens there is not a VM's control socket: {what}", path.display())]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// What is wrong with its answer.
        what: &'static str,
    },
    /// the VM refused
    #[error("{}: {}", path.display(), messages.join(": "))]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The answer's HTTP status.
        status: u16,
        /// Why, from what failed to its root cause.
        messages: Vec<String>,
    },
}

impl ClientError {
    /// The status to exit with, of [`crate::exit`].
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Absent(_) | Self::NoSocket(_) | Self::Foreign { .. } => USAGE,
            _ => RUNTIME,
        }
    }
}

/// Asks the VM that listens at `socket`: `method` and the endpoint's name, such as `vm.info`, with a body where one is
/// wanted. Gives the JSON that it answers, or null where it has nothing to say.
///
/// # Errors
/// [`ClientError`]
pub fn ask(
    socket: &Path,
    method: &str,
    name: &str,
    body: Option<&Value>,
    limit: Duration,
) -> Result<Value, ClientError> {
    ask_with(socket, method, name, body, None, limit)
}

/// The same, with a descriptor that is sent beside the request.
///
/// # Errors
/// [`ClientError`]
pub fn ask_with(
    socket: &Path,
    method: &str,
    name: &str,
    body: Option<&Value>,
    file: Option<OwnedFd>,
    limit: Duration,
) -> Result<Value, ClientError> {
    let target = format!("{PREFIX}{name}");
    let (status, body) = exchange(socket, method, &target, body, file, limit)?;
    match status {
        200 | 204 if body.is_empty() => Ok(Value::Null),
        200 => serde_json::from_slice(&body).map_err(|_| ClientError::Foreign {
            path: socket.to_owned(),
            what: "it answers with something other than JSON",
        }),
        _ => Err(refused(socket, status, &body)),
    }
}

/// Asks the VM that listens at `socket` for its metrics, a text in the OpenMetrics format.
///
/// # Errors
/// [`ClientError`]
pub fn metrics(socket: &Path, limit: Duration) -> Result<String, ClientError> {
    let (status, body) = exchange(socket, "GET", METRICS, None, None, limit)?;
    match status {
        200 => String::from_utf8(body).map_err(|_| ClientError::Foreign {
            path: socket.to_owned(),
            what: "it answers with something other than text",
        }),
        _ => Err(refused(socket, status, &body)),
    }
}

fn refused(socket: &Path, status: u16, body: &[u8]) -> ClientError {
    ClientError::Refused {
        path: socket.to_owned(),
        status,
        messages: serde_json::from_slice(body)
            .unwrap_or_else(|_| vec![format!("it answers with HTTP status {status}")]),
    }
}

/// One request, and the status and body of its answer.
fn exchange(
    socket: &Path,
    method: &str,
    target: &str,
    body: Option<&Value>,
    file: Option<OwnedFd>,
    limit: Duration,
) -> Result<(u16, Vec<u8>), ClientError> {
    let failed = |error: io::Error| explain(socket, limit, error);
    let stream = connect_within(socket, limit).map_err(failed)?;
    let limits = Limits {
        between: limit,
        whole: limit,
        linger: Duration::ZERO,
    };
    let mut wire = Wire::new(stream, limits);
    wire.begin();
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"),
    };
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\
         {length}Connection: close\r\n\r\n{body}"
    );
    let sent = match file {
        Some(file) => wire.send_with(request.as_bytes(), &file),
        None => wire.send(request.as_bytes()),
    };
    // A VM that does not serve the connection may have said why, and closed it, before it was asked.
    let unasked = match sent {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Some(error),
        sent => sent.map(|()| None).map_err(failed)?,
    };
    receive(&mut wire).map_err(|trouble| match (unasked, trouble) {
        (Some(error), _) | (None, Trouble::Io(error)) => failed(error),
        (None, Trouble::Foreign(what)) => ClientError::Foreign {
            path: socket.to_owned(),
            what,
        },
    })
}

/// What an error of the connection's means.
pub(super) fn explain(socket: &Path, limit: Duration, source: io::Error) -> ClientError {
    let path = socket.to_owned();
    let there = fs::metadata(socket);
    match source.kind() {
        io::ErrorKind::NotFound => ClientError::Absent(path),
        io::ErrorKind::ConnectionRefused => match there {
            Ok(there) if !there.file_type().is_socket() => ClientError::NoSocket(path),
            _ => ClientError::Dead(path),
        },
        io::ErrorKind::PermissionDenied => match there {
            Ok(there) => ClientError::Denied {
                path,
                owner: there.uid(),
                user: effective_user(),
            },
            Err(_) => ClientError::Broken { path, source },
        },
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => ClientError::Silent { path, limit },
        _ => ClientError::Broken { path, source },
    }
}

enum Trouble {
    Io(io::Error),
    Foreign(&'static str),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Foreign("it closes the connection unanswered"),
            _ => Self::Io(error),
        }
    }
}

/// An answer's status and body.
fn receive(wire: &mut Wire) -> Result<(u16, Vec<u8>), Trouble> {
    let (status, length) = loop {
        let mut headers = [EMPTY_HEADER; HEADERS_MOST];
        let mut response = httparse::Response::new(&mut headers);
        match response.parse(wire.rest()) {
            Ok(Status::Complete(head)) => {
                let length = response
                    .headers
                    .iter()
                    .find(|header| header.name.eq_ignore_ascii_case("Content-Length"))
                    .map_or(Some(0), |header| {
                        std::str::from_utf8(header.value).ok()?.trim().parse().ok()
                    });
                let status = response.code.unwrap_or_default();
                wire.take(head);
                break (status, length);
            }
            Ok(Status::Partial) if wire.rest().len() < HEAD_MOST => wire.more()?,
            Ok(Status::Partial) | Err(_) => {
                return Err(Trouble::Foreign("it does not speak HTTP"));
            }
        }
    };
    let length = length
        .filter(|length: &usize| *length <= BODY_MOST)
        .ok_or(Trouble::Foreign("its answer has no length, or is too long"))?;
    while wire.rest().len() < length {
        wire.more()?;
    }
    Ok((status, wire.rest().iter().copied().take(length).collect()))
}
