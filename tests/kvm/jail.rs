//! `--jail` and `--user`, looked at from outside: what the process of a VM that runs is, sees and may.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

use crate::bare::kernel;
use crate::served::{eventually, lives};
use crate::whole::{has_kvm, signal};

/// A user that owns nothing but one folder. base-passwd, `nobody`
const NOBODY: u32 = 65534;

/// How names begin of threads that KVM, vhost and io_uring make in a process.
const KERNELS: [&str; 3] = ["kvm-", "vhost-", "iou-"];

/// A folder with a guest and disks that are root's alone, and one that is another user's, for what the VM makes.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    /// None, said on standard error, where this process is not root, or there is no KVM.
    pub(crate) fn new() -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root makes these jails, and becomes another user");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let this = Self { folder };
        let secret = |name: &str, bytes: &[u8]| {
            fs::write(this.path(name), bytes).unwrap();
            fs::set_permissions(this.path(name), Permissions::from_mode(0o600)).unwrap();
        };
        secret("kernel", &kernel(&lives("here ")));
        for folder in ["images", "own"] {
            fs::create_dir(this.path(folder)).unwrap();
        }
        for disk in ["images/disk", "images/second", "elsewhere"] {
            secret(disk, &[0; 4096]);
        }
        chown(this.path("own"), Some(NOBODY), Some(NOBODY)).unwrap();
        Some(this)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `busway run` with a disk, a console's file and a control socket.
    pub(crate) fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
        command
            .args(["run", "-v", "--memory", "size=64M", "--kernel"])
            .arg(self.path("kernel"))
            .arg("--disk")
            .arg(format!(
                "path={},id=first",
                self.path("images/disk").display()
            ))
            .arg("--serial")
            .arg(format!("file={}", self.path("own/serial").display()))
            .arg("--api-socket")
            .arg(self.path("own/api"))
            .args(flags)
            // In the tree there is the way to it.
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.path("own/serial")).unwrap_or_default()
    }

    /// The process, once its guest has said its word.
    pub(crate) fn start(&self, flags: &[&str]) -> Child {
        self.started(&mut self.command(flags))
    }

    /// The same, by a command that has been prepared.
    pub(crate) fn started(&self, command: &mut Command) -> Child {
        let mut child = command.spawn().unwrap();
        eventually("the guest's word", || {
            if child.try_wait().unwrap().is_some() {
                let mut stderr = String::new();
                std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut stderr).unwrap();
                panic!("it ended: {stderr}");
            }
            self.said() == "here "
        });
        child
    }

    fn ctl(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_busway"))
            .args(["ctl", "--api-socket"])
            .arg(self.path("own/api"))
            .args(words)
            .output()
            .unwrap()
    }

    pub(crate) fn done(&self, words: &[&str]) {
        let output = self.ctl(words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {stderr}");
    }

    fn refused(&self, words: &[&str], why: &str) {
        let output = self.ctl(words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && stderr.contains(why),
            "{words:?}: {stderr}"
        );
    }

    /// It restarts, and ends in order by a signal: the first asks the guest, which does not hear, and the second ends it.
    fn live_and_end(&self, child: Child) {
        self.done(&["pause"]);
        self.done(&["resume"]);
        self.done(&["reboot"]);
        eventually("its word again", || self.said() == "here here ");
        signal(&child, libc::SIGTERM);
        signal(&child, libc::SIGINT);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code().is_some(),
            "{}: {stderr}",
            output.status
        );
        assert!(!stderr.contains("its filter does not have"), "{stderr}");
        assert!(
            !self.path("own/api").exists(),
            "the socket is left: {stderr}"
        );
    }
}

pub(crate) fn of<'a>(status: &'a str, key: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.map_or(Vec::new(), |line| line.split_whitespace().collect())
}

/// Each task is that user, in no other group, and can do nothing that root could. One that is just starting has a name before
/// it has its walls.
fn is_nobody(pid: u32) {
    let mut wrong = None;
    eventually("each task is nobody's", || {
        wrong = a_task_that_is_somebodys(pid);
        if let Some(wrong) = &wrong {
            eprintln!("{wrong}");
        }
        wrong.is_none()
    });
}

fn a_task_that_is_somebodys(pid: u32) -> Option<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // As a whole: the task may be gone a moment later.
    let statuses =
        tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    statuses.filter(|status| !status.is_empty()).find(|status| {
        let name = of(status, "Name:").concat();
        if KERNELS.iter().any(|begin| name.starts_with(begin)) {
            return false;
        }
        let is_nobody = ["Uid:", "Gid:"]
            .iter()
            .all(|key| of(status, key) == ["65534"; 4]);
        let kinds = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"];
        let nothing = kinds
            .iter()
            .all(|key| of(status, key) == ["0000000000000000"]);
        !is_nobody || !nothing || !of(status, "Groups:").is_empty()
    })
}

