//! Which paths a process has opened, connected to, made, renamed or removed since its guest has run, by what strace(1) wrote of
//! it, beside the table of those that it may: docs/security.md, "What is opened while a guest runs". That table is the only
//! list.

use std::collections::BTreeSet;
use std::path::Path;

/// What stands in front of `busway run` for its trace, which is in the file that follows. The process is a child of who starts
/// it, as without; only calls that are traced stop it. What a filter refuses is not there, for it is not done.
pub(crate) const STRACE: &[&str] = &[
    "strace",
    "--daemonize=grandchild",
    "--seccomp-bpf",
    "-fqYy",
    "--signal=none",
    "--string-limit=4096",
    "--trace=open,openat,openat2,creat,execve,execveat,connect,bind,link,linkat,symlink,symlinkat,mknod,mknodat,mkdir,mkdirat,\
     rename,renameat,renameat2,unlink,unlinkat,rmdir,truncate,chmod,fchmodat",
    "--output",
];

/// The thread that puts the VM together, whose last call is made before the guest's first instruction.
const BEFORE: &str = "assemble";

/// A path that a thread has asked the kernel for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Asked {
    pub(crate) thread: String,
    pub(crate) call: String,
    pub(crate) path: String,
}

/// All that has been asked for since the VM is put together, each thing once; nothing where it never was.
pub(crate) fn since_the_guest_began(trace: &str) -> Option<BTreeSet<Asked>> {
    let lines: Vec<&str> = trace.lines().collect();
    let last = lines.iter().rposition(|line| {
        let mut asked = asked(line).into_iter();
        asked.any(|one| one.thread == BEFORE)
    })?;
    let after = lines.into_iter().skip(last + 1);
    Some(after.flat_map(asked).collect())
}

/// The paths of a line, without those that were refused. A call that another one interrupts is in two lines, of which the first
/// has the paths.
fn asked(line: &str) -> Vec<Asked> {
    let Some((thread, rest)) = line.trim_start().split_once("> ") else {
        return Vec::new();
    };
    let thread = thread.split_once('<').map_or(thread, |(_, name)| name);
    let Some((call, arguments)) = rest.split_once('(') else {
        return Vec::new();
    };
    if call.contains(' ') || matches!(call, "sendto" | "sendmsg") || rest.contains("= -1 EACCES") {
        return Vec::new();
    }
    paths(arguments)
        .into_iter()
        .map(|path| Asked {
            thread: thread.to_owned(),
            call: call.to_owned(),
            path,
        })
        .collect()
}

/// The strings among a call's arguments, each behind the folder that it is relative to: `AT_FDCWD</root>, "file"`, `7</sys/bus>,
/// "file"`. What the descriptor is that comes of it, stands behind the last parenthesis, and is no argument.
fn paths(arguments: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = arguments;
    let mut folder = None;
    while let Some(at) = rest.find(['"', '<', ')']) {
        let (mark, after) = (rest.as_bytes()[at], &rest[at + 1..]);
        match mark {
            b'"' => {
                let Some(end) = after.find('"') else { break };
                let path = Path::new(&after[..end]);
                // The name of an abstract socket, `@"name"`, is nobody's file.
                if !rest[..at].ends_with('@') {
                    let folder = folder.unwrap_or("");
                    found.push(Path::new(folder).join(path).display().to_string());
                }
                rest = &after[end + 1..];
            }
            b'<' => {
                let Some(end) = after.find('>') else { break };
                folder = Some(&after[..end]).filter(|folder| folder.starts_with('/'));
                rest = &after[end + 1..];
            }
            _ => break,
        }
    }
    found
}

/// The rows of the table: a path's pattern, and what is in its other columns.
pub(crate) struct Table(Vec<String>);

impl Table {
    /// That of the page.
    pub(crate) fn read() -> Self {
        Self::parse(include_str!("../../docs/security.md"))
    }

    fn parse(page: &str) -> Self {
        let section = page
            .split("\n### ")
            .find(|section| section.starts_with("What is opened while a guest runs"));
        let rows = section
            .unwrap_or_default()
            .lines()
            .filter(|line| line.starts_with("| `"));
        let patterns = rows.flat_map(|row| {
            let column = row.split(" | ").next().unwrap_or_default();
            column.split('`').skip(1).step_by(2).map(str::to_owned)
        });
        Self(patterns.collect())
    }

