//! How the file of an image is opened and locked, and what is said where that fails.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::error::ImageError;
use crate::config::ImageType;
use crate::virtio::blk::lock::{self, ImageLockError};
use crate::virtio::blk::sys;

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::virtio::blk) struct ImageMode {
    pub(in crate::virtio::blk) readonly: bool,
    pub(in crate::virtio::blk) direct: bool,
    /// A descriptor of it that was inherited.
    pub(in crate::virtio::blk) fd: Option<u32>,
    pub(in crate::virtio::blk) image_type: ImageType,
    /// Files that it names are opened.
    pub(in crate::virtio::blk) backing_files: bool,
}

/// Opens and locks the file at `path`, or takes the descriptor that was inherited; says whether it is a block
/// device.
pub(super) fn open_raw(path: &Path, mode: ImageMode) -> Result<(File, bool), ImageError> {
    let failed = |source| open_error(path, mode, source);
    let inherited = mode.fd.map(sys::duplicate).transpose().map_err(failed)?;
    let metadata = match &inherited {
        Some(file) => file.metadata(),
        None => std::fs::metadata(path),
    };
    let kind = metadata.map_err(failed)?.file_type();
    let is_device = kind.is_block_device();
    if !is_device && !kind.is_file() {
        let what = if kind.is_dir() {
            "a directory"
        } else if kind.is_char_device() {
            "a character device"
        } else {
            "neither"
        };
        return Err(ImageError::Kind {
            path: path.to_owned(),
            what,
        });
    }
    let file = match inherited {
        Some(file) => {
            if !mode.readonly && !sys::is_writable(&file).map_err(failed)? {
                return Err(ImageError::NotWritable {
                    path: path.to_owned(),
                });
            }
            if mode.direct {
                sys::set_direct(&file).map_err(failed)?;
            }
            file
        }
        None => {
            let mut flags = if mode.direct { libc::O_DIRECT } else { 0 };
            if is_device && !mode.readonly {
                // For a block device: fails where the host itself uses it.
                flags |= libc::O_EXCL;
            }
            OpenOptions::new()
                .read(true)
                .write(!mode.readonly)
                .custom_flags(flags)
                .open(path)
                .map_err(failed)?
        }
    };
    lock::lock(&file, mode.readonly).map_err(|error| lock_error(path, error))?;
    Ok((file, is_device))
}

fn open_error(path: &Path, mode: ImageMode, source: io::Error) -> ImageError {
    let path = path.to_owned();
    let hint = match source.raw_os_error() {
        Some(libc::EBUSY) => return ImageError::InUse { path },
        Some(libc::EINVAL) if mode.direct => return ImageError::NotDirect { path },
        Some(libc::ENOENT) => "; make an empty one with `truncate -s 10G`, for example",
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !mode.readonly => {
            "; it has to be writable for the user that runs this, or give readonly=on"
        }
        Some(libc::EACCES | libc::EPERM) => "; it has to be readable for the user that runs this",
        _ => "",
    };
    ImageError::Open { path, source, hint }
}

fn lock_error(path: &Path, error: ImageLockError) -> ImageError {
    let path = path.to_owned();
    match error {
        ImageLockError::Held(holder) => ImageError::Locked { path, holder },
        ImageLockError::Kernel(source) => ImageError::Kernel {
            what: "locking",
            path,
            source,
        },
    }
}
