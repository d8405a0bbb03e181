//! Address space for memory of a device, or a guest's, in this process.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;

use busway_pci::{HostAddress, PAGE_SIZE};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// A piece of address space, such as one that maps a part of a device; unmapped when dropped.
///
/// A device's mapping keeps the device open in the kernel, whatever becomes of the descriptor.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    size: usize,
}

/// What the kernel can map by one page table entry, the larger ones first. Intel SDM 3A §4.5
const HUGE_PAGES: [usize; 2] = [1 << 30, 2 << 20];

impl Mapping {
    /// Maps `size` bytes of `fd`, which begin at `fd_offset`. `bar_offset` is their place in the BAR:
    /// address and place agree modulo the largest page that fits, so that the kernel can use such
    /// pages here and in the guest's tables.
    ///
    /// # Errors
    /// mmap(2)'s, and `EINVAL` where the size is beyond all address space.
    pub fn of_file(
        fd: BorrowedFd<'_>,
        fd_offset: u64,
        bar_offset: u64,
        size: u64,
        writable: bool,
    ) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let size = usize::try_from(size).map_err(|_| invalid())?;
        let reserved = Self::reserve(size, bar_offset)?;
        let mut protection = ProtFlags::READ;
        protection.set(ProtFlags::WRITE, writable);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range replaced is `reserved`, which nobody else knows.
        unsafe {
            mmap(
                reserved.start(),
                reserved.size,
                protection,
                flags,
                fd,
                fd_offset,
            )
        }?;
        if HUGE_PAGES.iter().any(|&page| reserved.size >= page) {
            reserved.prefer_huge_pages();
        }
        Ok(reserved)
    }

    /// Has the kernel use the largest pages that fit, also where it is set to do so on request only
    /// (`madvise` in `/sys/kernel/mm/transparent_hugepage/enabled`, as Ubuntu has it): it goes by that
    /// for device memory as well. Otherwise each 4 KiB costs the guest an exit at its first touch.
    fn prefer_huge_pages(&self) {
        // SAFETY: advice about how to map a range that is this mapping's own; it changes no content.
        let result = unsafe { madvise(self.start(), self.size, Advice::LinuxHugepage) };
        if let Err(error) = result {
            // A kernel without huge pages.
            log::debug!("madvise: {error}");
        }
    }

    /// Sets `size` bytes of address space aside, without access, at an address that agrees with `place`
    /// modulo the largest page that fits: Linux before 6.7 aligns no mapping by itself.
    ///
    /// # Errors
    /// mmap(2)'s, and `EINVAL` where the size is beyond all address space.
    pub fn reserve(size: usize, place: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let align = HUGE_PAGES
            .into_iter()
            .find(|&page| size >= page)
            .unwrap_or(PAGE_SIZE as usize);
        let place = usize::try_from(place % align as u64).map_err(|_| invalid())?;
        let room = size.checked_add(align).ok_or_else(invalid)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: an anonymous mapping without access, at an address of the kernel's choice, touches
        // nothing that is there.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), flags) }?;
        let base = base as usize;
        // Below `base + align`, so that `size` bytes fit behind it.
        let address = base + (place + align - base % align) % align;
        let mapping = Self { address, size };
        // The slack on both sides goes back, each as a mapping of its own.
        drop(Self {
            address: base,
            size: address - base,
        });
        drop(Self {
            address: address + size,
            size: room - (address - base) - size,
        });
        Ok(mapping)
    }

    /// Plain memory in a device's place, for tests.
    #[cfg(any(test, feature = "hostile"))]
    pub(crate) fn anonymous(size: u64, place: u64) -> io::Result<Self> {
        Self::reserve(usize::try_from(size).unwrap_or(usize::MAX), place)
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> HostAddress {
        HostAddress(self.address)
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    fn start(&self) -> *mut c_void {
        self.address as *mut c_void
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.size == 0 {
            return;
        }
        // SAFETY: the range was mapped by `reserve` and belongs to this value alone; its address is
        // given out as a number only, by whose contract nobody uses it any more.
        if let Err(error) = unsafe { munmap(self.start(), self.size) } {
            log::debug!("munmap: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_large_area_agrees_with_its_place_in_the_bar_modulo_the_huge_page() {
        for (size, place, align) in [
            (0x1000, 0x3000, 0x1000),
            (2 << 20, 0x3000, 2 << 20),
            ((64 << 20) - 0x3000, 0x3000, 2 << 20),
            (4 << 30, 0, 1 << 30),
        ] {
            let mapping = Mapping::anonymous(size, place).unwrap();
            let HostAddress(address) = mapping.address();
            assert_eq!(address as u64 % align, place % align, "{size:#x}");
            assert_eq!(mapping.size(), size);
        }
    }

    /// What smaps says of the mapping at an address: two letters for each of its properties. proc(5)
    fn properties(HostAddress(address): HostAddress) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = smaps
            .lines()
            .skip_while(|line| !line.starts_with(&format!("{address:x}-")));
        let line = lines.find_map(|line| line.strip_prefix("VmFlags: "));
        line.unwrap().to_owned()
    }

    #[test]
    fn a_large_area_asks_for_huge_pages_and_a_small_one_does_not() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("skipped: this kernel has no transparent huge pages");
            return;
        }
        let path = std::env::temp_dir().join(format!("busway-mapping-{}", std::process::id()));
        let file = std::fs::File::create_new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        for (size, huge) in [(4 << 20, true), (0x1000, false)] {
            let mapping = Mapping::of_file(file.as_fd(), 0, 0, size, false).unwrap();
            let properties = properties(mapping.address());
            let found = properties.split(' ').any(|property| property == "hg");
            assert_eq!(found, huge, "{size:#x}: {properties}");
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(Mapping::anonymous(u64::MAX, 0).is_err());
        assert!(Mapping::anonymous(1 << 62, 0).is_err());
    }
}
