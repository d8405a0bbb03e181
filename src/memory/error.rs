//! Why there is no RAM for a VM, and sizes as a person says them.

use std::{fmt, io};

use crate::sandbox::SizeLimitError;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// --memory size={0} is no multiple of 4096 bytes
    #[error("--memory size={0} is no multiple of 4096 bytes")]
    Unaligned(u64),
    /// It is shared, and larger than a file may be.
    #[error(transparent)]
    SizeLimit(#[from] SizeLimitError),
    /// --memory size=0: a VM needs RAM
    #[error("--memory size=0: a VM needs RAM")]
    Empty,
    /// --memory size= asks for {asked}, and this host has {total}, of which {available} are free: ask
    /// for less
    #[error(
        "--memory size= asks for {}, and this host has {}, of which {} are free: ask for less",
        Amount(*asked), Amount(*total), Amount(*available)
    )]
    TooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of RAM that the host has.
        total: u64,
        /// Bytes that the host could give now.
        available: u64,
    },
    /// --memory hugepage_size={size}: this host has no huge pages of that size, only {have}
    #[error("--memory hugepage_size={size}: this host has no huge pages of that size, only {have}")]
    NoSuchHugePage {
        /// Bytes asked for.
        size: u64,
        /// The sizes that there are.
        have: String,
    },
    /// --memory size={size} is no multiple of the huge page's {page} bytes
    #[error("--memory size={size} is no multiple of the huge page's {page} bytes")]
    NotWholeHugePages {
        /// Bytes asked for.
        size: u64,
        /// Bytes of a huge page.
        page: u64,
    },
    /// {needed} huge pages of {page_kib} KiB are needed and {free} are free: reserve them with
    /// `echo {total} | sudo tee {path}`
    #[error(
        "{needed} huge pages of {page_kib} KiB are needed and {free} are free: reserve them with \
         `echo {total} | sudo tee {path}`"
    )]
    TooFewHugePages {
        /// How many the VM takes.
        needed: u64,
        /// How many are free, or can be made when they are asked for.
        free: u64,
        /// KiB of a page.
        page_kib: u64,
        /// How many the pool has to hold, with what others have taken.
        total: u64,
        /// The pool's size in sysfs.
        path: String,
    },
    /// {what} failed for {size} bytes of guest RAM: {source}
    #[error("{what} failed for {size} bytes of guest RAM: {source}")]
    Map {
        /// The system call.
        what: &'static str,
        /// Bytes.
        size: u64,
        /// Why.
        source: io::Error,
    },
}

/// Bytes, as a person says them: whole or large in GiB, else in MiB, or in KiB where they are few.
pub(crate) struct Amount(pub(crate) u64);

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes.is_multiple_of(GIB) => write!(f, "{} GiB", bytes / GIB),
            bytes if bytes >= 10 * GIB => write!(f, "{:.1} GiB", bytes as f64 / GIB as f64),
            bytes if bytes >= MIB => write!(f, "{} MiB", bytes / MIB),
            bytes => write!(f, "{} KiB", bytes / KIB),
        }
    }
}
