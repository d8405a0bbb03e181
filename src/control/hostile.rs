//! Clients that do as they please: [`request`] takes any bytes as what one of them writes, has a process without a VM
//! answer, and panics where something does not hold that always has to.
//!
//! The tests beside this file play random bytes and what known clients write; `tests/fuzz` what reaches new code.

use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::End;
use super::connections::Service as _;
use super::http::{self, Answer, Request, Trouble};
use super::v1::{Api, ENDPOINTS, PREFIX};
use super::wire::{Limits, Wire};
use crate::machine::{self, Control, Extent, Requests};

/// A client is not waited for: all that it says is there at once.
const LIMITS: Limits = Limits {
    between: Duration::from_secs(1),
    whole: Duration::from_secs(1),
    linger: Duration::from_secs(1),
};
/// The most bytes of a story: a socket has room for them without a reader.
const MOST: usize = 64 << 10;

/// What would take something from the host, or end the process that answers.
const LEFT_OUT: [&str; 2] = ["vm.boot", "vmm.shutdown"];

/// A process that is told what to do, of which each test and each story asks.
fn process() -> &'static Control {
    static PROCESS: OnceLock<Control> = OnceLock::new();
    PROCESS.get_or_init(|| {
        let requests = Requests::new().expect("an eventfd");
        let control = requests.control();
        std::thread::spawn(move || {
            machine::serve(
                None,
                true,
                None,
                machine::ProcessBounds::default(),
                requests,
            )
        });
        control
    })
}

/// Plays what a client writes on one connection. The first byte says how many descriptors come beside the rest.
///
/// # Panics
/// An answer is not of those that are described, or a descriptor is left open.
pub fn request(story: &[u8]) {
    let Some((&first, text)) = story.split_first() else {
        return;
    };
    let text = text.get(..MOST).unwrap_or(text);
    let control = process();
    let api = Api::new(control.clone(), Arc::new(End::default()));
    let (client, server) = UnixStream::pair().expect("a pair of sockets");
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let files = [writer.as_fd(); 3];
    let count = usize::from(first % 4);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control_message = SendAncillaryBuffer::new(&mut space);
    if count > 0 {
        control_message.push(SendAncillaryMessage::ScmRights(
            files.get(..count).unwrap_or_default(),
        ));
    }
    let sent = sendmsg(
        &client,
        &[IoSlice::new(text)],
        &mut control_message,
        SendFlags::NOSIGNAL,
    );
    assert!(sent == Ok(text.len()), "the story does not fit: {sent:?}");
    client.shutdown(Shutdown::Write).expect("a socket");
    drop(writer);
    let mut wire = Wire::new(server, LIMITS);
    while !wire.rest().is_empty() || wire.wait().unwrap_or(false) {
        wire.begin();
        match http::receive(&mut wire) {
            Ok(request) => {
                let endpoint = request.path.strip_prefix(PREFIX).unwrap_or_default();
                if !LEFT_OUT.contains(&endpoint) {
                    check(&request, &api.answer(&request));
                }
                if request.close {
                    break;
                }
            }
            Err(Trouble::Refused(refusal)) => {
                let status = refusal.status();
                assert!([400, 408, 413, 431].contains(&status), "{status}");
                is_text(&api.refuse(status, &refusal.to_string()));
                break;
            }
            Err(Trouble::Gone(_)) => break,
        }
    }
    drop((wire, client));
    let _there = control.ask(machine::Request::End(Extent::Definition));
    // Its end, as soon as no copy of the writer is open any more.
    assert_eq!(reader.read(&mut [0]).ok(), Some(0), "a descriptor is left");
}

/// An answer is one of those that its endpoint can have.
fn check(request: &Request, answer: &Answer) {
    let name = request.path.strip_prefix(PREFIX);
    let endpoint = name.and_then(|name| ENDPOINTS.iter().find(|one| one.name == name));
    let statuses = endpoint.map_or(&[404][..], |endpoint| endpoint.statuses());
    let status = answer.status;
    assert!(
        statuses.contains(&status),
        "{} {}: {status}",
        request.method,
        request.path
    );
    assert_eq!(answer.body.is_none(), status == 204, "{}", request.path);
    is_text(answer);
}

/// What clients read: JSON in ASCII, with texts that say something where something is wrong.
fn is_text(answer: &Answer) {
    let Some(body) = answer.body.as_deref().filter(|body| !body.is_empty()) else {
        return;
    };
    assert!(body.is_ascii());
    let value: serde_json::Value = serde_json::from_slice(body).expect("JSON");
    if answer.status >= 400 {
        let texts = value.as_array().expect("a list");
        let says = |text: &serde_json::Value| text.as_str().is_some_and(|text| !text.is_empty());
        assert!(!texts.is_empty() && texts.iter().all(says), "{value}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What known clients send (`tests/kvm/clients`), each request on its own.
    fn known() -> Vec<String> {
        [
            include_str!("../../tests/kvm/clients/ch-remote.jsonl"),
            include_str!("../../tests/kvm/clients/kata-go.jsonl"),
            include_str!("../../tests/kvm/clients/kata-rs.jsonl"),
            include_str!("../../tests/kvm/clients/libvirt-11.jsonl"),
            include_str!("../../tests/kvm/clients/libvirt-9.jsonl"),
            include_str!("../../tests/kvm/clients/libvirt-main.jsonl"),
            include_str!("../../tests/kvm/clients/virtink.jsonl"),
        ]
        .iter()
        .flat_map(|file| file.lines())
        .filter_map(|line| {
            let step: serde_json::Value = serde_json::from_str(line).unwrap();
            let (method, name) = step["ask"].as_str()?.split_once(' ')?;
            let body = step["body"].as_str().unwrap_or_default();
            let mut text = format!("{method} /api/v1/{name} HTTP/1.1\r\n");
            for header in step["headers"].as_array()? {
                let header = header.as_str()?.replace("${LEN}", &body.len().to_string());
                text += &format!("{header}\r\n");
            }
            Some(text + "\r\n" + body)
        })
        .collect()
    }

    /// Requests of one client on one connection, with some bytes of them changed.
    fn story() -> impl Strategy<Value = Vec<u8>> {
        let known = known();
        let one = prop::sample::select(known).prop_map(String::into_bytes);
        let part = prop_oneof![4 => one, 1 => prop::collection::vec(any::<u8>(), 0..40)];
        let change = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
        (any::<u8>(), prop::collection::vec(part, 1..5), change).prop_map(
            |(files, parts, changes)| {
                let mut bytes = [vec![files], parts.concat()].concat();
                for (at, byte) in changes {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
                bytes
            },
        )
    }

    #[test]
    fn whatever_a_client_writes_the_answers_are_described_and_no_descriptor_is_left() {
        for text in known() {
            for files in [0, 1] {
                request(&[&[files][..], text.as_bytes()].concat());
            }
        }
        let mut runner = proptest::test_runner::TestRunner::default();
        runner
            .run(&story(), |story| {
                request(&story);
                Ok(())
            })
            .unwrap();
    }
}
