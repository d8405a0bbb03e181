//! The host's devices that the guest has: found, opened, attached, watched, released.
//!
//! Devices are attached in batches: at boot all that the configuration names, later one device at a
//! time. A batch is found (`find`), opened in the DMA space (`open`), reset and made into functions
//! (`attach`), which have their places behind root ports or on bus 0 (`placement`), and is presented to the
//! guest. From then on `attached` hears what a device tells, and releases it.

mod advice;
mod attach;
mod attached;
pub(super) mod dma;
#[cfg(test)]
mod fake;
mod find;
mod open;
pub(super) mod open_devices;
mod opener;
pub(super) mod placement;
mod steering;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use busway_iommu::{IovaRange, SysRoot};
use busway_pci::{FunctionId, RootSlot};
use busway_vfio::{KvmFiles, Placement, Resets};

use super::RunError;
use super::aside::Aside;
use super::events::Events;
use super::handed::Files;
use super::observed::{DeviceSeen, DeviceState, DmaSeen};
use super::pci::Pci;
use super::removal::Removal;
use super::requests::{Added, AddedFunction, Answer, Asker, RequestError};
use super::seats::{Owner, STEADY_LIMIT, Seat, Seats};
use crate::config::{DeviceConfig, PciPlace, PmemConfig, VmConfig};
use crate::kvm::{IrqRouter, Vm};
use crate::memory::Regions;
use crate::report::Report;
use attach::{Attacher, Prepared, Wires};
pub(super) use attached::Verdict;
use attached::{ASSIGNED, Attached};
use dma::PeerToPeerError;
pub(super) use find::{Found, options};
pub(super) use open::Opened;
use open::Opening;
pub(super) use open_devices::OpenDevices;
use opener::{MakeSpace, Vfio};
use placement::HostIdentity;
use steering::{Steered, Steering};

/// The host's devices of a machine, and what attaching one needs.
#[derive(Debug)]
pub(super) struct Passthrough {
    /// Those that the guest has. They stand before what they use.
    pub(super) attached: Attached,
    /// Batches on their way. They are waited for.
    coming: Aside,
    /// The seats that they are for, and what they are.
    on_their_way: Vec<(Seat, Vec<DeviceConfig>)>,
    /// Batches that have come, or have not.
    come: Arc<Mutex<Vec<Come>>>,
    /// Those of them that wait until their slots are steady, each until a time at most.
    waiting: Vec<(Come, Instant)>,
    attacher: Arc<Attacher>,
    router: IrqRouter,
    events: Arc<Events>,
    open: OpenDevices,
}

/// What came of attaching a device.
#[derive(Debug)]
struct Come {
    seat: Seat,
    outcome: Result<Vec<Prepared>, RunError>,
    asker: Asker,
}

impl Passthrough {
    /// Of a machine that has no device yet. `memory` may be empty until [`map`](Self::map). What is opened is
    /// among `devices`.
    ///
    /// # Errors
    /// [`RunError`]
    pub(super) fn new(
        config: &VmConfig,
        vm: &Vm,
        memory: &Arc<Regions>,
        router: &IrqRouter,
        events: &Arc<Events>,
        devices: &OpenDevices,
    ) -> Result<Self, RunError> {
        let can_have_some = !config.device.is_empty() || config.platform.has_hotplug_slots();
        let kvm = match can_have_some {
            true => Some(Arc::new(vm.vfio()?) as Arc<dyn KvmFiles>),
            false => None,
        };
        let devices = devices.clone();
        let spaces = Box::new(Vfio {
            paths: SysRoot::default(),
            kvm,
            devices: devices.clone(),
        });
        let own = router.with_own_count();
        let wires: Arc<dyn Wires> = match Steering::begin(&config.cpus) {
            Some(steering) => Arc::new(Steered {
                router: own,
                steering,
            }),
            None => Arc::new(own),
        };
        Self::opening(config, spaces, wires, memory, router, events, devices)
    }

