//! The lock that keeps two machines from writing one image: an open file description's lock over all
//! of it, which ends with the descriptor. QEMU's locks lie within it and collide with it as they
//! should.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::sys;

/// The image is not ours.
#[derive(Debug)]
pub(crate) enum ImageLockError {
    /// Somebody has it: who, as far as /proc tells.
    Held(String),
    /// The kernel refused otherwise.
    Kernel(io::Error),
}

/// Takes the lock: shared for a reader, exclusive for a writer.
pub(crate) fn lock(file: &File, shared: bool) -> Result<(), ImageLockError> {
    match sys::lock(file, shared) {
        Ok(()) => Ok(()),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Err(ImageLockError::Held(
                holder(file).unwrap_or_else(|| "another process".to_owned()),
            )),
            // A file system without locks, such as some network ones: nobody else could have one.
            Some(libc::EOPNOTSUPP | libc::ENOLCK | libc::ENOSYS | libc::EINVAL) => {
                log::warn!("no lock on an image: its file system has none ({error})");
                Ok(())
            }
            _ => Err(ImageLockError::Kernel(error)),
        },
    }
}

/// Who had the lock on a file, seen by [`remember_holder`].
static SEEN: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Looks who has the lock on a file that this process is going to lock, where somebody has: for what is said of it when
/// Landlock keeps the descriptors of others from sight. A file that nobody has locked is opened and closed.
pub(crate) fn remember_holder(path: &Path, shared: bool) {
    // Asked before opening: opening a FIFO would wait for its writer.
    let kind = std::fs::metadata(path).map(|there| there.file_type());
    if !kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device()) {
        return;
    }
    let Ok(file) = File::open(path) else { return };
    if sys::is_locked(&file, shared)
        && let Some(inode) = inode(&file)
        && let Some(holder) = holder_of(&inode)
    {
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push((inode, holder));
    }
}

/// Finds a process that holds a lock on `file`. The lock belongs to a descriptor and not to a
/// process, so that only the descriptors' information tells.
fn holder(file: &File) -> Option<String> {
    let inode = inode(file)?;
    holder_of(&inode).or_else(|| {
        let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = seen.iter();
        seen.find_map(|(of, holder)| (*of == inode).then(|| holder.clone()))
    })
}

/// A file as the kernel writes it in lines on locks.
fn inode(file: &File) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    Some(format!("{major:02x}:{minor:02x}:{}", metadata.ino()))
}

fn holder_of(inode: &str) -> Option<String> {
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            let descriptors = std::fs::read_dir(process.path().join("fdinfo")).ok()?;
            let locks = descriptors
                .flatten()
                .any(|descriptor| has_lock(&descriptor.path(), inode));
            locks.then(|| describe(pid))
        })
}

/// Whether a descriptor's information has a line such as `lock: 1: OFDLCK ADVISORY WRITE -1
/// fe:00:12 0 EOF`.
fn has_lock(fdinfo: &Path, inode: &str) -> bool {
    let text = std::fs::read_to_string(fdinfo).unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with("lock:"))
        .any(|line| line.split_whitespace().any(|word| word == inode))
}

fn describe(pid: u32) -> String {
    match busway_iommu::process_name(Path::new("/proc"), pid) {
        Some(name) => format!("process {pid} ({name})"),
        None => format!("process {pid}"),
    }
}
