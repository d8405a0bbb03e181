//! What a rule of Landlock's is of, where a file has no identity that lasts.
//!
//! A rule is of an inode. On 9p that keeps none (of `cache=` it has neither `loose` nor metadata) the kernel makes a new one each
//! time that a path is looked up (linux/fs/9p/vfs_inode.c, `v9fs_vfs_lookup`), so that a rule of a file would be of nothing the next time. The root of such a
//! mount stays what it is, and a rule of that has all below it.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// The places where file systems are mounted, and whether each is of 9p that keeps no inodes.
#[derive(Debug)]
pub(super) struct Mounts(Vec<(PathBuf, bool)>);

impl Mounts {
    /// Those of this process. Where procfs does not tell, there is none of 9p.
    pub(super) fn read() -> Self {
        let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
        Self::parse(&text)
    }

    /// Lines as proc_pid_mountinfo(5) has them; no place is kept where none is of 9p. A file system does not tell by statfs(2)
    /// what it is: 9p says what its server does.
    fn parse(text: &[u8]) -> Self {
        let lines = text.split(|byte| *byte == b'\n');
        let mounts: Vec<_> = lines.filter_map(mount).collect();
        match mounts.iter().any(|(_, is_9p)| *is_9p) {
            true => Self(mounts),
            false => Self(Vec::new()),
        }
    }

    /// `path`, or the root of the mount that it is in, where that is 9p's.
    pub(super) fn anchor<'a>(&self, path: &'a Path) -> Cow<'a, Path> {
        if self.0.is_empty() || is_open(path) {
            return Cow::Borrowed(path);
        }
        let Ok(whole) = fs::canonicalize(path) else {
            return Cow::Borrowed(path);
        };
        match self.root_on_9p(&whole) {
            Some(root) => {
                log::info!(
                    "Landlock: {} is on 9p, whose files no rule can name: all of {} is in reach as it was to be",
                    path.display(),
                    root.display()
                );
                Cow::Owned(root.to_owned())
            }
            None => Cow::Borrowed(path),
        }
    }

    /// Whether no rule can name the file at `path`, though it is there.
    pub(super) fn is_unnamable(&self, path: &Path) -> bool {
        !self.0.is_empty()
            && !is_open(path)
            && fs::canonicalize(path).is_ok_and(|whole| self.root_on_9p(&whole).is_some())
    }

    /// The last one that was mounted of those that lie closest above a path counts.
    fn root_on_9p(&self, path: &Path) -> Option<&Path> {
        let above = self.0.iter().filter(|(root, _)| path.starts_with(root));
        let (root, is_9p) = above.max_by_key(|(root, _)| root.components().count())?;
        is_9p.then_some(root)
    }
}

/// What the process has open already, and only opens again.
fn is_open(path: &Path) -> bool {
    path.starts_with("/proc/self/fd")
}

/// Bits of `cache=` by which inodes are kept, as the kernel writes it since Linux 6.4. linux/fs/9p/v9fs.h, `CACHE_META`,
/// `CACHE_LOOSE`
const KEEPS: u32 = 0b1010;

/// Whether options of 9p's keep inodes.
fn keeps_inodes(options: &[u8]) -> bool {
    let cache = options
        .split(|byte| *byte == b',')
        .find_map(|option| option.strip_prefix(b"cache="));
    match cache.and_then(|cache| std::str::from_utf8(cache).ok()) {
        Some("loose" | "fscache") => true,
        Some(bits) => u32::from_str_radix(bits, 16).is_ok_and(|bits| bits & KEEPS != 0),
        None => false,
    }
}

/// Where a line's file system is mounted, and whether that is 9p that keeps no inodes.
fn mount(line: &[u8]) -> Option<(PathBuf, bool)> {
    let mut words = line.split(|byte| *byte == b' ');
    let root = unescaped(words.nth(4)?);
    // Optional fields end with a hyphen.
    let mut words = words.skip_while(|word| *word != b"-").skip(1);
    let (kind, _source, options) = (words.next()?, words.next()?, words.next()?);
    let is_9p = kind == b"9p" && !keeps_inodes(options);
    Some((OsString::from_vec(root).into(), is_9p))
}

/// Blanks and the like are three octal digits behind a backslash.
fn unescaped(word: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, after)) = rest.split_first() {
        let digits = after
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let number = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number.filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = b"21 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=/\n\
        22 21 0:5 / /proc rw shared:5 - proc proc rw\n\
        30 21 0:31 / /lab rw,relatime shared:9 master:1 - 9p lab rw,access=any,trans=virtio\n\
        31 30 0:32 / /lab/own rw - tmpfs tmpfs rw\n\
        33 21 0:34 / /cache ro - 9p cache ro,cache=f,access=client,trans=virtio\n\
        34 21 0:35 / /project ro - 9p project ro,cache=5,trans=virtio\n\
        35 21 0:36 / /old ro - 9p old ro,cache=loose,trans=virtio\n\
        32 21 0:33 / /with\\040blank rw - 9p more rw\n\
        odd\n";

    #[test]
    fn a_file_on_9p_stands_for_its_mount_and_any_other_for_itself() {
        let mounts = Mounts::parse(MOUNTS);
        for (path, root) in [
            ("/lab/held", Some("/lab")),
            ("/lab", Some("/lab")),
            ("/lab/folder/file", Some("/lab")),
            ("/lab/own/file", None),
            ("/cache/kernel", None),
            ("/old/kernel", None),
            ("/project/file", Some("/project")),
            ("/labs/held", None),
            ("/with blank/x", Some("/with blank")),
            ("/etc/passwd", None),
        ] {
            let found = mounts.root_on_9p(Path::new(path));
            assert_eq!(found, root.map(Path::new), "{path}");
        }
        let without = Mounts::parse(b"21 1 0:20 / / rw - ext4 /dev/vda rw\n");
        assert!(without.0.is_empty());
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Mounts::read().anchor(folder.path()), folder.path());
    }
}