    /// The same where `spaces` makes the DMA spaces, and opens devices in them, and `wires` makes the ways for their
    /// interrupts.
    fn opening(
        config: &VmConfig,
        spaces: Box<dyn MakeSpace>,
        wires: Arc<dyn Wires>,
        memory: &Arc<Regions>,
        router: &IrqRouter,
        events: &Arc<Events>,
        open: OpenDevices,
    ) -> Result<Self, RunError> {
        let opening = Opening {
            platform: config.platform.clone(),
            // What is memory of the guest's beside RAM is pinned as well.
            ram: config
                .pmem
                .iter()
                .map(PmemConfig::likely_size)
                .fold(config.most_memory(), u64::saturating_add),
            spaces,
            iommufd: OnceLock::new(),
        };
        let resets = Arc::<Resets>::default();
        let attacher = Arc::new(Attacher::new(opening, memory.clone(), resets, wires));
        Ok(Self {
            attached: Attached::new(attacher.clone(), events.clone())
                .map_err(RunError::system("epoll_create"))?,
            coming: Aside::default(),
            on_their_way: Vec::new(),
            come: Arc::default(),
            waiting: Vec::new(),
            attacher,
            router: router.clone(),
            events: events.clone(),
            open,
        })
    }

    /// The devices that the machine has opened, opens or closes now.
    pub(super) fn open_devices(&self) -> OpenDevices {
        self.open.clone()
    }

    /// Opens the machine's first devices, in a space where nothing is mapped yet; nothing where there are
    /// none.
    pub(super) fn open(&self, found: Found, report: &Report) -> Result<Option<Opened>, RunError> {
        self.attacher.open_first(found, report)
    }

    /// Keeps the iommufd that was inherited or handed over, for DMA spaces that are made later: its node may be out
    /// of reach.
    ///
    /// # Errors
    /// fcntl(2), `F_DUPFD_CLOEXEC`
    pub(super) fn keep_iommufd(&self, found: &Found) -> Result<(), RunError> {
        self.attacher.keep_iommufd(found.iommufd.as_ref())
    }

    /// Gives the machine that is being put together its first devices: maps guest memory for them.
    pub(super) fn map(&self, opened: &Opened) -> Result<(), RunError> {
        self.attacher.map(&opened.space, opened.devices.len())
    }

    /// Puts the first devices behind root ports or on bus 0, and hears from now on what they tell.
    pub(super) fn attach_first(&mut self, opened: Opened, pci: &mut Pci) -> Result<(), RunError> {
        for functions in self.attacher.reset(opened) {
            let names = functions
                .iter()
                .map(|(_, (request, _))| request.identity.name());
            let names = names.collect::<Vec<_>>().join(" and ");
            let users = self.attacher.users();
            let on_root_bus = functions.iter().all(|(_, (one, _))| one.on_root_bus);
            let asked = functions.first().map(|(_, (one, _))| one.config.place());
            let asked = asked.unwrap_or_default();
            let low = match on_root_bus {
                true => pci.low_slot(&names, asked)?,
                false => None,
            };
            if let Some(slot) = low {
                let place = (slot, Placement::RootBus);
                for one in self.attacher.functions(functions, place, &users)? {
                    pci.add_low(slot, &one.function)?;
                    self.attached.add(one, Seat::Low(slot));
                }
                continue;
            }
            let slot = pci.port_slot(&names, asked)?;
            let place = (slot, Placement::BehindPort);
            let functions = self.attacher.functions(functions, place, &users)?;
            let behind = functions
                .iter()
                .map(|one| (one.number, one.function.clone()));
            let routes = Arc::new(self.router.clone());
            let listener = self.events.clone();
            let port = pci.add_behind_port(slot, behind.collect(), routes, listener)?;
            for one in functions {
                self.attached.add(one, Seat::Port(port));
            }
        }
        Ok(())
    }

