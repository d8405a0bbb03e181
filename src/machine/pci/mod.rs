//! Bus 0 of each segment and who sits where on it.
//!
//! The host bridge has slot 0. Virtio functions come from slot 1 up, in the order in which they are
//! given, and root ports from slot 16 up, so that neither moves when one of the others is added. Assigned
//! functions that sit on bus 0 by themselves come behind the virtio functions. A slot that is asked for by its number
//! is kept from all others.

mod assigned;
mod roots;

use std::ops::Range;
use std::sync::{Arc, Weak};

use busway_pci::{
    Ecam, FunctionId, HostBridge, PciFunction, Place, RootPort, RootSlot, Segment, Topology,
};
use busway_vfio::AssignedFunction;

use super::RunError;
use super::address_plan::SegmentAddresses;
use super::bars::Bars;
use super::bus::{EcamPlace, EcamWindow};
use super::quiet::VirtioFunctions;
use super::seats::{Owner, Seats};
use crate::arch::q35::{self, Lpc, Mch};
use crate::config::{PciPlace, VmConfig};
use crate::kvm::{Buses, Doorbells, SharedLines};
use crate::memory::Regions;
use crate::virtio::VirtioPci;
pub(super) use assigned::pins_of;
use roots::RootBus;

/// The PCI side of a machine. Dropping it takes out every function, with its BARs unmapped before,
/// and releases the buses, which refer to it.
#[derive(Debug)]
pub(super) struct Pci {
    topology: Arc<Topology>,
    seats: Arc<Seats>,
    buses: Buses,
    /// Bus 0 of each segment, in their order.
    roots: Vec<RootBus>,
    /// The root ports that have hot-plug slots.
    ports: Vec<(FunctionId, RootSlot)>,
    /// The functions behind each, until they are gone: while one is being taken out, which waits for the
    /// kernel, its port is not to be waited for.
    behind: Vec<(FunctionId, Weak<AssignedFunction>)>,
    /// The assigned functions, those that are still there.
    assigned: Vec<(FunctionId, Weak<AssignedFunction>)>,
    virtio: VirtioFunctions,
    lines: SharedLines,
    /// The host bridge that firmware knows, where there is firmware.
    mch: Option<Arc<Mch>>,
}

impl Pci {
    /// Segments with nothing in them but host bridges, reachable for the guest, where `segments` has their addresses, the
    /// first of them segment 0. A guest that begins with `firmware` finds the chip set that firmware knows in the first, and
    /// firmware says where that one's configuration space is in memory.
    pub(super) fn new(
        segments: Vec<SegmentAddresses>,
        buses: &Buses,
        memory: Arc<Regions>,
        doorbells: Doorbells,
        lines: SharedLines,
        firmware: bool,
    ) -> Result<Self, RunError> {
        let windows = segments.iter().map(|segment| segment.windows.clone());
        let bars = Bars::new(buses.clone(), memory, doorbells, windows.collect());
        let topology = Arc::new(Topology::new(Arc::new(bars)));
        let mut pci = Self {
            seats: Arc::new(Seats::new(topology.clone())),
            topology,
            buses: buses.clone(),
            roots: Vec::new(),
            ports: Vec::new(),
            behind: Vec::new(),
            assigned: Vec::new(),
            virtio: VirtioFunctions::default(),
            lines,
            mch: None,
        };
        for (number, addresses) in (0..).zip(segments) {
            let segment = Segment(number);
            pci.roots.push(RootBus::new(segment, addresses.windows));
            match firmware && segment == Segment(0) {
                true => pci.add_chip_set()?,
                false => pci.add_host_bridge(segment, addresses.ecam)?,
            }
        }
        Ok(pci)
    }

    /// The host bridge of a segment, with configuration space at `ecam`.
    fn add_host_bridge(&mut self, segment: Segment, ecam: Range<u64>) -> Result<(), RunError> {
        let slot = self.slot_in(segment, "the host bridge", 0)?;
        self.place_in(slot, Arc::new(HostBridge::new()))?;
        self.buses.mmio.insert(
            "PCI configuration space",
            ecam.start,
            ecam.end.saturating_sub(ecam.start),
            Arc::new(EcamWindow(Ecam::new(self.topology.clone(), segment))),
        )?;
        Ok(())
    }

