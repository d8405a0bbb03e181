//! A user whose quota is used up, at each step that takes room of a file system. The kernel's answer, EDQUOT, is strace(1)'s:
//! a quota of one's own to use up is a file system's, with rights that a test has not.

use std::fs;
use std::process::{Command, Output, Stdio};

use super::{Wanting, has_run, names, text};
use crate::attentive::attentive;
use crate::bare::kernel;
use crate::served::eventually;
use crate::traced::has_strace;
use crate::writer::{SLOT, writes_twice};

/// Who has no quota left is told so, and what to look at.
const REMEDY: [&str; 2] = ["Disk quota exceeded", "quota"];

/// The shell's words to run what follows under strace(1), which answers each of these `calls` so, or those of them that have
/// to do with the path `at` where it is given; `calls` are as `openat` or `openat:when=1`. Busway is the shell's own process, and
/// its filters see another call in the place of those, which all threads may make.
fn under_strace(calls: &[(&str, &str)], at: Option<&str>) -> String {
    let mut words =
        "exec strace --daemonize=grandchild --seccomp-bpf -fqq --signal=none".to_owned();
    let names: Vec<_> = calls.iter().map(|(call, _)| *call).collect();
    words += &format!(" --output=/dev/null --trace={}", names.join(","));
    for (call, answer) in calls {
        words += &format!(" --inject={call}:syscall=getpid:error={answer}");
    }
    if let Some(path) = at {
        words += &format!(" --trace-path={path}");
    }
    words + " \"$@\""
}

