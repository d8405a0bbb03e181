//! The VMs that run, found by their control sockets.
//!
//! Busway locks a control socket that it made by a file beside it, `PATH.lock`, which it keeps open; one that it was
//! handed has the number that its command line says. So a process that has such a file or number has that socket. No
//! socket is tried that may be another one, such as a console's, which has room for one client only. It does not matter
//! which network namespace the process is in, nor, where its root can be reached, which mount namespace.
//!
//! What cannot be looked into is counted: processes of other users, and VMs without a control socket.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use busway_iommu::process_name;

/// What Busway's processes are called, as the kernel cuts names: by its own name, and by that of the VMM that it
/// stands in for.
const NAMES: [&str; 2] = ["busway", "cloud-hypervis"];

/// A socket that may be a VM's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Where it is for its process.
    pub(super) socket: PathBuf,
    /// Where it is for this one.
    pub(super) reach: PathBuf,
    /// Whose it is.
    pub(super) pid: u32,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Search {
    /// The sockets, by path.
    pub(super) found: Vec<Found>,
    /// Processes that have a VM and no control socket.
    pub(super) without: Vec<u32>,
    /// How many processes are called as Busway's are and cannot be looked into.
    pub(super) unseen: usize,
}

/// Looks through the processes that `proc` tells of.
pub(super) fn search(proc: &Path) -> Search {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let mut search = Search::default();
    let mut found = BTreeMap::new();
    for pid in pids {
        let folder = proc.join(pid.to_string());
        let Some(files) = Files::of(&folder) else {
            let name = process_name(proc, pid).unwrap_or_default();
            let is = NAMES.iter().any(|known| name.starts_with(known));
            search.unseen += usize::from(is);
            continue;
        };
        let sockets = files.sockets(&folder);
        if sockets.is_empty() && files.has_vm {
            search.without.push(pid);
        }
        for (socket, reach) in sockets {
            let one = Found {
                socket: socket.clone(),
                reach,
                pid,
            };
            found.entry(socket).or_insert(one);
        }
    }
    search.found = found.into_values().collect();
    search
}

/// What a process has open, as far as it matters here.
#[derive(Debug, Default)]
struct Files {
    /// What is locked by a file beside it.
    locked: Vec<PathBuf>,
    /// The inodes of its sockets, by descriptor.
    sockets: BTreeMap<u32, u64>,
    /// It has a VM of KVM's.
    has_vm: bool,
}

impl Files {
    /// None where the process cannot be looked into, or is gone.
    fn of(folder: &Path) -> Option<Self> {
        let mut files = Self::default();
        for entry in fs::read_dir(folder.join("fd")).ok()?.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let bytes = target.as_os_str().as_bytes();
            if let Some(path) = bytes.strip_suffix(b".lock") {
                files.locked.push(OsString::from_vec(path.to_vec()).into());
            } else if let (Some(inode), Some(number)) = (socket_inode(&target), number) {
                files.sockets.insert(number, inode);
            }
            files.has_vm |= bytes == b"anon_inode:kvm-vm";
        }
        Some(files)
    }

    /// Its control sockets, each with where it can be reached.
    fn sockets(&self, folder: &Path) -> Vec<(PathBuf, PathBuf)> {
        let handed = handed(folder).and_then(|number| self.sockets.get(&number));
        let handed = handed.and_then(|inode| path_of(folder, *inode));
        let all = self.locked.iter().cloned().chain(handed);
        all.filter_map(|socket| {
            let reach = reach(folder, &socket)?;
            Some((socket, reach))
        })
        .collect()
    }
}

/// Where this process reaches what is at `path` for another; none where it is no socket.
fn reach(folder: &Path, path: &Path) -> Option<PathBuf> {
    let theirs = folder.join("root").join(path.strip_prefix("/").ok()?);
    let is_socket = |path: &Path| {
        let there = fs::symlink_metadata(path).ok();
        there.filter(|there| there.file_type().is_socket())
    };
    let Some(there) = is_socket(&theirs) else {
        // Their root may not be looked into: then it is taken for this one.
        let unknown = fs::read_link(folder.join("root")).is_err();
        return (unknown && is_socket(path).is_some()).then(|| path.to_owned());
    };
    let same =
        is_socket(path).is_some_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()));
    // By its own name where it has it: a socket's path has 107 bytes at most.
    Some(if same { path.to_owned() } else { theirs })
}

