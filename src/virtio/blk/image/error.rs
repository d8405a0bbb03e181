//! Why an image cannot be used.

use std::io;
use std::path::PathBuf;

/// An image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// cannot open {path}: {source}{hint}
    #[error("cannot open {path}: {source}{hint}")]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do, starting with a separator.
        hint: &'static str,
    },
    /// {path} is in use on this host: it is mounted, part of a volume, or opened by another program for itself; release it there, or give the guest a copy
    #[error(
        "{path} is in use on this host: it is mounted, part of a volume, or opened by another program for itself; release it there, or give the guest a copy"
    )]
    InUse {
        /// The block device.
        path: PathBuf,
    },
    /// {path} is locked by {holder}: two machines that write one image destroy it; stop the other one, or give readonly=on to both
    #[error(
        "{path} is locked by {holder}: two machines that write one image destroy it; stop the other one, or give readonly=on to both"
    )]
    Locked {
        /// The image.
        path: PathBuf,
        /// Who has it, as far as /proc tells.
        holder: String,
    },
    /// {path} is {what}: a disk is an image file or a block device
    #[error("{path} is {what}: a disk is an image file or a block device")]
    Kind {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// {path} holds {size} bytes, less than one block of {block}: make it larger, with `truncate -s 10G` for example
    #[error(
        "{path} holds {size} bytes, less than one block of {block}: make it larger, with `truncate -s 10G` for example"
    )]
    Empty {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// Its block size.
        block: u32,
    },
    /// {path} lies on a file system without direct I/O: give direct=off
    #[error("{path} lies on a file system without direct I/O: give direct=off")]
    NotDirect {
        /// The image.
        path: PathBuf,
    },
    /// {path} cannot be used as a qcow2 image: {source}
    #[error(
        "{path} cannot be used as a qcow2 image: {source}; `qemu-img check` tells whether it is whole"
    )]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// {path} lies on {backing}, and the names of files in an image are not followed: give backing_files=on if you trust it
    #[error(
        "{path} lies on {backing}, and the names of files in an image are not followed: give backing_files=on if you trust it"
    )]
    Backing {
        /// The image.
        path: PathBuf,
        /// What its header names.
        backing: PathBuf,
    },
    /// {path} lies on {backing}, of which it says no format that can be read here ({format}): say it with `qemu-img rebase -u -F raw`, or `-F qcow2`
    #[error(
        "{path} lies on {backing}, of which it says no format that can be read here ({format}): say it with `qemu-img rebase -u -F raw`, or `-F qcow2`"
    )]
    BackingFormat {
        /// The image.
        path: PathBuf,
        /// What its header names.
        backing: PathBuf,
        /// The format that it says.
        format: String,
    },
    /// {path} lies on more files than are followed
    #[error(
        "{path} lies on more files below one another than are followed, or on itself: join some with `qemu-img commit`"
    )]
    Depth {
        /// The image where it ends.
        path: PathBuf,
    },
    /// {path} has its data in another file, which is not supported
    #[error(
        "{path} has its data in another file, which is not supported: convert it with `qemu-img convert -O qcow2`"
    )]
    DataFile {
        /// The image.
        path: PathBuf,
    },
    /// {path} is a descriptor that is not open for writing
    #[error("{path} is a descriptor that is not open for writing: open it so, or give readonly=on")]
    NotWritable {
        /// What it is called.
        path: PathBuf,
    },
    /// {what} of {path} failed: {source}
    #[error("{what} of {path} failed: {source}")]
    Kernel {
        /// The system call.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
