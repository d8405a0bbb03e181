//! Where the guest's RAM comes from: ordinary pages, a memfd where it is shared, or huge pages.

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use busway_vfio::Mapping;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use super::error::RamError;
use super::huge_pages::{Pool, reserved_huge_pages};
use super::{Ballooned, GuestRam, Pluggable, RamMap, Region, Regions};
use crate::arch::layout;
use crate::config::MemoryConfig;
use crate::sandbox::{check_size, size_limit};

/// Pages of this size and its multiples are what a guest can be made of.
const PAGE: u64 = busway_pci::PAGE_SIZE;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Whether the host makes transparent huge pages of shared memory, which it decides apart from other memory.
/// Linux, Documentation/admin-guide/mm/transhuge.rst
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The RAM of one VM.
#[derive(Clone, Debug)]
pub struct Ram {
    map: GuestRam,
    regions: Vec<Arc<GuestRegionMmap>>,
    /// The regions of `regions`, where these can go and come back by blocks.
    in_blocks: Vec<Arc<Region>>,
    /// What is plugged and unplugged by blocks, behind all other RAM: its memory, and it as a region.
    pluggable: Option<(Arc<GuestRegionMmap>, Arc<Region>)>,
    /// The host is to have memory before the guest uses it.
    populates: bool,
    huge_page: Option<u64>,
}

impl Ram {
    /// As [`around`](Self::around), where nothing is reserved.
    ///
    /// # Errors
    /// [`RamError`]
    pub fn new(config: &MemoryConfig, whole: bool) -> Result<Self, RamError> {
        Self::around(config, whole, layout::MMIO32_START, &[])
    }

    /// Maps RAM as configured: below `low_end`, where the 32-bit MMIO window starts, and from 4 GiB on;
    /// round the addresses in `reserved` (first and last, ascending), where assigned devices let none
    /// be. No page is touched yet; `whole` says that all of them will be,
    /// so that the host has to have them now.
    ///
    /// # Errors
    /// [`RamError`]; what the host cannot give is refused before anything is taken.
    pub fn around(
        config: &MemoryConfig,
        whole: bool,
        low_end: u64,
        reserved: &[(u64, u64)],
    ) -> Result<Self, RamError> {
        let size = config.size;
        if size == 0 {
            return Err(RamError::Empty);
        }
        if !size.is_multiple_of(PAGE) {
            return Err(RamError::Unaligned(size));
        }
        let huge_page = match config.hugepages {
            true => Some(reserved_huge_pages(config)?),
            false => {
                check_host_memory(size, whole)?;
                None
            }
        };

        if config.shared && config.thp && !config.hugepages {
            tell_of_small_pages(Path::new(SHMEM_HUGE_PAGES));
        }
        let mut regions = Vec::new();
        let holes = layout::holes(reserved.iter().copied(), huge_page.unwrap_or(2 * MIB));
        for range in layout::ram_ranges(size, low_end, &holes) {
            regions.push(Arc::new(mapped(&range, config, huge_page)?));
        }
        let mut all = regions.clone();
        let mut pluggable = None;
        if let Some(asked) = config.pluggable() {
            let top = regions
                .last()
                .map_or(0, |last| last.start_addr().0.saturating_add(last.len()));
            let range = layout::pluggable_range(asked, top, &holes);
            let memory = Arc::new(mapped(&range, config, huge_page)?);
            let name = "pluggable guest RAM";
            let region = Region::pluggable(name, memory.clone(), config.block_size());
            all.push(memory.clone());
            pluggable = Some((memory, Arc::new(region)));
        }
        let map = RamMap::from_arc_regions(all).map_err(|error| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
            map_error("mapping", size)(source)
        })?;
        Ok(Self {
            map: GuestRam::new(map),
            regions,
            in_blocks: Vec::new(),
            pluggable,
            populates: config.prefault == Some(true),
            huge_page,
        })
    }

    /// The handle that devices and the boot loader use.
    #[must_use]
    pub fn guest(&self) -> &GuestRam {
        &self.map
    }

    /// Has RAM that the guest starts with be such that blocks of `block` bytes can go and come back
    /// ([`ballooned`](Self::ballooned)). Called before it is put on the list.
    pub fn split(&mut self, block: u64) {
        let region = |memory: &Arc<GuestRegionMmap>| {
            let region = Region::in_blocks(name_of(memory), memory.clone(), block);
            Arc::new(region)
        };
        self.in_blocks = self.regions.iter().map(region).collect();
    }

    /// RAM as regions for the list.
    pub fn regions(&self) -> impl Iterator<Item = Arc<Region>> {
        let pluggable = self.pluggable.iter();
        let pluggable = pluggable.map(|(_, region)| region.clone());
        let whole = self.regions.iter().enumerate().map(|(at, memory)| {
            let in_blocks = self.in_blocks.get(at).cloned();
            in_blocks.unwrap_or_else(|| Arc::new(Region::ram(name_of(memory), memory.clone())))
        });
        whole.chain(pluggable)
    }

    /// The pages that are in the guest's balloon, where RAM was [split](Self::split), for the list that it is on.
    #[must_use]
    pub fn ballooned(&self, regions: &Arc<Regions>) -> Option<Ballooned> {
        let memory = self.regions.iter().cloned();
        let parts = memory.zip(self.in_blocks.iter().cloned());
        (!self.in_blocks.is_empty()).then(|| Ballooned::new(regions, parts))
    }

    /// What of it comes and goes by blocks, where something does, for the list that it is on.
    #[must_use]
    pub fn pluggable(&self, regions: &Arc<Regions>) -> Option<Pluggable> {
        let (memory, region) = self.pluggable.as_ref()?;
        Some(Pluggable::new(regions, region, memory, self.populates))
    }

    /// Where RAM can be plugged, to the guest. It lies behind all other RAM.
    #[must_use]
    pub fn pluggable_range(&self) -> Option<Range<u64>> {
        let (_, region) = self.pluggable.as_ref()?;
        Some(region.guest()..region.guest().saturating_add(region.size()))
    }

    /// Where RAM is, to the guest, in ascending order, without what can be plugged.
    #[must_use]
    pub fn guest_ranges(&self) -> Vec<Range<u64>> {
        self.regions
            .iter()
            .map(|region| {
                let start = region.start_addr().0;
                start..start.saturating_add(region.len())
            })
            .collect()
    }

    /// Where RAM is mapped in this process, with what can be plugged.
    #[must_use]
    pub fn host_ranges(&self) -> Vec<Range<usize>> {
        let pluggable = self.pluggable.iter().map(|(memory, _)| memory);
        self.regions
            .iter()
            .chain(pluggable)
            .map(|region| {
                let start = region.as_ptr() as usize;
                start..start + region.size()
            })
            .collect()
    }

    /// The mappings, in ascending order.
    pub(super) fn mappings(&self) -> &[Arc<GuestRegionMmap>] {
        &self.regions
    }

    /// Bytes of a huge page, where RAM is made of them.
    pub(super) fn huge_page(&self) -> Option<u64> {
        self.huge_page
    }

    /// Bytes, without what can be plugged.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.size() as u64).sum()
    }
}