#[test]
fn as_another_user_a_vm_opens_what_is_roots_and_has_nothing_of_it_once_the_guest_runs() {
    let Some(place) = Place::new() else { return };
    let child = place.start(&["--user", "65534:65534"]);
    is_nobody(child.id());
    // What only root may open is opened no more, unless somebody sends it.
    let second = place.path("images/second").display().to_string();
    place.refused(&["add-disk", &second, "--id", "second"], "denied");
    place.done(&["add-disk", &second, "--id", "second", "--send"]);
    is_nobody(child.id());
    place.live_and_end(child);
}

/// What a folder of the jail has, as the host sees it.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The process in the jail, whose outer one was started as `outer`, as the host knows it.
pub(crate) fn inner(outer: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).unwrap();
    children
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("one, not {children:?}"))
}

/// The process that was started has one thread, nothing open but what it waits with, and no rights.
fn is_bare(outer: u32) {
    let folder = PathBuf::from(format!("/proc/{outer}"));
    assert_eq!(names(&folder.join("task")), [outer.to_string()]);
    let open = names(&folder.join("fd")).into_iter();
    let mut open: Vec<_> = open
        .filter(|number| number != "2")
        .map(|number| fs::read_link(folder.join("fd").join(number)).unwrap())
        .collect();
    for kept in ["pidfd", "signalfd", "socket"] {
        let place = open
            .iter()
            .position(|link| link.to_string_lossy().contains(kept));
        open.remove(place.unwrap_or_else(|| panic!("{kept}: {open:?}")));
    }
    assert!(open.is_empty(), "{open:?}");
    let status = fs::read_to_string(folder.join("status")).unwrap();
    for key in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(of(&status, key), ["0000000000000000"], "{key}");
    }
    assert_eq!(of(&status, "Name:"), ["supervisor"]);
    assert_eq!(
        [of(&status, "Seccomp:"), of(&status, "NoNewPrivs:")],
        [["2"], ["1"]]
    );
}

/// The process has namespaces of its own, and a root in which there is what its VM names.
fn is_jailed(place: &Place, outer: u32, by_user: bool) {
    let pid = inner(outer);
    is_bare(outer);
    let namespace = |pid: &str, kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let its = pid.to_string();
    for (kind, own) in [
        ("mnt", true),
        ("net", true),
        ("ipc", true),
        ("uts", true),
        ("pid", true),
        ("user", by_user),
    ] {
        assert_eq!(
            namespace(&its, kind) != namespace("self", kind),
            own,
            "{kind}"
        );
    }
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let first = place.folder.path().iter().nth(1).unwrap().to_str().unwrap();
    assert_eq!(names(&root), ["dev", "proc", "sys", first]);
    assert!(!root.join("etc/passwd").exists());
    let inside = |name: &str| root.join(place.path(name).strip_prefix("/").unwrap());
    assert_eq!(names(&inside("images")), ["disk", "second"]);
    assert_eq!(names(&inside("")), ["images", "kernel", "own"]);
    let dev = names(&root.join("dev"));
    for node in ["kvm", "null", "urandom"] {
        assert!(dev.iter().any(|name| name == node), "{dev:?}");
    }
    for node in ["mem", "sda", "vda", "tty", "ptmx", "pts", "shm"] {
        assert!(dev.iter().all(|name| name != node), "{dev:?}");
    }
    let proc = names(&root.join("proc"));
    let known = ["cpuinfo", "interrupts", "irq", "meminfo", "self", "sys"];
    assert!(
        proc.iter().all(|name| known.contains(&name.as_str())),
        "{proc:?}"
    );
    let status = fs::read_to_string(root.join("proc/self/status")).unwrap();
    assert_eq!(of(&status, "Pid:"), [its.as_str()]);
    assert_eq!(of(&status, "NSpid:"), [its.as_str(), "1"]);
    // The host's tree is not below or above it, and even root makes nothing in its own.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let roots: Vec<_> = mounts
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some("/"))
        .collect();
    assert!(roots.len() == 1 && roots[0].contains(" ro,"), "{mounts}");
    assert!(roots[0].contains("- tmpfs "), "{mounts}");
    assert_eq!(
        fs::create_dir(root.join("new")).unwrap_err().raw_os_error(),
        Some(libc::EROFS)
    );
    let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let names: Vec<_> = interfaces.lines().skip(2).map(|line| line.trim()).collect();
    assert!(
        names.iter().all(|name| name.starts_with("lo:")),
        "{interfaces}"
    );
}

#[test]
fn a_jail_has_what_its_vm_names_and_nothing_else_of_the_host() {
    let Some(place) = Place::new() else { return };
    let child = place.start(&["--jail"]);
    is_jailed(&place, child.id(), false);
    let second = place.path("images/second").display().to_string();
    place.done(&["add-disk", &second, "--id", "second"]);
    let elsewhere = place.path("elsewhere").display().to_string();
    place.refused(&["add-disk", &elsewhere, "--id", "third"], "--jail");
    place.done(&["add-disk", &elsewhere, "--id", "third", "--send"]);
    place.refused(&["add-net", "busway-jail"], "--jail");
    place.live_and_end(child);
}

