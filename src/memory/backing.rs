//! What a stretch of the guest's RAM is made of: ordinary pages, a memfd where it is shared, or huge pages; of any of the
//! host's nodes, or of one.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use busway_vfio::Mapping;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use super::error::RamError;
use super::huge_pages::Pool;
use super::mapped;
use crate::config::{MAX_HOST_NODES, MemoryConfig, MemoryZoneConfig};
use crate::sandbox::{check_size, size_limit};

/// The words of a set of the host's nodes.
const NODE_WORDS: usize = (MAX_HOST_NODES / u64::BITS) as usize;

/// What a stretch of RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    /// Other processes can map it.
    pub(super) shared: bool,
    /// Transparent huge pages are asked for.
    pub(super) thp: bool,
    /// Bytes of a huge page of hugetlbfs, where it is made of such.
    pub(super) huge_page: Option<u64>,
    /// The host's node that has it; any where absent.
    pub(super) host_node: Option<u32>,
    /// Whether it is touched before the guest starts, where that was said.
    pub(super) prefault: Option<bool>,
    /// Huge pages are taken block by block, and none by the mapping: [`HugeBlocks`](super::huge_blocks::HugeBlocks).
    pub(super) by_blocks: bool,
}

impl Backing {
    /// That of all RAM.
    pub(super) fn of_all(config: &MemoryConfig, huge_page: Option<u64>) -> Self {
        Self {
            shared: config.shared,
            thp: config.thp,
            huge_page,
            host_node: None,
            prefault: config.prefault,
            by_blocks: false,
        }
    }

    /// That of a zone. Reserved huge pages are reserved on any node: a zone of those of one is touched at once, so that
    /// too few are found out before the guest runs into it.
    pub(super) fn of_zone(
        config: &MemoryConfig,
        zone: &MemoryZoneConfig,
        huge_page: Option<u64>,
    ) -> Self {
        let must = huge_page.is_some() && zone.host_numa_node.is_some();
        Self {
            shared: config.shared || zone.shared,
            thp: config.thp,
            huge_page,
            host_node: zone.host_numa_node,
            prefault: match must {
                true => Some(true),
                false => zone.prefault.or(config.prefault),
            },
            by_blocks: false,
        }
    }

    /// The same of RAM that comes and goes by blocks.
    pub(super) fn by_blocks(self) -> Self {
        Self {
            by_blocks: true,
            // Huge pages are a file's, from which they are taken and given back.
            shared: self.shared || self.huge_page.is_some(),
            ..self
        }
    }

