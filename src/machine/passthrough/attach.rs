//! The way of a batch of devices to the guest, up to where they are put into slots. It waits for the
//! kernel, which resets each device that is opened and pins memory, so that a machine that runs has it
//! done on a thread of its own.

use std::fmt::Debug;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use busway_iommu::{DmaSpace, IovaRange};
use busway_pci::pace::SystemClock;
use busway_pci::{Function, InterruptLines, InterruptRoutes, PciFunction, RootSlot};
use busway_vfio::{AssignedFunction, DeviceIo, Placement, Resets, Wiring};

use busway_host::open_node;

use super::advice::with_remedies;
use super::dma::{DmaListener, PeerToPeerError};
use super::find::{Found, Request};
use super::open::{Opened, Opening};
use super::opener::OpenSpace;
use super::placement::{Behind, behind_ports};
use crate::config::DeviceConfig;
use crate::kvm::{IrqRouter, VectorCount};
use crate::machine::RunError;
use crate::machine::handed::Files;
use crate::machine::pci::pins_of;
use crate::machine::pluggable::check_reach;
use crate::memory::{RegionListener, Regions};
use crate::report::Report;

/// What attaching devices needs, shared by the threads that do it.
#[derive(Debug)]
pub(super) struct Attacher {
    opening: Opening,
    memory: Arc<Regions>,
    pub(super) resets: Arc<Resets>,
    wires: Arc<dyn Wires>,
    /// Held for moments only.
    space: Mutex<Option<SpaceInUse>>,
    /// Held while a space is made or given up, which takes as long as memory is pinned.
    making: Mutex<()>,
}

/// The ways of devices' interrupts to the guest.
pub(super) trait Wires: Debug + Send + Sync {
    /// Those of the messages of a device, by its name on the host.
    fn routes(&self, device: &str) -> Arc<dyn InterruptRoutes>;

    /// Those of pins that are wired to these global system interrupts.
    fn lines(&self, gsis: [u32; 4]) -> Arc<dyn InterruptLines>;

    /// How many vectors devices have.
    fn vectors(&self) -> VectorCount;
}

/// KVM's, by a handle that counts the devices' vectors alone.
impl Wires for IrqRouter {
    fn routes(&self, _: &str) -> Arc<dyn InterruptRoutes> {
        Arc::new(self.clone())
    }

    fn lines(&self, gsis: [u32; 4]) -> Arc<dyn InterruptLines> {
        Arc::new(self.pins(gsis))
    }

    fn vectors(&self) -> VectorCount {
        self.vectors()
    }
}

/// The DMA space that all devices are in, with guest memory mapped in it.
#[derive(Clone, Debug)]
struct SpaceInUse {
    open: OpenSpace,
    dma: Arc<dyn DmaSpace>,
    listener: Arc<DmaListener>,
    users: Arc<Users>,
}

/// How many devices use a space. A type1 container forgets what is mapped with its last group, so that the
/// last device's is kept until nothing is mapped, and until it is known whether a device that is being
/// opened stays.
#[derive(Debug, Default)]
pub(super) struct Users {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    open: usize,
    /// Batches that are being opened.
    coming: usize,
}

impl Users {
    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut lock(&self.counts));
        self.changed.notify_all();
    }

    /// Whether no device uses the space when those have come, or not, that were coming.
    fn are_none(&self) -> bool {
        let counts = lock(&self.counts);
        let undecided = |counts: &mut Counts| counts.open == 0 && counts.coming > 0;
        let counts = self.changed.wait_while(counts, undecided);
        counts.unwrap_or_else(PoisonError::into_inner).open == 0
    }
}

/// A device that is open, on its way to the guest.
type Ready = (Request, Arc<dyn DeviceIo>);

/// A host device's function that is ready to be put behind a port.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) number: Function,
    pub(super) config: DeviceConfig,
    pub(super) function: Arc<AssignedFunction>,
    pub(super) device: Arc<dyn DeviceIo>,
    /// Of its space, which it has to leave before it is closed: [`Attacher::close`].
    pub(super) users: Arc<Users>,
}

