//! What the kernel says is mounted and swapped to.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::root::{self, SysRoot};

/// The block devices that hold mounted file systems and swap.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    by_number: BTreeMap<String, Vec<PathBuf>>,
    by_source: BTreeMap<String, Vec<PathBuf>>,
    by_pool: BTreeMap<String, Vec<PathBuf>>,
    swaps: Vec<String>,
    /// Every mount, in the order in which they were made.
    all: Vec<Mount>,
    swap_files: Vec<PathBuf>,
}

impl Mounts {
    /// Reads this process's mount namespace and the host's swap devices.
    pub(super) fn read(root: &SysRoot) -> Self {
        let mut mounts = Self::default();
        for mount in all(root) {
            if let Some(name) = device_name(root, &mount.source) {
                let at = mounts.by_source.entry(name).or_default();
                at.push(mount.at.clone());
            }
            if mount.kind == "zfs" {
                // `pool/dataset/…`
                let source = mount.source.to_string_lossy();
                let pool = root::printable(source.split('/').next().unwrap_or_default());
                let at = mounts.by_pool.entry(pool).or_default();
                at.push(mount.at.clone());
            }
            let at = mounts.by_number.entry(mount.number.clone()).or_default();
            at.push(mount.at.clone());
            for name in mount.beside(root) {
                let at = mounts.by_source.entry(name).or_default();
                at.push(mount.at.clone());
            }
            mounts.all.push(mount);
        }
        mounts.read_overlays(root);
        let text = root::text(&root.proc.join("swaps")).unwrap_or_default();
        mounts.swaps = text
            .lines()
            .skip(1)
            .filter_map(|line| {
                let path = unescape(line.split_whitespace().next()?.as_bytes());
                device_name(root, &path)
            })
            .collect();
        let files = text.lines().skip(1).filter_map(|line| {
            let mut words = line.split_whitespace();
            let path = unescape(words.next()?.as_bytes());
            (words.next()? == "file").then(|| PathBuf::from(path))
        });
        mounts.swap_files = files.collect();
        mounts
    }

    /// What an overlay's folders lie on is in use at the overlay's own place as well, which may be `/`.
    fn read_overlays(&mut self, root: &SysRoot) {
        let mut uses = Vec::new();
        for overlay in self.all.iter().filter(|mount| mount.kind == "overlay") {
            let mut seen = BTreeSet::new();
            let mut next = overlay.overlaid();
            while let Some(folder) = next.pop() {
                if !seen.insert(folder.clone()) {
                    continue;
                }
                match self.of_file(&folder) {
                    Some(below) if below.kind == "overlay" => next.extend(below.overlaid()),
                    Some(below) => uses.push((below, overlay.at.clone())),
                    None => {}
                }
            }
        }
        let uses: Vec<_> = uses
            .into_iter()
            .map(|(below, at)| (below.number.clone(), device_name(root, &below.source), at))
            .collect();
        for (number, name, at) in uses {
            if let Some(name) = name {
                self.by_source.entry(name).or_default().push(at.clone());
            }
            self.by_number.entry(number).or_default().push(at);
        }
    }

    /// The mount that a file is in: the last one made of those whose place is nearest above it.
    fn of_file(&self, file: &Path) -> Option<&Mount> {
        let above = self.all.iter().filter(|mount| file.starts_with(&mount.at));
        above.max_by_key(|mount| mount.at.components().count())
    }

    /// The number, and the name where it has one, of the block device that a file is on.
    pub(super) fn below(&self, root: &SysRoot, file: &Path) -> Option<(&str, Option<String>)> {
        let mount = self.of_file(file)?;
        Some((&mount.number, device_name(root, &mount.source)))
    }

    /// The files that are swapped to.
    pub(super) fn swap_files(&self) -> &[PathBuf] {
        &self.swap_files
    }

    /// Where the block device `name`, numbered `MAJOR:MINOR`, is mounted; the shortest path first.
    ///
    /// By both, for some file systems (btrfs) show a number of their own.
    pub(super) fn at(&self, name: &str, number: &str) -> Vec<PathBuf> {
        let by_number = self.by_number.get(number).into_iter();
        let mut at: Vec<_> = by_number
            .chain(self.by_source.get(name))
            .flatten()
            .cloned()
            .collect();
        at.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
        at.dedup();
        at
    }

