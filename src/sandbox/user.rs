//! `--user`: the user that the process becomes, and whose rights are all that it has once the guest runs.
//!
//! A thread has its own credentials in the kernel, so the change is made while there is one thread, and all others begin
//! with it. The main thread keeps the capabilities of the [`table`](super::table) until the VM is put together: what only
//! root may open is opened by these. Nothing is kept after that.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::Access;
use rustix::process::{Gid, Resource, Rlimit, Uid, setrlimit};
use rustix::thread::{
    CapabilitySet, capabilities, set_keep_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::kind::Kind;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// How far this process has come on its way to another user: [`SELF`], [`OPENS`] or [`OTHER`].
static STATE: AtomicU8 = AtomicU8::new(SELF);
/// It is the user that started it.
const SELF: u8 = 0;
/// It is another user, and main threads have capabilities to open what the VM names.
const OPENS: u8 = 1;
/// It is another user, without any capability.
const OTHER: u8 = 2;

/// A user with its groups, none of them looked up any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    uid: u32,
    gid: u32,
    /// Supplementary groups.
    groups: Vec<u32>,
}

/// The process cannot be another user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// --user {0}: no such user or group
    #[error(
        "--user {said}: {file} has no {what} of that name; give UID:GID, as numbers, where users and groups are kept \
         elsewhere"
    )]
    Unknown {
        /// What was said.
        said: String,
        /// `user` or `group`.
        what: &'static str,
        /// Where it was looked for.
        file: &'static str,
    },
    /// --user {0}: the number has no entry
    #[error("--user {0}: /etc/passwd has no such user, and so no group for it; give UID:GID")]
    NoGroup(String),
    /// --user {0}: not of the form
    #[error("--user {0}: it is UID, UID:GID, NAME or NAME:GROUP")]
    Form(String),
    /// --user {0}: root
    #[error(
        "--user {0}: that is root, whom the process is to leave; name another user, or leave --user away"
    )]
    Root(String),
    /// a file cannot be read
    #[error("--user: cannot read {0}: {1}; give UID:GID, which needs no file")]
    Read(&'static str, #[source] io::Error),
    /// --user needs root
    #[error(
        "--user: this process may not become another user (it lacks {0}): start it as root, or start it as that user and \
         leave --user away"
    )]
    NotRoot(&'static str),
    /// the kernel refuses
    #[error(
        "--user: the kernel does not let this process be user {uid} with group {gid}: {source}; in a user namespace, such \
         as a container's, only users that are mapped into it can be named"
    )]
    Kernel {
        /// Which user.
        uid: u32,
        /// Which group.
        gid: u32,
        /// Why.
        source: io::Error,
    },
    /// a folder is another's
    #[error(
        "--user: files and sockets of this VM are made in {folder}, where user {uid} may not: {source}; give the folder to \
         that user (`chown {uid}:{gid} {folder}`), or name another one"
    )]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Who may not.
        uid: u32,
        /// With which group.
        gid: u32,
        /// Why.
        source: io::Error,
    },
}

impl User {
    /// The user that `--user` names, as the host's files have it.
    ///
    /// # Errors
    /// [`UserError`]
    pub fn named(said: &str) -> Result<Self, UserError> {
        let read = |file| fs::read_to_string(file).map_err(|error| UserError::Read(file, error));
        Self::of(said, read)
    }

