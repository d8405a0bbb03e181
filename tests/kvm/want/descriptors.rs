//! Descriptors that run out while a guest runs: whatever was asked for is refused with the limit's name, nothing is left of it,
//! and it is had when there are more.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use super::text;
use crate::attentive::attentive;
use crate::bare::say;
use crate::served::{LIMIT, Served, eventually};
use crate::whole::{Run, has_kvm};
use crate::writer::{SLOT, writes_when_told};

/// More descriptors than anything here takes.
const PLENTY: u64 = 64;

/// The descriptors that a process has open.
fn open(pid: u32) -> BTreeSet<u64> {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    all.map(|one| one.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect()
}

/// The lowest number from which on a process may open nothing, where it may open `free` more.
fn bound(pid: u32, free: u64) -> u64 {
    let open = open(pid);
    let mut unused = (0..).filter(|number| !open.contains(number));
    unused.nth(usize::try_from(free).unwrap()).unwrap()
}

/// Leaves a process so many descriptors beside those that it has open.
fn leave(pid: u32, free: u64) {
    set_limit(pid, Some(bound(pid, free)));
}

/// Whether a process has a number free below that of a socket.
fn gap_before_sockets(pid: u32) -> bool {
    let socket = |number: &u64| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{number}"));
        link.is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    let last = open(pid).into_iter().filter(socket).max();
    last.is_some_and(|last| bound(pid, 0) < last)
}

/// How many ends of connections to a path there are. Linux, net/unix/af_unix.c, `unix_seq_show`
fn clients(path: &Path) -> usize {
    let list = fs::read_to_string("/proc/net/unix").unwrap();
    let path = path.display().to_string();
    let is_end =
        |line: &&str| line.ends_with(&path) && line.split_whitespace().nth(5) != Some("01");
    list.lines().filter(is_end).count()
}

/// The limit that processes of this one's have: getrlimit(2).
fn set_limit(pid: u32, most: Option<u64>) {
    let own = getrlimit(Resource::Nofile);
    let limit = Rlimit {
        current: most.or(own.maximum),
        ..own
    };
    let pid = Pid::from_raw(i32::try_from(pid).unwrap());
    prlimit(pid, Resource::Nofile, limit).unwrap();
}

#[track_caller]
fn names_the_limit(said: &str) {
    for words in ["ulimit -n", "LimitNOFILE", "prlimit --nofile"] {
        assert_eq!(said.matches(words).count(), 1, "{words}: {said}");
    }
}

fn ctl(served: &Served, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
    command.arg("ctl").args(arguments);
    command.arg("--api-socket").arg(served.path("api"));
    command.output().unwrap()
}

/// Adds a device to a VM that runs with ever more descriptors, until it is added.
fn add(served: &Served, pid: u32, arguments: &[&str], made: &[&Path]) {
    let what = arguments[0];
    let before = served.all_descriptors();
    let added = (0..PLENTY).find(|&free| {
        leave(pid, free);
        let output = ctl(served, arguments);
        set_limit(pid, None);
        let said = text(&output);
        if output.status.success() {
            return true;
        }
        assert_eq!(output.status.code(), Some(1), "{what}, {free} left: {said}");
        names_the_limit(&said);
        assert_eq!(served.state(), "Running", "{what}, {free} left");
        eventually(&format!("{what}, {free} left: nothing stays open"), || {
            served.all_descriptors() == before
        });
        for path in made {
            assert!(!path.exists(), "{}: {free} left", path.display());
        }
        false
    });
    // A connection takes two, and a device at least one.
    assert!(added.is_some_and(|free| free > 2), "{what}: {added:?}");
}

#[test]
fn a_device_for_which_no_descriptor_is_left_is_refused_leaves_nothing_and_is_had_when_there_are_more()
 {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let pid = served.ask("GET", "vmm.ping", None).1["pid"].as_u64();
    let pid = u32::try_from(pid.unwrap()).unwrap();
    let vm = served.vm(&attentive());
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    let path = |name: &str| served.path(name).to_str().unwrap().to_owned();
    let (disk, memory, vsock) = (path("disk"), path("memory"), path("vsock"));
    fs::write(&disk, [0; 64 << 10]).unwrap();
    File::create(&memory).unwrap().set_len(2 << 20).unwrap();
    let lock = format!("{vsock}.lock");
    let nic: &[&str] = &["add-net", "--id", "one"];
    for (arguments, made) in [
        (&["add-disk", &disk, "--id", "one"][..], &[][..]),
        (&["add-disk", &disk, "--send", "--id", "one"], &[]),
        (&["add-pmem", &memory, "--id", "one"], &[]),
        (
            &["add-vsock", "3", "--socket", &vsock, "--id", "one"],
            &[Path::new(&vsock), Path::new(&lock)],
        ),
        (nic, &[]),
    ] {
        let before = served.all_descriptors();
        if arguments == nic {
            let output = ctl(&served, nic);
            if !output.status.success() {
                eprintln!("skipped: no tap is to be had: {}", text(&output));
                continue;
            }
            assert!(ctl(&served, &["remove-device", "one"]).status.success());
        }
        add(&served, pid, arguments, made);
        let removed = ctl(&served, &["remove-device", "one"]);
        assert!(removed.status.success(), "{}", text(&removed));
        eventually("all that it had is closed", || {
            served.all_descriptors() == before
        });
    }
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

#[test]
fn a_disk_for_which_no_descriptor_is_left_when_its_driver_starts_it_works_when_there_are_more() {
    if !has_kvm() {
        return;
    }
    let mut run = Run::new(&writes_when_told());
    let disk = run.folder.path().join("disk");
    fs::write(&disk, [0xff; 64 << 10]).unwrap();
    let disk_flag = format!("path={},pci_device_id={SLOT}", disk.display());
    run.command.args(["--disk", &disk_flag]);
    run.command.stdin(Stdio::piped());
    let (mut child, _folder) = run.until("ready").unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let written = (0..PLENTY).find(|&free| {
        leave(child.id(), free);
        input.write_all(b".").unwrap();
        let mut said = [0];
        output.read_exact(&mut said).unwrap();
        if said == *b"0" {
            return true;
        }
        let mut rest = [0; 5];
        output.read_exact(&mut rest).unwrap();
        assert_eq!([&said[..], &rest].concat(), b"broken", "{free}");
        false
    });
    assert!(written.is_some_and(|free| free > 0), "{written:?}");
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", text(&ended));
    let said = text(&ended);
    let mut lines = said.lines();
    let stopped = lines.find(|line| line.contains("stops until its driver resets it"));
    names_the_limit(stopped.unwrap_or(&said));
    assert_eq!(fs::read(&disk).unwrap()[..512], [0; 512]);
}

#[test]
fn who_comes_to_a_consoles_socket_when_no_descriptor_is_left_is_turned_away_and_others_are_not() {
    if !has_kvm() {
        return;
    }
    // The guest says all that is typed: mov dx, 0x3fd; in al, dx; test al, 1; jz back; mov dx, 0x3f8; in al, dx; out dx, al; jmp
    let echo = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee,
        0xeb, 0xef,
    ];
    let mut run = Run::new(&[&say("runs")[..], &echo].concat());
    let [socket, api] = ["console", "api"].map(|name| run.folder.path().join(name));
    run.command.arg("--api-socket").arg(&api);
    let at = format!("socket={}", socket.display());
    run.command.args(["--serial", &at]);
    let mut child = run.command.spawn().unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    eventually("the console's socket", || {
        UnixStream::connect(&socket).is_ok_and(|mut client| {
            client.set_read_timeout(Some(LIMIT)).unwrap();
            client.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).is_ok()
        })
    });
    eventually("the client before is gone", || clients(&socket) == 0);
    // A limit below a descriptor that is open does not count those above: connections fill the gaps first.
    let mut idle = Vec::new();
    while gap_before_sockets(child.id()) {
        let before = open(child.id()).len();
        idle.push(UnixStream::connect(&api).unwrap());
        eventually("a connection", || open(child.id()).len() == before + 2);
    }
    leave(child.id(), 0);
    let mut away = UnixStream::connect(&socket).unwrap();
    away.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(away.read(&mut [0]).unwrap(), 0);
    let mut said = String::new();
    while !said.contains("turned away") {
        said.clear();
        assert_ne!(errors.read_line(&mut said).unwrap(), 0);
    }
    assert!(said.contains(socket.to_str().unwrap()), "{said}");
    names_the_limit(&said);
    set_limit(child.id(), None);
    let mut client = UnixStream::connect(&socket).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client.write_all(b"y").unwrap();
    let mut heard = [0];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(heard, *b"y");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_restart_goes_on_or_ends_the_vm_in_order_however_many_descriptors_are_left() {
    // mov dx, 0x3fd; in al, dx; test al, 1; jz back; mov dx, 0xcf9; mov al, 6; out dx, al; jmp $
    let resets = [
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06,
        0xee, 0xeb, 0xfe,
    ];
    if !has_kvm() {
        return;
    }
    for free in 0..PLENTY {
        let mut run = Run::new(&[&say("ready")[..], &resets].concat());
        run.command.stdin(Stdio::piped());
        let (mut child, _folder) = run.until("ready").unwrap();
        leave(child.id(), free);
        child.stdin.as_mut().unwrap().write_all(b".").unwrap();
        let mut said = [0; 5];
        if child.stdout.as_mut().unwrap().read_exact(&mut said).is_ok() {
            assert_eq!(&said, b"ready");
            child.kill().unwrap();
            child.wait().unwrap();
            return;
        }
        let ended = child.wait_with_output().unwrap();
        let said = text(&ended);
        assert_eq!(ended.status.code(), Some(1), "{free}: {said}");
        names_the_limit(&said);
    }
    panic!("it never goes on");
}
