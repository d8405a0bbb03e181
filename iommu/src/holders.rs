//! Who has a device node open, as far as this process may see.
//!
//! A process that Landlock bounds does not see the descriptors of others. linux/security/landlock/task.c,
//! `hook_ptrace_access_check`. So it looks before it is bounded ([`remember_holders`]), and says later what it saw then.

use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::{SysRoot, process_name};

/// What was seen by [`remember_holders`]: a node and who had it open.
static SEEN: Mutex<Vec<(PathBuf, String)>> = Mutex::new(Vec::new());

/// The processes that have one of `nodes` open, as far as this one may see, or how they are found.
#[must_use]
pub fn holder(paths: &SysRoot, nodes: &[PathBuf]) -> String {
    let holders = holders(paths, nodes);
    if nodes.is_empty() {
        "another process".to_owned()
    } else if holders.is_empty() {
        let nodes: Vec<_> = nodes.iter().map(|node| node.to_string_lossy()).collect();
        format!(
            "another process (see `fuser -v {}` as root)",
            nodes.join(" ")
        )
    } else {
        holders.join(", ")
    }
}

/// The other processes that have one of `nodes` open, as far as this one may see, or saw before it was bounded.
#[must_use]
pub fn holders(paths: &SysRoot, nodes: &[PathBuf]) -> Vec<String> {
    let now = holders_now(paths, nodes);
    if !now.is_empty() {
        return now;
    }
    let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut holders: Vec<String> = Vec::new();
    for (node, holder) in seen.iter() {
        if nodes.contains(node) && !holders.contains(holder) {
            holders.push(holder.clone());
        }
    }
    holders
}

/// Looks who has a group, or a device of it, where the kernel says that somebody has: for what is said of it when this
/// process sees no others any more. A group that nobody has is opened and closed, and nothing else is looked at.
pub fn remember_holders(paths: &SysRoot, group: u32) {
    let node = paths.group(group);
    let opened = OpenOptions::new().read(true).write(true).open(node);
    if !opened.is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
        return;
    }
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    for node in paths.nodes_of_group(group) {
        let holders = holders_now(paths, std::slice::from_ref(&node));
        seen.extend(holders.into_iter().map(|holder| (node.clone(), holder)));
    }
}

fn holders_now(paths: &SysRoot, nodes: &[PathBuf]) -> Vec<String> {
    std::fs::read_dir(&paths.proc)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            if pid == std::process::id() {
                return None;
            }
            let mut open = std::fs::read_dir(process.path().join("fd")).ok()?;
            open.any(|fd| {
                fd.is_ok_and(|fd| {
                    std::fs::read_link(fd.path()).is_ok_and(|link| nodes.contains(&link))
                })
            })
            .then(|| {
                let name = process_name(&paths.proc, pid).unwrap_or_default();
                format!("process {pid} ({name})")
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn who_was_seen_before_is_named_when_others_are_out_of_sight() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::under(root.path());
        let node = paths.group(7);
        let process = paths.proc.join("12/fd");
        fs::create_dir_all(&process).unwrap();
        fs::write(paths.proc.join("12/comm"), "other\n").unwrap();
        symlink(&node, process.join("3")).unwrap();
        // There is no such node here, which is not the kernel's word that somebody has it.
        remember_holders(&paths, 7);
        let only = std::slice::from_ref(&node);
        assert_eq!(holders(&paths, only), ["process 12 (other)"]);
        fs::remove_dir_all(&process).unwrap();
        assert_eq!(holders(&paths, only), [""; 0]);
        let mut seen = SEEN.lock().unwrap();
        seen.push((node.clone(), "process 12 (other)".to_owned()));
        drop(seen);
        assert_eq!(holder(&paths, &[node]), "process 12 (other)");
        assert!(holder(&paths, &[paths.group(8)]).contains("fuser"));
    }
}