    /// Where a group is named, the user has that one and no other; else those that the files give to it.
    fn of(
        said: &str,
        read: impl Fn(&'static str) -> Result<String, UserError>,
    ) -> Result<Self, UserError> {
        let (user, group) = match said.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (said, None),
        };
        let odd = |word: &str| word.is_empty() || word.contains([':', '\n']);
        if odd(user) || group.is_some_and(odd) {
            return Err(UserError::Form(said.to_owned()));
        }
        let unknown = |what, file| UserError::Unknown {
            said: said.to_owned(),
            what,
            file,
        };
        let by_number = number(user);
        let user = match (by_number, group.and_then(number)) {
            (Some(uid), Some(gid)) => Self {
                uid,
                gid,
                groups: Vec::new(),
            },
            (_, gid) => {
                let passwd = read(PASSWD)?;
                let entry = passwd.lines().filter_map(Entry::of_user);
                let mut entry = entry.filter(|entry| match by_number {
                    Some(uid) => entry.uid == uid,
                    None => entry.name == user,
                });
                let entry = entry.next();
                let groups = match group {
                    Some(_) if gid.is_some() => String::new(),
                    _ => read(GROUP)?,
                };
                match (entry, group, gid) {
                    (Some(entry), None, _) => Self {
                        uid: entry.uid,
                        gid: entry.gid,
                        groups: groups_of(&groups, entry.name, entry.gid),
                    },
                    (None, None, _) if by_number.is_some() => {
                        return Err(UserError::NoGroup(said.to_owned()));
                    }
                    (entry, Some(group), gid) => {
                        let uid = by_number.or(entry.map(|entry| entry.uid));
                        let gid = gid.or_else(|| group_number(&groups, group));
                        Self {
                            uid: uid.ok_or_else(|| unknown("user", PASSWD))?,
                            gid: gid.ok_or_else(|| unknown("group", GROUP))?,
                            groups: Vec::new(),
                        }
                    }
                    (None, None, _) => return Err(unknown("user", PASSWD)),
                }
            }
        };
        match user.uid {
            0 => Err(UserError::Root(said.to_owned())),
            _ => Ok(user),
        }
    }

    /// Its number.
    #[must_use]
    pub const fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether this process may become another user at all.
    ///
    /// # Errors
    /// [`UserError::NotRoot`]
    pub(super) fn check_rights() -> Result<(), UserError> {
        let has = capabilities(None).map(|now| now.effective);
        let has = has.unwrap_or(CapabilitySet::empty());
        for (needed, name) in [
            (CapabilitySet::SETUID, "CAP_SETUID"),
            (CapabilitySet::SETGID, "CAP_SETGID"),
        ] {
            if !has.contains(needed) {
                return Err(UserError::NotRoot(name));
            }
        }
        Ok(())
    }

    /// Makes the calling thread, which is to be the only one, this user's. It keeps the capabilities that it is permitted,
    /// of which none is in effect.
    ///
    /// # Errors
    /// [`UserError::Kernel`]
    pub(super) fn become_it(&self) -> Result<(), UserError> {
        // What is pinned later has no capability by which it is let pass. Where this process may not raise the limit, what
        // pins memory says how high it has to be.
        let unlimited = Rlimit {
            current: None,
            maximum: None,
        };
        if let Err(error) = setrlimit(Resource::Memlock, unlimited) {
            log::debug!("RLIMIT_MEMLOCK: {error}");
        }
        let change = || -> rustix::io::Result<()> {
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
            let groups: Vec<_> = self.groups.iter().copied().map(Gid::from_raw).collect();
            set_keep_capabilities(true)?;
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
            set_keep_capabilities(false)
        };
        change().map_err(|error| UserError::Kernel {
            uid: self.uid,
            gid: self.gid,
            source: error.into(),
        })?;
        STATE.store(OPENS, Ordering::Release);
        Ok(())
    }

