//! Bus 0 and who sits where on it.
//!
//! The host bridge has slot 0. Virtio functions come from slot 1 up, in the order in which they are
//! given, and root ports from slot 16 up, so that neither moves when one of the others is added.

use std::sync::Arc;

use busway_pci::{
    BarKind, Device, Ecam, FunctionId, HostBridge, InterruptPin, InterruptRoutes, Link,
    PciFunction, Place, RootPort, SlotListener, Topology, Windows, capabilities, spec,
};

use super::RunError;
use super::bars::Bars;
use super::bus::EcamWindow;
use crate::acpi;
use crate::kvm::Buses;
use crate::memory::layout;

/// The first slot that is tried for a root port.
const FIRST_PORT: u8 = 16;

/// The PCI side of a machine. Dropping it takes out every function, with its BARs unmapped before,
/// and lets go of the buses, which refer to it.
#[derive(Debug)]
pub(super) struct Pci {
    topology: Arc<Topology>,
    buses: Buses,
    windows: Windows,
    /// Bit n: slot n is taken.
    slots: u32,
}

impl Pci {
    /// Bus 0 with nothing on it but the host bridge, reachable for the guest.
    pub(super) fn new(mapper: Bars, buses: &Buses, windows: Windows) -> Result<Self, RunError> {
        let mut pci = Self {
            topology: Arc::new(Topology::new(Arc::new(mapper))),
            buses: buses.clone(),
            windows,
            slots: 0,
        };
        pci.place("the host bridge", 0, Arc::new(HostBridge::new()))?;
        buses.mmio.insert(
            "PCI configuration space",
            layout::ECAM_START,
            layout::ECAM_SIZE,
            Arc::new(EcamWindow(Ecam::new(pci.topology.clone()))),
        )?;
        Ok(pci)
    }

    pub(super) fn topology(&self) -> &Arc<Topology> {
        &self.topology
    }

    /// Adds a function that the machine makes itself.
    pub(super) fn add(
        &mut self,
        name: &str,
        function: Arc<dyn PciFunction>,
    ) -> Result<(), RunError> {
        self.place(name, 1, function).map(drop)
    }

    /// The slot that the root port for the host device `name` will have.
    pub(super) fn port_slot(&self, name: &str) -> Result<Device, RunError> {
        self.free_slot(name, FIRST_PORT)
    }

    /// Adds a host device, behind a root port of its own in `slot` whose link is as fast as its. The
    /// device can leave at run time: `slots` hears what the guest does with the port's slot. Gives the
    /// port.
    pub(super) fn add_behind_port(
        &mut self,
        slot: Device,
        name: &str,
        function: Arc<dyn PciFunction>,
        routes: Arc<dyn InterruptRoutes>,
        slots: Arc<dyn SlotListener>,
    ) -> Result<FunctionId, RunError> {
        let mut port =
            RootPort::new(slot.number().into(), link_of(&*function), routes).hot_plug(slots);
        let has_ports = function.bars().iter().any(|bar| bar.kind == BarKind::Io);
        if !has_ports {
            port = port.without_io();
        }
        let port = self.place(name, slot.number(), Arc::new(port))?;
        self.topology.add(Place::behind(port), function)?;
        Ok(port)
    }

    /// Numbers buses and gives addresses, as firmware does. No vCPU may run.
    pub(super) fn assign(&self) -> Result<(), RunError> {
        self.topology.assign(&self.windows)?;
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
        for (id, _) in self.topology.functions() {
            // What is behind a port goes with it.
            self.topology.remove(id);
        }
        self.buses.mmio.clear();
        self.buses.ports.clear();
    }
}

/// The global system interrupts that INTA to INTD of the device behind the root port in `slot` lead
/// to: a link has device 0 only, so the port passes its pins on as they are.
pub(super) fn pins_behind_port(slot: Device) -> [u32; 4] {
    InterruptPin::ALL.map(|pin| acpi::intx_gsi(slot, pin.swizzle(Device::default())))
}

/// The link of a PCIe function; the fastest there is where it does not say.
fn link_of(function: &dyn PciFunction) -> Link {
    let dword = |offset| {
        let mut data = [0; 4];
        function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    capabilities(&dword)
        .iter()
        .find(|capability| capability.id == spec::CAP_PCI_EXPRESS)
        .map(|capability| {
            dword(
                capability
                    .offset
                    .saturating_add(spec::EXP_LINK_CAPABILITIES),
            )
        })
        // A virtual function and an integrated endpoint have no link, and say width 0.
        .filter(|register| register >> spec::EXP_LINK_WIDTH_SHIFT & 0x3f != 0)
        .map_or_else(Link::default, Link::from_capabilities)
}
