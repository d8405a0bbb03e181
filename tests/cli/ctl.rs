//! `busway ctl`, and the socket of `busway run` that is of no use.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::thread;

use snapbox::{file, str};

use crate::busway;

#[test]
fn the_help_names_what_can_be_asked() {
    busway()
        .args(["ctl", "-h"])
        .assert()
        .success()
        .stdout_eq(file!["snapshots/ctl-h.txt"]);
}

#[test]
fn a_socket_has_to_be_named() {
    busway()
        .args(["ctl", "info"])
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: no socket: name the VM's with --api-socket PATH, as its `busway run` was given it

"#]]);
}

#[test]
fn a_socket_that_is_not_there_or_dead_is_told_with_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    busway()
        .args(["ctl", "--api-socket", "api", "info"])
        .current_dir(folder.path())
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: api: there is no such socket: name the one that `busway run --api-socket` was given

"#]]);
    drop(UnixListener::bind(folder.path().join("api")).unwrap());
    busway()
        .args(["ctl", "info", "--api-socket", "api"])
        .current_dir(folder.path())
        .assert()
        .code(1)
        .stderr_eq(str![[r#"
busway: error: api: nobody listens there: the VM whose socket it was has ended without removing it; the next VM with this --api-socket takes its place

"#]]);
}

#[test]
fn an_answer_is_for_people_or_as_it_came() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("api")).unwrap();
    let answering = thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut some = [0; 1024];
            let count = stream.read(&mut some).unwrap();
            assert!(some[..count].starts_with(b"GET /api/v1/vmm.ping HTTP/1.1\r\n"));
            let body = "{\"version\":\"1.2.3\",\"pid\":7}";
            let length = body.len();
            let answer = format!("HTTP/1.1 200 \r\nContent-Length: {length}\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let ping = || {
        busway()
            .args(["ctl", "--api-socket", "api", "ping"])
            .current_dir(folder.path())
    };
    ping()
        .assert()
        .success()
        .stdout_eq("version 1.2.3 answers, as process 7\n");
    ping().arg("--json").assert().success().stdout_eq(str![[r#"
{
  "pid": 7,
  "version": "1.2.3"
}

"#]]);
    answering.join().unwrap();
}

#[test]
fn a_socket_that_cannot_be_had_is_known_before_the_guest_starts() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "precious").unwrap();
    for (socket, said) in [
        (
            "file",
            "busway: error: --api-socket: file is there, and no socket: remove it, or name another path\n",
        ),
        (
            "no/api",
            "busway: error: --api-socket: cannot open no/api.lock: No such file or directory (os error 2); \
             make the folder first\n",
        ),
        (
            "fd=99",
            "busway: error: --api-socket: descriptor 99 is not open in Busway's process: whoever starts \
             Busway opens a Unix socket that listens (SOCK_STREAM), without close-on-exec, and says its \
             number\n",
        ),
    ] {
        busway()
            .args(["run", "--kernel", "vmlinuz", "--api-socket", socket])
            .current_dir(folder.path())
            .assert()
            .code(2)
            .stderr_eq(said);
    }
    // Nor is anything left of one that could be had, where the guest does not start.
    busway()
        .args(["run", "--kernel", "absent", "--api-socket", "api"])
        .current_dir(folder.path())
        .assert()
        .failure();
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1);
}
