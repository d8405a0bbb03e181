//! The functions of a machine: who answers at which address of which segment, and which BARs the guest can reach.
//!
//! The guest decides both as it goes, by the bus numbers and windows of bridges and by each
//! function's command register. The topology finds functions by what the registers say at the time,
//! and after each configuration write maps and unmaps what changed by it.

mod assign;
mod mapping;
mod room;
mod tree;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use crate::activity::Access;
use crate::address::{Bdf, Function};
use crate::function::{BarMapper, Bridge, HotPlug, PciFunction};
use crate::pace::{self, Clock, SystemClock};
use crate::spec;
pub use assign::AssignError;
use mapping::Mappings;
pub use room::{Behind, Needs, NoRoom, end_of_room, find_room};
pub use tree::{FunctionId, Parent, Place, PlaceError};
use tree::{Node, Tree};

/// The PCI functions of a machine.
///
/// vCPU threads access configuration space in parallel. Locks are taken in this order: that of writes to
/// a bridge, that of writes to one function behind it, then the mappings, then the tree (never held
/// while a function is written), then a function's own. So a function must not call the topology from
/// within an access, nor may the [`BarMapper`] from within a call; a function's own lock is never held
/// when the mapper is called.
///
/// What a guest's writes have mapped, unmapped and switched is charged to the function that it writes
/// ([`pace`](crate::pace)), and the vCPU that has used the allowance up waits before its write returns.
pub struct Topology {
    mapper: Arc<dyn BarMapper>,
    tree: RwLock<Tree>,
    /// Serialises changes of what is mapped; accesses to BARs do not come here.
    mappings: Mutex<Mappings>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Topology")
            .field("tree", &self.tree)
            .finish_non_exhaustive()
    }
}

impl Topology {
    /// A topology without functions, whose BARs `mapper` makes reachable.
    #[must_use]
    pub fn new(mapper: Arc<dyn BarMapper>) -> Self {
        Self::with_clock(mapper, Arc::new(SystemClock::default()))
    }

    /// [`new`](Self::new), where `clock` tells the time by which writes are paced.
    #[must_use]
    pub fn with_clock(mapper: Arc<dyn BarMapper>, clock: Arc<dyn Clock>) -> Self {
        Self {
            mapper,
            tree: RwLock::default(),
            mappings: Mutex::default(),
            clock,
        }
    }