    /// RAM for the guest's addresses in `range`, of which no page is touched yet.
    pub(super) fn map(&self, range: &Range<u64>) -> Result<Arc<GuestRegionMmap>, RamError> {
        let length = range.end - range.start;
        let (mapping, pages) = self.mapping(range.start, length)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start)).ok_or_else(|| {
            let source = io::Error::from(io::ErrorKind::InvalidInput);
            map_error("mmap", length)(source)
        })?;
        if let Some(node) = self.host_node {
            bind(&region, node).map_err(|source| RamError::Bind { node, source })?;
        }
        self.advise(&region);
        Ok(mapped::keep(region, pages))
    }

    /// RAM for the guest's addresses from `guest` on, as aligned here as it is there: only so can the
    /// kernel use huge pages, in this process, in the guest's tables and in the IOMMU's.
    fn mapping(&self, guest: u64, size: u64) -> Result<(vm_memory::MmapRegion, Mapping), RamError> {
        let huge_page = self.huge_page;
        let length = usize::try_from(size)
            .map_err(|_| map_error("mmap", size)(io::ErrorKind::OutOfMemory.into()))?;
        let reserved = Mapping::reserve(length, guest).map_err(map_error("mmap", size))?;
        let file = match self.shared {
            true => {
                check_size("shared guest RAM (--memory)", size, size_limit())?;
                Some(memfd(size, huge_page).map_err(map_error("memfd_create", size))?)
            }
            false => None,
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Huge pages are reserved by the mapping, so that a guest is never killed for want of one.
        let mut flags = match huge_page {
            Some(_) if !self.by_blocks => MapFlags::empty(),
            _ => MapFlags::NORESERVE,
        };
        flags |= match (&file, huge_page) {
            (Some(_), _) => MapFlags::SHARED,
            (None, None) => MapFlags::PRIVATE,
            (None, Some(page)) => {
                let size = page.trailing_zeros() << libc::MAP_HUGE_SHIFT;
                MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::from_bits_retain(size)
            }
        };
        let (address, fixed) = (reserved.address().0 as *mut c_void, flags | MapFlags::FIXED);
        // SAFETY: the range replaced is `reserved`, which nobody else knows.
        let mapped = unsafe {
            match &file {
                Some(file) => mmap(address, length, protection, fixed, file, 0),
                None => mmap_anonymous(address, length, protection, fixed),
            }
        };
        mapped.map_err(|error| match huge_page {
            // Somebody else was quicker, or memory is in too small pieces for the kernel to make more.
            Some(page) if error == Errno::NOMEM => {
                let pool = Pool::of(page);
                pool.too_few(size / page, pool.free())
            }
            _ => map_error("mmap", size)(error.into()),
        })?;
        // What vm-memory is told are libc's flags.
        let anonymous = file.as_ref().map_or(libc::MAP_ANONYMOUS, |_| 0);
        let mut builder = MmapRegionBuilder::new(length)
            .with_mmap_prot(protection.bits() as i32)
            .with_mmap_flags(flags.bits() as i32 | anonymous)
            .with_hugetlbfs(huge_page.is_some());
        if let Some(file) = file {
            builder = builder.with_file_offset(FileOffset::new(file, 0));
        }
        // SAFETY: `length` bytes were just mapped there with this protection, and stay for as long as somebody has the
        // region, device threads that outlive the VM among them: `mapped::keep`.
        let region = unsafe { builder.with_raw_mmap_pointer(address.cast()) }.build();
        let region = region.map_err(|error| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
            map_error("mmap", size)(source)
        })?;
        Ok((region, reserved))
    }

    /// What the kernel should know about the mapping. Advice only: a refusal costs speed.
    fn advise(&self, region: &GuestRegionMmap) {
        let mut advice = vec![
            // A child must not keep the guest's memory, nor break its pinning by copy-on-write.
            Advice::LinuxDontFork,
            Advice::LinuxDontDump,
        ];
        if self.huge_page.is_none() {
            advice.push(match self.thp {
                true => Advice::LinuxHugepage,
                false => Advice::LinuxNoHugepage,
            });
        }
        for advice in advice {
            // SAFETY: the range is the region's own mapping, and none of this advice changes contents.
            if let Err(error) = unsafe { madvise(region.as_ptr().cast(), region.size(), advice) } {
                log::debug!("madvise({advice:?}) on guest RAM: {error}");
            }
        }
    }
}

pub(super) fn map_error(what: &'static str, size: u64) -> impl FnOnce(io::Error) -> RamError {
    move |source| RamError::Map { what, size, source }
}

/// A set of the host's nodes, as the kernel takes it. The kernel takes one off its number of bits. Linux, mm/mempolicy.c,
/// `get_nodes`
const NODE_BITS: libc::c_ulong = MAX_HOST_NODES as libc::c_ulong + 1;

/// The set of one node.
fn only(node: u32) -> io::Result<[u64; NODE_WORDS]> {
    let mut nodes = [0_u64; NODE_WORDS];
    let (word, bit) = (node / u64::BITS, node % u64::BITS);
    let word = usize::try_from(word)
        .ok()
        .and_then(|word| nodes.get_mut(word));
    *word.ok_or(io::ErrorKind::InvalidInput)? |= 1 << bit;
    Ok(nodes)
}