/// Runs the guest to its end under such calls.
fn run(wanting: &Wanting, calls: &[(&str, &str)], at: Option<&str>, flags: &[&str]) -> Output {
    Command::new("sh")
        .args(["-c", &under_strace(calls, at), "sh"])
        .arg(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--memory", "size=64M"])
        .args(["--kernel", &wanting.path("kernel")])
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// None, said on standard error, where there is no KVM or no strace.
fn wanting() -> Option<Wanting> {
    has_strace().then(Wanting::new).flatten()
}

#[track_caller]
fn tells(said: &str, path: &str) {
    for words in REMEDY.into_iter().chain([path]) {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn a_quota_that_is_used_up_at_the_start_is_named_with_what_helps() {
    let Some(wanting) = wanting() else {
        return;
    };
    let (serial, api) = (wanting.path("serial"), wanting.path("api"));
    let (lock, vsock) = (wanting.path("api.lock"), wanting.path("vsock"));
    let vsock_lock = wanting.path("vsock.lock");
    let file = format!("file={serial}");
    let socket = format!("socket={}", wanting.path("console"));
    let cid = format!("cid=3,socket={vsock}");
    let opened = ("openat", "EDQUOT");
    let bound = ("bind", "EDQUOT");
    for (call, at, flags, named) in [
        (opened, Some(&serial), ["--serial", &file], &serial),
        (opened, Some(&lock), ["--api-socket", &api], &lock),
        (
            ("write", "EDQUOT"),
            Some(&lock),
            ["--api-socket", &api],
            &lock,
        ),
        (bound, None, ["--api-socket", &api], &api),
        (bound, None, ["--serial", &socket], &wanting.path("console")),
        (opened, Some(&vsock_lock), ["--vsock", &cid], &vsock),
        (bound, None, ["--vsock", &cid], &vsock),
    ] {
        let at = at.map(String::as_str);
        let output = run(&wanting, &[call], at, &flags);
        let said = text(&output);
        names(&output, &[named]);
        assert_eq!(output.status.code(), Some(3), "{call:?}: {said}");
        tells(&said, named);
        for left in [&api, &lock, &vsock, &vsock_lock] {
            assert!(!fs::exists(left).unwrap(), "{call:?}: {left} is left");
        }
    }
}

#[test]
fn output_that_a_quota_has_no_room_for_is_told_of_and_the_guest_runs_to_its_end() {
    let Some(wanting) = wanting() else {
        return;
    };
    let (serial, report) = (wanting.path("serial"), wanting.path("report"));
    let file = format!("file={serial}");
    let output = run(
        &wanting,
        &[("write,writev", "EDQUOT")],
        Some(&serial),
        &["--serial", &file],
    );
    assert!(has_run(&output), "{}", text(&output));
    tells(&text(&output), &serial);
    assert_eq!(fs::read(&serial).unwrap(), b"");
    // The report is written to another file first, which has the process's number behind it.
    let beside = format!("{report}.$$");
    for (call, at) in [
        (("openat", "EDQUOT"), &beside),
        (("write", "EDQUOT"), &beside),
        (("rename", "EDQUOT"), &beside),
    ] {
        let flags = ["--serial", "null", "--report", &report];
        let output = run(&wanting, &[call], Some(at), &flags);
        let said = text(&output);
        assert!(has_run(&output), "{call:?}: {said}");
        tells(&said, &format!("--report {report}: "));
        let left = fs::read_dir(wanting.0.path()).unwrap();
        let left: Vec<_> = left.map(|one| one.unwrap().file_name()).collect();
        let is_left = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("report");
        assert!(!left.iter().any(is_left), "{call:?}: {left:?}");
    }
}

#[test]
fn a_write_that_a_quota_has_no_room_for_fails_in_the_guest_and_the_next_does_not() {
    let Some(wanting) = wanting() else {
        return;
    };
    fs::write(wanting.path("kernel"), kernel(&writes_twice())).unwrap();
    let (disk, serial) = (wanting.path("disk"), wanting.path("serial"));
    fs::write(&disk, [0xff; 64 << 10]).unwrap();
    let flags = [
        "--disk",
        &format!("path={disk},id=data,pci_device_id={SLOT}"),
        "--serial",
        &format!("file={serial}"),
    ];
    // By threads and plain calls, of which each thread's first fails.
    let calls = [("io_uring_setup", "EPERM"), ("pwritev", "EDQUOT:when=1")];
    let output = run(&wanting, &calls, None, &flags);
    let said = text(&output);
    assert!(has_run(&output), "{said}");
    // VIRTIO_BLK_S_IOERR, and VIRTIO_BLK_S_OK
    assert_eq!(fs::read_to_string(&serial).unwrap(), "10", "{said}");
    tells(&said, "disk data: ");
    assert_eq!(fs::read(&disk).unwrap()[..512], [0; 512]);
}

#[test]
fn a_device_whose_socket_a_quota_has_no_room_for_is_refused_and_the_vm_runs_on() {
    let Some(wanting) = wanting() else {
        return;
    };
    fs::write(wanting.path("kernel"), kernel(&attentive())).unwrap();
    let (api, vsock) = (wanting.path("api"), wanting.path("vsock"));
    let lock = format!("{vsock}.lock");
    let child = Command::new("sh")
        .args([
            "-c",
            &under_strace(&[("openat", "EDQUOT")], Some(&lock)),
            "sh",
        ])
        .arg(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--memory", "size=64M", "--serial", "null"])
        .args(["--kernel", &wanting.path("kernel"), "--api-socket", &api])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ctl = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
        command.args(["ctl", "--api-socket", &api]).args(arguments);
        command.output().unwrap()
    };
    eventually("the guest runs", || {
        String::from_utf8_lossy(&ctl(&["info"]).stdout).contains("running")
    });
    let refused = ctl(&["add-vsock", "3", "--socket", &vsock]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    tells(&text(&refused), &lock);
    assert!(!fs::exists(&vsock).unwrap());
    let added = ctl(&["add-vsock", "3", "--socket", &wanting.path("other")]);
    assert!(added.status.success(), "{}", text(&added));
    assert!(ctl(&["power-button"]).status.success());
    let output = child.wait_with_output().unwrap();
    assert!(has_run(&output), "{}", text(&output));
}