    /// Adds a function before the guest's start: a slot behind which it is, is then taken.
    ///
    /// # Errors
    /// [`PlaceError`]: something is there already, or the bridge above is none.
    pub fn add(
        &self,
        place: Place,
        function: Arc<dyn PciFunction>,
    ) -> Result<FunctionId, PlaceError> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let id = tree.add(place, function, &self.clock)?;
        drop(tree);
        if let Parent::Bridge(port) = place.parent {
            self.with_slot(port, |slot| slot.prepare(true));
        }
        self.remap(&mut self.mappings(), &[id]);
        Ok(id)
    }

    /// Puts functions, each with its number, into the empty slot behind a bridge while the guest runs, and
    /// tells the guest. They have to be in their state at power-on.
    ///
    /// # Errors
    /// [`PlaceError`]: something is there already, or the bridge is none. Nothing has changed then.
    pub fn plug(
        &self,
        bridge: FunctionId,
        functions: impl IntoIterator<Item = (Function, Arc<dyn PciFunction>)>,
    ) -> Result<Vec<FunctionId>, PlaceError> {
        let write = self.tree().get(bridge).map(|node| node.write.clone());
        let _one = write.as_deref().map(lock);
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let mut ids = Vec::new();
        for (number, function) in functions {
            let place = Place::behind(bridge).with_function(number);
            match tree.add(place, function, &self.clock) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    for id in ids {
                        tree.remove(id);
                    }
                    return Err(error);
                }
            }
        }
        drop(tree);
        // What has to be found is there before the guest is told to look.
        self.remap(&mut self.mappings(), &ids);
        self.with_slot(bridge, |slot| slot.set_present(true));
        Ok(ids)
    }

    /// What is behind a bridge, the functions of one bus.
    #[must_use]
    pub fn behind(&self, bridge: FunctionId) -> Vec<FunctionId> {
        let tree = self.tree();
        let behind = tree.children(Parent::Bridge(bridge));
        behind.map(|node| node.id).collect()
    }

    /// Empties the slot behind a bridge while the guest runs, whether the guest released the device
    /// or not: its functions answer no longer, then their BARs are unmapped, then the guest is told.
    /// What a vCPU had the bridge or a function carry out, such as a reset, is waited for. The functions
    /// are the caller's, to be dropped; an access that a vCPU began before may hold one for a moment
    /// longer.
    pub fn unplug(&self, bridge: FunctionId) -> Vec<Arc<dyn PciFunction>> {
        let write = self.tree().get(bridge).map(|node| node.write.clone());
        let _one = write.as_deref().map(lock);
        let below = self.behind(bridge);
        let functions = below.into_iter().flat_map(|id| self.remove(id)).collect();
        self.with_slot(bridge, |slot| slot.set_present(false));
        functions
    }

    /// The slot behind a bridge, where it takes hot-plug operations.
    pub fn with_slot<T>(
        &self,
        bridge: FunctionId,
        act: impl FnOnce(&dyn HotPlug) -> T,
    ) -> Option<T> {
        let port = self.function(bridge)?;
        port.bridge()?.hot_plug().map(act)
    }

    /// Takes out a function and all that is behind it, with their BARs unmapped, and gives them
    /// back, when what a vCPU had them carry out is done. Nothing where it is out already.
    pub fn remove(&self, id: FunctionId) -> Vec<Arc<dyn PciFunction>> {
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        let nodes = tree.remove(id);
        drop(tree);
        let ids: Vec<_> = nodes.iter().map(|node| node.id).collect();
        self.remap(&mut self.mappings(), &ids);
        let after_its_writes = |node: Node| {
            drop(lock(&node.write));
            node.pci
        };
        nodes.into_iter().map(after_its_writes).collect()
    }

    /// Every function; a bridge before what is behind it.
    #[must_use]
    pub fn functions(&self) -> Vec<(FunctionId, Arc<dyn PciFunction>)> {
        let tree = self.tree();
        let nodes = tree.nodes().iter();
        nodes.map(|node| (node.id, node.pci.clone())).collect()
    }

    /// The function with this name.
    #[must_use]
    pub fn function(&self, id: FunctionId) -> Option<Arc<dyn PciFunction>> {
        self.tree().get(id).map(|node| node.pci.clone())
    }

    /// Where a function is by the bus numbers that the guest has set; on bus 0 while its bridge has
    /// none.
    #[must_use]
    pub fn bdf(&self, id: FunctionId) -> Option<Bdf> {
        self.tree().bdf(id)
    }

    /// Reads configuration space, of any offset and width. All ones where nothing answers.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        data.fill(u8::MAX);
        let tree = self.tree();
        let Some(node) = tree.find(bdf).cloned() else {
            return;
        };
        let multi_function = tree.is_multi_function(&node);
        drop(tree);
        node.count(Access::ConfigRead);
        let mut rest = data;
        for (offset, width) in in_dwords(offset, rest.len()) {
            let (part, after) = rest.split_at_mut(width);
            node.pci.config_read(offset, part);
            set_multi_function(offset, part, multi_function);
            rest = after;
        }
    }

    /// Writes configuration space, of any offset and width, and maps and unmaps what changes by it
    /// before it returns. Dropped where nothing answers.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(node) = self.tree().find(bdf).cloned() else {
            return;
        };
        node.count(Access::ConfigWrite);
        let mut rest = data;
        for (offset, width) in in_dwords(offset, data.len()) {
            let (part, after) = rest.split_at(width);
            self.write_dword(&node, offset, part);
            // With no lock held.
            node.pace.pay();
            rest = after;
        }
    }

    /// Puts every function into its state at power-on, as when the machine is reset. No vCPU may
    /// run. Nothing is mapped or numbered after it; [`assign`](Self::assign) comes next.
    pub fn reset(&self) {
        self.reset_while(|_| true);
    }

    /// [`reset`](Self::reset), but `go_on` is asked before each function. Once it says no, the others
    /// are left as they are, with nothing of them mapped: the machine will not run again.
    pub fn reset_while(&self, go_on: impl Fn(&dyn PciFunction) -> bool) {
        let functions = self.functions();
        // As with a bridge's reset: what others reach of a device's memory ends with the reset, and one
        // reset can be that of several devices.
        self.mappings().clear(&*self.mapper);
        for (_, function) in &functions {
            if !go_on(&**function) {
                return;
            }
            function.reset();
        }
        let ids: Vec<_> = functions.iter().map(|(id, _)| *id).collect();
        self.remap(&mut self.mappings(), &ids);
    }

    /// One write to a function at a time: what a write asks for is carried out before another vCPU takes
    /// it back, each reset of a bus is seen to begin exactly once, and none ends before all below are
    /// reset.
    fn write_dword(&self, node: &Node, offset: u16, data: &[u8]) {
        let _one = lock(&node.write);
        // It may have been taken out while this waited, or just before.
        if self.tree().get(node.id).is_none() {
            return;
        }
        match node.pci.bridge() {
            Some(bridge) => self.write_bridge(node, bridge, offset, data),
            None => self.write_endpoint(node, offset, data),
        }
    }

    /// Most writes change no decoding and have nothing carried out: they take no lock that writes to
    /// other functions take.
    fn write_endpoint(&self, node: &Node, offset: u16, data: &[u8]) {
        let before = node.pci.decoded();
        node.pci.config_write(offset, data);
        let now = node.pci.decoded();
        if now != before {
            let changes = self.remap(&mut self.mappings(), &[node.id]);
            node.pace.charge(pace::MAPPING, changes);
        }
        // Nothing of it is mapped, and what was deferred can take long: other functions go on, for
        // the lock that is held is that of writes to this one.
        if now.is_empty() && node.pci.run_deferred() {
            let changes = self.remap(&mut self.mappings(), &[node.id]);
            node.pace.charge(pace::MAPPING, changes);
        }
    }

    fn write_bridge(&self, node: &Node, bridge: &dyn Bridge, offset: u16, data: &[u8]) {
        let mut mappings = self.mappings();
        let was_in_reset = bridge.in_reset();
        node.pci.config_write(offset, data);
        let in_reset = bridge.in_reset();
        let begins = in_reset && !was_in_reset;
        let affected = self.tree().with_descendants(node.id);
        let changes = self.remap(&mut mappings, &affected);
        drop(mappings);
        node.pace.charge(pace::MAPPING, changes);
        // The machine hears of each, also where the slot is empty. What is reset below is charged itself.
        node.pace
            .charge(pace::SWITCH, (in_reset != was_in_reset).into());
        if begins {
            // By now nothing below is mapped. Resets can take long: other functions go on.
            for &id in affected.iter().filter(|&&id| id != node.id) {
                let below = self.tree().get(id).cloned();
                if let Some(below) = below {
                    // A write to it finds it as it was, or reset.
                    let _one = lock(&below.write);
                    below.pci.reset();
                }
            }
            let changes = self.remap(&mut self.mappings(), &affected);
            node.pace.charge(pace::MAPPING, changes);
        }
    }

    /// Brings what is mapped of `functions` in line with their registers as they are now, and says how
    /// many BARs the mapper was given or had taken from it for that.
    fn remap(&self, mappings: &mut Mappings, functions: &[FunctionId]) -> u32 {
        let tree = self.snapshot();
        mappings.update(&tree, functions, &*self.mapper)
    }

    /// The tree as it is now, to look at without its lock.
    fn snapshot(&self) -> Tree {
        self.tree().clone()
    }

    fn mappings(&self) -> MutexGuard<'_, Mappings> {
        lock(&self.mappings)
    }

    fn tree(&self) -> RwLockReadGuard<'_, Tree> {
        self.tree.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts an access into parts that do not cross a doubleword, each with its offset and width; what is