/// The inode of a link such as `socket:[123]`.
fn socket_inode(target: &Path) -> Option<u64> {
    let text = target.to_str()?;
    text.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// The descriptor of the control socket that a process was handed, by its command line.
fn handed(folder: &Path) -> Option<u32> {
    let line = fs::read(folder.join("cmdline")).ok()?;
    let words: Vec<_> = line.split(|byte| *byte == 0).collect();
    let flag = b"--api-socket";
    let at = words.iter().position(|word| word.starts_with(flag))?;
    let value = match words.get(at)?.strip_prefix(flag)? {
        b"" => words.get(at.checked_add(1)?).copied()?,
        value => value.strip_prefix(b"=")?,
    };
    let number = value.strip_prefix(b"fd=")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// The path of a socket, by the process's own list of them. proc(5), `net/unix`
fn path_of(folder: &Path, inode: u64) -> Option<PathBuf> {
    let list = fs::read(folder.join("net/unix")).ok()?;
    list.split(|byte| *byte == b'\n').find_map(|line| {
        // Num RefCount Protocol Flags Type St Inode Path
        let line = std::str::from_utf8(line).ok()?;
        let inode_there: u64 = line.split_ascii_whitespace().nth(6)?.parse().ok()?;
        let path = line.split_once(" /").map(|(_, path)| format!("/{path}"))?;
        (inode_there == inode).then(|| path.into())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Made-up processes, whose root is a folder.
    struct Processes {
        folder: tempfile::TempDir,
        _sockets: Vec<UnixListener>,
    }

    impl Processes {
        fn new(sockets: &[&str]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir_all(folder.path().join("root/run")).unwrap();
            let bind = |name: &&str| UnixListener::bind(folder.path().join("root/run").join(name));
            let sockets = sockets.iter().map(|name| bind(name).unwrap()).collect();
            Self {
                folder,
                _sockets: sockets,
            }
        }

        fn proc(&self) -> PathBuf {
            self.folder.path().join("proc")
        }

        fn add(&self, pid: u32, name: &str, cmdline: &str, files: &[(u32, &str)]) {
            let folder = self.proc().join(pid.to_string());
            fs::create_dir_all(folder.join("fd")).unwrap();
            fs::create_dir_all(folder.join("net")).unwrap();
            fs::write(folder.join("comm"), name).unwrap();
            fs::write(folder.join("cmdline"), cmdline).unwrap();
            fs::write(
                folder.join("net/unix"),
                "Num       RefCount Protocol Flags    Type St Inode Path\n\
                 0000000000000000: 00000002 00000000 00010000 0001 01 77 /run/handed over\n\
                 0000000000000000: 00000002 00000000 00010000 0001 01 78\n",
            )
            .unwrap();
            symlink(self.folder.path().join("root"), folder.join("root")).unwrap();
            for (number, target) in files {
                symlink(target, folder.join("fd").join(number.to_string())).unwrap();
            }
        }
    }

    #[test]
    fn a_vm_is_found_by_the_lock_beside_its_socket_or_by_the_number_that_it_was_handed() {
        let world = Processes::new(&["vm", "handed over", "console"]);
        let vm = "anon_inode:kvm-vm";
        world.add(
            7,
            "busway",
            "busway\0run\0",
            &[(3, "/run/vm.lock"), (4, "socket:[5]"), (5, vm)],
        );
        for (pid, line) in [
            (8, "busway\0--api-socket\0fd=3\0"),
            (9, "x\0--api-socket=fd=3\0"),
        ] {
            world.add(pid, "busway", line, &[(3, "socket:[77]"), (5, vm)]);
        }
        // Its console's socket is not its control socket.
        world.add(
            10,
            "busway",
            "busway\0run\0",
            &[(3, "socket:[77]"), (5, vm)],
        );
        // A lock of something else, and of what is gone.
        world.add(
            11,
            "apt",
            "apt\0",
            &[(3, "/run/other.lock"), (4, "/run/gone.lock (deleted)")],
        );
        let found = search(&world.proc());
        let sockets: Vec<_> = found
            .found
            .iter()
            .map(|one| (one.socket.to_str().unwrap(), one.pid))
            .collect();
        assert_eq!(sockets, [("/run/handed over", 8), ("/run/vm", 7)]);
        assert!(found.found[1].reach.ends_with("proc/7/root/run/vm"));
        assert_eq!((found.without, found.unseen), (vec![10], 0));
    }

    #[test]
    fn what_cannot_be_looked_into_is_counted_where_it_may_be_a_vm() {
        let world = Processes::new(&[]);
        for (pid, name) in [(7, "busway"), (8, "cloud-hypervisor"), (9, "bash")] {
            let folder = world.proc().join(pid.to_string());
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("comm"), name).unwrap();
        }
        let expected = Search {
            unseen: 2,
            ..Search::default()
        };
        assert_eq!(search(&world.proc()), expected);
        assert_eq!(search(Path::new("/nowhere")), Search::default());
    }

    #[test]
    fn a_command_line_without_a_number_hands_over_nothing() {
        let world = Processes::new(&[]);
        for (pid, line) in [
            (1, ""),
            (2, "busway\0--api-socket\0"),
            (3, "busway\0--api-socket\0/run/vm\0"),
            (4, "busway\0--api-socket=fd=x\0"),
        ] {
            world.add(pid, "busway", line, &[]);
            assert_eq!(handed(&world.proc().join(pid.to_string())), None);
        }
    }
}