    /// Adds functions of one host device to the machine that runs, in an empty seat. Whoever asks is
    /// answered when they are in it, or when it is known that they will not be.
    pub(super) fn attach(
        &mut self,
        configs: Vec<DeviceConfig>,
        files: Files,
        pci: &Pci,
        asker: Asker,
    ) {
        let comes = |config: &DeviceConfig| {
            let mut coming = self.coming_devices();
            coming.any(|other| other.path == config.path || other.id() == config.id())
        };
        let is_there = |config: &&DeviceConfig| self.attached.has(config) || comes(config);
        if let Some(twice) = configs.iter().find(is_there) {
            asker.answer(Err(RequestError::Exists(twice.name())));
            return;
        }
        let asked = configs.first().map(DeviceConfig::place).unwrap_or_default();
        let segments = u16::try_from(pci.segments().count()).unwrap_or(u16::MAX);
        if let Err(error) = asked.check(segments) {
            asker.answer(Err(RequestError::Invalid(error.to_string())));
            return;
        }
        let Some((seat, slot)) = self.find_seat(&configs, asked, pci) else {
            asker.answer(Err(RequestError::Failed(pci.no_slot(asked))));
            return;
        };
        let names: Vec<_> = configs.iter().map(DeviceConfig::name).collect();
        let names = names.join(" and ");
        self.on_their_way.push((seat, configs.clone()));
        let (attacher, come, events) = (
            self.attacher.clone(),
            self.come.clone(),
            self.events.clone(),
        );
        self.coming.start("attach", &names, move || {
            let outcome = attacher.prepare(&configs, &files, (slot, seat.placement()));
            // VFIO has the device for as long as somebody has a descriptor of it.
            drop(files);
            let mut come = come.lock().unwrap_or_else(PoisonError::into_inner);
            come.push(Come {
                seat,
                outcome,
                asker,
            });
            drop(come);
            events.attached();
        });
    }

    /// Asks the guest to release the device called `id`: [`Attached::remove`]. One that is still on its way cannot
    /// be asked for.
    pub(super) fn remove(&mut self, id: &str, removal: Removal, seats: &Arc<Seats>, held: bool) {
        if self.coming_devices().any(|config| config.id() == id) {
            let why = RequestError::State("still to get it: ask again when it is there");
            removal.end(id, Err(why));
            return;
        }
        self.attached.remove(id, removal, seats, held);
    }

    /// How long the guest has to release a device where whoever wants it back does not say.
    pub(super) fn removal_limit(&self) -> Duration {
        self.attacher.removal_limit()
    }

    /// An empty seat for functions of one host device, and the slot of bus 0 that it is in or behind: on bus 0 for one
    /// function that is to be there, while a slot is free, and else behind a port.
    fn find_seat(
        &self,
        configs: &[DeviceConfig],
        place: PciPlace,
        pci: &Pci,
    ) -> Option<(Seat, RootSlot)> {
        if let [one] = configs
            && self.attacher.is_for_root_bus(one)
        {
            if let Some(slot) = pci.seats().claim(Owner::Assigned, place) {
                return Some((Seat::Low(slot), slot));
            }
            log::warn!(
                "{}: no slot of bus 0 is free: it comes behind a root port",
                one.name()
            );
        }
        let lives_by_io = configs.iter().any(HostIdentity::may_live_by_io);
        let (port, slot) = pci.empty_port(&self.taken(), lives_by_io, place)?;
        Some((Seat::Port(port), slot))
    }

    fn taken(&self) -> Vec<FunctionId> {
        let seats = self.on_their_way.iter();
        seats.filter_map(|(seat, _)| seat.port()).collect()
    }

    fn coming_devices(&self) -> impl Iterator<Item = &DeviceConfig> {
        self.on_their_way.iter().flat_map(|(_, configs)| configs)
    }

    /// How many devices can be added.
    pub(super) fn empty_slots(&self, pci: &Pci) -> usize {
        let low = match self.attacher.has_root_bus() {
            true => pci.seats().free_slots(),
            false => 0,
        };
        pci.empty_ports(&self.taken()).count() + low
    }

    /// Takes what has come: it is put into its slot by [`on_time`](Self::on_time), which comes next.
    pub(super) fn on_attached(&mut self) {
        let come = std::mem::take(&mut *self.come.lock().unwrap_or_else(PoisonError::into_inner));
        let limit = Instant::now() + STEADY_LIMIT;
        self.waiting
            .extend(come.into_iter().map(|come| (come, limit)));
    }