impl Attacher {
    pub(super) fn new(
        opening: Opening,
        memory: Arc<Regions>,
        resets: Arc<Resets>,
        wires: Arc<dyn Wires>,
    ) -> Self {
        Self {
            opening,
            memory,
            resets,
            wires,
            space: Mutex::default(),
            making: Mutex::default(),
        }
    }

    /// Opens the first devices of a machine, in a space where nothing is mapped yet. Says in the report
    /// which of the kernel's interfaces it is. Nothing where there are none.
    pub(super) fn open_first(
        &self,
        found: Found,
        report: &Report,
    ) -> Result<Option<Opened>, RunError> {
        if found.requests.is_empty() {
            return Ok(None);
        }
        let (opened, way) = found.open(&self.opening)?;
        report.set_iommu(way.kind.word(), &way.why);
        Ok(Some(opened))
    }

    /// Maps guest memory into a space that `count` devices are in, and keeps it in step from now on.
    pub(super) fn map(&self, open: &OpenSpace, count: usize) -> Result<(), RunError> {
        let dma = open.dma();
        let peer_to_peer = self.opening.platform.p2p;
        let listener = Arc::new(DmaListener::new(dma.clone(), peer_to_peer));
        self.memory.listen(listener.clone())?;
        if let Err(error) = check_reach(&self.memory.pluggable(), &*dma) {
            let listener: Arc<dyn RegionListener> = listener;
            self.memory.forget(&listener);
            return Err(error.into());
        }
        let users = Arc::<Users>::default();
        users.change(|counts| counts.open = count);
        *self.space() = Some(SpaceInUse {
            open: open.clone(),
            dma,
            listener,
            users,
        });
        Ok(())
    }

    /// Keeps an iommufd for spaces that are made later.
    pub(super) fn keep_iommufd(&self, file: Option<&File>) -> Result<(), RunError> {
        if let Some(file) = file {
            let file = file.try_clone().map_err(RunError::system("fcntl"))?;
            // The first one stays.
            drop(self.opening.iommufd.set(file));
        }
        Ok(())
    }

    /// How long the guest has to release a device where whoever wants it back does not say.
    pub(super) fn removal_limit(&self) -> Duration {
        self.opening.platform.removal_limit()
    }

    /// Of the space that there is now.
    pub(super) fn users(&self) -> Arc<Users> {
        let users = self.space().as_ref().map(|space| space.users.clone());
        users.unwrap_or_default()
    }

    /// Whether a device is to sit on bus 0 by itself, where it can.
    pub(super) fn is_for_root_bus(&self, device: &DeviceConfig) -> bool {
        self.opening.platform.has_on_root_bus(device)
    }

    /// Whether devices of which nothing else is said are to sit on bus 0.
    pub(super) fn has_root_bus(&self) -> bool {
        !self.opening.platform.root_ports()
    }

    /// Finds, opens and resets devices that are one device of the guest's, and makes the functions that
    /// go to `place`. Guest memory is mapped for them. Nothing is left of it after an error.
    pub(super) fn prepare(
        &self,
        configs: &[DeviceConfig],
        files: &Files,
        place: (RootSlot, Placement),
    ) -> Result<Vec<Prepared>, RunError> {
        let root = self.opening.spaces.paths();
        let iommufd = self.opening.iommufd()?;
        let asked = self.opening.platform.iommufd;
        let found = Found::find_more(root.clone(), configs, files, asked, iommufd)?;
        let opened = self.open_more(found);
        let (opened, users) = opened
            .map_err(|error| with_remedies(error, root, configs, self.opening.ram, &open_node))?;
        // They stay open until their space is left.
        let devices: Vec<_> = opened.devices.iter().map(|(_, io)| io.clone()).collect();
        let mut ports = self.reset(opened);
        let functions = match (ports.pop(), ports.is_empty()) {
            (Some(functions), true) => self.functions(functions, place, &users),
            _ => Err(RunError::SeveralDevices),
        };
        if functions.is_err() {
            for device in &devices {
                self.resets.forget(device);
            }
            self.leave(&users, devices.len());
        }
        functions
    }

