//! The two processes of a VM in a jail: the one that was started, and the one in the jail, looked at from outside.

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt::set_socket_passcred,
};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::jail::{Place, inner, of};
use crate::served::{LIMIT, eventually};

/// A service manager's socket, and from which processes it was told what.
struct Manager(UnixDatagram);

impl Manager {
    fn new(place: &Place) -> Self {
        let socket = UnixDatagram::bind(place.path("own/notify")).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        set_socket_passcred(&socket, true).unwrap();
        Self(socket)
    }

    /// Waits for a line, and gives the process that said it.
    #[track_caller]
    fn hear(&self, line: &str) -> u32 {
        loop {
            let mut text = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
            let mut beside = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut text)];
            let received = recvmsg(&self.0, &mut into, &mut beside, RecvFlags::empty());
            let length = received
                .unwrap_or_else(|error| panic!("{line}: {error}"))
                .bytes;
            let sender = beside.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid),
                _ => None,
            });
            let text = String::from_utf8_lossy(&text[..length]).into_owned();
            if text.lines().any(|one| one == line) {
                return sender.unwrap().as_raw_nonzero().get().cast_unsigned();
            }
        }
    }
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(number.cast_signed()).unwrap()
}

fn send(number: u32, signal: Signal) {
    kill_process(pid(number), signal).unwrap();
}

/// The state of a process, by its letter, as it is for one that is not traced; none where it is gone, or nobody has waited for it.
fn state(number: u32) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{number}/status")).ok()?;
    let state = of(&status, "State:").first()?.to_string();
    Some(state.to_uppercase()).filter(|state| state != "Z")
}

/// How the process that was started ends, which takes the other one with it.
fn ended(mut child: Child, inner: u32) -> ExitStatus {
    let status = child.wait().unwrap();
    eventually("the inner process's end", || state(inner).is_none());
    status
}

/// Ctrl-C, and a service manager that ends a unit, send a signal to both.
#[test]
fn a_signal_to_both_processes_is_one_and_its_vm_is_told_of_by_the_one_that_was_started() {
    let Some(place) = Place::new() else { return };
    let manager = Manager::new(&place);
    let mut command = place.command(&["--jail", "--platform", "power_off_timeout=300"]);
    let command = command.env("NOTIFY_SOCKET", place.path("own/notify"));
    let child = command.process_group(0).spawn().unwrap();
    assert_eq!(manager.hear("READY=1"), child.id());
    let inner = inner(child.id());
    let group = pid(child.id());
    kill_process_group(group, Signal::TERM).unwrap();
    // The outer process has told the signal on before it passes this on. What asks for the VM comes after the signal.
    assert_eq!(manager.hear("STOPPING=1"), child.id());
    place.done(&["info"]);
    assert!(state(inner).is_some());
    kill_process_group(group, Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(
        stderr.matches("is asked to power off").count(),
        1,
        "{stderr}"
    );
    assert!(!stderr.contains("its filter does not have"), "{stderr}");
    assert_eq!(state(inner), None);
}

#[test]
fn a_vm_in_a_jail_is_found_by_the_number_that_the_host_has_for_it() {
    let Some(place) = Place::new() else { return };
    let child = place.start(&["--jail"]);
    let inner = inner(child.id());
    let lock = fs::read_to_string(place.path("own/api.lock")).unwrap();
    assert_eq!(lock.trim(), inner.to_string());
    let list = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["ctl", "list"])
        .output()
        .unwrap();
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let socket = place.path("own/api").display().to_string();
    let lines: Vec<_> = list.lines().filter(|line| line.contains(&socket)).collect();
    assert_eq!(lines.len(), 1, "{list}");
    let has = |line: &str| {
        line.split_whitespace()
            .any(|word| word == inner.to_string())
    };
    assert!(has(lines[0]), "{inner}: {list}");
    send(inner, Signal::TERM);
    send(inner, Signal::TERM);
    assert_eq!(
        ended(child, inner).code(),
        Some(1),
        "signals to the inner one alone count"
    );
}

#[test]
fn whichever_of_the_two_processes_is_killed_the_other_one_ends_with_it() {
    let Some(place) = Place::new() else { return };
    for flags in [
        &["--jail"][..],
        &["--jail", "--user", "65534:65534", "--seccomp", "false"],
    ] {
        for is_outer in [true, false] {
            let child = place.start(flags);
            let inner = inner(child.id());
            send(if is_outer { child.id() } else { inner }, Signal::KILL);
            assert_eq!(ended(child, inner).signal(), Some(9));
            for file in ["own/serial", "own/api", "own/api.lock"] {
                let _there = fs::remove_file(place.path(file));
            }
        }
    }
}

#[test]
fn what_ends_or_stops_a_process_by_default_does_so_to_both() {
    let Some(place) = Place::new() else { return };
    let child = place.start(&["--jail"]);
    let inner = inner(child.id());
    send(child.id(), Signal::TSTP);
    let are = |letter| {
        [child.id(), inner].map(state) == [letter, letter].map(|one: &str| Some(one.to_owned()))
    };
    eventually("both are stopped", || are("T"));
    send(child.id(), Signal::CONT);
    eventually("both go on", || are("S"));
    place.done(&["info"]);
    send(child.id(), Signal::QUIT);
    assert_eq!(ended(child, inner).code(), Some(128 + 3));
}

/// Each key is the guest's while it runs, and the terminal is as it was after any end: by a signal that is handled, and by
/// one that is not. In a jail the foreground is of another namespace.
#[test]
fn a_terminal_is_the_guests_while_it_runs_and_is_given_back_with_a_jail_and_without() {
    let Some(place) = Place::new() else { return };
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
    let is_cooked = || {
        let modes = tcgetattr(&terminal).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ISIG)
    };
    assert!(is_cooked());
    for jail in ["--jail=false", "--jail=true"] {
        for (signals, status) in [
            (&[Signal::ABORT][..], 128 + 6),
            (&[Signal::TERM, Signal::INT], 1),
        ] {
            let mut command = place.command(&[jail, "--console", "tty"]);
            command.stdin(Stdio::from(terminal.try_clone().unwrap()));
            // SAFETY: both are calls of the kernel's alone, which a process may make that has just been made.
            unsafe {
                command.pre_exec(|| {
                    rustix::process::setsid()?;
                    rustix::process::ioctl_tiocsctty(std::io::stdin())?;
                    Ok(())
                });
            }
            let mut child = place.started(&mut command);
            assert!(!is_cooked(), "{jail}");
            for signal in signals {
                send(child.id(), *signal);
            }
            let ended = child.wait().unwrap();
            let by_signal = ended.signal().map(|signal| 128 + signal);
            assert_eq!(ended.code().or(by_signal), Some(status), "{jail}");
            assert!(is_cooked(), "{jail}: {status}");
            fs::remove_file(place.path("own/serial")).unwrap();
        }
    }
}
