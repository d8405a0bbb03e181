//! The guest's RAM as back ends are told of it: a listener on the VM's list of regions, and those who follow it.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vhost::VhostUserMemoryRegionInfo;

use crate::memory::{Region, RegionError, RegionKind, RegionListener};

/// Who has to know the guest's memory while it serves rings.
pub(crate) trait Follower: Send + Sync {
    /// Whose it is, for a person.
    fn name(&self) -> String;

    /// The guest's RAM is what `regions` say.
    ///
    /// # Errors
    /// It cannot have that memory, and keeps what it had.
    fn memory_is(&self, regions: &[Arc<Region>]) -> Result<(), vhost::Error>;
}

/// The table of one VM. It has RAM alone: what devices and firmware have of the guest's addresses no request
/// may use.
#[derive(Default)]
pub struct MemoryTable(Mutex<State>);

#[derive(Default)]
struct State {
    regions: Vec<Arc<Region>>,
    /// How often that has changed.
    changes: u64,
    followers: Vec<Weak<dyn Follower>>,
}

impl State {
    fn followers(&mut self) -> Vec<Arc<dyn Follower>> {
        self.followers.retain(|one| one.strong_count() > 0);
        self.followers.iter().filter_map(Weak::upgrade).collect()
    }
}

impl fmt::Debug for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.state().regions).finish()
    }
}

impl MemoryTable {
    /// Tells `follower` of the memory, and from now on of each change, until it is dropped or
    /// [forgotten](Self::forget). No other follower waits for what this one takes to hear it.
    ///
    /// # Errors
    /// The follower's; it is told of nothing more then.
    pub(crate) fn follow(&self, follower: &Arc<dyn Follower>) -> Result<(), vhost::Error> {
        let (mut regions, mut told) = {
            let mut state = self.state();
            state.followers.push(Arc::downgrade(follower));
            (state.regions.clone(), state.changes)
        };
        loop {
            if let Err(error) = follower.memory_is(&regions) {
                self.forget(&**follower);
                return Err(error);
            }
            // A change of the meantime can have been told before this.
            let state = self.state();
            if state.changes == told {
                return Ok(());
            }
            (regions, told) = (state.regions.clone(), state.changes);
        }
    }

    /// Tells `follower` of nothing more.
    pub(crate) fn forget(&self, follower: &dyn Follower) {
        let this = std::ptr::from_ref(follower).cast::<()>();
        let other = |one: &Weak<dyn Follower>| one.as_ptr().cast::<()>() != this;
        self.state().followers.retain(other);
    }

    /// Changes the memory: what it is then, and who is to be told.
    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Arc<Region>>),
    ) -> (Vec<Arc<Region>>, Vec<Arc<dyn Follower>>) {
        let mut state = self.state();
        change(&mut state.regions);
        state.changes += 1;
        (state.regions.clone(), state.followers())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RegionListener for MemoryTable {
    fn name(&self) -> &str {
        "virtio devices' back ends"
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        if region.kind() != RegionKind::Ram {
            return Ok(());
        }
        let (regions, followers) = self.change(|regions| regions.push(Arc::clone(region)));
        for follower in followers {
            let Err(source) = follower.memory_is(&regions) else {
                continue;
            };
            let (regions, followers) = self.change(|regions| without(regions, region));
            let others = followers.iter().filter(|one| !Arc::ptr_eq(one, &follower));
            others.for_each(|other| tell_of_less(&**other, &regions));
            return Err(format!("{}: {source}", follower.name()).into());
        }
        Ok(())
    }

    fn removed(&self, region: &Arc<Region>) {
        if region.kind() != RegionKind::Ram {
            return;
        }
        let (regions, followers) = self.change(|regions| without(regions, region));
        for follower in followers {
            tell_of_less(&*follower, &regions);
        }
    }
}

fn without(regions: &mut Vec<Arc<Region>>, gone: &Arc<Region>) {
    regions.retain(|one| !Arc::ptr_eq(one, gone));
}

/// Memory has gone. A guest without memory has no rings, and no back end takes an empty table.
fn tell_of_less(follower: &dyn Follower, regions: &[Arc<Region>]) {
    if regions.is_empty() {
        return;
    }
    if let Err(error) = follower.memory_is(regions) {
        log::error!(
            "{}: its back end was not told that memory has gone: {error}",
            follower.name()
        );
    }
}

/// The table as the `vhost` crate takes it. The descriptors in it are open for as long as `regions` live; a
/// region that no other process can map has none (-1).
pub(crate) fn infos(regions: &[Arc<Region>]) -> Vec<VhostUserMemoryRegionInfo> {
    let info = |region: &Arc<Region>| {
        let file = region.file();
        VhostUserMemoryRegionInfo {
            guest_phys_addr: region.guest(),
            memory_size: region.size(),
            userspace_addr: region.host() as u64,
            mmap_offset: file.map_or(0, vm_memory::FileOffset::start),
            mmap_handle: file.map_or(-1, |file| file.file().as_raw_fd()),
        }
    };
    regions.iter().map(info).collect()
}
