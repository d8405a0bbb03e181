//! What a thread of each kind can do once it has entered it, tried in a process of its own.

use std::collections::HashMap;
use std::env;
use std::io;
use std::path::Path;
use std::process::{self, Command};
use std::thread;

use rustix::thread::{CapabilitySet, capabilities as capabilities_now};

use super::landlock::Rules;
use super::table;
use super::{Apart, Bounds, Kind, Mode, User, capabilities, confine, end_opening, enter};
use crate::config::Choice;

/// The kind whose thread the process is to have.
const CHILD: &str = "BUSWAY_TEST_WALLS";
/// The folder that the processes of a test share.
pub(super) const FOLDER: &str = "BUSWAY_TEST_FOLDER";
/// The status of a process that could not be confined.
pub(super) const NO_WALLS: i32 = 77;
/// The capabilities that it was started with.
const RIGHTS: &str = "BUSWAY_TEST_RIGHTS";

/// Runs the test `name` again in a process of its own, for each kind: there, `act` is done on a thread of that kind,
/// with violations dealt with as `mode` says. Gives each process's status and standard error.
fn in_a_process_each(name: &str, mode: Mode, act: fn(Kind)) -> Vec<(Kind, Option<i32>, String)> {
    in_a_process_with(&format!("tests::{name}"), mode, None, || None, act)
}

/// The same, where a test is named with its module, the processes share a folder ([`FOLDER`]), and Landlock leaves them
/// what `files` says.
pub(super) fn in_a_process_with(
    name: &str,
    mode: Mode,
    folder: Option<&Path>,
    files: fn() -> Option<Rules>,
    act: fn(Kind),
) -> Vec<(Kind, Option<i32>, String)> {
    in_a_process_apart(name, mode, folder, files, Apart::default, act)
}

/// The same, in a process that goes where `apart` says.
pub(super) fn in_a_process_apart(
    name: &str,
    mode: Mode,
    folder: Option<&Path>,
    files: fn() -> Option<Rules>,
    apart: fn() -> Apart,
    act: fn(Kind),
) -> Vec<(Kind, Option<i32>, String)> {
    if let Ok(number) = env::var(CHILD) {
        let kind = Kind::ALL[number.parse::<usize>().unwrap()];
        let files = files();
        let bounds = match &files {
            Some(files) => Bounds::Files(Choice::On, files),
            None => Bounds::Threads,
        };
        if let Err(error) = confine(mode, bounds, &apart()) {
            eprintln!("{error}");
            process::exit(NO_WALLS);
        }
        let thread = thread::Builder::new().name("taken".to_owned());
        let body = move || {
            enter(kind);
            act(kind);
        };
        let done = thread.spawn(body).unwrap().join();
        process::exit(if done.is_ok() { 0 } else { 9 });
    }
    let test = format!("sandbox::{name}");
    let rights = capabilities_now(None).unwrap().permitted;
    let run = |(number, kind): (usize, Kind)| {
        let folder = folder.map(|folder| (FOLDER, folder));
        let output = Command::new(env::current_exe().unwrap())
            .envs(folder)
            .args(["--exact", &test, "--nocapture", "--test-threads=1"])
            .env(CHILD, number.to_string())
            .env(RIGHTS, rights.bits().to_string())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (kind, output.status.code(), stderr)
    };
    Kind::ALL.into_iter().enumerate().map(run).collect()
}

/// Makes a call, and gives the error that it has.
pub(super) fn errno(number: libc::c_long, arguments: [usize; 5]) -> i32 {
    let [a, b, c, d, e] = arguments;
    // SAFETY: each call in these tests either is refused, or is given descriptors and addresses that do not exist, or
    // makes something that is left alone.
    let result = unsafe { libc::syscall(number, a, b, c, d, e) };
    if result == 0 && matches!(number, libc::SYS_clone | libc::SYS_fork) {
        // SAFETY: this is the process that should not be there.
        unsafe { libc::_exit(0) };
    }
    match result {
        -1 => io::Error::last_os_error().raw_os_error().unwrap_or(0),
        _ => 0,
    }
}

