//! The host's devices that the guest has: found, opened, attached, watched, released.
//!
//! Devices are attached in batches, at boot all that the configuration names. A batch is found
//! (`find`), opened in the DMA space (`open`), has its place behind root ports (`placement`), and is
//! presented to the guest by [`Passthrough::attach`]. From then on `attached` hears what a device
//! tells, and releases it.

mod attached;
mod dma;
mod find;
mod open;
mod placement;
mod releases;

use std::sync::Arc;

use busway_iommu::{DmaSpace, IovaRange};
use busway_pci::Function;
use busway_pci::pace::SystemClock;
use busway_vfio::{AssignedFunction, DeviceIo, Resets, Wiring};

use super::RunError;
use super::events::Events;
use super::pci::{Pci, pins_behind_port};
use crate::config::Choice;
use crate::kvm::IrqRouter;
use crate::memory::Regions;
use crate::report::Report;
pub(super) use attached::{Attached, Verdict};
use dma::DmaListener;
pub(super) use dma::PeerToPeerError;
pub(super) use find::Found;
use find::Request;
pub(super) use open::Opened;
pub(super) use placement::{HostIdentity, behind_ports};

/// The host's devices of a machine, and what attaching one needs.
#[derive(Debug)]
pub(super) struct Passthrough {
    /// Those that the guest has. They stand before what they use.
    pub(super) attached: Attached,
    resets: Arc<Resets>,
    space: Option<SpaceInUse>,
    router: IrqRouter,
    /// Counts the devices' vectors.
    host_vectors: IrqRouter,
    events: Arc<Events>,
}

/// The DMA space that all devices are in.
#[derive(Debug)]
struct SpaceInUse {
    dma: Arc<dyn DmaSpace>,
    listener: Arc<DmaListener>,
}

/// A device that is open, on its way to the guest.
type Ready = (Request, Arc<dyn DeviceIo>);

impl Passthrough {
    /// Of a machine that has no device yet.
    pub(super) fn new(router: &IrqRouter, events: &Arc<Events>) -> Result<Self, RunError> {
        let resets = Arc::<Resets>::default();
        let attached = Attached::new(resets.clone()).map_err(RunError::system("epoll_create"))?;
        Ok(Self {
            attached,
            resets,
            space: None,
            router: router.clone(),
            host_vectors: router.counting_anew(),
            events: events.clone(),
        })
    }

    /// Maps guest memory into the space that `opened` are in, and keeps it in step from now on.
    pub(super) fn map(
        &mut self,
        opened: &Opened,
        memory: &Regions,
        peer_to_peer: Choice,
    ) -> Result<(), RunError> {
        let dma = opened.space.dma();
        let listener = Arc::new(DmaListener::new(dma.clone(), peer_to_peer));
        memory.listen(listener.clone())?;
        self.space = Some(SpaceInUse { dma, listener });
        Ok(())
    }

    /// The guest-physical addresses that devices can reach; none where that is not known.
    pub(super) fn usable_ranges(&self) -> Vec<IovaRange> {
        let usable = self.space.as_ref().map(|space| space.dma.usable_ranges());
        usable.and_then(Result::ok).unwrap_or_default()
    }

    /// Gives the guest devices that are open and whose space is mapped: puts each behind a root port and
    /// hears what it tells.
    pub(super) fn attach(&mut self, opened: Opened, pci: &mut Pci) -> Result<(), RunError> {
        let mut ready: Vec<Option<Ready>> = Vec::new();
        for (request, device) in opened.devices {
            let name = device.name().to_owned();
            let device: Arc<dyn DeviceIo> = Arc::new(device);
            self.resets.add(&name, device.clone());
            ready.push(Some((request, device)));
        }
        self.resets.begin();
        let identities = ready.iter().flatten().map(|(request, _)| &request.identity);
        for port in behind_ports(identities) {
            let functions = port.iter().filter_map(|behind| {
                let ready = ready.get_mut(behind.index)?.take()?;
                Some((behind.function, ready))
            });
            self.present(functions.collect(), pci)?;
        }
        Ok(())
    }

    /// Puts the functions of a host device, all of them given, behind a root port.
    fn present(
        &mut self,
        functions: Vec<(Function, Ready)>,
        pci: &mut Pci,
    ) -> Result<(), RunError> {
        let names = functions
            .iter()
            .map(|(_, (request, _))| request.identity.name());
        let names = names.collect::<Vec<_>>().join(" and ");
        let slot = pci.port_slot(&names)?;
        let mut behind = Vec::new();
        for (number, (request, device)) in &functions {
            let wiring = Wiring {
                routes: Arc::new(self.host_vectors.clone()),
                lines: Arc::new(self.router.pins(pins_behind_port(slot))),
                resets: self.resets.clone(),
                clock: Arc::new(SystemClock::default()),
            };
            let name = request.identity.name();
            let function = AssignedFunction::new(&name, device.clone(), wiring, &request.options)?;
            log::info!("{}", function.summary());
            behind.push((*number, function));
        }
        let routes = Arc::new(self.router.clone());
        let port = pci.add_behind_port(slot, &names, behind, routes, self.events.clone())?;
        for (_, (request, device)) in functions {
            self.attached.add(&request.config, port, device);
        }
        Ok(())
    }

    /// Finds out which BARs devices reach where they have addresses now. No vCPU may run.
    pub(super) fn survey(&self, pci: &Pci) -> Result<(), PeerToPeerError> {
        match &self.space {
            Some(space) => space.listener.survey(&pci.host_functions()),
            None => Ok(()),
        }
    }

    /// Says in the report what devices have cost so far.
    pub(super) fn account(&self, report: &Report) {
        if let Some(space) = &self.space {
            let stats = space.dma.stats();
            report.set_mappings(stats.map_calls, stats.bytes, stats.device_map_calls);
        }
        let vectors = self.host_vectors.vectors();
        report.set_vectors(vectors.most as u64, vectors.updates);
    }
}