    /// Which of its patterns a path fits, of a VM whose own files and folders are `own`.
    pub(crate) fn has(&self, path: &str, own: &[&str]) -> bool {
        own.iter().any(|pattern| fits(pattern, path))
            || self.0.iter().any(|pattern| fits(pattern, path))
    }
}

/// Whether a path is of a pattern: `*` is what has no slash in it, `**` anything.
fn fits(pattern: &str, path: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == path,
        Some((before, after)) => {
            let Some(rest) = path.strip_prefix(before) else {
                return false;
            };
            let (after, whole) = match after.strip_prefix('*') {
                Some(after) => (after, true),
                None => (after, false),
            };
            let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            let mut ends = ends.take_while(|end| whole || !rest[..*end].contains('/'));
            ends.any(|end| fits(after, &rest[end..]))
        }
    }
}

#[test]
fn of_a_trace_there_is_what_was_asked_for_since_the_guest_began_and_was_not_refused() {
    let trace = "\
        12<busway> openat(AT_FDCWD</root>, \"/etc/early\", O_RDONLY) = 3</etc/early>\n\
        13<assemble> openat(AT_FDCWD</root>, \"vm/first\", O_RDWR|O_CLOEXEC) = 4</root/vm/first>\n\
        13<assemble> +++ exited with 0 +++\n\
        15<http> openat(AT_FDCWD</root>, \"vm/disk\", O_RDWR|O_CLOEXEC <unfinished ...>\n\
        16<attach> openat(9</sys/bus/pci>, \"driver\", O_RDONLY) = 10</sys/bus/pci/driver>\n\
        15<http> <... openat resumed>) = 11</root/vm/disk>\n\
        17<_disk0> openat(AT_FDCWD</root>, \"/etc/localtime\", O_RDONLY) = -1 EACCES (Permission denied)\n\
        18<vsock-out> connect(7<socket:[1]>, {sa_family=AF_UNIX, sun_path=\"/run/v_80\"}, 110) = -1 ENOENT (No such file or directory)\n\
        12<busway> connect(7<socket:[2]>, {sa_family=AF_UNIX, sun_path=@\"other\"}, 110) = 0\n\
        12<busway> renameat(AT_FDCWD</root>, \"/a\", AT_FDCWD</root>, \"/b\") = 0\n\
        12<busway> +++ exited with 0 +++\n";
    let asked = since_the_guest_began(trace).unwrap();
    let asked: Vec<_> = asked
        .iter()
        .map(|one| (&*one.thread, &*one.call, &*one.path))
        .collect();
    assert_eq!(
        asked,
        [
            ("attach", "openat", "/sys/bus/pci/driver"),
            ("busway", "renameat", "/a"),
            ("busway", "renameat", "/b"),
            ("http", "openat", "/root/vm/disk"),
            ("vsock-out", "connect", "/run/v_80"),
        ]
    );
    assert_eq!(
        since_the_guest_began("1<busway> openat(AT_FDCWD</>, \"/a\", O_RDONLY) = 3</a>\n"),
        None
    );
}

#[test]
fn the_table_of_the_page_is_read_and_its_patterns_end_at_slashes() {
    let table = Table::parse(
        "### Other\n\n| `/no` | x | y |\n\n### What is opened while a guest runs\n\n| path | by | when |\n|---|---|---|\n\
         | `/proc/*/stat`, `/proc/*/comm` | `http` | asked |\n| `/sys/devices/**` | `attach` | `/etc/passwd` |\n\n### Next\n\n| `/nor` | x |\n",
    );
    assert!(table.has("/proc/12/stat", &[]) && table.has("/proc/self/comm", &[]));
    assert!(table.has("/sys/devices/pci0000:00/0000:00:01.0/reset_method", &[]));
    for path in [
        "/proc/12/task/13/stat",
        "/proc/12/stat/",
        "/no",
        "/nor",
        "/etc/passwd",
        "/sys/devices",
    ] {
        assert!(!table.has(path, &[]), "{path}");
    }
    assert!(table.has("/run/vm/api", &["/run/vm/*"]));
    assert!(!Table::read().0.is_empty());
}