/// beyond configuration space is cut off.
fn in_dwords(offset: u16, width: usize) -> impl Iterator<Item = (u16, usize)> {
    let end = usize::from(offset)
        .saturating_add(width)
        .min(spec::CONFIG_SPACE_SIZE.into());
    let mut at = usize::from(offset);
    std::iter::from_fn(move || {
        let part = at;
        at = (at + 1).next_multiple_of(4).min(end);
        (part < end).then(|| (part as u16, at - part))
    })
}

/// Whether a device has several functions is a matter of where they were put, so the header type's
/// bit is the topology's to answer. PCIe 6.0 §7.5.1.1.9.
fn set_multi_function(offset: u16, data: &mut [u8], multi_function: bool) {
    let at = spec::HEADER_TYPE.checked_sub(offset).map(usize::from);
    if let Some(byte) = at.and_then(|at| data.get_mut(at)) {
        *byte &= !spec::HEADER_TYPE_MULTI_FUNCTION;
        if multi_function {
            *byte |= spec::HEADER_TYPE_MULTI_FUNCTION;
        }
    }
}

#[cfg(test)]
mod busy_tests;
#[cfg(test)]
mod hot_plug_tests;
#[cfg(test)]
mod moves_tests;
#[cfg(test)]
mod segments_tests;
#[cfg(test)]
mod tests;
