//! `--jail`: the process has namespaces of its own, and a tree in which there is nothing but what its VM names.
//!
//! The tree is made of the same rules as Landlock's bounds ([`Rules`]). Mounts, process numbers, network, IPC and host name are
//! the process's own; a user namespace is taken where nothing else gives the right to the others, which is where the process
//! has no `CAP_SYS_ADMIN`. The process that was started stays outside of the namespace of process numbers (`processes.rs`).
//!
//! What is open stays open, and so does what belongs to the host's network: [`Tap`](crate::virtio::net)'s nodes are opened
//! before.

mod calls;
mod mounts;
mod plan;
mod processes;

use std::error::Error;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, getegid, geteuid, pivot_root, umask};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities};

use super::landlock::Rules;
use plan::{Bound, Plan};
pub(crate) use processes::is_told_on;
pub use processes::process_id;
pub(super) use processes::{Outer, Side};

/// This process is in one.
static IS_IN_FORCE: AtomicBool = AtomicBool::new(false);

/// What an error of a file that was added by its path is to be followed by, where it is not there because of the jail.
#[must_use]
pub fn remedy(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if !IS_IN_FORCE.load(Ordering::Acquire) {
        return None;
    }
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
            || error.downcast_ref::<Errno>() == Some(&Errno::NOENT)
        {
            return Some(REMEDY);
        }
        cause = error.source();
    }
    None
}

const REMEDY: &str = "this process is in a jail (--jail), in which there is what its VM's configuration named at the start: \
    --landlock-rules path=PATH,access=rw adds some, and a descriptor (busway ctl add-disk --send) needs none";

/// Where the tree is put together: a folder that each host has. What is below it has been opened by then.
const PLACE: &str = "/proc";

/// What this process has of `/proc`.
const OWN: &str = "/proc/self";

/// The jail cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// there are no namespaces to be had
    #[error("--jail: the kernel gives this process no namespaces of its own: {source}; {remedy}")]
    Namespaces {
        /// Why.
        source: io::Error,
        /// What helps.
        remedy: String,
    },
    /// --user in a user namespace
    #[error(
        "--jail with --user: this process has no CAP_SYS_ADMIN, so that the jail is in a user namespace, which has no other \
         user: start it as root with CAP_SYS_ADMIN, or start it as that user and leave --user away"
    )]
    User,
    /// what the VM names cannot be put into the tree
    #[error(
        "--jail: {path} cannot be put into the jail's tree: {source}; name it in another place, or go without --jail"
    )]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// the tree cannot be made
    #[error("--jail: {what}: {source}; {remedy}")]
    Tree {
        /// What was not done.
        what: &'static str,
        /// Why.
        source: io::Error,
        /// What helps.
        remedy: &'static str,
    },
}

impl JailError {
    fn path(path: &Path) -> impl FnOnce(Errno) -> Self {
        |source| Self::Path {
            path: path.to_owned(),
            source: source.into(),
        }
    }

    fn tree(what: &'static str, remedy: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Tree {
            what,
            source: source.into(),
            remedy,
        }
    }
}

const OLD: &str = "it needs Linux 5.12 or newer, with tmpfs (CONFIG_TMPFS), and the right to mount";

/// Leaves the host's namespaces, and makes the process that is in its own one of process numbers. There has to be one thread.
/// `other_user`: the process becomes another user.
///
/// # Errors
/// [`JailError`]: the process may be half way out, and is to end.
pub(super) fn divide(other_user: bool) -> Result<Side, JailError> {
    leave_namespaces(other_user)?;
    processes::divide().map_err(|source| JailError::Tree {
        what: "its process cannot be made",
        source,
        remedy: "it needs Linux 5.3 or newer, and one process more than ulimit -u or pids.max may let there be",
    })
}

