//! The device over pauses, resets and moves, its socket, and what there is room for.

use std::collections::VecDeque;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use zerocopy::IntoBytes as _;

use super::super::EVENT_QUEUE;
use super::super::hub::{PEERS_MOST, RESETS_MOST};
use super::super::packet::{HEADER_SIZE, Key, Op};
use super::super::socket::SocketDevice;
use super::{BUFFERS, CID, Guest, from_host, line, rest};
use crate::virtio::spec::vsock;

#[test]
fn connections_go_on_over_a_pause_and_end_with_a_reset_and_the_socket_is_there_all_the_time() {
    let mut guest = Guest::new();
    // Before there is a driver.
    let mut early = guest.connect();
    early.write_all(b"CONNECT 5\n").unwrap();
    guest.start();
    let key = from_host(&guest.packet().0);
    guest.send(key, Op::Response);
    assert_eq!(line(&mut early), format!("OK {}\n", key.host));
    for round in 0..3 {
        guest.driver.function.pause();
        early.write_all(&[round]).unwrap();
        let mut waiting = guest.connect();
        writeln!(waiting, "CONNECT {}", 50 + round).unwrap();
        guest.driver.function.resume();
        let (mut data, mut request) = (None, None);
        while data.is_none() || request.is_none() {
            let (header, bytes) = guest.packet();
            match Op::of(&header) {
                Some(Op::Rw) => data = Some(bytes),
                op => {
                    assert_eq!(op, Some(Op::Request));
                    request = Some(from_host(&header));
                }
            }
        }
        let asked = 50 + u32::from(round);
        let host = request.unwrap();
        assert_eq!((data, host.guest), (Some(vec![round]), asked));
        // It is not wanted.
        guest.send(host, Op::Rst);
        assert!(rest(&waiting).is_empty());
    }
    let listener = guest.listen(7);
    for _ in 0..20 {
        let key = Key { host: 7, guest: 8 };
        let program = guest.guest_connects(key, &listener);
        guest.data(key, b"x");
        guest.restart();
        assert!(
            program
                .set_read_timeout(Some(Duration::from_secs(10)))
                .is_ok()
        );
        assert_eq!(rest(&program), b"x");
        guest.send(key, Op::Rw);
        guest.expect(key, Op::Rst);
    }
    assert!(rest(&early).is_empty());
    guest.program_connects(5);
}

#[test]
fn a_driver_that_finds_itself_on_another_device_hears_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let mut events = guest.driver.queue(EVENT_QUEUE, BUFFERS);
    guest.start();
    let at = guest.driver.alloc(4);
    guest.driver.write(at, &[0xff; 4]);
    events.submit(&[(at, 4, true)]);
    guest.driver.notify(&events);
    let (key, _program) = guest.program_connects(5);
    // A pause is no such thing.
    guest.driver.function.pause();
    guest.driver.function.resume();
    guest.expect_nothing();
    assert!(events.poll_used().is_none());
    let other = guest.folder.path().join("other");
    let device = SocketDevice::new("vsock0", CID, &other).unwrap();
    guest.driver.move_to(device);
    guest.driver.function.resume();
    assert_eq!(events.wait_used().1, 4);
    assert_eq!(guest.driver.read(at, 4), [0; 4]);
    guest.send(key, Op::Rw);
    guest.expect(key, Op::Rst);
}

#[test]
fn a_socket_that_somebody_listens_at_is_not_taken_and_one_that_nobody_does_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let first = SocketDevice::new("vsock0", CID, &path).unwrap();
    let second = SocketDevice::new("vsock1", CID, &path).unwrap_err();
    let expected = format!("vsock vsock1: {} is a socket of process", path.display());
    assert!(second.to_string().starts_with(&expected), "{second}");
    drop(first);
    assert!(!path.exists());
    let long = folder.path().join("l".repeat(100));
    let why = SocketDevice::new("vsock0", CID, &long).unwrap_err();
    assert!(why.to_string().contains("has 107 bytes at most"), "{why}");
}

#[test]
fn a_driver_without_buffers_is_waited_for_and_what_it_asks_for_is_bounded() {
    let mut guest = Guest::new();
    guest.driver.ready();
    let key = |guest| Key { host: 7, guest };
    // Each is answered by a reset, for which there is no buffer yet.
    let all = RESETS_MOST as u32 + 1;
    for port in 0..all {
        let at = guest.out + 64 * u64::from(port % u32::from(BUFFERS));
        let header = Guest::header(key(port), Op::Request);
        guest.driver.write(at, header.as_bytes());
        guest.transmit.submit(&[(at, HEADER_SIZE as u32, false)]);
        guest.driver.notify(&guest.transmit);
        if port + 1 < all {
            guest.transmit.wait_used();
        }
    }
    guest.driver.function.pause();
    assert!(guest.transmit.poll_used().is_none());
    guest.driver.function.resume();
    for _ in 0..BUFFERS {
        guest.give_buffer();
    }
    for port in 0..all {
        guest.expect(key(port), Op::Rst);
    }
    guest.transmit.wait_used();
    guest.expect_nothing();
}

#[test]
fn there_are_so_many_connections_and_no_more_and_each_that_ends_makes_room() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let mut guest = Guest::ready();
    let listener = guest.listen(7);
    let key = |guest| Key { host: 7, guest };
    let mut programs = VecDeque::new();
    for port in 0..PEERS_MOST as u32 {
        programs.push_back(guest.guest_connects(key(port), &listener));
    }
    let more = key(PEERS_MOST as u32);
    guest.send(more, Op::Request);
    guest.expect(more, Op::Rst);
    guest.shut(key(0), vsock::SHUTDOWN_SEND | vsock::SHUTDOWN_RECEIVE);
    guest.expect(key(0), Op::Rst);
    programs.push_back(guest.guest_connects(more, &listener));
}
