//! Clients that mean no good, or do no good, while a guest runs: each is answered as it is said, nothing of theirs
//! is left in the process, and the guest hears of none.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::{Value, json};

use crate::attentive::{attentive, hears_nmi};
use crate::bare::say;
use crate::clients;
use crate::served::{LIMIT, Served, eventually, lives};

/// A request with descriptors beside its first bytes, and its answer.
fn ask_with(served: &Served, name: &str, body: &Value, files: &[BorrowedFd<'_>]) -> (u16, Value) {
    let mut stream = UnixStream::connect(served.path("api")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    let length = body.len();
    let head = format!("PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    clients::send(&stream, &(head + &body), files);
    let answer = clients::receive(&mut stream).unwrap();
    let body = serde_json::from_slice(&answer.body).unwrap_or_default();
    (answer.status, body)
}

fn image(served: &Served, name: &str) -> File {
    let path = served.path(name);
    fs::write(&path, [0; 4096]).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn descriptors_beside_requests_are_used_or_closed_and_none_is_left() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let (first, second) = (image(&served, "first"), image(&served, "second"));
    let read_only = File::open(served.path("second")).unwrap();
    let before = served.descriptors();
    let mut vm = served.vm(&attentive());
    let (a, b, r) = (first.as_fd(), second.as_fd(), read_only.as_fd());
    // One without a use, one that is asked for and does not come, one that is no iommufd.
    assert_eq!(ask_with(&served, "vm.create", &vm, &[a]).0, 400);
    vm["disks"] = json!([{ "id": "root", "fd_index": 1 }]);
    assert_eq!(ask_with(&served, "vm.create", &vm, &[a]).0, 400);
    vm["disks"][0]["fd_index"] = json!(0);
    vm["platform"] = json!({ "iommufd_fd_index": 1 });
    let (status, why) = ask_with(&served, "vm.create", &vm, &[a, b]);
    assert!(
        status == 400 && why.to_string().contains("not an iommufd"),
        "{status} {why}"
    );
    vm["platform"] = Value::Null;
    assert_eq!(served.descriptors(), before);
    assert_eq!(ask_with(&served, "vm.create", &vm, &[a]).0, 204);
    // One that comes twice is closed with what it came with.
    assert_eq!(ask_with(&served, "vm.create", &vm, &[a]).0, 500);
    assert_eq!(served.descriptors(), before + 1);
    for round in 0..3 {
        assert_eq!(served.put("vm.boot"), 204, "{round}");
        let disks = served.ask("GET", "vm.info", None).1["config"]["disks"].take();
        let path = disks[0]["path"].as_str().unwrap();
        assert!(
            path.ends_with("/first") && disks[0]["id"] == "root",
            "{disks}"
        );
        let running = served.descriptors();
        let add = |body: Value, files: &[BorrowedFd<'_>]| {
            ask_with(&served, "vm.add-disk", &body, files).0
        };
        assert_eq!(add(json!({ "id": "hot" }), &[b]), 200);
        let more = served.descriptors();
        assert!(more > running);
        for (body, files, status) in [
            (json!({ "id": "x" }), &[b, b][..], 400),
            (json!({ "id": "x", "path": "/a" }), &[b], 400),
            (json!({ "id": "hot" }), &[b], 409),
            (json!({ "id": "x" }), &[r], 500),
            (json!({ "id": "x" }), &[], 400),
        ] {
            assert_eq!(add(body.clone(), files), status, "{body}");
        }
        for (name, body, status) in [
            ("vm.add-device", json!({ "id": "v", "fd": null }), 400),
            ("vm.add-net", json!({ "id": "n" }), 500),
            ("vm.pause", Value::Null, 204),
            ("vm.resume", Value::Null, 204),
            ("vm.power-button", json!({ "a": 1 }), 400),
            ("vm.remove-device", json!({ "id": "nothing" }), 404),
            (
                "vm.snapshot",
                json!({ "destination_url": "file:///a" }),
                501,
            ),
            ("vm.unheard-of", Value::Null, 404),
        ] {
            assert_eq!(ask_with(&served, name, &body, &[b]).0, status, "{name}");
        }
        eventually("only what is used is open", || served.descriptors() == more);
        let gone = json!({ "id": "hot", "wait": true });
        assert_eq!(served.ask("PUT", "vm.remove-device", Some(&gone)).0, 204);
        eventually("it is closed", || served.descriptors() == running);
        assert_eq!(served.put("vm.shutdown"), 204);
        // It is answered before the process waits for the next request, by a descriptor of its own.
        eventually("only the disk's is kept", || {
            served.descriptors() == before + 1
        });
    }
    assert_eq!(served.put("vm.delete"), 204);
    assert_eq!(served.descriptors(), before);
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

/// What one of many clients does, by its number: all of it is wrong, or comes at the wrong time.
fn misbehave(served: &Served, number: usize, file: BorrowedFd<'_>) {
    let request = |name: &str, body: &str| {
        let length = body.len();
        format!("PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let text = match number % 10 {
        // Halves.
        0 => request("vm.create", &"x".repeat(100))[..90].to_owned(),
        1 => "PUT /api/v1/vm.pau".to_owned(),
        // Oversized.
        2 => request("vm.add-disk", "").replace("Length: 0", "Length: 99999999"),
        3 => format!(
            "GET /api/v1/vm.info HTTP/1.1\r\nA: {}\r\n\r\n",
            "x".repeat(20 << 10)
        ),
        // The wrong state, and twice.
        4 => request("vm.boot", ""),
        5 => request("vm.resume", ""),
        6 => request("vm.create", "{}").repeat(2),
        // No JSON, and depth without end.
        7 => request("vm.remove-device", &"[".repeat(4000)),
        // Nobody's device, twice in one piece.
        8 => request("vm.remove-device", r#"{"id":"nobody"}"#).repeat(2),
        _ => "\0\r\n\r\n".to_owned(),
    };
    let Ok(stream) = UnixStream::connect(served.path("api")) else {
        return;
    };
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let files = [file; 8];
    clients::try_send(
        &stream,
        &text,
        if number.is_multiple_of(3) {
            &files
        } else {
            &[]
        },
    );
    if number.is_multiple_of(4) {
        return; // It goes, in the middle or before its answer.
    }
    let _end = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _cut = (&stream).read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    // Some texts of errors have the word as well.
    let statuses = answer
        .split("HTTP/1.1 ")
        .filter_map(|head| head.get(..3)?.parse().ok());
    for status in statuses {
        let status: u16 = status;
        // 503: ten others were in the middle of a request.
        assert!((400..600).contains(&status), "{number}: {answer}");
    }
}

#[test]
fn fifty_clients_that_mean_no_good_disturb_neither_the_guest_nor_each_other() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let vm = served.vm(&[hears_nmi(&say("nmi ")), lives("boot ")].concat());
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    eventually("its word", || served.said() == "boot ");
    let file = image(&served, "file");
    let before = served.all_descriptors();
    for _ in 0..3 {
        thread::scope(|scope| {
            for number in 0..50 {
                let (served, file) = (&served, file.as_fd());
                scope.spawn(move || misbehave(served, number, file));
            }
        });
    }
    assert_eq!(served.state(), "Running");
    assert_eq!(served.put("vm.nmi"), 204);
    eventually("the guest goes on where it was", || {
        served.said() == "boot nmi boot "
    });
    assert_eq!(served.all_descriptors(), before);
    assert_eq!(served.put("vmm.shutdown"), 200);
    let (status, errors) = served.ended();
    assert_eq!((status.code(), errors.as_str()), (Some(0), ""));
}

#[test]
fn a_pseudo_terminal_is_there_when_the_vm_is_created_and_stays_through_its_boots() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&lives("boot "));
    vm["serial"] = json!({ "mode": "Pty" });
    let before = served.descriptors();
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    let path = || served.ask("GET", "vm.info", None).1["config"]["serial"]["file"].take();
    let at = path();
    // Somebody listens before there is a guest.
    let mut terminal = File::options()
        .read(true)
        .write(true)
        .open(at.as_str().unwrap())
        .unwrap();
    let settings = rustix::termios::tcgetattr(&terminal).unwrap();
    let raw = rustix::termios::LocalModes::ICANON | rustix::termios::LocalModes::ECHO;
    assert!(!settings.local_modes.intersects(raw));
    for _ in 0..2 {
        assert_eq!(served.put("vm.boot"), 204);
        assert_eq!(path(), at);
        let mut said = [0; 5];
        terminal.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"boot ");
        terminal.write_all(b"typed").unwrap();
        assert_eq!(served.put("vm.shutdown"), 204);
        assert_eq!(path(), at);
    }
    drop(terminal);
    assert_eq!(served.put("vm.delete"), 204);
    eventually("it is gone", || served.descriptors() == before);
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}
