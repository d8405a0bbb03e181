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
busway: error: no socket: name the VM's with --api-socket PATH, as its `busway run` was given it; `busway ctl list` shows those that there are

"#]]);
}

#[test]
fn top_has_a_help_of_its_own() {
    busway()
        .args(["ctl", "top", "-h"])
        .assert()
        .success()
        .stdout_eq(file!["snapshots/ctl-top-h.txt"]);
}

#[test]
fn a_file_of_what_a_vm_is_to_be_is_read_before_anybody_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("vm"), "{").unwrap();
    let create = |file| {
        busway()
            .args(["ctl", "--api-socket", "api", "create", file])
            .current_dir(folder.path())
    };
    create("vm").assert().code(2).stderr_eq(str![[r#"
busway: error: vm: it is no JSON of what a VM is to be: EOF while parsing an object at line 1 column 1

"#]]);
    create("absent").assert().code(2).stderr_eq(str![[r#"
busway: error: absent: No such file or directory (os error 2)

"#]]);
}

/// A VM that answers so many requests with one body, and has its socket locked as Busway locks its own.
struct Pretended {
    folder: tempfile::TempDir,
    _lock: std::fs::File,
    answering: thread::JoinHandle<Vec<String>>,
}

impl Pretended {
    fn new(count: usize, kind: &'static str, body: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("api")).unwrap();
        let lock = std::fs::File::create(folder.path().join("api.lock")).unwrap();
        let answering = thread::spawn(move || {
            let one = |_| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut some = [0; 1024];
                let count = stream.read(&mut some).unwrap();
                let request = String::from_utf8_lossy(&some[..count]).into_owned();
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 200 \r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
                );
                stream.write_all(answer.as_bytes()).unwrap();
                request.lines().next().unwrap_or_default().to_owned()
            };
            (0..count).map(one).collect()
        });
        Self {
            folder,
            _lock: lock,
            answering,
        }
    }

    fn ctl(&self, args: &[&str]) -> snapbox::cmd::Command {
        busway()
            .args(["ctl", "--api-socket", "api"])
            .args(args)
            .current_dir(self.folder.path())
    }

    /// What was asked, line by line.
    fn asked(self) -> Vec<String> {
        self.answering.join().unwrap()
    }
}

#[test]
fn list_finds_a_vm_by_the_lock_beside_its_socket_and_shows_what_it_answers() {
    let body = r#"{"state":"Running","memory_actual_size":268435456,"config":{"cpus":{"boot_vcpus":2},"disks":[{}]}}"#;
    let vm = Pretended::new(2, "application/json", body);
    let socket = vm.folder.path().join("api");
    let listed = busway().args(["ctl", "list", "--json"]).output().unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let all = listed["vms"].as_array().unwrap();
    let own = all
        .iter()
        .find(|vm| vm["socket"] == socket.to_str().unwrap())
        .unwrap();
    assert_eq!(own["pid"], std::process::id());
    assert_eq!(
        (&own["state"], &own["vcpus"]),
        (&"running".into(), &2.into())
    );
    assert_eq!(
        (&own["memory_bytes"], &own["devices"]),
        (&(256 << 20).into(), &1.into())
    );
    let table = busway().args(["ctl", "list"]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    let line = table
        .lines()
        .find(|line| line.contains(socket.to_str().unwrap()));
    assert!(line.unwrap().contains("running"), "{table}");
    assert!(table.starts_with("SOCKET"), "{table}");
    assert_eq!(vm.asked(), ["GET /api/v1/vm.info HTTP/1.1"; 2]);
}

#[test]
fn top_looks_twice_and_says_that_a_vm_has_ended() {
    let body = r#"{"state":"Running","pid":7,"uptime_ms":5000,"memory_bytes":1048576,"process_cpu_us":0,"vcpus":[],"threads":[],"devices":[],"vector_updates":0}"#;
    let top = |vm: &Pretended, more: &[&str]| {
        let args = [&["top", "--interval", "0.1"], more].concat();
        vm.ctl(&args).assert()
    };
    let vm = Pretended::new(2, "application/json", body);
    top(&vm, &["--once"]).success().stdout_eq(str![[r#"
api, process 7
running, up 5s, 1MiB of memory, processors 0%

"#]]);
    assert_eq!(vm.asked(), ["GET /api/v1/vm.activity HTTP/1.1"; 2]);
    // It listens no more.
    let vm = Pretended::new(2, "application/json", body);
    top(&vm, &[]).success().stdout_eq(str![[r#"
api, process 7
running, up 5s, 1MiB of memory, processors 0%
the VM has ended

"#]]);
}

#[test]
fn metrics_are_printed_as_they_came() {
    let vm = Pretended::new(1, "application/openmetrics-text", "# EOF\n");
    vm.ctl(&["metrics"]).assert().success().stdout_eq("# EOF\n");
    assert_eq!(vm.asked(), ["GET /metrics HTTP/1.1"]);
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