    /// By when something has to have happened.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|(_, limit)| *limit);
        waiting.chain(self.attached.deadline()).min()
    }

    /// Does what is due, or can be done by now. To be called whenever something has happened.
    pub(super) fn on_time(&mut self, pci: &mut Pci, now: Instant) {
        self.attached.on_time(pci.seats(), now);
        let due = |(come, limit): &mut (Come, Instant)| {
            come.outcome.is_err() || *limit <= now || pci.seats().is_steady(come.seat)
        };
        let due: Vec<_> = self.waiting.extract_if(.., due).collect();
        for (come, _) in due {
            let Come {
                seat,
                outcome,
                asker,
            } = come;
            self.on_their_way.retain(|(taken, _)| *taken != seat);
            let answer = match outcome {
                Ok(functions) => self.present(functions, seat, pci),
                Err(error) => Err(RequestError::failed(&error)),
            };
            if answer.is_err() {
                pci.seats().give_up(seat);
            }
            asker.answer(answer);
        }
    }

    fn present(
        &mut self,
        functions: Vec<Prepared>,
        seat: Seat,
        pci: &mut Pci,
    ) -> Result<Answer, RequestError> {
        let behind = functions
            .iter()
            .map(|one| (one.number, one.function.clone()));
        match pci.plug(seat, behind.collect()) {
            Ok(addresses) => {
                let mut added = Vec::new();
                for (one, address) in functions.into_iter().zip(addresses) {
                    log::info!("{}: added at {address}", one.config.name());
                    let id = one.config.id();
                    added.push(AddedFunction { id, address });
                    self.attached.add(one, seat);
                }
                let mut added = added.into_iter();
                let Some(first) = added.next() else {
                    return Err(RequestError::Failed("there is no device to add".to_owned()));
                };
                let attended = pci.seats().attended(seat);
                if !attended {
                    log::warn!(
                        "{}: no driver of the guest's attends to the slot: the guest finds the device when it has \
                         one (Linux's, pciehp, is off with pcie_ports=compat)",
                        first.id
                    );
                }
                Ok(Answer::Added(Added {
                    first,
                    others: added.collect(),
                    attended,
                }))
            }
            Err(error) => {
                self.attached.refuse(functions);
                Err(RequestError::failed(&error))
            }
        }
    }

    /// The guest-physical addresses that devices can reach; none where that is not known.
    pub(super) fn usable_ranges(&self) -> Vec<IovaRange> {
        self.attacher.usable_ranges()
    }

    /// Finds out which BARs devices reach where they have addresses now. No vCPU may run.
    pub(super) fn survey(&self, pci: &Pci) -> Result<(), PeerToPeerError> {
        self.attacher.survey(&pci.host_functions())
    }

    /// What is seen of those that the guest has, or is to have. `held`: it is paused for an error of one.
    pub(super) fn observed(&self, seats: &Seats, held: bool) -> Vec<DeviceSeen> {
        let coming = self.coming_devices().map(|config| DeviceSeen {
            id: config.id(),
            kind: ASSIGNED,
            host: config.host_name().ok().map(|name| name.to_string()),
            guest: None,
            state: DeviceState::Coming,
            doing: None,
        });
        let mut all = self.attached.observed(seats, held);
        all.extend(coming);
        all
    }

    /// What is mapped for devices.
    pub(super) fn dma(&self) -> Option<DmaSeen> {
        let stats = self.attacher.stats()?;
        Some(DmaSeen {
            mappings: stats.mappings,
            bytes: stats.bytes,
            map_calls: stats.map_calls,
            device_map_calls: stats.device_map_calls,
        })
    }

    /// How often an interrupt was given another message.
    pub(super) fn vector_updates(&self) -> u64 {
        self.attacher.vectors().updates
    }

    /// Says in the report what devices have cost so far.
    pub(super) fn account(&self, report: &Report) {
        self.attacher.account(report);
    }
}

impl Drop for Passthrough {
    fn drop(&mut self) {
        self.coming.finish();
        let come = std::mem::take(&mut *self.come.lock().unwrap_or_else(PoisonError::into_inner));
        // What has come and is in no slot leaves its space before it is closed.
        for functions in come.into_iter().filter_map(|come| come.outcome.ok()) {
            self.attacher.give_up(functions);
        }
    }
}