fn name_of(memory: &GuestRegionMmap) -> &'static str {
    match memory.start_addr().0 {
        layout::HIGH_RAM_START.. => "guest RAM above 4 GiB",
        _ => "guest RAM below 4 GiB",
    }
}

fn map_error(what: &'static str, size: u64) -> impl FnOnce(io::Error) -> RamError {
    move |source| RamError::Map { what, size, source }
}

/// RAM for the guest's addresses in `range`.
fn mapped(
    range: &Range<u64>,
    config: &MemoryConfig,
    huge_page: Option<u64>,
) -> Result<GuestRegionMmap, RamError> {
    let length = range.end - range.start;
    let mapping = map(range.start, length, config, huge_page)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(range.start)).ok_or_else(|| {
        let source = io::Error::from(io::ErrorKind::InvalidInput);
        map_error("mmap", length)(source)
    })?;
    advise(&region, config, huge_page.is_some());
    Ok(region)
}

/// RAM for the guest's addresses from `guest` on, as aligned here as it is there: only so can the
/// kernel use huge pages, in this process, in the guest's tables and in the IOMMU's.
fn map(
    guest: u64,
    size: u64,
    config: &MemoryConfig,
    huge_page: Option<u64>,
) -> Result<vm_memory::MmapRegion, RamError> {
    let length = usize::try_from(size)
        .map_err(|_| map_error("mmap", size)(io::ErrorKind::OutOfMemory.into()))?;
    let reserved = Mapping::reserve(length, guest).map_err(map_error("mmap", size))?;
    let file = match config.shared {
        true => {
            check_size("shared guest RAM (--memory)", size, size_limit())?;
            Some(memfd(size, huge_page).map_err(map_error("memfd_create", size))?)
        }
        false => None,
    };
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // Huge pages are reserved by the mapping, so that a guest is never killed for want of one.
    let mut flags = huge_page.map_or(MapFlags::NORESERVE, |_| MapFlags::empty());
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
    // SAFETY: `length` bytes were just mapped there with this protection, and stay for the life of the
    // process: whoever holds guest memory, device threads among them, may outlive the VM.
    let region = unsafe { builder.with_raw_mmap_pointer(address.cast()) }.build();
    mem::forget(reserved);
    region.map_err(|error| {
        let source = io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
        map_error("mmap", size)(source)
    })
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

/// What the kernel should know about the mapping. Advice only: a refusal costs speed.
fn advise(region: &GuestRegionMmap, config: &MemoryConfig, huge: bool) {
    let mut advice = vec![
        // A child must not keep the guest's memory, nor break its pinning by copy-on-write.
        Advice::LinuxDontFork,
        Advice::LinuxDontDump,
    ];
    if !huge {
        advice.push(match config.thp {
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

/// Says where the host makes no transparent huge pages of shared memory, and what would have it do so.
fn tell_of_small_pages(setting: &Path) -> bool {
    let text = fs::read_to_string(setting).unwrap_or_default();
    let small = text.contains("[never]") || text.contains("[deny]");
    if small {
        log::info!(
            "guest RAM is shared with other processes, and this host makes no huge pages of such memory: \
             `echo advise | sudo tee {}` has it do so, and --memory hugepages=on takes reserved ones",
            setting.display()
        );
    }
    small
}

/// Refuses what the host has not got: more than is free, where the whole is needed at once, and
/// otherwise more than there is, for a guest may never touch it all.
fn check_host_memory(asked: u64, whole: bool) -> Result<(), RamError> {
    let Ok(text) = fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    check_against_meminfo(asked, whole, &text)
}

fn check_against_meminfo(asked: u64, whole: bool, meminfo: &str) -> Result<(), RamError> {
    let kib = |name: &str| {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    let (Some(total), Some(available)) = (kib("MemTotal"), kib("MemAvailable")) else {
        return Ok(());
    };
    let limit = if whole { available } else { total };
    if asked > limit.saturating_mul(KIB) {
        return Err(RamError::TooLarge {
            asked,
            total: total.saturating_mul(KIB),
            available: available.saturating_mul(KIB),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddressSpace};

    #[test]
    fn more_than_the_host_can_give_is_refused_with_the_figures() {
        let meminfo = "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    4096000 kB\n";
        check_against_meminfo(4000 * MIB, true, meminfo).unwrap();
        let error = check_against_meminfo(4001 * MIB, true, meminfo).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--memory size= asks for 4001 MiB, and this host has 7812 MiB, of which 4000 MiB are \
             free: ask for less"
        );
        let error = check_against_meminfo(512 << 30, false, meminfo).unwrap_err();
        assert!(error.to_string().contains("asks for 512 GiB, "), "{error}");
        check_against_meminfo(7812 * MIB, false, meminfo).unwrap();
        check_against_meminfo(7813 * MIB, false, meminfo).unwrap_err();
        check_against_meminfo(u64::MAX, true, "nonsense").unwrap();
    }

    #[test]
    fn ram_of_every_kind_is_mapped_where_the_layout_says() {
        for shared in [false, true] {
            let config = MemoryConfig {
                size: 16 << 20,
                shared,
                ..Default::default()
            };
            let ram = Ram::new(&config, false).unwrap();
            assert_eq!(ram.size(), config.size);
            let memory = ram.guest().memory();
            memory
                .write_obj(7_u64, GuestAddress((16 << 20) - 8))
                .unwrap();
            memory.write_obj(7_u8, GuestAddress(16 << 20)).unwrap_err();
            let region = ram.regions().next().unwrap();
            assert_eq!(region.file().map(FileOffset::start), shared.then_some(0));
            assert!(!region.read_only());
        }
    }

    #[test]
    fn a_host_that_makes_no_huge_pages_of_shared_memory_is_told_of() {
        let setting = tempfile::NamedTempFile::new().unwrap();
        for (text, small) in [
            ("always within_size advise [never] deny force", true),
            ("always within_size [advise] never deny force", false),
            ("always within_size advise never [deny] force", true),
            ("", false),
        ] {
            fs::write(setting.path(), text).unwrap();
            assert_eq!(tell_of_small_pages(setting.path()), small, "{text}");
        }
    }

    #[test]
    fn whoever_has_shared_ram_can_neither_cut_it_short_nor_make_it_longer() {
        let config = MemoryConfig {
            size: 16 << 20,
            shared: true,
            ..Default::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let region = ram.regions().next().unwrap();
        let file = region.file().unwrap().file();
        for size in [0, config.size - 4096, config.size + 4096] {
            let error = file.set_len(size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{size}");
        }
        let seals = rustix::fs::fcntl_get_seals(file).unwrap();
        assert!(seals.contains(SealFlags::SEAL), "{seals:?}");
    }

    #[test]
    fn ram_agrees_with_its_place_in_the_guest_modulo_the_huge_page() {
        let config = MemoryConfig {
            size: 3 << 29,
            ..Default::default()
        };
        // A hole moves what follows to an odd place.
        let reserved = [(0x345_6000, 0x345_6fff)];
        let ram = Ram::around(&config, false, layout::MMIO32_START, &reserved).unwrap();
        assert!(ram.mappings().len() > 1);
        for region in ram.mappings() {
            let (guest, host) = (region.start_addr().0, region.as_ptr() as u64);
            let page = if region.len() >= 1 << 30 {
                1 << 30
            } else {
                2 * MIB
            };
            assert_eq!(guest % page, host % page, "{guest:#x} at {host:#x}");
        }
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 4095, 4097] {
            let config = MemoryConfig {
                size,
                ..Default::default()
            };
            assert!(Ram::new(&config, false).is_err(), "{size}");
        }
    }
}
