//! What somebody could do who has taken over a thread of each kind: they make the calls that a way out begins with, each in
//! a process of its own, with the walls as they stand round a VM.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::landlock::Rules;
use super::table::{self, Files};
use super::tests::{FOLDER, NO_FD, NO_WALLS, errno, in_a_process_apart, in_a_process_with};
use super::{Apart, Kind, Mode};
use crate::config::{DiskConfig, LandlockAccess, LandlockRule, VmConfig};

/// The status of a thread's process that ended as if nothing had happened.
const SURVIVED: Option<i32> = Some(0);

/// An attempt, the call by whose name it is told, and the kinds that make that call for their work.
struct Attempt {
    test: &'static str,
    call: &'static str,
    act: fn(Kind),
    may: &'static [Kind],
}

impl Attempt {
    /// Makes it on a thread of each kind. Where that is none of its work, the process ends with a line that names the
    /// call, and nothing of it is done.
    fn ends_the_process(&self) {
        let name = format!("takeover::{}", self.test);
        for (kind, status, stderr) in in_a_process_with(&name, Mode::True, None, || None, self.act)
        {
            let told = stderr.contains(&format!("({}), with 0x", self.call))
                && stderr.contains("busway: error: thread taken asked the kernel for call");
            match self.may.contains(&kind) {
                true => assert_eq!(status, SURVIVED, "{kind:?}: {stderr}"),
                false => assert!(told && status == Some(1), "{kind:?}: {status:?}: {stderr}"),
            }
        }
    }
}

#[test]
fn a_thread_that_was_taken_over_executes_nothing() {
    Attempt {
        test: "a_thread_that_was_taken_over_executes_nothing",
        call: "execve",
        act: |_| {
            errno(libc::SYS_execve, [c"/bin/sh".as_ptr() as usize, 0, 0, 0, 0]);
        },
        may: &[],
    }
    .ends_the_process();
}

#[test]
fn a_thread_that_was_taken_over_traces_nothing() {
    Attempt {
        test: "a_thread_that_was_taken_over_traces_nothing",
        call: "ptrace",
        // PTRACE_ATTACH to its own parent. linux/ptrace.h
        act: |_| {
            errno(libc::SYS_ptrace, [16, 1, 0, 0, 0]);
        },
        may: &[],
    }
    .ends_the_process();
}

#[test]
fn a_thread_that_was_taken_over_mounts_nothing() {
    Attempt {
        test: "a_thread_that_was_taken_over_mounts_nothing",
        call: "mount",
        act: |_| {
            let path = c"/".as_ptr() as usize;
            let bind = libc::MS_BIND as usize;
            errno(libc::SYS_mount, [path, path, 0, bind, 0]);
        },
        may: &[],
    }
    .ends_the_process();
}

#[test]
fn a_thread_that_was_taken_over_has_no_memory_that_it_could_execute() {
    Attempt {
        test: "a_thread_that_was_taken_over_has_no_memory_that_it_could_execute",
        call: "mmap",
        act: |_| {
            let all = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as usize;
            let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
            errno(libc::SYS_mmap, [0, 4096, all, anonymous, NO_FD]);
        },
        may: &[],
    }
    .ends_the_process();
}

#[test]
fn a_thread_that_was_taken_over_makes_nothing_executable() {
    Attempt {
        test: "a_thread_that_was_taken_over_makes_nothing_executable",
        call: "mprotect",
        act: |_| {
            let execute = (libc::PROT_READ | libc::PROT_EXEC) as usize;
            errno(libc::SYS_mprotect, [0, 4096, execute, 0, 0]);
        },
        may: &[],
    }
    .ends_the_process();
}

#[test]
fn a_thread_that_was_taken_over_connects_only_where_that_is_its_work() {
    Attempt {
        test: "a_thread_that_was_taken_over_connects_only_where_that_is_its_work",
        call: "connect",
        act: |_| {
            errno(libc::SYS_connect, [NO_FD, 0, 0, 0, 0]);
        },
        // What a vCPU starts connects to nothing either.
        may: &[Kind::Main, Kind::VhostUser, Kind::VsockPorts, Kind::Tpm],
    }
    .ends_the_process();
}