    /// Where file systems of the ZFS pool are mounted; the shortest path first.
    pub(super) fn of_pool(&self, pool: &str) -> Vec<PathBuf> {
        let mut at = self.by_pool.get(pool).cloned().unwrap_or_default();
        at.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
        at
    }

    /// Whether the block device `name` is swapped to.
    pub(super) fn swaps_to(&self, name: &str) -> bool {
        self.swaps.iter().any(|swap| swap == name)
    }
}

/// Every mount of this process's namespace.
pub(super) fn all(root: &SysRoot) -> Vec<Mount> {
    // Paths are any bytes, and commands have to name them exactly.
    let text = fs::read(root.proc.join("self/mountinfo")).unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(Mount::parse).collect()
}

/// Something mounted.
#[derive(Debug)]
pub(super) struct Mount {
    number: String,
    /// Where.
    pub(super) at: PathBuf,
    /// The file system's type.
    pub(super) kind: String,
    /// What it is of: a device's node, a server's folder.
    pub(super) source: OsString,
    /// The file system's own options, with commas between.
    pub(super) options: String,
}

impl Mount {
    /// A line of mountinfo (proc_pid_mountinfo(5)):
    /// `36 35 98:0 /root /mountpoint options [optional fields…] - type source options`.
    fn parse(line: &[u8]) -> Option<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let between = line.windows(3).position(|three| three == b" - ")?;
        let (left, right) = (line.get(..between)?, line.get(between + 3..)?);
        let mut left = left.split(|byte| *byte == b' ').skip(2);
        let mut right = right.split(|byte| *byte == b' ');
        Some(Self {
            number: text(left.next()?),
            at: unescape(left.nth(1)?).into(),
            kind: text(right.next()?),
            source: unescape(right.next()?),
            options: unescape(right.next().unwrap_or_default())
                .to_string_lossy()
                .into_owned(),
        })
    }

    fn values<'a>(&'a self, keys: &'a [&str]) -> impl Iterator<Item = &'a str> {
        let pairs = self.options.split(',').filter_map(|o| o.split_once('='));
        pairs.filter_map(|(key, value)| keys.contains(&key).then_some(value))
    }

    /// The block devices that it has beside its source: XFS's log and real-time device, and all of
    /// bcachefs's.
    fn beside(&self, root: &SysRoot) -> Vec<String> {
        let source = self.source.to_string_lossy();
        let several = source.split(':').filter(|_| self.kind == "bcachefs");
        let all = self.values(&["logdev", "rtdev"]).chain(several);
        let names = all.filter_map(|path| device_name(root, path.as_ref()));
        names.collect()
    }

    /// The folders that an overlay lies on.
    fn overlaid(&self) -> Vec<PathBuf> {
        let values = self.values(&["lowerdir", "upperdir", "workdir", "lowerdir+"]);
        let folders = values.flat_map(|value| value.split(':'));
        folders
            .filter(|f| !f.is_empty())
            .map(PathBuf::from)
            .collect()
    }
}

/// The kernel's name of the block device whose node, or a link to it, is `path`: `dm-0` for
/// `/dev/mapper/vg-root`.
pub(super) fn device_name(root: &SysRoot, path: &OsStr) -> Option<String> {
    let path = Path::new(path).strip_prefix("/dev").ok()?;
    let node = root.dev.join(path);
    // In another namespace's container the node may be absent; its name is all that there is.
    let node = node.canonicalize().unwrap_or(node);
    let below = node
        .strip_prefix(root.dev.canonicalize().unwrap_or_else(|_| root.dev.clone()))
        .or_else(|_| node.strip_prefix(&root.dev))
        .ok()?;
    // sysfs writes the slash of such names as cciss/c0d0 as an exclamation mark.
    Some(root::one_line(&below.to_string_lossy().replace('/', "!")))
}

/// Undoes the kernel's octal escapes of white space and backslash: `\040` is a space.
fn unescape(text: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let escape = tail.get(..3).filter(|_| first == b'\\');
        let octal = escape
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_with_optional_fields_and_spaces_is_read() {
        let line =
            b"36 35 259:3 /@home /mnt/my\\040disk rw,noatime shared:1 master:2 - btrfs /dev/sda3 rw";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.number, "259:3");
        assert_eq!(mount.at, Path::new("/mnt/my disk"));
        assert_eq!(mount.source, "/dev/sda3");
    }

    proptest! {
        #[test]
        fn no_line_makes_it_fail(line: Vec<u8>) {
            let _ = Mount::parse(&line);
            let _ = unescape(&line);
        }
    }
}