    fn add_chip_set(&mut self) -> Result<(), RunError> {
        let place = Arc::new(EcamPlace::new(&self.buses, &self.topology));
        let mch = Arc::new(Mch::new(place));
        self.mch = Some(mch.clone());
        let slot = self.slot_in(Segment(0), "the host bridge", 0)?;
        self.place_in(slot, mch)?;
        let slot = self.slot_in(Segment(0), "the LPC bridge", q35::LPC_SLOT)?;
        self.place_in(slot, Arc::new(Lpc::new()))?;
        Ok(())
    }

    /// The host bridge that firmware knows, where there is firmware.
    pub(super) fn mch(&self) -> Option<&Arc<Mch>> {
        self.mch.as_ref()
    }

    /// A root port that says to firmware, where there is firmware, what to reserve.
    fn with_hint(&self, port: RootPort) -> RootPort {
        match self.mch {
            Some(_) => port.hinting(),
            None => port,
        }
    }

    pub(super) fn topology(&self) -> &Arc<Topology> {
        &self.topology
    }

    /// Where devices sit, and are asked for.
    pub(super) fn seats(&self) -> &Arc<Seats> {
        &self.seats
    }

    /// Keeps the slots that devices are to have by their numbers from all others. To be called before any device is added.
    pub(super) fn keep_places(&mut self, config: &VmConfig) {
        let virtio = config.virtio().map(|(_, device)| device.place());
        let devices = config.device.iter().map(|device| device.place());
        for place in virtio.chain(devices) {
            if let (Some(device), Some(root)) = (place.device(), self.root_mut(place.segment())) {
                root.keep(device);
            }
        }
    }

    /// Adds a virtio device, which the machine makes itself, and gives its slot.
    pub(super) fn add_virtio(
        &mut self,
        function: &Arc<VirtioPci>,
        place: PciPlace,
    ) -> Result<(RootSlot, FunctionId), RunError> {
        let slot = self.low_place(function.name(), place)?;
        let id = self.place_in(slot, function.clone())?;
        self.virtio.push(function);
        Ok((slot, id))
    }

    /// Puts a virtio device into `slot`, which was kept for it, while the guest runs.
    ///
    /// # Errors
    /// As [`plug_low`](Self::plug_low)
    pub(super) fn plug_virtio(
        &mut self,
        slot: RootSlot,
        function: &Arc<VirtioPci>,
    ) -> Result<(), RunError> {
        self.plug_low(slot, Owner::Virtio, function.clone())?;
        self.virtio.push(function);
        Ok(())
    }

    /// Puts a function into a slot of bus 0 that was kept for it while the guest runs, and tells the guest.
    ///
    /// # Errors
    /// [`RunError::Addresses`] where its BARs would find no room; nothing has changed then
    fn plug_low(
        &self,
        slot: RootSlot,
        owner: Owner,
        function: Arc<dyn PciFunction>,
    ) -> Result<FunctionId, RunError> {
        let root = self.root(slot.segment, &function.name())?;
        self.topology
            .has_room(slot.segment, &root.windows, &*function)?;
        let id = self.topology.add(place_of(slot), function)?;
        self.seats.take(slot, owner, id);
        self.seats.tell(slot);
        Ok(id)
    }

    /// Adds a function of the board's that stays, and keeps it.
    ///
    /// # Errors
    /// [`RunError`]
    pub(super) fn add_board(&mut self, function: Arc<dyn PciFunction>) -> Result<(), RunError> {
        let slot = self.slot_in(Segment(0), &function.name(), 1)?;
        self.place_in(slot, function).map(drop)
    }

    /// The segments that there are.
    pub(super) fn segments(&self) -> impl Iterator<Item = Segment> {
        self.roots.iter().map(|root| root.segment)
    }

    /// Bit n: slot n of bus 0 is one for devices, and free at the guest's start.
    pub(super) fn free_slots(&self, segment: Segment) -> u32 {
        let mut roots = self.roots.iter();
        let root = roots.find(|root| root.segment == segment);
        root.map_or(0, RootBus::low_free)
    }

    /// The virtio devices, which are paused with the guest.
    pub(super) fn virtio(&self) -> &VirtioFunctions {
        &self.virtio
    }

