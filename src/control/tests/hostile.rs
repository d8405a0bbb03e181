//! Clients that mean no good, or do no good.

use proptest::prelude::*;

use super::*;

/// A request of which the last byte is missing.
fn half() -> String {
    let text = request("GET", "vmm.ping", "");
    text[..text.len() - 1].to_owned()
}

#[test]
fn ten_connections_that_say_nothing_keep_no_eleventh_out() {
    let vm = Vm::living();
    let mut used = vm.connect();
    assert_eq!(used.ask("GET", "vmm.ping").status, 200);
    let mut silent: Vec<_> = (0..9).map(|_| vm.connect()).collect();
    until("ten connections", || vm.connections() == 10);
    let mut eleventh = vm.connect();
    assert_eq!(eleventh.ask("GET", "vm.info").status, 200);
    // The oldest of those that never asked anything has gone, and no other.
    assert!(silent.remove(0).is_closed());
    assert_eq!(vm.connections(), 10);
    for mut client in silent.into_iter().chain([used]) {
        assert_eq!(client.ask("GET", "vmm.ping").status, 200);
    }
}

#[test]
fn idle_connections_give_way_the_longest_idle_first() {
    let vm = Vm::living();
    let mut clients: Vec<_> = (0..10).map(|_| vm.connect()).collect();
    until("ten connections", || vm.connections() == 10);
    for index in (0..10).chain([0]) {
        assert_eq!(clients[index].ask("GET", "vmm.ping").status, 200);
        until("idle again", || vm.idle() == 10);
    }
    assert_eq!(vm.connect().ask("GET", "vmm.ping").status, 200);
    assert!(clients[1].is_closed());
    assert_eq!(clients[0].ask("GET", "vmm.ping").status, 200);
}

#[test]
fn one_connection_too_many_is_told_so() {
    let vm = Vm::living();
    let mut busy: Vec<_> = (0..10).map(|_| vm.connect()).collect();
    for client in &mut busy {
        client.send(half());
    }
    until("ten that are busy", || {
        (vm.connections(), vm.idle()) == (10, 0)
    });
    let mut eleventh = vm.connect();
    let reply = eleventh.reply().unwrap();
    assert_eq!((reply.status, reply.keeps_alive()), (503, false));
    assert_eq!(
        reply.messages(),
        ["all 10 connections are in the middle of a request"]
    );
    assert!(eleventh.is_closed());
    for client in &mut busy {
        client.send("\n");
        assert_eq!(client.reply().unwrap().status, 200);
    }
}

#[test]
fn a_slow_client_is_given_up_and_an_idle_one_is_not() {
    let vm = Vm::with(SHORT, living());
    let mut idle = vm.connect();
    assert_eq!(idle.ask("GET", "vmm.ping").status, 200);
    // One stands still in each part of a request, one always has another byte.
    let chunked = request("PUT", "vm.pause", "Transfer-Encoding: chunked\r\n");
    for text in [
        half(),
        request("PUT", "vm.create", "Content-Length: 10\r\n") + "123",
        chunked.clone() + "5",
        chunked.clone() + "5\r\n123",
        chunked + "0\r\nA: b\r\n",
    ] {
        let mut client = vm.connect();
        client.send(&text);
        let start = Instant::now();
        assert_eq!(client.reply().unwrap().status, 408, "{text}");
        assert!(start.elapsed() < SHORT.whole, "{text}");
        assert!(client.is_closed());
    }
    let mut dripping = vm.connect();
    // A header line that never ends.
    dripping.send("GET /api/v1/vmm.ping HTTP/1.1\r\nA: ");
    while dripping.0.write_all(b"a").is_ok() {
        thread::sleep(SHORT.between / 5);
    }
    assert_eq!(dripping.reply().unwrap().status, 408);
    assert_eq!(idle.ask("GET", "vmm.ping").status, 200);
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let vm = Vm::with(SHORT, living());
    let mut client = vm.connect();
    let many: String = (0..100).map(|_| request("GET", "vm.info", "")).collect();
    client.0.set_write_timeout(Some(SHORT.whole)).unwrap();
    // Until neither end has room.
    while client.0.write_all(many.as_bytes()).is_ok() {}
    until("it is given up", || vm.connections() == 0);
    assert_eq!(vm.connect().ask("GET", "vmm.ping").status, 200);
}

