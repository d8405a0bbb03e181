//! RAM of huge pages that comes and goes by blocks: the host's pages are taken when a block is plugged, all of them or none,
//! and given back when it is unplugged.
//!
//! A page of hugetlbfs that nobody has taken is not certain to be had: a process that touches it where the pool is empty
//! is killed by SIGBUS. So the pages are a file's, into which a plug has the kernel put them (fallocate(2), which says when
//! there are too few), and only plugged blocks are mapped from it. At the others are ordinary pages, which read as zeros,
//! for a guest may touch what it has not plugged, and have Busway's devices touch it. What other processes map is the
//! whole file.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::backing::{Put, put, with_node};

/// The pages of a region.
#[derive(Debug)]
pub(super) struct HugeBlocks {
    file: File,
    page: u64,
    /// The host's node that they are of; any where absent.
    host_node: Option<u32>,
}

/// Huge pages could not be taken, or not given back.
#[derive(Debug, thiserror::Error)]
pub(super) enum HugeBlocksError {
    /// The pool has too few.
    #[error("too few are free")]
    TooFew,
    /// The kernel's.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl HugeBlocks {
    /// Of a `region` that is mapped from its file and of which nothing is plugged; nothing of the file's is mapped
    /// afterwards. `page`: bytes of a huge page. `host_node`: the host's node that pages are taken of; any where absent.
    ///
    /// # Errors
    /// mmap(2), dup(2); a region without a file.
    pub(super) fn new(
        region: &GuestRegionMmap,
        page: u64,
        host_node: Option<u32>,
    ) -> io::Result<Self> {
        let file = region.file_offset().ok_or(io::ErrorKind::InvalidInput)?;
        let file = file.file().try_clone()?;
        put(region, 0, region.len(), Put::Nothing)?;
        Ok(Self {
            file,
            page,
            host_node,
        })
    }

    /// Bytes of a page.
    pub(super) fn page(&self) -> u64 {
        self.page
    }

    /// The host's node that they are of.
    pub(super) fn host_node(&self) -> Option<u32> {
        self.host_node
    }

    /// Has `size` bytes of the `region` from `offset` on be huge pages that the host has given.
    ///
    /// # Errors
    /// [`HugeBlocksError`]; nothing is taken then.
    pub(super) fn take(
        &self,
        region: &GuestRegionMmap,
        offset: u64,
        size: u64,
    ) -> Result<(), HugeBlocksError> {
        let allocate = || self.allocate(FallocateFlags::empty(), offset, size);
        let taken = match with_node(self.host_node, allocate)? {
            Ok(()) => put(region, offset, size, Put::File(&self.file)).map_err(Into::into),
            // A file of hugetlbfs says the former of its own pool, and the latter of a node's or a cgroup's.
            Err(Errno::NOSPC | Errno::NOMEM) => Err(HugeBlocksError::TooFew),
            Err(error) => Err(io::Error::from(error).into()),
        };
        if taken.is_err()
            && let Err(error) = self.give(region, offset, size)
        {
            log::error!("huge pages that were not plugged stay with Busway: {error}");
        }
        taken
    }

    /// Gives `size` bytes of the `region` from `offset` on back to the host. Nothing may have them pinned.
    ///
    /// # Errors
    /// mmap(2), fallocate(2)
    pub(super) fn give(&self, region: &GuestRegionMmap, offset: u64, size: u64) -> io::Result<()> {
        put(region, offset, size, Put::Nothing)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(self.allocate(flags, offset, size)?)
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, size: u64) -> rustix::io::Result<()> {
        rustix::io::retry_on_intr(|| fallocate(&self.file, flags, offset, size))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::backing::Backing;
    use crate::memory::huge_pages::Pool;
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    const PAGE: u64 = 2 << 20;
    /// Pages of a region.
    const COUNT: u64 = 64;

    /// A region of which nothing is taken; nothing where the kernel has no such pages.
    fn region() -> Option<(Arc<GuestRegionMmap>, HugeBlocks)> {
        of_node(None)
    }

    fn of_node(node: Option<u32>) -> Option<(Arc<GuestRegionMmap>, HugeBlocks)> {
        if !std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
            eprintln!("skipped: this kernel has no huge pages of 2 MiB");
            return None;
        }
        let backing = Backing {
            shared: true,
            by_blocks: true,
            ..Backing::of_all(&MemoryConfig::default(), Some(PAGE))
        };
        let start = 4_u64 << 30;
        let region = backing.map(&(start..start + COUNT * PAGE)).unwrap();
        assert_eq!(region.start_addr(), GuestAddress(start));
        let blocks = HugeBlocks::new(&region, PAGE, node).unwrap();
        Some((region, blocks))
    }