    /// Whether this user may make and remove files in `folders`, which is done while the guest runs. The process is this
    /// user by now.
    ///
    /// # Errors
    /// [`UserError::Folder`]
    pub(super) fn check_folders(&self, folders: &[PathBuf]) -> Result<(), UserError> {
        for folder in folders {
            // access(2) is of the real user, whose rights no capability adds to. What is not there is told of by whoever
            // wants it.
            let rights = Access::WRITE_OK | Access::EXEC_OK;
            match rustix::fs::access(folder, rights) {
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) | Ok(()) => {}
                Err(error) => {
                    return Err(UserError::Folder {
                        folder: folder.clone(),
                        uid: self.uid,
                        gid: self.gid,
                        source: error.into(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The capabilities that a thread of a kind may have, whatever the table has for it: all, where the process is the user
/// that started it.
pub(super) fn bound(kind: Kind) -> CapabilitySet {
    match (STATE.load(Ordering::Acquire), kind) {
        (SELF, _) | (OPENS, Kind::Main) => CapabilitySet::all(),
        _ => CapabilitySet::empty(),
    }
}

/// Has nothing be opened any more but by the user's own rights.
pub(super) fn end_opening() {
    let _other = STATE.compare_exchange(OPENS, OTHER, Ordering::AcqRel, Ordering::Acquire);
}

/// A line of passwd(5).
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

impl<'a> Entry<'a> {
    fn of_user(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        Some(Self {
            name,
            uid: number(fields.next()?)?,
            gid: number(fields.next()?)?,
        })
    }
}

/// Lines of group(5): name, number and members.
fn groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = number(fields.next()?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn group_number(text: &str, name: &str) -> Option<u32> {
    let mut named = groups(text).filter(|(one, ..)| *one == name);
    named.next().map(|(_, gid, _)| gid)
}

/// The groups that have `user` as a member, beside `own`.
fn groups_of(text: &str, user: &str, own: u32) -> Vec<u32> {
    let of_user = groups(text).filter(|(_, gid, members)| {
        *gid != own && members.split(',').any(|member| member.trim() == user)
    });
    let mut numbers: Vec<_> = of_user.map(|(_, gid, _)| gid).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// A user's or group's number; the highest one means "none" to the kernel. setresuid(2)
fn number(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| digits);
    number.filter(|number| *number != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/sh\nodd\nvm:x:990:991::/var/lib/vm:/usr/sbin/nologin\n\
        toor:x:0:0::/:/bin/sh\n+::::::\n";
    const GROUPS: &str =
        "root:x:0:\nkvm:x:104:vm,other\nvm:x:991:vm\ndisk:x:6:other\nvfio:x:105:other,vm\nodd:x\n";

    fn read(file: &'static str) -> Result<String, UserError> {
        Ok(if file == PASSWD { USERS } else { GROUPS }.to_owned())
    }

    fn user(uid: u32, gid: u32, groups: &[u32]) -> User {
        User {
            uid,
            gid,
            groups: groups.to_vec(),
        }
    }

    #[test]
    fn a_user_has_the_groups_of_the_files_or_the_one_that_is_named() {
        for (said, expected) in [
            ("vm", user(990, 991, &[104, 105])),
            ("990", user(990, 991, &[104, 105])),
            ("vm:kvm", user(990, 104, &[])),
            ("vm:7", user(990, 7, &[])),
            ("990:kvm", user(990, 104, &[])),
            ("4000:kvm", user(4000, 104, &[])),
            ("4000:4001", user(4000, 4001, &[])),
        ] {
            assert_eq!(User::of(said, read).unwrap(), expected, "{said}");
        }
        // Numbers need no file.
        let nothing = |file| Err(UserError::Read(file, io::ErrorKind::NotFound.into()));
        assert_eq!(User::of("8:9", nothing).unwrap(), user(8, 9, &[]));
        assert!(User::of("vm", nothing).is_err());
    }

    #[test]
    fn what_is_no_user_is_told_with_what_helps() {
        for (said, what) in [
            (
                "nobody",
                "/etc/passwd has no user of that name; give UID:GID",
            ),
            ("vm:wheel", "/etc/group has no group of that name"),
            ("4000", "no group for it; give UID:GID"),
            ("root", "that is root"),
            ("toor:kvm", "that is root"),
            ("0:5", "that is root"),
            ("", "UID, UID:GID, NAME or NAME:GROUP"),
            (":5", "UID, UID:GID, NAME or NAME:GROUP"),
            ("vm:", "UID, UID:GID, NAME or NAME:GROUP"),
            ("1:2:3", "UID, UID:GID, NAME or NAME:GROUP"),
            ("4294967295:5", "/etc/passwd has no user"),
        ] {
            let error = User::of(said, read).unwrap_err().to_string();
            assert!(error.contains(what), "{said}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_file_or_name_is_too_odd(said: String, users: String, groups: String) {
            let read = |file| Ok(if file == PASSWD { users.clone() } else { groups.clone() });
            if let Ok(user) = User::of(&said, read) {
                prop_assert!(user.uid != 0 && user.uid != u32::MAX && user.gid != u32::MAX);
            }
        }
    }
}