    /// Opens devices in the space of those that there are, or else in a new one.
    fn open_more(&self, mut found: Found) -> Result<(Opened, Arc<Users>), RunError> {
        let making = lock(&self.making);
        let mut joined = None;
        if self.space().is_none()
            && let Some((open, first)) = found.make_space(&self.opening)?
        {
            self.map(&open, 0)?;
            joined = Some(first);
        }
        let there = self.space().clone();
        let Some(space) = there else {
            let (opened, _way) = found.open(&self.opening)?;
            self.map(&opened.space, opened.devices.len())?;
            return Ok((opened, self.users()));
        };
        space.users.change(|counts| counts.coming += 1);
        // Others come and go while the kernel resets these.
        drop(making);
        let opened = found.open_in(space.open, &self.opening);
        let count = opened.as_ref().map_or(0, |opened| opened.devices.len());
        space.users.change(|counts| {
            counts.coming -= 1;
            counts.open += count;
        });
        if opened.is_err() {
            // Where it was made for these, it goes with them, and before what it was made of.
            self.leave(&space.users, 0);
        }
        drop(joined);
        Ok((opened?, space.users))
    }

    /// Has the devices in their state at power-on, and says which of them share a port, with their
    /// numbers behind it.
    pub(super) fn reset(&self, opened: Opened) -> Vec<Vec<(Function, Ready)>> {
        for (request, device) in &opened.devices {
            self.resets.add(&request.identity.name(), device.clone());
        }
        self.resets.begin();
        let mut ready: Vec<_> = opened.devices.into_iter().map(Some).collect();
        let identities = ready.iter().flatten().map(|(request, _)| &request.identity);
        let ports = behind_ports(identities);
        let mut take = |behind: Behind| {
            let ready = ready.get_mut(behind.index)?.take()?;
            Some((behind.function, ready))
        };
        let ports = ports.into_iter();
        ports
            .map(|port| port.into_iter().filter_map(&mut take).collect())
            .collect()
    }

    /// The functions that go into a slot of bus 0, or behind the port in it.
    pub(super) fn functions(
        &self,
        functions: Vec<(Function, Ready)>,
        (slot, placement): (RootSlot, Placement),
        users: &Arc<Users>,
    ) -> Result<Vec<Prepared>, RunError> {
        let functions = functions.into_iter().map(|(number, (request, device))| {
            let name = request.identity.name();
            let wiring = Wiring {
                routes: self.wires.routes(&name),
                lines: self.wires.lines(pins_of(slot.device)),
                resets: self.resets.clone(),
                clock: Arc::new(SystemClock::default()),
                placement,
            };
            let function = AssignedFunction::new(&name, device.clone(), wiring, &request.options)?;
            log::info!("{}", function.summary());
            Ok(Prepared {
                number,
                config: request.config,
                function,
                device,
                users: users.clone(),
            })
        });
        functions.collect()
    }

    /// Closes devices that are in no slot.
    pub(super) fn give_up(&self, functions: Vec<Prepared>) {
        let Some(users) = functions.first().map(|one| one.users.clone()) else {
            return;
        };
        let folder = functions.first().map(|one| one.config.path.clone());
        let devices = functions.into_iter().map(|one| {
            drop(one.function);
            one.device
        });
        let devices: Vec<_> = devices.collect();
        self.close(&users, &folder.unwrap_or_default(), devices);
    }