#[test]
fn a_thread_that_was_taken_over_reaches_the_network_by_no_socket() {
    Attempt {
        test: "a_thread_that_was_taken_over_reaches_the_network_by_no_socket",
        call: "socket",
        act: |_| {
            let stream = libc::SOCK_STREAM as usize;
            errno(libc::SYS_socket, [libc::AF_INET6 as usize, stream, 0, 0, 0]);
        },
        may: &[],
    }
    .ends_the_process();
}

/// A new path is refused with an error where libraries look at paths in passing, and is a violation elsewhere; no kind but
/// those that write files makes one.
#[test]
fn a_thread_that_was_taken_over_makes_no_file() {
    let folder = env::var_os(FOLDER)
        .is_none()
        .then(|| tempfile::tempdir().unwrap());
    let folder = folder.as_ref().map(TempDir::path);
    let act = |kind: Kind| {
        let path = PathBuf::from(env::var_os(FOLDER).unwrap()).join(format!("{kind:?}"));
        let _refused = File::create(path);
    };
    let name = "takeover::a_thread_that_was_taken_over_makes_no_file";
    for (kind, status, stderr) in in_a_process_with(name, Mode::True, folder, || None, act) {
        let made = folder.is_some_and(|folder| folder.join(format!("{kind:?}")).exists());
        let writes = table::files(kind) == Files::AsTheProcess;
        assert_eq!(made, writes, "{kind:?}: {status:?}: {stderr}");
    }
}

/// What the VM's configuration names in the tests of Landlock: a folder, of which there is another beside it, and a disk in a
/// folder with others. It can be asked for more.
fn files() -> Option<Rules> {
    let folder = PathBuf::from(env::var_os(FOLDER)?);
    let config = VmConfig {
        disk: vec![DiskConfig::new(folder.join("images/own"))],
        landlock_rules: vec![LandlockRule {
            path: folder.join("named"),
            access: LandlockAccess::ReadWrite,
        }],
        ..VmConfig::default()
    };
    Some(Rules::of(&config, true))
}

/// The level of the kernel's Landlock.
fn level() -> i32 {
    // SAFETY: the call is given no memory, and a flag that asks for the number. landlock_create_ruleset(2)
    let level = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    i32::try_from(level).unwrap_or(0)
}

fn is_refused<T>(result: io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::PermissionDenied)
}

/// Without any filter: what is refused is refused by Landlock.
fn try_paths(kind: Kind) {
    let folder = PathBuf::from(env::var_os(FOLDER).unwrap());
    let (named, other) = (folder.join("named"), folder.join("other"));
    let (reads, writes, removes) = match table::files(kind) {
        Files::AsTheProcess => (true, true, true),
        Files::Read => (true, false, false),
        Files::Change => (true, true, false),
        Files::Remove => (false, false, true),
        Files::Connect | Files::None => (false, false, false),
    };
    let writing = |path: PathBuf| OpenOptions::new().append(true).open(path);
    assert_eq!(!is_refused(File::open(named.join("file"))), reads);
    assert_eq!(!is_refused(fs::read_dir(&named)), reads);
    assert_eq!(!is_refused(fs::read_dir("/proc/self/task")), reads);
    assert_eq!(!is_refused(writing(named.join("file"))), writes);
    let new = named.join(format!("{kind:?}"));
    let makes = table::files(kind) == Files::AsTheProcess;
    assert_eq!(!is_refused(File::create(new)), makes);
    let own = named.join(format!("for {kind:?}"));
    assert_eq!(!is_refused(fs::remove_file(own)), removes);
    // What can be added: it is opened, and not made, taken away or looked for.
    let images = folder.join("images");
    let append = |name: &str| is_refused(writing(images.join(name)));
    assert_eq!([append("own"), append("other")], [!writes; 2]);
    assert_eq!(!is_refused(File::open(images.join("other"))), reads);
    assert!(is_refused(File::create(images.join("new"))));
    assert!(is_refused(fs::remove_file(images.join("other"))));
    assert!(is_refused(fs::read_dir(&images)));
    assert!(is_refused(fs::read_dir("/sys/kernel")));
    // Whatever the kind: it is nothing of this VM's.
    assert!(is_refused(File::open(other.join("file"))));
    assert!(is_refused(writing(other.join("file"))));
    assert!(is_refused(fs::read_dir(&other)));
    assert!(is_refused(File::create(other.join("new"))));
    assert!(is_refused(fs::remove_file(other.join("file"))));
    assert!(is_refused(fs::rename(
        other.join("file"),
        named.join("mine")
    )));
    assert!(is_refused(fs::create_dir(named.join("folder"))));
    assert!(is_refused(fs::read_dir("/etc")));
    if level() >= 4 {
        assert!(is_refused(TcpStream::connect("127.0.0.1:1")));
    }
    if level() >= 6 {
        // The signal 0 is none, and asks whether one could be sent.
        let parent = std::os::unix::process::parent_id() as usize;
        let signal = errno(libc::SYS_kill, [parent, 0, 0, 0, 0]);
        assert_eq!(signal, libc::EPERM);
    }
    // Its own process's threads are still kicked.
    let (own, thread) = (std::process::id() as usize, rustix::thread::gettid());
    let thread = thread.as_raw_nonzero().get() as usize;
    assert_eq!(errno(libc::SYS_tgkill, [own, thread, 0, 0, 0]), 0);
}