/// Puts the calling thread, which is to be the only one of the inner process, and all that it will start, into a jail with
/// what `rules` name.
///
/// # Errors
/// [`JailError`]: the process may be half way in, and is to end.
pub(super) fn enter(rules: &Rules) -> Result<(), JailError> {
    let work = std::env::current_dir().map_err(|source| JailError::Tree {
        what: "the working directory cannot be told",
        source,
        remedy: "start it in a folder that is there",
    })?;
    let plan = Plan::of(rules, &work);
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(JailError::tree("mounts cannot be its own", OLD))?;
    let trees = plan.bound.iter().map(taken);
    let trees = trees.collect::<Result<Vec<_>, _>>()?;
    let own = Bound {
        path: OWN.into(),
        readonly: false,
        devices: false,
        is_folder: true,
        is_inside: false,
    };
    let own = taken(&own)?;
    let root = empty()?;
    attach(&root, Path::new(PLACE))?;
    chdir(PLACE).map_err(JailError::tree("the new root cannot be entered", OLD))?;
    // Who the process becomes can go through it.
    let before = umask(Mode::from_raw_mode(0o022));
    let made = make(&plan);
    umask(before);
    made?;
    for (bound, tree) in plan.bound.iter().zip(&trees) {
        attach(tree, &below(&bound.path))?;
    }
    attach(&own, &below(OWN.as_ref()))?;
    change_root()?;
    chdir(&work).map_err(JailError::path(&work))?;
    IS_IN_FORCE.store(true, Ordering::Release);
    log::info!(
        "the process is in a jail, whose tree has {} files and folders of the host's",
        trees.len()
    );
    Ok(())
}

/// Has the process leave the host's namespaces.
fn leave_namespaces(other_user: bool) -> Result<(), JailError> {
    let now = capabilities(None).map(|now| now.effective);
    let may = now.is_ok_and(|now| now.contains(CapabilitySet::SYS_ADMIN));
    let mut namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    if may {
        return calls::leave(namespaces).map_err(|source| JailError::Namespaces {
            remedy: why_none(&source, false),
            source,
        });
    }
    if other_user {
        return Err(JailError::User);
    }
    namespaces |= UnshareFlags::NEWUSER;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let refused = |source: io::Error| JailError::Namespaces {
        remedy: why_none(&source, true),
        source,
    };
    calls::leave(namespaces).map_err(refused)?;
    // Each is itself, and there is nobody else. user_namespaces(7)
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("{uid} {uid} 1")),
        ("/proc/self/gid_map", format!("{gid} {gid} 1")),
    ] {
        fs::write(file, text).map_err(refused)?;
    }
    Ok(())
}

/// What helps where there are no namespaces.
fn why_none(error: &io::Error, by_user: bool) -> String {
    let setting = |name: &str| {
        let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    why(error, by_user, setting)
}

fn why(error: &io::Error, by_user: bool, setting: impl Fn(&str) -> Option<u64>) -> String {
    let limits: &[&str] = match by_user {
        true => &["user", "mnt", "pid", "net", "ipc", "uts"],
        false => &["mnt", "pid", "net", "ipc", "uts"],
    };
    for limit in limits {
        let name = format!("max_{limit}_namespaces");
        if setting(&format!("user/{name}")) == Some(0) {
            return format!("user.{name} is 0: `sysctl -w user.{name}=1024` as root allows them");
        }
    }
    if by_user {
        for (name, refuses, allows) in [
            ("unprivileged_userns_clone", 0, 1),
            ("apparmor_restrict_unprivileged_userns", 1, 0),
        ] {
            if setting(&format!("kernel/{name}")) == Some(refuses) {
                return format!(
                    "kernel.{name} is {refuses}, by which users have none: `sysctl -w kernel.{name}={allows}` as root \
                     allows them to all users; or start it as root, with --user"
                );
            }
        }
    }
    match error.raw_os_error() {
        Some(libc::ENOSPC) => {
            "there are as many as the limits user.max_*_namespaces let be".to_owned()
        }
        Some(libc::EINVAL) => {
            "the kernel was built without them: CONFIG_NAMESPACES, _USER_NS, _PID_NS, _NET_NS, _IPC_NS, _UTS_NS".to_owned()
        }
        _ => "what started it forbids them: a service's RestrictNamespaces=, a container's filter, or a module of the \
              kernel's such as AppArmor or SELinux"
            .to_owned(),
    }
}

/// A copy of what is at a path, with all that is mounted below, which nobody has mounted yet.
fn taken(bound: &Bound) -> Result<OwnedFd, JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let refused = |source: Errno| match source {
        Errno::NOSYS => JailError::tree("its tree cannot be made", OLD)(source),
        _ => JailError::path(&bound.path)(source),
    };
    let tree = open_tree(CWD, &bound.path, flags).map_err(refused)?;
    mounts::narrow(&tree, bound.readonly, bound.devices).map_err(refused)?;
    Ok(tree)
}