    /// Closes devices, the first of which has its folder in `first`: the kernel resets each, and memory is unmapped
    /// meanwhile where they were the last in their space. When this returns, they are closed and the space is left.
    pub(super) fn close<T: Send>(&self, users: &Arc<Users>, first: &Path, devices: Vec<T>) {
        let count = devices.len();
        let open = {
            let space = self.space();
            let own = space
                .as_ref()
                .filter(|space| Arc::ptr_eq(&space.users, users));
            own.map(|space| space.open.clone())
        };
        // A container forgets what is mapped with its last group, so that one is kept.
        let joined = open.and_then(|open| open.join(first).ok());
        if joined.is_none() {
            self.leave(users, count);
        }
        thread::scope(|scope| {
            for device in devices {
                let thread = thread::Builder::new().name("release".to_owned());
                // Where there is no thread to be had, it is closed by this one.
                let _closing = thread.spawn_scoped(scope, move || drop(device));
            }
            if joined.is_some() {
                self.leave(users, count);
            }
        });
    }

    /// So many devices, which are open or whose group is kept, leave their space. With the last one nothing stays
    /// mapped: those that come later have a space of their own.
    pub(super) fn leave(&self, users: &Arc<Users>, count: usize) {
        users.change(|counts| counts.open = counts.open.saturating_sub(count));
        while users.are_none() {
            let _making = lock(&self.making);
            let counts = lock(&users.counts);
            if counts.open > 0 || counts.coming > 0 {
                // Somebody came meanwhile.
                continue;
            }
            drop(counts);
            let own = |space: &mut SpaceInUse| Arc::ptr_eq(&space.users, users);
            let space = self.space().take_if(own);
            if let Some(space) = space {
                let listener: Arc<dyn RegionListener> = space.listener;
                self.memory.forget(&listener);
            }
            return;
        }
    }

    /// The guest-physical addresses that devices can reach; none where that is not known.
    pub(super) fn usable_ranges(&self) -> Vec<IovaRange> {
        let space = self.space();
        let usable = space.as_ref().map(|space| space.dma.usable_ranges());
        usable.and_then(Result::ok).unwrap_or_default()
    }

    /// Finds out which BARs of `functions` devices reach where they have addresses now. No vCPU may run.
    pub(super) fn survey(&self, functions: &[Arc<dyn PciFunction>]) -> Result<(), PeerToPeerError> {
        let listener = self.space().as_ref().map(|space| space.listener.clone());
        listener.map_or(Ok(()), |listener| listener.survey(functions))
    }

    /// Says in the report what devices have cost so far.
    pub(super) fn account(&self, report: &Report) {
        if let Some(space) = self.space().as_ref() {
            let stats = space.dma.stats();
            report.set_mappings(stats.map_calls, stats.bytes, stats.device_map_calls);
        }
        let vectors = self.wires.vectors();
        report.set_vectors(vectors.most as u64, vectors.updates);
    }

    /// What is mapped for devices; none where there is no space.
    pub(super) fn stats(&self) -> Option<busway_iommu::Stats> {
        self.space().as_ref().map(|space| space.dma.stats())
    }

    /// How many vectors devices have.
    pub(super) fn vectors(&self) -> VectorCount {
        self.wires.vectors()
    }

    fn space(&self) -> MutexGuard<'_, Option<SpaceInUse>> {
        lock(&self.space)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_last_device_waits_for_those_that_are_being_opened() {
        let users = Arc::<Users>::default();
        users.change(|counts| counts.open = 1);
        assert!(!users.are_none());
        for stays in [true, false] {
            users.change(|counts| (counts.open, counts.coming) = (0, 1));
            let (tell, reported) = mpsc::channel();
            let waiting = {
                let users = users.clone();
                thread::spawn(move || tell.send(users.are_none()))
            };
            // Undecided as long as it is not known whether the other one stays.
            assert!(reported.recv_timeout(Duration::from_millis(50)).is_err());
            users.change(|counts| (counts.open, counts.coming) = (stays.into(), 0));
            assert_eq!(reported.recv(), Ok(!stays));
            waiting.join().unwrap().unwrap();
        }
    }
}
