//! What a service manager is told of a VM, and how long it gives that to end.

use std::io::Read as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::bare::{power_off, say};
use crate::served::LIMIT;
use crate::whole::{Run, has_kvm, signal, stderr, wait_for_the_button};

/// A service manager, which hears what it is told.
struct Manager {
    socket: UnixDatagram,
    /// All that it has heard.
    heard: Vec<String>,
}

impl Manager {
    fn new(socket: UnixDatagram) -> Self {
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self {
            socket,
            heard: Vec::new(),
        }
    }

    /// Waits for a message with this line, which it returns.
    #[track_caller]
    fn hear(&mut self, line: &str) -> String {
        let has = |text: &str| text.lines().any(|one| one == line);
        loop {
            let mut text = [0; 4096];
            let length = match self.socket.recv(&mut text) {
                Ok(length) => length,
                Err(error) => panic!("{line}: {error}; heard: {:?}", self.heard),
            };
            let text = String::from_utf8(text[..length].to_vec()).unwrap();
            self.heard.push(text.clone());
            if has(&text) {
                return text;
            }
        }
    }
}

/// A VM that tells `address` of itself, and what it does on standard output.
fn told(code: &[u8], address: &str, platform: &str) -> (Child, TempDir) {
    let mut run = Run::new(code);
    run.command
        .args(["--platform", platform])
        .env("NOTIFY_SOCKET", address)
        .env("WATCHDOG_USEC", "200000")
        .env_remove("WATCHDOG_PID");
    (run.command.spawn().unwrap(), run.folder)
}

#[test]
fn a_service_manager_is_told_when_the_vm_runs_that_it_lives_and_when_it_ends() {
    if !has_kvm() {
        return;
    }
    let name = format!("busway-test-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap());
    let mut manager = Manager::new(socket.unwrap());
    let code = [wait_for_the_button(), power_off()].concat();
    let (mut child, _folder) = told(&code, &format!("@{name}"), "power_off_timeout=7");
    let ready = manager.hear("READY=1");
    assert!(ready.contains("STATUS=The guest runs\n"), "{ready}");
    let before = manager
        .heard
        .iter()
        .filter(|text| text.contains("STOPPING"));
    assert_eq!(before.count(), 0);
    // Nothing happens in the VM, and its loop says that it goes round all the same.
    for _ in 0..3 {
        manager.hear("WATCHDOG=1");
    }
    let mut word = [0; 5];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut word)
        .unwrap();
    signal(&child, libc::SIGTERM);
    let stopping = manager.hear("STOPPING=1");
    // What the guest has to power off, and then what it may take to give devices back.
    assert!(
        stopping.contains("EXTEND_TIMEOUT_USEC=97000000\n"),
        "{stopping}"
    );
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_guest_that_powers_off_by_itself_is_told_of_as_an_end() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::new(UnixDatagram::bind(&path).unwrap());
    let (child, _folder) = told(&power_off(), path.to_str().unwrap(), "power_off_timeout=7");
    manager.hear("READY=1");
    manager.hear("STOPPING=1");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_deaf_guest_is_killed_when_the_time_is_over_that_it_was_given() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::new(UnixDatagram::bind(&path).unwrap());
    let deaf = [&say("deaf")[..], &[0xeb, 0xfe]].concat();
    let (child, _folder) = told(&deaf, path.to_str().unwrap(), "power_off_timeout=1");
    manager.hear("READY=1");
    let start = Instant::now();
    signal(&child, libc::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let took = start.elapsed();
    let time = Duration::from_secs(1)..Duration::from_secs(15);
    assert!(time.contains(&took), "{took:?}");
    assert!(stderr(&output).contains("1 s"), "{}", stderr(&output));
}

#[test]
fn a_process_that_makes_vms_is_ready_when_it_can_be_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let mut manager = Manager::new(UnixDatagram::bind(&path).unwrap());
    let mut child = Command::new(env!("CARGO_BIN_EXE_busway"))
        .arg("--api-socket")
        .arg(folder.path().join("api"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "200000")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    manager.hear("READY=1");
    manager.hear("WATCHDOG=1");
    signal(&child, libc::SIGTERM);
    manager.hear("STOPPING=1");
    assert!(child.wait().unwrap().success());
}