#[test]
fn connections_that_are_cut_off_leave_nothing() {
    let vm = Vm::living();
    let text = request("PUT", "vm.create", "Content-Length: 100\r\n") + "{}";
    for length in 0..text.len() {
        vm.connect().send(&text[..length]);
    }
    until("all are gone", || vm.connections() == 0);
    assert_eq!(vm.connect().ask("GET", "vmm.ping").status, 200);
}

#[test]
fn what_is_no_request_is_refused_by_its_fault() {
    let vm = Vm::living();
    let long = "x".repeat(http::HEAD_MOST);
    let lines = "A: b\r\n".repeat(65);
    let line = |more: &str| request("PUT", "vm.pause", more);
    let chunk = |body: &str| line("Transfer-Encoding: chunked\r\n") + body;
    for (status, text) in [
        (400, "\0\x01\x02\r\n\r\n".to_owned()),
        (400, "GET\r\n\r\n".to_owned()),
        (400, "GET /api/v1/vmm.ping HTTP/2.0\r\n\r\n".to_owned()),
        (
            400,
            "GET /api/v1/vmm.ping HTTP/1.1\r\nno colon\r\n\r\n".to_owned(),
        ),
        (400, line("Content-Length: -1\r\n")),
        (400, line("Content-Length: +0\r\n")),
        (400, line("Content-Length: \r\n")),
        (400, line("Content-Length: 0x10\r\n")),
        (400, line("Content-Length: 0\r\nContent-Length: 5\r\n")),
        (
            400,
            line("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
        ),
        (
            400,
            line("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
        ),
        (400, line("Transfer-Encoding: gzip, chunked\r\n")),
        (400, line("Expect: a miracle\r\n")),
        (400, chunk("\r\n")),
        (400, chunk("-1\r\n")),
        (400, chunk("fffffffffffffffff\r\n")),
        (400, chunk("1\r\nab\r\n")),
        (400, chunk(&format!("1;{long}"))),
        (413, chunk("ffffffffffffffff\r\n")),
        (413, chunk("400001\r\n")),
        (413, line("Content-Length: 4194305\r\n")),
        (413, line("Content-Length: 99999999999999999999999\r\n")),
        (431, line(&format!("A: {long}\r\n"))),
        (431, line(&lines)),
        (431, format!("GET /{long}")),
        (431, chunk(&format!("0\r\n{lines}\r\n"))),
        (431, chunk(&format!("0\r\nA: {long}\r\n"))),
    ] {
        let mut client = vm.connect();
        client.send(&text);
        let reply = client.reply().unwrap();
        let shown: String = text.chars().take(120).collect();
        assert_eq!(reply.status, status, "{shown}: {:?}", reply.messages());
        assert!(!reply.keeps_alive() && client.is_closed(), "{shown}");
    }
    // None of it was taken for a request.
    assert_eq!(
        vm.connect().ask("GET", "vm.info").json()["state"],
        "Running"
    );
}

/// What a client may write: noise, or a request with noise in it.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        Just(request("GET", "vmm.ping", "").into_bytes()),
        Just(request("PUT", "vm.pause", "").into_bytes()),
        Just(request("PUT", "vm.create", "Content-Length: 9\r\n").into_bytes()),
        Just(request("PUT", "vm.create", "Transfer-Encoding: chunked\r\n").into_bytes()),
        Just(b"4\r\nabcd\r\n0\r\n\r\n".to_vec()),
        Just(b"Content-Length: ".to_vec()),
        Just(b"\r\n\r\n".to_vec()),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    let change = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (prop::collection::vec(part, 1..6), change).prop_map(|(parts, changes)| {
        let mut bytes = parts.concat();
        for (at, byte) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        bytes
    })
}

#[test]
fn whatever_bytes_come_the_server_lives_and_the_connection_ends() {
    let vm = Vm::with(SHORT, living());
    let mut runner = proptest::test_runner::TestRunner::default();
    runner
        .run(&noise(), |bytes| {
            let mut client = vm.connect();
            let _cut = client.0.write_all(&bytes);
            let _gone = client.0.shutdown(std::net::Shutdown::Write);
            let mut answers = Vec::new();
            let read = client.0.read_to_end(&mut answers);
            let reset = read.is_err_and(|error| error.kind() != io::ErrorKind::ConnectionReset);
            prop_assert!(!reset && answers.is_ascii());
            Ok(())
        })
        .unwrap();
    until("all are gone", || vm.connections() == 0);
    assert_eq!(vm.connect().ask("GET", "vmm.ping").status, 200);
}
