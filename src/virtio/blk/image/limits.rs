//! What an image's storage asks for and can do.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::bounce::Bounce;
use super::error::ImageError;
use crate::virtio::blk::sys;

/// What block sizes can be: from a sector to a page.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;

/// What the image's storage asks for and can do. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio::blk) struct Limits {
    /// The least that is read or written, and what positions are multiples of.
    pub(in crate::virtio::blk) block_size: u32,
    /// What is written without reading first.
    pub(in crate::virtio::blk) physical_block_size: u32,
    /// Preferred least request; 0 where unknown.
    pub(in crate::virtio::blk) min_io_size: u32,
    /// Best request; 0 where unknown.
    pub(in crate::virtio::blk) opt_io_size: u32,
    /// What a discard frees; 0 where there is no discard.
    pub(in crate::virtio::blk) discard_granularity: u32,
    /// What memory has to be aligned to; 1 where it need not be.
    pub(in crate::virtio::blk) memory_alignment: u32,
}

/// A block device's.
pub(super) fn of_device(file: &File, direct: bool) -> io::Result<Limits> {
    let geometry = sys::geometry(file)?;
    let queue = sys_queue(file.metadata()?.rdev());
    let granularity = std::fs::read_to_string(queue.join("discard_granularity"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    Ok(Limits {
        block_size: geometry
            .logical
            .clamp(*BLOCK_SIZES.start(), *BLOCK_SIZES.end()),
        physical_block_size: geometry.physical.max(geometry.logical),
        min_io_size: geometry.min_io,
        opt_io_size: geometry.opt_io,
        discard_granularity: granularity,
        memory_alignment: if direct { geometry.logical.max(512) } else { 1 },
    })
}

/// Where sysfs has a block device's queue; a partition's is its disk's.
fn sys_queue(device: u64) -> PathBuf {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let folder = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let own = folder.join("queue");
    if own.is_dir() {
        own
    } else {
        folder.join("../queue")
    }
}

/// A file's.
///
/// # Errors
/// [`ImageError::NotDirect`]
pub(super) fn of_file(file: &File, path: &Path, direct: bool) -> Result<Limits, ImageError> {
    let physical = 4096;
    let mut limits = Limits {
        block_size: *BLOCK_SIZES.start(),
        physical_block_size: physical,
        min_io_size: physical,
        opt_io_size: 0,
        discard_granularity: physical,
        memory_alignment: 1,
    };
    if direct {
        let not_direct = || ImageError::NotDirect {
            path: path.to_owned(),
        };
        let alignment = match sys::direct_alignment(file) {
            Some(alignment) => alignment,
            None => probe_direct(file).ok_or_else(not_direct)?,
        };
        if !BLOCK_SIZES.contains(&alignment.offset.max(512)) {
            return Err(not_direct());
        }
        limits.block_size = alignment.offset.max(512);
        limits.memory_alignment = alignment.memory.max(1);
    }
    Ok(limits)
}

/// Finds by reading what alignment a direct file needs, where the kernel does not say.
fn probe_direct(file: &File) -> Option<sys::DirectAlignment> {
    let block = [512_u32, 4096].into_iter().find(|&block| {
        let mut bounce = Bounce::new(block as usize);
        file.read_at(bounce.first(block as usize), 0).is_ok()
    })?;
    Some(sys::DirectAlignment {
        memory: block,
        offset: block,
    })
}
