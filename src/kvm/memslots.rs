//! KVM's memory slots: a guest-physical range that the guest reaches without an exit. Of one that is
//! read-only, writes do exit, as those to a device do. KVM API §4.35, `KVM_MEM_READONLY`.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::error::KvmError;
use crate::memory::{Region, RegionError, RegionListener};

/// The slots of a VM. A listener on the list of regions: each region is one slot.
pub struct Memslots {
    fd: Arc<VmFd>,
    limit: usize,
    /// What is in each slot. It keeps the memory mapped for as long as the guest can reach it.
    slots: Mutex<Vec<Option<Arc<Region>>>>,
}

impl fmt::Debug for Memslots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memslots")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Memslots {
    pub(super) fn new(fd: Arc<VmFd>, limit: usize) -> Self {
        Self {
            fd,
            limit,
            slots: Mutex::default(),
        }
    }

    fn set(&self, slot: usize, region: &Region, size: u64) -> Result<(), KvmError> {
        let description = kvm_userspace_memory_region {
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
            flags: if region.read_only() {
                KVM_MEM_READONLY
            } else {
                0
            },
            guest_phys_addr: region.guest(),
            memory_size: size,
            userspace_addr: region.host() as u64,
        };
        // SAFETY: a `Region` answers for the memory being mapped at `host` for `size` bytes while
        // it lives, and `slots` keeps it for as long as the slot holds it; the guest's accesses to
        // it race with nothing but volatile ones.
        unsafe { self.fd.set_user_memory_region(description) }
            .map_err(KvmError::ioctl("KVM_SET_USER_MEMORY_REGION", region))
    }
}

impl RegionListener for Memslots {
    fn name(&self) -> &str {
        "KVM memory slots"
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let free = slots
            .iter()
            .position(Option::is_none)
            .unwrap_or(slots.len());
        if free >= self.limit {
            return Err(KvmError::NoMemslot { limit: self.limit }.into());
        }
        self.set(free, region, region.size())?;
        if free == slots.len() {
            slots.push(None);
        }
        if let Some(slot) = slots.get_mut(free) {
            *slot = Some(region.clone());
        }
        Ok(())
    }

    fn removed(&self, region: &Arc<Region>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let found = slots
            .iter_mut()
            .enumerate()
            .find(|(_, slot)| matches!(slot, Some(present) if Arc::ptr_eq(present, region)));
        let Some((number, slot)) = found else { return };
        // A slot of size 0 is a slot deleted. KVM API §4.35.
        match self.set(number, region, 0) {
            Ok(()) => *slot = None,
            // The region stays held, so that the guest never reaches memory that is gone.
            Err(error) => log::error!("{error}; the memory stays reachable for the guest"),
        }
    }
}