pub(super) const NO_FD: usize = usize::MAX;

/// What no thread whatever may do: each is refused by EPERM in this mode.
fn try_what_nobody_may(kind: Kind) {
    let path = c"/bin/true".as_ptr() as usize;
    let (exec, anonymous) = (
        (libc::PROT_READ | libc::PROT_EXEC) as usize,
        (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize,
    );
    let child = libc::SIGCHLD as usize;
    let namespace = (libc::CLONE_NEWUSER | libc::SIGCHLD) as usize;
    for (what, number, arguments) in [
        ("execve", libc::SYS_execve, [path, 0, 0, 0, 0]),
        ("execveat", libc::SYS_execveat, [NO_FD, path, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [16, NO_FD, 0, 0, 0]),
        ("mount", libc::SYS_mount, [path, path, path, 0, 0]),
        ("umount2", libc::SYS_umount2, [path, 0, 0, 0, 0]),
        ("fsopen", libc::SYS_fsopen, [path, 0, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [path, 0, 0, 0, 0]),
        ("mmap", libc::SYS_mmap, [0, 4096, exec, anonymous, NO_FD]),
        ("mprotect", libc::SYS_mprotect, [0, 4096, exec, 0, 0]),
        ("fork", libc::SYS_fork, [0; 5]),
        ("clone", libc::SYS_clone, [child, 0, 0, 0, 0]),
        ("clone", libc::SYS_clone, [namespace, 0, 0, 0, 0]),
        (
            "unshare",
            libc::SYS_unshare,
            [libc::CLONE_NEWNS as usize, 0, 0, 0, 0],
        ),
        ("setns", libc::SYS_setns, [NO_FD, 0, 0, 0, 0]),
        ("setuid", libc::SYS_setuid, [0; 5]),
        ("bpf", libc::SYS_bpf, [NO_FD, 0, 0, 0, 0]),
        ("init_module", libc::SYS_init_module, [0; 5]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [NO_FD, 0, 0, 0, 0]),
        (
            "process_vm_writev",
            libc::SYS_process_vm_writev,
            [NO_FD, 0, 0, 0, 0],
        ),
        ("kill", libc::SYS_kill, [1, 0, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [1, 1, 0, 0, 0]),
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_PACKET as usize, 3, 0, 0, 0],
        ),
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_INET6 as usize, 1, 0, 0, 0],
        ),
        (
            "socket",
            libc::SYS_socket,
            [libc::AF_VSOCK as usize, 1, 0, 0, 0],
        ),
        (
            "TIOCSTI",
            libc::SYS_ioctl,
            [NO_FD, libc::TIOCSTI as usize, 0, 0, 0],
        ),
        (
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            [libc::SIGSYS as usize, 0, 0, 8, 0],
        ),
        (
            "prctl",
            libc::SYS_prctl,
            [libc::PR_SET_DUMPABLE as usize, 1, 0, 0, 0],
        ),
    ] {
        assert_eq!(errno(number, arguments), libc::EPERM, "{kind:?}: {what}");
    }
    // Libraries go on by clone, whose flags are seen.
    assert_eq!(errno(libc::SYS_clone3, [0; 5]), libc::ENOSYS);
}

