//! What a user who is not root can do with a VM, and what they are told who lack a right for it.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::bare::{kernel, power_off, say};
use crate::whole::has_kvm;

/// A user that owns nothing. base-passwd, `nobody`
const NOBODY: u32 = 65534;

/// A folder that everybody can look into, with the program and a guest.
struct Ordinary {
    folder: TempDir,
}

impl Ordinary {
    /// None, said on standard error, where this process cannot be another user, or there is no KVM.
    fn new() -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root runs programs as another user");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let this = Self { folder };
        fs::copy(env!("CARGO_BIN_EXE_busway"), this.path("busway")).unwrap();
        let guest = kernel(&[say("here"), power_off()].concat());
        fs::write(this.path("kernel"), guest).unwrap();
        fs::set_permissions(this.path("kernel"), Permissions::from_mode(0o644)).unwrap();
        // What the user's VM writes is in a folder of their own.
        fs::create_dir(this.path("own")).unwrap();
        std::os::unix::fs::chown(this.path("own"), Some(NOBODY), Some(NOBODY)).unwrap();
        Some(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the guest as that user, in the group `group` alone.
    fn run(&self, group: u32, flags: &[&str]) -> Output {
        // Root's other groups are left by that. std::os::unix::process::CommandExt::uid
        Command::new(self.path("busway"))
            .args(["run", "--seccomp", "true", "--memory", "size=64M"])
            .arg("--kernel")
            .arg(self.path("kernel"))
            .arg("--serial")
            .arg(format!("file={}", self.path("own/serial").display()))
            .args(flags)
            .stdin(Stdio::null())
            .gid(group)
            .uid(NOBODY)
            .output()
            .unwrap()
    }
}

fn kvms_group() -> u32 {
    fs::metadata("/dev/kvm").unwrap().gid()
}

/// Everybody can open a node.
fn is_everybodys(node: &str) -> bool {
    fs::metadata(node).is_ok_and(|node| node.mode() & 0o006 == 0o006)
}

#[test]
fn a_user_in_kvms_group_runs_a_guest_behind_all_walls() {
    let Some(ordinary) = Ordinary::new() else {
        return;
    };
    let mut flags = vec!["--landlock", "true"];
    // SAFETY: the call is given no memory, and a flag that asks for the level. landlock_create_ruleset(2)
    if unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) } <= 0 {
        flags.clear();
    }
    let output = ordinary.run(kvms_group(), &flags);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let said = fs::read_to_string(ordinary.path("own/serial")).unwrap();
    assert_eq!(said, "here", "{stderr}");
}

#[test]
fn a_user_who_lacks_a_right_is_told_which_and_how_to_get_it() {
    let Some(ordinary) = Ordinary::new() else {
        return;
    };
    let refused = |group, flags: &[&str], words: &[&str]| {
        let output = ordinary.run(group, flags);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{flags:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{flags:?}: {word}: {stderr}");
        }
    };
    if !is_everybodys("/dev/kvm") {
        refused(NOBODY, &[], &["/dev/kvm", "usermod -aG kvm"]);
    }
    let kvm = kvms_group();
    if is_everybodys("/dev/net/tun") {
        let words = ["walls2-none", "ip tuntap add", "CAP_NET_ADMIN"];
        refused(kvm, &["--net", "tap=walls2-none"], &words);
    }
}
