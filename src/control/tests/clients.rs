//! Requests in the forms in which known clients write them, with what each demands of the answer.

use rustix::event::{PollFd, PollFlags, poll};

use super::*;

#[test]
fn chunked_requests_without_a_body_that_expect_a_word_are_answered_and_the_connection_goes_on() {
    // libcurl that uploads nothing of unknown length, as libvirt 9.0 has it do.
    let vm = Vm::living();
    let mut client = vm.connect();
    for name in ["vm.pause", "vm.resume", "vm.pause"] {
        let more = "Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n";
        client.send(request("PUT", name, more));
        assert_eq!(client.reply().unwrap().head, ["HTTP/1.1 100 ", "", ""]);
        client.send("0\r\n\r\n");
        assert_eq!(client.reply().unwrap().status, 204, "{name}");
        let more = "Content-Type: application/json\r\n";
        client.send(request("GET", "vm.info", more));
        assert_eq!(client.reply().unwrap().status, 200);
    }
    // Another that does not wait for the word is not told it.
    let more = "Transfer-Encoding: Chunked\r\nExpect: 100-Continue\r\n";
    client.send(request("PUT", "vm.resume", more) + "0\r\n\r\n");
    assert_eq!(client.reply().unwrap().status, 204);
    // Nor is one that has nothing to send.
    client.send(request(
        "PUT",
        "vm.pause",
        "Expect: 100-continue\r\nContent-Length: 0\r\n",
    ));
    assert_eq!(client.reply().unwrap().status, 204);
}

#[test]
fn one_connection_is_enough_for_a_client_that_never_dials_again() {
    // Cloud Hypervisor's own client: the head in pieces, a status that must be a number to the line's end,
    // the length by its literal name, 256 bytes at a time, each of them ASCII.
    let vm = Vm::living();
    let mut client = vm.connect();
    for (method, name, status, body) in [
        ("GET", "vmm.ping", 200, true),
        ("PUT", "vm.pause", 204, false),
        ("GET", "vm.info", 200, true),
        ("PUT", "vm.pause", 500, true),
        ("PUT", "vm.resume", 204, false),
        ("PUT", "vm.boot", 500, true),
    ] {
        let first =
            format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        client.send(first);
        client.send("\r\n");
        let reply = client.reply().unwrap();
        assert_eq!(
            (reply.status, !reply.body.is_empty()),
            (status, body),
            "{name}"
        );
        assert_eq!(reply.head[0], format!("HTTP/1.1 {status} "));
        assert!(reply.body.is_ascii());
        let has_length = reply
            .head
            .iter()
            .any(|line| line.starts_with("Content-Length: "));
        assert_eq!(has_length, body, "{name}");
    }
}

#[test]
fn go_clients_find_a_type_with_each_answer_that_has_one_and_none_else() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let more = "User-Agent: OpenAPI-Generator/1.0.0/go\r\nAccept-Encoding: gzip\r\n";
    client.send(request("GET", "vm.info", more));
    let reply = client.reply().unwrap();
    assert!(
        reply
            .head
            .contains(&"Content-Type: application/json".to_owned())
    );
    assert!(reply.json()["memory_actual_size"].as_u64().unwrap() > 0);
    client.send(request(
        "PUT",
        "vm.pause",
        &format!("{more}Content-Length: 0\r\n"),
    ));
    let reply = client.reply().unwrap();
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    // A second connection beside the first, for its look at the VM's health.
    assert_eq!(vm.connect().ask("GET", "vmm.ping").status, 200);
    // A body of white space is none.
    client.send(request("PUT", "vm.resume", "Content-Length: 2\r\n") + "\n ");
    assert_eq!(client.reply().unwrap().status, 204);
}

#[test]
fn a_client_that_wants_the_connection_closed_sees_it_closed() {
    let vm = Vm::living();
    for more in ["Connection: close\r\n", "connection: Keep-Alive, CLOSE\r\n"] {
        let mut client = vm.connect();
        client.send(request("GET", "vm.info", more));
        let reply = client.reply().unwrap();
        assert_eq!(reply.status, 200);
        assert!(!reply.keeps_alive());
        assert!(client.is_closed());
    }
    let mut old = vm.connect();
    old.send("GET http://localhost/api/v1/vmm.ping HTTP/1.0\r\n\r\n");
    assert_eq!(old.reply().unwrap().status, 200);
    assert!(old.is_closed());
}

#[test]
fn requests_come_byte_by_byte_or_many_at_once() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let text = request("PUT", "vm.pause", "tRANSFER-eNCODING: chunked\r\n");
    let text = text + "2;a=b\r\n \n\r\n1\r\n\t\r\n0\r\nTrailer: x\r\n\r\n";
    for byte in text.bytes() {
        client.send([byte]);
    }
    assert_eq!(client.reply().unwrap().status, 204);
    let many: String = (0..50).map(|_| request("GET", "vmm.ping", "")).collect();
    client.send("\r\n".to_owned() + &many + &request("PUT", "vm.resume", ""));
    for _ in 0..50 {
        assert_eq!(client.reply().unwrap().status, 200);
    }
    assert_eq!(client.reply().unwrap().status, 204);
}

#[test]
fn a_body_of_4_mib_is_taken() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let body = format!("{{\"a\":\"{}\"}}", "x".repeat((4 << 20) - 8));
    let more = format!("Content-Length: {}\r\nExpect: 100-continue\r\n", body.len());
    assert_eq!(body.len(), 4 << 20);
    client.send(request("PUT", "vm.create", &more));
    assert_eq!(client.reply().unwrap().status, 100);
    client.send(body);
    // It comes whole to where it is refused.
    assert_eq!(client.reply().unwrap().status, 500);
    assert_eq!(client.ask("GET", "vmm.ping").status, 200);
}

#[test]
fn a_client_that_sends_too_much_is_read_to_its_end_so_that_it_reads_the_answer() {
    let vm = Vm::living();
    let mut client = vm.connect();
    let body = "x".repeat((4 << 20) + 1);
    let more = format!("Content-Length: {}\r\n", body.len());
    client.send(request("PUT", "vm.create", &more));
    // What comes now comes after it was refused.
    let mut answered = [PollFd::new(&client.0, PollFlags::IN)];
    assert_eq!(poll(&mut answered, None), Ok(1));
    client.send(body);
    assert_eq!(client.reply().unwrap().status, 413);
    assert!(client.is_closed());
}