/// The folders of the tests of Landlock, where this process is the one that starts the others.
fn folders() -> Option<TempDir> {
    if env::var_os(FOLDER).is_some() {
        return None;
    }
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    for (name, files) in [
        ("named", &["file"][..]),
        ("other", &["file"]),
        ("images", &["own", "other"]),
    ] {
        fs::create_dir(folder.join(name)).unwrap();
        for file in files {
            fs::write(folder.join(name).join(file), "secret").unwrap();
        }
    }
    for kind in Kind::ALL {
        fs::write(folder.join(format!("named/for {kind:?}")), "").unwrap();
    }
    Some(root)
}

/// Behind a filter and Landlock, as they stand by default: libraries look at paths in passing, so that nothing ends the process.
fn try_what_is_not_named(kind: Kind) {
    let folder = PathBuf::from(env::var_os(FOLDER).unwrap());
    let other = folder.join("other/file");
    for path in [&*other, "/etc/passwd".as_ref(), "/proc/1/environ".as_ref()] {
        assert!(is_refused(File::open(path)), "{kind:?}: {}", path.display());
    }
}

#[test]
fn behind_the_default_walls_no_thread_opens_what_its_vm_does_not_name() {
    if level() == 0 {
        eprintln!("skipped: this kernel has no Landlock");
        return;
    }
    let folder = folders();
    let folder = folder.as_ref().map(TempDir::path);
    let test = "takeover::behind_the_default_walls_no_thread_opens_what_its_vm_does_not_name";
    let act = try_what_is_not_named;
    for (kind, status, stderr) in in_a_process_with(test, Mode::True, folder, files, act) {
        assert_eq!(status, SURVIVED, "{kind:?}: {stderr}");
    }
}

#[test]
fn under_landlock_a_thread_reaches_what_its_vm_names_as_far_as_its_kind_does_with_files() {
    let folder = folders();
    let folder = folder.as_ref().map(TempDir::path);
    let test = "takeover::under_landlock_a_thread_reaches_what_its_vm_names_as_far_as_its_kind_does_with_files";
    for (kind, status, stderr) in in_a_process_with(test, Mode::False, folder, files, try_paths) {
        if status == Some(NO_WALLS) && level() == 0 {
            assert!(stderr.contains("this kernel has no Landlock"), "{stderr}");
            eprintln!("skipped: {stderr}");
            return;
        }
        assert_eq!(status, SURVIVED, "{kind:?}: {stderr}");
    }
    let other = folder.map(|folder| fs::read_to_string(folder.join("other/file")).unwrap());
    assert_eq!(other.as_deref(), Some("secret"));
}

/// Without any filter, and in a process that Landlock leaves its files, as one is that has VMs over its API: threads that serve
/// the guest have none.
fn try_paths_of_the_process(kind: Kind) {
    let file = PathBuf::from(env::var_os(FOLDER).unwrap()).join("file");
    let whole = matches!(
        table::files(kind),
        Files::AsTheProcess | Files::Read | Files::Change
    );
    assert_eq!(!is_refused(File::open(&file)), whole);
    assert_eq!(!is_refused(fs::read_dir("/")), whole);
    let writes = OpenOptions::new().append(true).open(&file);
    assert_eq!(!is_refused(writes), whole);
}

