//! The file that is persistent memory: how it is opened, locked and measured.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::PmemFault;
use crate::config::{PMEM_ALIGNMENT, PmemConfig};
use crate::virtio::blk::lock::{self, ImageLockError};

/// Opens and locks the file, and gives the bytes of it that the guest has.
pub(super) fn open(config: &PmemConfig) -> Result<(File, u64), PmemFault> {
    let path = &config.file;
    let failed = |source| open_error(path, config.discard_writes, source);
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if kind.is_dir() {
        let size = config
            .size
            .ok_or_else(|| PmemFault::NoSize { path: path.clone() })?;
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(libc::O_TMPFILE).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        file.set_len(size).map_err(failed)?;
        return Ok((file, size));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(PmemFault::Kind { path: path.clone() });
    }
    let mut options = OpenOptions::new();
    options.read(true).write(!config.discard_writes);
    if kind.is_block_device() && !config.discard_writes {
        // Fails where the host itself uses it.
        options.custom_flags(libc::O_EXCL);
    }
    let mut file = options.open(path).map_err(failed)?;
    lock::lock(&file, config.discard_writes).map_err(|error| match error {
        ImageLockError::Held(holder) => PmemFault::Locked {
            path: path.clone(),
            holder,
        },
        ImageLockError::Kernel(source) => failed(source),
    })?;
    // A block device's metadata has no size.
    let have = file.seek(SeekFrom::End(0)).map_err(failed)?;
    match config.size {
        Some(asked) if asked > have => Err(PmemFault::TooShort {
            path: path.clone(),
            have,
            asked,
        }),
        Some(asked) => Ok((file, asked)),
        None if have == 0 || !have.is_multiple_of(PMEM_ALIGNMENT) => Err(PmemFault::Size {
            path: path.clone(),
            size: have,
        }),
        None => Ok((file, have)),
    }
}

fn open_error(path: &Path, discard_writes: bool, source: io::Error) -> PmemFault {
    let hint = match source.raw_os_error() {
        Some(libc::ENOENT) => "; make an empty one with `truncate -s 1G`, for example",
        Some(libc::EBUSY) => "; the host uses it",
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !discard_writes => {
            "; it has to be writable for the user that runs this, or give discard_writes=on"
        }
        Some(libc::EACCES | libc::EPERM) => "; it has to be readable for the user that runs this",
        _ => "",
    };
    PmemFault::Open {
        path: path.to_owned(),
        source,
        hint,
    }
}