/// A new file system in memory, with nothing in it.
fn empty() -> Result<OwnedFd, JailError> {
    let make = || {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "mode", "0755")?;
        fsconfig_create(&fs)?;
        let never = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, never)
    };
    make().map_err(JailError::tree("there is no tmpfs for its root", OLD))
}

fn attach(tree: &OwnedFd, at: &Path) -> Result<(), JailError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree, "", CWD, at, flags).map_err(JailError::path(at))
}

/// The place of an absolute path in the tree that is the working directory.
fn below(path: &Path) -> PathBuf {
    Path::new(".").join(path.strip_prefix("/").unwrap_or(path))
}

/// Makes, in the working directory, what mounts lie on and links are in.
fn make(plan: &Plan) -> Result<(), JailError> {
    let folder = |path: &Path| match rustix::fs::mkdir(below(path), Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        made => made.map_err(JailError::path(path)),
    };
    for path in &plan.folders {
        folder(path)?;
    }
    folder(Path::new(PLACE))?;
    folder(Path::new(OWN))?;
    for (at, to) in &plan.links {
        rustix::fs::symlink(to, below(at)).map_err(JailError::path(at))?;
    }
    for bound in plan.bound.iter().filter(|bound| !bound.is_inside) {
        if bound.is_folder {
            folder(&bound.path)?;
            continue;
        }
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let made = rustix::fs::open(below(&bound.path), flags, Mode::from_raw_mode(0o444));
        made.map_err(JailError::path(&bound.path))?;
    }
    Ok(())
}

/// Makes the working directory the root, in which nothing can be made from then on, and the host's tree none of this
/// process's.
fn change_root() -> Result<(), JailError> {
    let initial = "the host's root may be its initial RAM file system, which no process can leave: boot it from another one";
    pivot_root(".", ".").map_err(JailError::tree("the root cannot be changed", initial))?;
    // It lies on the new one now. pivot_root(2)
    unmount(".", UnmountFlags::DETACH).map_err(JailError::tree("the host's tree stays", OLD))?;
    chdir("/").map_err(JailError::tree("the new root cannot be entered", OLD))?;
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    mount_remount("/", flags, "").map_err(JailError::tree("the new root stays writable", OLD))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_there_are_no_namespaces_is_told_with_the_setting_that_refuses_them() {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        let with = |name: &'static str, value| move |asked: &str| (asked == name).then_some(value);
        for (name, value, by_user, what) in [
            (
                "user/max_user_namespaces",
                0,
                true,
                "sysctl -w user.max_user_namespaces=1024",
            ),
            (
                "user/max_net_namespaces",
                0,
                false,
                "sysctl -w user.max_net_namespaces=1024",
            ),
            (
                "kernel/unprivileged_userns_clone",
                0,
                true,
                "kernel.unprivileged_userns_clone=1",
            ),
            (
                "kernel/apparmor_restrict_unprivileged_userns",
                1,
                true,
                "kernel.apparmor_restrict_unprivileged_userns=0",
            ),
            (
                "kernel/unprivileged_userns_clone",
                0,
                false,
                "RestrictNamespaces=",
            ),
            ("user/max_user_namespaces", 9, true, "RestrictNamespaces="),
        ] {
            let said = why(&denied, by_user, with(name, value));
            assert!(said.contains(what), "{name}: {said}");
        }
        let none = |_: &str| None;
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert!(why(&full, true, none).contains("user.max_*_namespaces"));
        let without = io::Error::from_raw_os_error(libc::EINVAL);
        assert!(why(&without, true, none).contains("_USER_NS"));
    }
}