#[test]
fn in_a_jail_as_another_user_a_vm_has_neither_roots_rights_nor_the_hosts_files() {
    let Some(place) = Place::new() else { return };
    let child = place.start(&[
        "--jail",
        "true",
        "--user",
        "65534:65534",
        "--landlock",
        "false",
    ]);
    is_nobody(child.id());
    is_nobody(inner(child.id()));
    is_jailed(&place, child.id(), false);
    place.live_and_end(child);
}

/// A tap is the host's, though the process has left the host's network.
#[test]
fn a_tap_that_a_jailed_vm_makes_is_in_the_hosts_network() {
    let Some(place) = Place::new() else { return };
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: no /dev/net/tun here");
        return;
    }
    let name = format!("jail{}", std::process::id());
    let flags = [
        "--net",
        &format!("tap={name},num_queues=4,mtu=1400"),
        "--jail",
        "--user",
        "65534:65534",
    ];
    let child = place.start(&flags);
    let of_host = Path::new("/sys/class/net").join(&name);
    assert_eq!(fs::read_to_string(of_host.join("mtu")).unwrap(), "1400\n");
    let up = fs::read_to_string(of_host.join("flags")).unwrap();
    let up = u32::from_str_radix(up.trim().trim_start_matches("0x"), 16).unwrap();
    assert_eq!(up & libc::IFF_UP as u32, libc::IFF_UP as u32);
    is_jailed(&place, child.id(), false);
    place.live_and_end(child);
    assert!(!of_host.exists(), "a tap of the VM's own goes with it");
}

/// Whether the kernel gives namespaces to a user is the host's affair; a user who gets none is told why.
#[test]
fn a_user_has_a_jail_in_a_user_namespace_or_is_told_what_forbids_it() {
    let Some(place) = Place::new() else { return };
    let command = place.command(&["--jail"]);
    fs::set_permissions(place.path("kernel"), Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(place.path("images/disk"), Permissions::from_mode(0o666)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_busway"), place.path("busway")).unwrap();
    let mut own = Command::new(place.path("busway"));
    let kvm = fs::metadata("/dev/kvm").map(|kvm| std::os::unix::fs::MetadataExt::gid(&kvm));
    own.args(command.get_args()).gid(kvm.unwrap()).uid(NOBODY);
    own.current_dir("/")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = own.spawn().unwrap();
    let mut ended = false;
    eventually("its word or its end", || {
        ended = child.try_wait().unwrap().is_some();
        ended || place.said() == "here "
    });
    if ended {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        assert!(stderr.contains("no namespaces of its own"), "{stderr}");
        eprintln!("skipped: {stderr}");
        return;
    }
    fs::remove_file(place.path("busway")).unwrap();
    is_jailed(&place, child.id(), true);
    place.live_and_end(child);
}

#[test]
fn who_cannot_be_another_user_is_told_what_helps() {
    let Some(place) = Place::new() else { return };
    let run = |flags: &[&str]| {
        let output = place.command(flags).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    for (user, status, what) in [
        (
            "no-such-user",
            2,
            "/etc/passwd has no user of that name; give UID:GID",
        ),
        ("0:0", 2, "that is root"),
        ("1:2:3", 2, "UID, UID:GID, NAME or NAME:GROUP"),
        // The folder is the other one's.
        ("65533:65533", 3, "chown 65533:65533"),
    ] {
        let (code, stderr) = run(&["--user", user]);
        assert_eq!(code, Some(status), "{user}: {stderr}");
        assert!(stderr.contains(what), "{user}: {stderr}");
        assert_eq!(place.said(), "", "no guest has run");
    }
    // Who is a user already.
    fs::copy(env!("CARGO_BIN_EXE_busway"), place.path("busway")).unwrap();
    let output = Command::new(place.path("busway"))
        .args(["run", "--user", "1:1", "--kernel", "k"])
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("lacks CAP_SETUID"), "{stderr}");
}

#[test]
fn a_process_that_takes_its_vms_over_an_api_has_no_jail_and_no_other_user_and_says_so() {
    for flags in [&["--jail"][..], &["--user", "1:1"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_busway"))
            .args(["--api-socket", "/run/never/there"])
            .args(flags)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("of the one VM of `busway run`"), "{stderr}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "kernel = \"k\"\njail = true\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["--api-socket", "/run/never/there", "--config"])
        .arg(file.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("`jail` is of the one VM"), "{stderr}");
}

#[test]
fn a_pseudo_terminal_in_a_jail_is_a_mistake_that_is_told() {
    let output = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--kernel", "k", "--jail", "--serial", "pty"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("/dev/ptmx"), "{stderr}");
}
