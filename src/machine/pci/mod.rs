//! Bus 0 and who sits where on it.
//!
//! The host bridge has slot 0. Virtio functions come from slot 1 up, in the order in which they are
//! given, and root ports from slot 16 up, so that neither moves when one of the others is added. Assigned
//! functions that sit on bus 0 by themselves come behind the virtio functions.

mod assigned;

use std::sync::{Arc, Weak};

use busway_pci::{
    Device, Ecam, FunctionId, HostBridge, PciFunction, Place, RootPort, Segment, Topology, Windows,
};
use busway_vfio::AssignedFunction;

use super::RunError;
use super::bars::Bars;
use super::bus::{EcamPlace, EcamWindow};
use super::quiet::VirtioFunctions;
use super::seats::{LOW_SLOTS, Owner, Seats};
pub(super) use assigned::pins_of;
use crate::arch::q35::{self, Lpc, Mch};
use crate::arch::layout;
use crate::kvm::{Buses, Doorbells, SharedLines};
use crate::memory::Regions;
use crate::virtio::VirtioPci;

/// The PCI side of a machine. Dropping it takes out every function, with its BARs unmapped before,
/// and releases the buses, which refer to it.
#[derive(Debug)]
pub(super) struct Pci {
    topology: Arc<Topology>,
    seats: Arc<Seats>,
    buses: Buses,
    windows: Windows,
    /// Bit n: slot n is taken.
    slots: u32,
    /// The root ports that have hot-plug slots.
    ports: Vec<(FunctionId, Device)>,
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
    /// Bus 0 with nothing on it but the host bridge, reachable for the guest. The BARs may be within
    /// `windows`. A guest that begins with `firmware` finds the chip set that firmware knows, and firmware
    /// says where configuration space is in memory.
    pub(super) fn new(
        windows: Windows,
        buses: &Buses,
        memory: Arc<Regions>,
        doorbells: Doorbells,
        lines: SharedLines,
        firmware: bool,
    ) -> Result<Self, RunError> {
        let within = [&windows.memory32[..], &windows.memory64].concat();
        let bars = Bars::new(buses.clone(), memory, doorbells, within);
        let topology = Arc::new(Topology::new(Arc::new(bars)));
        let mut pci = Self {
            seats: Arc::new(Seats::new(topology.clone())),
            topology,
            buses: buses.clone(),
            windows,
            slots: 0,
            ports: Vec::new(),
            behind: Vec::new(),
            assigned: Vec::new(),
            virtio: VirtioFunctions::default(),
            lines,
            mch: None,
        };
        match firmware {
            true => pci.add_chip_set()?,
            false => pci.add_host_bridge()?,
        }
        Ok(pci)
    }

    fn add_host_bridge(&mut self) -> Result<(), RunError> {
        self.place("the host bridge", 0, Arc::new(HostBridge::new()))?;
        self.buses.mmio.insert(
            "PCI configuration space",
            layout::ECAM_START,
            layout::ECAM_SIZE,
            Arc::new(EcamWindow(Ecam::new(self.topology.clone(), Segment(0)))),
        )?;
        Ok(())
    }

    fn add_chip_set(&mut self) -> Result<(), RunError> {
        let place = Arc::new(EcamPlace::new(&self.buses, &self.topology));
        let mch = Arc::new(Mch::new(place));
        self.mch = Some(mch.clone());
        self.place("the host bridge", 0, mch)?;
        self.place("the LPC bridge", q35::LPC_SLOT, Arc::new(Lpc::new()))?;
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

    /// Adds a virtio device, which the machine makes itself, and gives its slot.
    pub(super) fn add_virtio(
        &mut self,
        function: &Arc<VirtioPci>,
    ) -> Result<(Device, FunctionId), RunError> {
        let slot = self.free_slot(function.name(), 1)?;
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
        slot: u8,
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
        slot: u8,
        owner: Owner,
        function: Arc<dyn PciFunction>,
    ) -> Result<FunctionId, RunError> {
        let device = Device::new(slot).ok_or_else(|| RunError::NoSlot {
            device: function.name(),
        })?;
        self.topology
            .has_room(Segment(0), &self.windows, &*function)?;
        let id = self.topology.add(Place::root(device), function)?;
        self.seats.take(slot, owner, id);
        self.seats.tell(slot);
        Ok(id)
    }

    /// Adds a function of the board's that stays, and keeps it.
    ///
    /// # Errors
    /// [`RunError`]
    pub(super) fn add_board(&mut self, function: Arc<dyn PciFunction>) -> Result<(), RunError> {
        self.place(&function.name(), 1, function).map(drop)
    }

    /// Bit n: slot n is one for devices, and free at the guest's start.
    pub(super) fn free_slots(&self) -> u32 {
        ((1 << LOW_SLOTS) - 1) & !self.slots
    }

    /// The virtio devices, which are paused with the guest.
    pub(super) fn virtio(&self) -> &VirtioFunctions {
        &self.virtio
    }

    /// Where firmware finds the function that is `called` so: slots and functions from the host bridge on, in
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
            Some(slot) => format!("/pci@i0cf8/pci-bridge@{:x}/{node}", slot.number()),
            None => format!("/pci@i0cf8/{node}"),
        })
    }

    /// Numbers buses and gives addresses, as firmware does. No vCPU may run.
    pub(super) fn assign(&self) -> Result<(), RunError> {
        self.topology.assign(Segment(0), &self.windows)?;
        for (id, function) in self.topology.functions() {
            let bdf = self.topology.bdf(id).unwrap_or_default();
            log::debug!("{bdf}: {:x?}", function.bars());
        }
        Ok(())
    }

    fn place(
        &mut self,
        name: &str,
        from: u8,
        function: Arc<dyn PciFunction>,
    ) -> Result<FunctionId, RunError> {
        let slot = self.free_slot(name, from)?;
        self.place_in(slot, function)
    }

    fn place_in(
        &mut self,
        slot: Device,
        function: Arc<dyn PciFunction>,
    ) -> Result<FunctionId, RunError> {
        let id = self.topology.add(Place::root(slot), function)?;
        self.slots |= 1 << slot.number();
        Ok(id)
    }

    /// The first free slot from `from` on or, where there is none, at all.
    fn free_slot(&self, name: &str, from: u8) -> Result<Device, RunError> {
        (from..Device::COUNT)
            .chain(0..from)
            .find(|slot| self.slots & 1 << slot == 0)
            .and_then(Device::new)
            .ok_or_else(|| RunError::NoSlot {
                device: name.to_owned(),
            })
    }
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
