//! Why a guest could not be loaded.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryError;

use super::e820::E820;
use crate::arch::layout::MMIO32_START;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// cannot open the {what} {path}: {source}; check the path and its permissions
    #[error("cannot open the {what} {}: {source}; check the path and its permissions", path.display())]
    Open {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// the {what} {path} is {found}, not a file
    #[error("the {what} {} is {found}, not a file", path.display())]
    NotAFile {
        /// Kernel or initramfs.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// {path} is no kernel that can be booted: it looks like {looks}; {remedy}
    #[error("{} is no kernel that can be booted: it looks like {looks}; {remedy}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What its first bytes say.
        looks: String,
        /// What to give instead.
        remedy: &'static str,
    },
    /// the kernel {path} has no 64-bit entry (boot protocol {major}.{minor:02}): it is a 32-bit or
    /// very old kernel; give an x86-64 one
    #[error(
        "the kernel {} has no 64-bit entry (boot protocol {major}.{minor:02}): it is a 32-bit or very old kernel; give an x86-64 one",
        path.display()
    )]
    No64BitEntry {
        /// The file.
        path: PathBuf,
        /// Of the boot protocol's version.
        major: u8,
        /// Of the boot protocol's version.
        minor: u8,
    },
    /// the ELF kernel {path} has no PVH entry note; build it with CONFIG_PVH=y, or give the bzImage
    #[error("the ELF kernel {} has no PVH entry note; build it with CONFIG_PVH=y, or give the bzImage", path.display())]
    NoPvhEntry {
        /// The file.
        path: PathBuf,
    },
    /// the kernel {path} is damaged: {why}; copy or build it again
    #[error("the kernel {} is damaged: {why}; copy or build it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// the kernel {path} needs RAM from {start:#x} to {end:#x}, but {why}
    #[error(
        "the kernel {} needs RAM from {start:#x} to {end:#x}, but {why}",
        path.display()
    )]
    NoRamForKernel {
        /// The file.
        path: PathBuf,
        /// First address it needs.
        start: u64,
        /// End of what it needs.
        end: u64,
        /// What is there, and what to do about it.
        why: String,
    },
    /// the initramfs {path} of {size} bytes does not fit: RAM where this kernel can have it is {room}
    /// bytes in one piece; {remedy}
    #[error(
        "the initramfs {} of {size} bytes does not fit: above the kernel's end at {floor:#x} there are \
         {room} bytes of RAM in one piece where this kernel can have it; {remedy}",
        path.display()
    )]
    InitramfsTooBig {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes of the largest piece of RAM that it could have.
        room: u64,
        /// Where the kernel ends.
        floor: u64,
        /// What to do about it.
        remedy: String,
    },
    /// the command line has {length} bytes, but this kernel takes {max}; shorten it
    #[error("the command line has {length} bytes, but this kernel takes {max}; shorten it")]
    CommandLineTooLong {
        /// Its bytes.
        length: usize,
        /// What the kernel takes.
        max: u64,
    },
    /// the command line has a zero byte in it, at {at}; remove it
    #[error("the command line has a zero byte in it, at {at}; remove it")]
    CommandLineZero {
        /// Where.
        at: usize,
    },
    /// cannot read the {what} {path}: {source}
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// cannot write {what} to guest memory at {address:#x}: {source}
    #[error("cannot write {what} to guest memory at {address:#x}: {source}")]
    Memory {
        /// What was written.
        what: &'static str,
        /// Guest-physical.
        address: u64,
        /// Why.
        source: GuestMemoryError,
    },
}

impl BootError {
    /// Not all of `needed` is RAM below 4 GiB in `map`.
    pub(super) fn no_ram_for_kernel(kernel: &Path, needed: Range<u64>, map: &E820) -> Self {
        let Range { start, end } = needed;
        let ram_end = map.low_ram_end();
        let why = if end > MMIO32_START {
            format!(
                "the low RAM of any guest ends at {MMIO32_START:#x}; give a kernel that is built for a \
                 lower address (CONFIG_PHYSICAL_START of Linux)"
            )
        } else if end > ram_end {
            let enough = end.div_ceil(1 << 20);
            format!(
                "the guest's low RAM ends at {ram_end:#x}; give the guest more memory, at least \
                 {enough} MiB"
            )
        } else {
            "the IOMMU of the host keeps some of that from the guest, because of an assigned device; \
             give a kernel that is built for another address (CONFIG_PHYSICAL_START of Linux), or \
             leave that device out"
                .to_owned()
        };
        Self::NoRamForKernel {
            path: kernel.to_owned(),
            start,
            end,
            why,
        }
    }
}