    /// Where firmware finds the function that is `called` so, which is in segment 0: slots and functions from the host bridge on, in
    /// Open Firmware's form. EDK II OvmfPkg/Library/QemuBootOrderLib/QemuBootOrderLib.c,
    /// `TranslatePciOfwNodes`
    pub(super) fn boot_path(&self, called: impl Fn(&str) -> bool) -> Option<String> {
        let functions = self.topology.functions();
        let (id, _) = functions
            .into_iter()
            .find(|(_, function)| called(&function.name()))?;
        let place = self.topology.bdf(id)?;
        let (device, function) = (place.device.number(), place.function.number());
        let node = match function {
            0 => format!("device@{device:x}"),
            function => format!("device@{device:x},{function:x}"),
        };
        let assigned = self.assigned.iter().find(|(of, _)| *of == id);
        let port = assigned.and_then(|(_, function)| {
            let mut behind = self.behind.iter();
            let (port, _) = behind.find(|(_, other)| other.ptr_eq(function))?;
            let (_, slot) = self.ports.iter().find(|(of, _)| of == port)?;
            Some(*slot)
        });
        Some(match port {
            Some(slot) => {
                let bridge = slot.device.number();
                format!("/pci@i0cf8/pci-bridge@{bridge:x}/{node}")
            }
            None => format!("/pci@i0cf8/{node}"),
        })
    }

    /// Numbers buses and gives addresses, as firmware does. No vCPU may run.
    pub(super) fn assign(&self) -> Result<(), RunError> {
        for root in &self.roots {
            self.topology.assign(root.segment, &root.windows)?;
        }
        for (id, function) in self.topology.functions() {
            let bdf = self.topology.bdf(id).unwrap_or_default();
            log::debug!("{bdf}: {:x?}", function.bars());
        }
        Ok(())
    }

    fn place_in(
        &mut self,
        slot: RootSlot,
        function: Arc<dyn PciFunction>,
    ) -> Result<FunctionId, RunError> {
        let id = self.topology.add(place_of(slot), function)?;
        if let Some(root) = self.root_mut(slot.segment) {
            root.take(slot.device);
        }
        Ok(id)
    }

    /// The first free slot of bus 0 of `segment` from `from` on or, where there is none, at all.
    fn slot_in(&self, segment: Segment, name: &str, from: u8) -> Result<RootSlot, RunError> {
        let device = self.root(segment, name)?.free(from);
        let device = device.ok_or_else(|| RunError::NoSlot {
            device: name.to_owned(),
        })?;
        Ok(RootSlot { segment, device })
    }

    /// The slot for a device on bus 0: the one that is asked for, or one that is free.
    fn low_place(&self, name: &str, place: PciPlace) -> Result<RootSlot, RunError> {
        let segment = place.segment();
        match place.device() {
            Some(device) => self.root(segment, name)?.low(device, name),
            None => self.slot_in(segment, name, 1),
        }
    }

    fn root(&self, segment: Segment, name: &str) -> Result<&RootBus, RunError> {
        let mut roots = self.roots.iter();
        let root = roots.find(|root| root.segment == segment);
        root.ok_or_else(|| RunError::NoSegment {
            device: name.to_owned(),
            segment: segment.0,
        })
    }

    fn root_mut(&mut self, segment: Segment) -> Option<&mut RootBus> {
        let mut roots = self.roots.iter_mut();
        roots.find(|root| root.segment == segment)
    }
}

fn place_of(slot: RootSlot) -> Place {
    Place::root(slot.device).in_segment(slot.segment)
}

impl Drop for Pci {
    fn drop(&mut self) {
        // First nothing of a device's memory is mapped any more, for other devices neither, which still
        // run: a reset kills what they reach. What is behind a port goes with it.
        let functions = self.topology.functions().into_iter();
        let functions: Vec<_> = functions
            .flat_map(|(id, _)| self.topology.remove(id))
            .collect();
        // All before the first is closed, for some are reset together.
        let assigned = self.assigned.drain(..);
        for function in assigned.filter_map(|(_, function)| function.upgrade()) {
            function.retire();
        }
        drop(functions);
        drop(self.seats.clear());
        self.buses.mmio.clear();
        self.buses.ports.clear();
    }
}
