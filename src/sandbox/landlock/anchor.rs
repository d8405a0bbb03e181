//! What a rule of Landlock's is of, where a file has no identity that lasts.
//!
//! A rule is of an inode. On 9p without a cache the kernel makes a new one each time that a path is looked up
//! (linux/fs/9p/vfs_inode.c, `v9fs_vfs_lookup`), so that a rule of a file would be of nothing the next time. The root of such a
//! file system stays what it is, and a rule of that has all below it.

use std::borrow::Cow;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

/// linux/magic.h
const V9FS_MAGIC: u64 = 0x0102_1997;

/// `path`, or the root of the file system that it is on, where that is 9p.
pub(super) fn anchor(path: &Path) -> Cow<'_, Path> {
    let is_9p = statfs(path).is_ok_and(|found| u64::try_from(found.f_type) == Ok(V9FS_MAGIC));
    let root = is_9p.then(|| root_of(path)).flatten();
    match root {
        Some(root) => {
            log::info!(
                "Landlock: {} is on 9p, whose files no rule can name: all of {} is in reach as it was to be",
                path.display(),
                root.display()
            );
            Cow::Owned(root)
        }
        None => Cow::Borrowed(path),
    }
}

/// The topmost folder above `path` that is on the same file system.
fn root_of(path: &Path) -> Option<PathBuf> {
    let path = fs::canonicalize(path).ok()?;
    let device = fs::metadata(&path).ok()?.dev();
    let mut root = &*path;
    while let Some(parent) = root.parent() {
        if fs::metadata(parent).ok()?.dev() != device {
            break;
        }
        root = parent;
    }
    Some(root.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stands_for_itself_and_the_root_of_its_file_system_is_the_topmost_folder_there() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(anchor(folder.path()), folder.path());
        assert_eq!(
            anchor(Path::new("/nowhere/file")),
            Path::new("/nowhere/file")
        );
        let version = Path::new("/proc/sys/kernel/ostype");
        assert_eq!(root_of(version).as_deref(), Some(Path::new("/proc")));
    }
}
