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
    /// memory zone `{zone}`: this host has no NUMA node {node} with memory, only {have}
    #[error(
        "memory zone `{zone}`: this host has no NUMA node {node} with memory, only {have}: say another in \
         host_numa_node= (`busway hugepages` shows them), or leave it out"
    )]
    NoNode {
        /// The zone.
        zone: String,
        /// The node that was asked for.
        node: u32,
        /// The nodes that have memory.
        have: String,
    },
    /// the memory zones of the host's node {node} ask for {asked}, and it has {total}, of which {available} are free
    #[error(
        "the memory zones with host_numa_node={node} ask for {}, and that node of the host has {}, of which {} are \
         free: ask for less of it (size= and hotplug_size=)",
        Amount(*asked), Amount(*total), Amount(*available)
    )]
    NodeTooSmall {
        /// The node.
        node: u32,
        /// Bytes asked for.
        asked: u64,
        /// Bytes that it has.
        total: u64,
        /// Bytes that it could give now.
        available: u64,
    },
    /// memory zone `{zone}` would begin or end within a huge page
    #[error(
        "memory zone `{zone}` is made of huge pages of {}, and a part of it at {start:#x} would begin or end within \
         one: name zones of larger pages before those of smaller ones",
        Amount(*page)
    )]
    ZonePlace {
        /// The zone.
        zone: String,
        /// Bytes of a page.
        page: u64,
        /// Guest-physical address.
        start: u64,
    },
    /// guest RAM cannot be bound to the host's NUMA node {node}: mbind: {source}
    #[error(
        "guest RAM cannot be bound to the host's NUMA node {node}: mbind: {source}; a process may use the nodes in \
         Mems_allowed_list of /proc/self/status: say one of them in host_numa_node="
    )]
    Bind {
        /// The node.
        node: u32,
        /// Why.
        source: io::Error,
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