#[test]
fn in_a_process_that_has_all_files_threads_that_serve_the_guest_have_none() {
    let folder = env::var_os(FOLDER)
        .is_none()
        .then(|| tempfile::tempdir().unwrap());
    let folder = folder.as_ref().map(TempDir::path);
    if let Some(folder) = folder {
        fs::write(folder.join("file"), "secret").unwrap();
    }
    if level() == 0 {
        eprintln!("skipped: this kernel has no Landlock");
        return;
    }
    let test = "takeover::in_a_process_that_has_all_files_threads_that_serve_the_guest_have_none";
    let act = try_paths_of_the_process;
    for (kind, status, stderr) in in_a_process_with(test, Mode::False, folder, || None, act) {
        assert_eq!(status, SURVIVED, "{kind:?}: {stderr}");
    }
}

/// Without any filter, and without Landlock where the kernel has none: what is not there cannot be had.
fn look_round_a_jail(kind: Kind) {
    let folder = PathBuf::from(env::var_os(FOLDER).unwrap());
    let missing = |path: &Path| {
        let error = File::open(path).err().map(|error| error.kind());
        let none = [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied];
        assert!(
            error.is_some_and(|error| none.contains(&error)),
            "{kind:?}: {path:?}: {error:?}"
        );
        fs::metadata(path).map_err(|error| error.kind())
    };
    for path in [
        "/etc/passwd",
        "/usr",
        "/proc/1",
        "/proc/cmdline",
        "/proc/net",
        "/dev/mem",
        "/dev/tty",
        "/sys/kernel/debug",
        "/sys/fs/cgroup",
    ] {
        let there = missing(Path::new(path));
        assert_eq!(
            there.err(),
            Some(io::ErrorKind::NotFound),
            "{kind:?}: {path}"
        );
    }
    assert!(missing(&folder.join("other/file")).is_err());
    // No process but this one, by whatever number.
    if let Ok(processes) = fs::read_dir("/proc") {
        let names = processes.map(|one| one.unwrap().file_name().into_string().unwrap());
        let mut numbers = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        assert_eq!(numbers.next(), None, "{kind:?}");
    }
    // No interface but the namespace's own loopback, by whatever call.
    let mut interfaces = 0;
    for number in 1..200 {
        // SAFETY: the buffer has IF_NAMESIZE bytes, which is what a name has at most.
        let name = unsafe {
            let mut name = [0; libc::IF_NAMESIZE];
            libc::if_indextoname(number, name.as_mut_ptr())
        };
        interfaces += u32::from(!name.is_null());
    }
    assert!(interfaces <= 1, "{kind:?}: {interfaces}");
    // The tree stays as it is, whatever the rights.
    for place in ["/new", "/proc/new", "/dev/new", "/etc"] {
        assert!(fs::create_dir(place).is_err(), "{kind:?}: {place}");
        assert!(File::create(place).is_err(), "{kind:?}: {place}");
    }
    let own = File::open(folder.join("named/file"));
    assert_eq!(own.is_ok(), level() == 0 || reads_files(kind), "{kind:?}");
}

fn reads_files(kind: Kind) -> bool {
    matches!(
        table::files(kind),
        Files::AsTheProcess | Files::Read | Files::Change
    )
}

#[test]
fn in_a_jail_no_thread_sees_files_processes_or_interfaces_of_the_host() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root has this jail");
        return;
    }
    let folder = folders();
    let folder = folder.as_ref().map(TempDir::path);
    let test = "takeover::in_a_jail_no_thread_sees_files_processes_or_interfaces_of_the_host";
    let jail = || Apart {
        jail: files(),
        ..Apart::default()
    };
    let act = look_round_a_jail;
    for (kind, status, stderr) in in_a_process_apart(test, Mode::False, folder, || None, jail, act)
    {
        assert_eq!(status, SURVIVED, "{kind:?}: {stderr}");
    }
    let other = folder.map(|folder| fs::read_to_string(folder.join("other/file")).unwrap());
    assert_eq!(other.as_deref(), Some("secret"));
}