/// What some kinds may do and others not.
fn try_what_some_may(kind: Kind) {
    let refused =
        |number, arguments| matches!(errno(number, arguments), libc::EPERM | libc::EACCES);
    let path = c"/dev/null".as_ptr() as usize;
    let at = libc::AT_FDCWD as usize;
    let (read, write) = (libc::O_RDONLY as usize, libc::O_WRONLY as usize);
    let writes = matches!(kind, Kind::Main | Kind::Report | Kind::ConsoleOutput);
    let changes = writes || kind == Kind::Steer;
    let reads = changes || kind == Kind::Http;
    let looks = reads || kind == Kind::GivenUp;
    let connects = matches!(
        kind,
        Kind::Main | Kind::VhostUser | Kind::VsockPorts | Kind::Tpm
    );
    // One end of which is a back end's, or swtpm's.
    let pairs = matches!(kind, Kind::Main | Kind::VhostUser | Kind::Tpm);
    let unix = libc::AF_UNIX as usize;
    let starts = matches!(kind, Kind::Main | Kind::Vcpu);
    for (what, may, number, arguments) in [
        (
            "openat to write",
            changes,
            libc::SYS_openat,
            [at, path, write, 0, 0],
        ),
        (
            "openat to read",
            reads,
            libc::SYS_openat,
            [at, path, read, 0, 0],
        ),
        (
            "open to write",
            writes,
            libc::SYS_open,
            [path, write, 0, 0, 0],
        ),
        ("open to read", reads, libc::SYS_open, [path, read, 0, 0, 0]),
        ("stat", looks, libc::SYS_newfstatat, [at, path, 0, 0, 0]),
        ("connect", connects, libc::SYS_connect, [NO_FD, 0, 0, 0, 0]),
        ("socket", connects, libc::SYS_socket, [unix, 1, 0, 0, 0]),
        (
            "socketpair",
            pairs,
            libc::SYS_socketpair,
            [unix, 99, 0, 0, 0],
        ),
        (
            "timerfd_create",
            starts,
            libc::SYS_timerfd_create,
            [99, 0, 0, 0, 0],
        ),
        ("KVM_RUN", starts, libc::SYS_ioctl, [NO_FD, 0xae80, 0, 0, 0]),
        (
            "KVM_CREATE_VM",
            kind == Kind::Main,
            libc::SYS_ioctl,
            [NO_FD, 0xae01, 0, 0, 0],
        ),
        (
            "TUNSETIFF",
            kind == Kind::Main,
            libc::SYS_ioctl,
            [NO_FD, 0x4004_54ca, 0, 0, 0],
        ),
    ] {
        assert_eq!(!refused(number, arguments), may, "{kind:?}: {what}");
    }
}

/// What threads do as such: they take memory and give it back, wait, start others, and say what goes wrong.
fn live_and_panic(kind: Kind) {
    let mut words: HashMap<usize, Vec<u8>> = HashMap::new();
    for size in [64, 64 << 10, 8 << 20] {
        words.insert(size, vec![1; size]);
    }
    drop(words);
    let started = std::time::Instant::now();
    thread::sleep(std::time::Duration::from_millis(1));
    assert!(started.elapsed().as_micros() > 0);
    let other = thread::Builder::new().name("other".to_owned());
    let other = other.spawn(|| enter(Kind::Watchdog)).unwrap();
    other.join().unwrap();
    // What was refused is explained where it was, with the limit and the user.
    let lack = std::io::Error::from_raw_os_error(libc::ENOMEM);
    let _no_limit = crate::shortage::remedy(&lack, "");
    let _user = busway_iommu::effective_user();
    std::panic::set_hook(Box::new(|info| {
        eprintln!("this went wrong: {info}");
        process::exit(1);
    }));
    panic!("a thread ({kind:?}) is out of tea");
}

fn exec(_kind: Kind) {
    errno(
        libc::SYS_execve,
        [c"/bin/true".as_ptr() as usize, 0, 0, 0, 0],
    );
}

/// The rights that are left are those of the table which were there before.
fn compare_rights(kind: Kind) {
    let now = capabilities_now(None).unwrap();
    let start = env::var(RIGHTS).unwrap().parse().unwrap();
    let start = CapabilitySet::from_bits_retain(start);
    assert_eq!(now.effective, capabilities(kind) & start, "{kind:?}");
    assert_eq!(now.permitted, now.effective);
    assert!(now.inheritable.is_empty());
}

/// Numbers that no file of users and groups is asked for. base-passwd, `nobody`
fn as_another_user() -> Apart {
    Apart {
        user: Some(User::named("65534:65534").unwrap()),
        ..Apart::default()
    }
}