    /// Huge pages that the host has given, whatever others take of its pool meanwhile.
    fn taken(blocks: &HugeBlocks) -> u64 {
        use std::os::unix::fs::MetadataExt;

        blocks.file.metadata().unwrap().blocks() * 512 / PAGE
    }

    fn write(region: &GuestRegionMmap, page: u64, byte: u8) {
        let at = MemoryRegionAddress(page * PAGE + 5);
        region.write_obj(byte, at).unwrap();
    }

    fn read(region: &GuestRegionMmap, page: u64) -> u8 {
        let at = MemoryRegionAddress(page * PAGE + 5);
        region.read_obj(at).unwrap()
    }

    #[test]
    fn what_is_not_taken_can_be_touched_whatever_the_pool_has_and_too_many_pages_are_refused_whole()
    {
        let Some((region, blocks)) = region() else {
            return;
        };
        let room = Pool::of(PAGE).room();
        if room >= COUNT {
            eprintln!("skipped: this host has {room} huge pages to spare");
            return;
        }
        for page in 0..COUNT {
            write(&region, page, 7);
            assert_eq!(read(&region, page), 7);
        }
        let refused = blocks.take(&region, 0, COUNT * PAGE);
        assert!(
            matches!(refused, Err(HugeBlocksError::TooFew)),
            "{refused:?}"
        );
        assert_eq!(
            taken(&blocks),
            0,
            "what a failed plug was given has gone back"
        );
        for page in 0..COUNT {
            assert_eq!(read(&region, page), 0);
            write(&region, page, 8);
        }
    }

    #[test]
    fn pages_are_the_hosts_until_they_are_taken_and_again_when_they_are_given_back() {
        let Some((region, blocks)) = region() else {
            return;
        };
        assert_eq!((blocks.page(), taken(&blocks)), (PAGE, 0));
        write(&region, 9, 1);
        match blocks.take(&region, 8 * PAGE, 2 * PAGE) {
            Err(HugeBlocksError::TooFew) => {
                eprintln!("skipped: this host has no two huge pages of 2 MiB to spare");
                return;
            }
            done => done.unwrap(),
        }
        assert_eq!(taken(&blocks), 2);
        assert_eq!(read(&region, 9), 0, "what was there before is gone");
        for page in 8..10 {
            write(&region, page, page as u8);
        }
        // Another process that maps the file sees it.
        let mut byte = [0];
        let file = region.file_offset().unwrap().file();
        std::os::unix::fs::FileExt::read_exact_at(file, &mut byte, 9 * PAGE + 5).unwrap();
        assert_eq!(byte, [9]);
        blocks.give(&region, 8 * PAGE, PAGE).unwrap();
        assert_eq!(taken(&blocks), 1);
        assert_eq!((read(&region, 8), read(&region, 9)), (0, 9));
        blocks.give(&region, 9 * PAGE, PAGE).unwrap();
        assert_eq!((taken(&blocks), read(&region, 9)), (0, 0));
    }

    /// The number of pages of 2 MiB that a node has free.
    fn free_of_node(node: u32) -> u64 {
        Pool::of_node(PAGE, node).free()
    }

    #[test]
    fn pages_of_one_node_are_taken_of_it_and_the_thread_is_bound_to_none_afterwards() {
        let Some((region, blocks)) = of_node(Some(0)) else {
            return;
        };
        assert_eq!(blocks.host_node(), Some(0));
        let before = free_of_node(0);
        match blocks.take(&region, 0, PAGE) {
            Err(HugeBlocksError::TooFew) => {
                eprintln!("skipped: this host has no huge page of 2 MiB to spare on node 0");
            }
            done => {
                done.unwrap();
                assert_eq!(taken(&blocks), 1);
                assert!(free_of_node(0) <= before);
                blocks.give(&region, 0, PAGE).unwrap();
            }
        }
        let policy = std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap_or_default();
        let stack = policy.lines().find(|line| line.contains("stack"));
        assert!(stack.is_none_or(|line| !line.contains("bind")), "{stack:?}");
    }

    #[test]
    fn a_node_that_there_is_not_is_refused_before_anything_is_taken() {
        let Some((region, blocks)) = of_node(Some(1023)) else {
            return;
        };
        let refused = blocks.take(&region, 0, PAGE);
        assert!(
            matches!(refused, Err(HugeBlocksError::System(_))),
            "{refused:?}"
        );
        assert_eq!(taken(&blocks), 0);
    }
}
