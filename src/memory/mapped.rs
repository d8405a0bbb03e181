//! RAM stays mapped for as long as anybody has it, which may be longer than its VM is there: a disk's request that the
//! host does not give back has it until it does. What nobody has any more is found, and unmapped, when a VM has ended and
//! before the next one takes memory.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use busway_vfio::Mapping;
use vm_memory::GuestRegionMmap;

/// All that this process has mapped for guests.
static MAPPED: Mutex<Vec<Mapped>> = Mutex::new(Vec::new());

struct Mapped {
    region: Weak<GuestRegionMmap>,
    /// Its pages, which go when this is dropped.
    _pages: Mapping,
}

/// `region`, whose pages are `pages` and stay until nobody has it.
pub(super) fn keep(region: GuestRegionMmap, pages: Mapping) -> Arc<GuestRegionMmap> {
    let region = Arc::new(region);
    let mapped = Mapped {
        region: Arc::downgrade(&region),
        _pages: pages,
    };
    let mut all = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    all.push(mapped);
    region
}

/// Gives the host back what nobody has any more.
pub(crate) fn unmap_unused() {
    let mut all = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    let is_unused = |mapped: &mut Mapped| mapped.region.strong_count() == 0;
    let unused: Vec<_> = all.extract_if(.., is_unused).collect();
    drop(all);
    // It takes the kernel its time, where there is much.
    drop(unused);
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;
    use vm_memory::mmap::MmapRegionBuilder;

    use super::*;

    #[test]
    fn what_nobody_has_is_unmapped_and_what_somebody_has_is_not() {
        const SIZE: usize = 1 << 20;
        let new = || {
            let pages = Mapping::reserve(SIZE, 0).unwrap();
            let address = pages.address().0;
            let builder = MmapRegionBuilder::<()>::new(SIZE);
            // SAFETY: the range is mapped, without access, and nobody accesses it.
            let region = unsafe { builder.with_raw_mmap_pointer(address as *mut u8) }.build();
            let region = GuestRegionMmap::new(region.unwrap(), GuestAddress(0)).unwrap();
            keep(region, pages)
        };
        let is_mapped = |region: *const GuestRegionMmap| {
            let all = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter().any(|one| one.region.as_ptr() == region)
        };
        let (first, second) = (new(), new());
        let (at, other) = (Arc::as_ptr(&first), Arc::as_ptr(&second));
        assert!(is_mapped(at) && is_mapped(other));
        let lender = second.clone();
        drop((first, second));
        unmap_unused();
        assert!(!is_mapped(at) && is_mapped(other));
        drop(lender);
        unmap_unused();
        assert!(!is_mapped(other));
    }
}