/// Has a mapping's pages be of one of the host's nodes and of no other, whoever touches them first. That of shared memory
/// is its file's policy, and holds for other processes as well. mbind(2)
fn bind(region: &GuestRegionMmap, node: u32) -> io::Result<()> {
    let nodes = only(node)?;
    // SAFETY: the range is the region's own mapping, whose contents the call does not change, and it reads `NODE_BITS`
    // less one bits of `nodes`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            libc::MPOL_BIND,
            nodes.as_ptr(),
            NODE_BITS,
            0,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Does what takes memory from the host with the calling thread bound to one of its nodes, where one is given: a file of
/// hugetlbfs has no policy of its own, and fallocate(2) of one goes by its caller's. set_mempolicy(2); Linux,
/// Documentation/admin-guide/mm/numa_memory_policy.rst
///
/// # Errors
/// set_mempolicy(2), before anything is done.
pub(super) fn with_node<T>(node: Option<u32>, take: impl FnOnce() -> T) -> io::Result<T> {
    let Some(node) = node else {
        return Ok(take());
    };
    let nodes = only(node)?;
    // SAFETY: the call reads `NODE_BITS` less one bits of `nodes`.
    let set = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::MPOL_BIND,
            nodes.as_ptr(),
            NODE_BITS,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let taken = take();
    // SAFETY: without a set of nodes the call reads nothing.
    let reset = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::MPOL_DEFAULT,
            std::ptr::null::<u64>(),
            0,
        )
    };
    if reset != 0 {
        let error = io::Error::last_os_error();
        log::debug!("set_mempolicy(MPOL_DEFAULT): {error}");
    }
    Ok(taken)
}

/// What is at a part of a region's mapping.
#[derive(Clone, Copy, Debug)]
pub(super) enum Put<'a> {
    /// The region's own file, from as far into it as the part is into the region.
    File(&'a File),
    /// Ordinary pages that read as zeros, of which the host gives each when it is touched.
    Nothing,
}

/// Puts something else at `size` bytes of `region` from `offset` on, both whole pages of it. What was there is gone to
/// whoever reaches it by this process: its own threads, and the guest's processors.
///
/// # Errors
/// mmap(2); a range outside of the region. What was there may be gone then.
pub(super) fn put(
    region: &GuestRegionMmap,
    offset: u64,
    size: u64,
    what: Put<'_>,
) -> io::Result<()> {
    let inside = |end: &u64| *end <= region.len();
    let end = offset.checked_add(size).filter(inside);
    end.ok_or(io::ErrorKind::InvalidInput)?;
    let convert = |number: u64| usize::try_from(number).map_err(|_| io::ErrorKind::InvalidInput);
    let at = region.as_ptr().wrapping_add(convert(offset)?);
    let (at, length) = (at.cast::<c_void>(), convert(size)?);
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: the range lies in the region's mapping, which stays while there is the region. It is the guest's RAM, which
    // nobody here has a reference to, and whose contents may become others at any time; what is put there can be read and
    // written as well.
    unsafe {
        match what {
            Put::File(file) => mmap(
                at,
                length,
                protection,
                flags | MapFlags::SHARED,
                file,
                offset,
            ),
            Put::Nothing => mmap_anonymous(at, length, protection, flags | MapFlags::PRIVATE),
        }
    }?;
    for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
        // SAFETY: the range was just mapped, and this advice does not change contents.
        if let Err(error) = unsafe { madvise(at, length, advice) } {
            log::debug!("madvise({advice:?}) on guest RAM: {error}");
        }
    }
    Ok(())
}

/// A nameless file of `size` bytes that another process can map. It is sealed to that size: whoever is given it
/// could otherwise cut it short, and have this process and the guest killed by their next access.
fn memfd(size: u64, huge_page: Option<u64>) -> io::Result<File> {
    let huge = huge_page.map_or(MemfdFlags::empty(), |page| {
        let size = page.trailing_zeros() << libc::MFD_HUGE_SHIFT;
        MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(size)
    });
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge;
    let file = File::from(memfd_create(c"guest-ram", flags)?);
    file.set_len(size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}