/// The main thread can open what is root's until it is said that all is open; no other thread can, and nobody after that.
fn compare_rights_of_another_user(kind: Kind) {
    let uids = [rustix::process::getuid(), rustix::process::geteuid()];
    assert_eq!(
        uids.map(rustix::process::Uid::as_raw),
        [65534; 2],
        "{kind:?}"
    );
    let groups = rustix::process::getgroups().unwrap();
    assert!(groups.is_empty(), "{kind:?}: {groups:?}");
    let now = || capabilities_now(None).unwrap();
    let start = env::var(RIGHTS).unwrap().parse().unwrap();
    let start = CapabilitySet::from_bits_retain(start);
    let expected = match kind {
        Kind::Main => capabilities(kind) & start,
        _ => CapabilitySet::empty(),
    };
    assert_eq!(now().effective, expected, "{kind:?}");
    end_opening().unwrap();
    assert!(
        now().effective.is_empty() && now().permitted.is_empty(),
        "{kind:?}"
    );
    let other = thread::spawn(|| {
        enter(Kind::Main);
        let now = capabilities_now(None).unwrap();
        now.effective | now.permitted | now.inheritable
    });
    assert!(other.join().unwrap().is_empty(), "{kind:?}");
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    // Who may not raise limits keeps the one that they have.
    if start.contains(CapabilitySet::SYS_RESOURCE) {
        assert_eq!((limit.current, limit.maximum), (None, None));
    }
}

#[test]
fn as_another_user_no_thread_has_a_capability_once_all_is_open() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root becomes another user");
        return;
    }
    let test = "tests::as_another_user_no_thread_has_a_capability_once_all_is_open";
    let act = compare_rights_of_another_user;
    let results = in_a_process_apart(test, Mode::False, None, || None, as_another_user, act);
    all_pass(results);
}

fn all_pass(results: Vec<(Kind, Option<i32>, String)>) {
    for (kind, status, stderr) in results {
        assert_eq!(status, Some(0), "{kind:?}: {stderr}");
    }
}

#[test]
fn no_thread_executes_traces_mounts_forks_or_makes_memory_executable() {
    let test = "no_thread_executes_traces_mounts_forks_or_makes_memory_executable";
    all_pass(in_a_process_each(test, Mode::Errno, try_what_nobody_may));
}

#[test]
fn only_threads_whose_work_it_is_open_connect_and_ask_kvm() {
    let test = "only_threads_whose_work_it_is_open_connect_and_ask_kvm";
    all_pass(in_a_process_each(test, Mode::Errno, try_what_some_may));
}

#[test]
fn a_violation_on_a_thread_of_any_kind_ends_the_process_with_a_word() {
    let test = "a_violation_on_a_thread_of_any_kind_ends_the_process_with_a_word";
    for (kind, status, stderr) in in_a_process_each(test, Mode::True, exec) {
        let message = "busway: error: thread taken asked the kernel for call 59 (execve), with 0x";
        assert!(stderr.contains(message), "{kind:?}: {stderr}");
        assert_eq!(status, Some(1), "{kind:?}");
    }
}

#[test]
fn a_panic_on_a_thread_of_any_kind_still_prints_its_message() {
    let test = "a_panic_on_a_thread_of_any_kind_still_prints_its_message";
    for (kind, status, stderr) in in_a_process_each(test, Mode::True, live_and_panic) {
        let message = format!("a thread ({kind:?}) is out of tea");
        assert!(stderr.contains(&message), "{kind:?}: {stderr}");
        assert_eq!(status, Some(1), "{kind:?}");
    }
}

#[test]
fn a_thread_keeps_the_capabilities_that_the_table_has_for_its_kind() {
    let test = "a_thread_keeps_the_capabilities_that_the_table_has_for_its_kind";
    all_pass(in_a_process_each(test, Mode::False, compare_rights));
}

#[test]
fn every_call_in_the_table_has_a_name() {
    for kind in Kind::ALL {
        for (call, _) in table::allowed(kind) {
            assert!(
                crate::arch::system_calls::call_name(call).is_some(),
                "{call}"
            );
        }
    }
}
