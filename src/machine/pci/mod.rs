//! Bus 0 and who sits where on it.
//!
//! The host bridge has slot 0. Virtio functions come from slot 1 up, in the order in which they are
//! given, and root ports from slot 16 up, so that neither moves when one of the others is added. Assigned
//! functions that sit on bus 0 by themselves come behind the virtio functions.

use std::sync::{Arc, Weak};

use busway_pci::{
    AtomicOps, BarKind, Behind, Device, Ecam, Function, FunctionId, HostBridge, HotPlug,
    InterruptLevel, InterruptPin, InterruptRoutes, Link, Needs, PciFunction, Place, Reserve,
    RootPort, Segment, SlotListener, Topology, WindowKind, Windows, capabilities, find_room, spec,
};
use busway_vfio::AssignedFunction;

use super::RunError;
use super::bars::Bars;
use super::bus::{EcamPlace, EcamWindow};
use super::quiet::VirtioFunctions;
use super::seats::{LOW_SLOTS, Owner, Seat, Seats};
use crate::arch::q35::{self, Lpc, Mch};
use crate::arch::{gsi, layout};
use crate::kvm::{Buses, Doorbells, SharedLines};
use crate::memory::Regions;
use crate::report::AssignedDevice;
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

    /// The slot of bus 0 that an assigned device which is there at the guest's start will have, where one is free.
    pub(super) fn low_slot(&self) -> Option<Device> {
        let slot = self.free_slots().trailing_zeros() as u8;
        Device::new(slot).filter(|slot| slot.number() < LOW_SLOTS)
    }

    /// Adds a function of a host device that sits on bus 0 by itself, in a slot that is free.
    pub(super) fn add_low(
        &mut self,
        slot: Device,
        function: &Arc<AssignedFunction>,
    ) -> Result<(), RunError> {
        let id = self.place_in(slot, function.clone())?;
        self.seats.take(slot.number(), Owner::Assigned, id);
        self.assigned.push((id, Arc::downgrade(function)));
        Ok(())
    }

    /// The virtio devices, which are paused with the guest.
    pub(super) fn virtio(&self) -> &VirtioFunctions {
        &self.virtio
    }

    /// The slot that the root port for the host device `name` will have.
    pub(super) fn port_slot(&self, name: &str) -> Result<Device, RunError> {
        self.free_slot(name, LOW_SLOTS)
    }

    /// Adds the functions of a host device, function 0 first, behind a root port in `slot` whose link
    /// is as fast as theirs, and which carries out the AtomicOps that their port on the host does. The
    /// device can leave at run time: `slots` hears what the guest does with the port's slot. Gives the
    /// port.
    pub(super) fn add_behind_port(
        &mut self,
        slot: Device,
        name: &str,
        functions: Vec<(Function, Arc<AssignedFunction>)>,
        routes: Arc<dyn InterruptRoutes>,
        slots: Arc<dyn SlotListener>,
    ) -> Result<FunctionId, RunError> {
        let link = functions.first().map(|(_, function)| link_of(&**function));
        let link = link.unwrap_or_default();
        // They are on one slot of the host, so that what works on the way up works for all of them.
        let atomics = functions.iter().map(|(_, function)| function.atomic_ops());
        let atomics = atomics.fold(AtomicOps::NONE, |all, one| all | one);
        let mut port = RootPort::new(slot.number().into(), link, routes)
            .completing(atomics)
            .wired(self.port_pin(slot))
            .hot_plug(slots);
        let mut bars = functions.iter().flat_map(|(_, function)| function.bars());
        if !bars.any(|bar| bar.kind == BarKind::Io) {
            port = port.without_io();
        }
        let port = self.with_hint(port);
        let port = self.place(name, slot.number(), Arc::new(port))?;
        self.ports.push((port, slot));
        for (number, function) in functions {
            let place = Place::behind(port).with_function(number);
            let id = self.topology.add(place, function.clone())?;
            self.behind.push((port, Arc::downgrade(&function)));
            self.assigned.push((id, Arc::downgrade(&function)));
        }
        Ok(port)
    }

    /// Adds root ports with empty slots, which reserve room for what is plugged in.
    pub(super) fn add_empty_ports(
        &mut self,
        count: u8,
        reserve: Reserve,
        routes: &Arc<dyn InterruptRoutes>,
        slots: &Arc<dyn SlotListener>,
    ) -> Result<(), RunError> {
        for index in 0..count {
            let name = "a slot for hot-plug";
            let slot = self.port_slot(name)?;
            let port = RootPort::new(slot.number().into(), Link::default(), routes.clone())
                .hot_plug(slots.clone())
                .wired(self.port_pin(slot))
                .reserving(reserve);
            // One is enough for what lives by I/O ports, and leaves the others to those that are there.
            let port = match index {
                0 => port,
                _ => port.without_io(),
            };
            let port = self.with_hint(port);
            let port = self.place(name, slot.number(), Arc::new(port))?;
            self.ports.push((port, slot));
        }
        Ok(())
    }

    /// The interrupt pin of the root port in `slot`.
    fn port_pin(&self, slot: Device) -> Arc<dyn InterruptLevel> {
        Arc::new(self.lines.pin(gsi::intx(slot, RootPort::PIN)))
    }

    /// A root port whose slot is empty, which is none of those that are `taken`.
    ///
    /// One with a window for I/O ports is before others, where the device lives by them; and then one that the
    /// guest is not at.
    pub(super) fn empty_port(
        &self,
        taken: &[FunctionId],
        lives_by_io: bool,
    ) -> Option<(FunctionId, Device)> {
        let is = |port, what: fn(&dyn HotPlug) -> bool| {
            self.topology.with_slot(port, |slot| what(slot)) == Some(true)
        };
        let mut ports: Vec<_> = self.empty_ports(taken).collect();
        ports.sort_by_key(|&(port, _)| {
            let lacks_io = lives_by_io && !is(port, |slot| slot.has_io());
            (lacks_io, !is(port, |slot| slot.steady()))
        });
        ports.into_iter().next()
    }

    /// The same of all of them; those that were made to be empty come first.
    pub(super) fn empty_ports(
        &self,
        taken: &[FunctionId],
    ) -> impl Iterator<Item = (FunctionId, Device)> {
        let empty = |(port, _): &&(FunctionId, Device)| {
            let leaves = |(of, function): &(FunctionId, Weak<AssignedFunction>)| {
                of == port && function.strong_count() > 0
            };
            !taken.contains(port)
                && self.topology.behind(*port).is_empty()
                && !self.behind.iter().any(leaves)
        };
        self.ports.iter().rev().filter(empty).copied()
    }

    /// That there is no empty slot, and what helps.
    pub(super) fn no_slot(&self) -> String {
        let names: Vec<_> = self
            .assigned()
            .into_iter()
            .map(|device| device.host)
            .collect();
        match self.ports.len() {
            0 => "the VM has no slot for devices that are added: start it with --platform \
                  hotplug_slots=N"
                .to_owned(),
            count => format!(
                "each of the VM's {count} slots is taken or about to be (it has {}): remove a device, or \
                 start the VM with more (--platform hotplug_slots=N)",
                names.join(", ")
            ),
        }
    }

    /// Puts the functions of a host device into a seat that is empty, or was kept for it, while the guest runs, and
    /// gives the guest's address of each.
    ///
    /// # Errors
    /// [`RunError::SlotTooSmall`] or [`RunError::Addresses`] where there is no room for its BARs,
    /// [`RunError::Place`] where the seat is taken
    pub(super) fn plug(
        &mut self,
        seat: Seat,
        functions: Vec<(Function, Arc<AssignedFunction>)>,
    ) -> Result<Vec<String>, RunError> {
        let ids = match (seat, &functions[..]) {
            (Seat::Port(port), _) => self.plug_behind(port, &functions)?,
            (Seat::Low(slot), [(_, function)]) => {
                vec![self.plug_low(slot, Owner::Assigned, function.clone())?]
            }
            (Seat::Low(_), _) => return Err(RunError::SeveralDevices),
        };
        self.assigned
            .retain(|(_, function)| function.strong_count() > 0);
        let addresses = ids
            .iter()
            .map(|id| self.topology.bdf(*id).unwrap_or_default().to_string());
        let addresses = addresses.collect();
        for (id, (_, function)) in ids.into_iter().zip(&functions) {
            self.assigned.push((id, Arc::downgrade(function)));
        }
        Ok(addresses)
    }

    /// Puts the functions of a host device into the empty slot of a root port.
    fn plug_behind(
        &mut self,
        port: FunctionId,
        functions: &[(Function, Arc<AssignedFunction>)],
    ) -> Result<Vec<FunctionId>, RunError> {
        self.fits(port, functions)?;
        let atomics = functions.iter().map(|(_, function)| function.atomic_ops());
        let atomics = atomics.fold(AtomicOps::NONE, |all, one| all | one);
        self.topology.with_slot(port, |slot| slot.complete(atomics));
        let here = functions.iter().cloned();
        let here = here.map(|(number, function)| (number, function as Arc<dyn PciFunction>));
        let ids = self.topology.plug(port, here)?;
        self.behind
            .retain(|(_, function)| function.strong_count() > 0);
        for (_, function) in functions {
            self.behind.push((port, Arc::downgrade(function)));
        }
        Ok(ids)
    }

    /// Whether the BARs of functions find room in the windows of a slot, as they are now.
    fn fits(
        &self,
        port: FunctionId,
        functions: &[(Function, Arc<AssignedFunction>)],
    ) -> Result<(), RunError> {
        let Some(windows) = self.topology.with_slot(port, |slot| slot.windows()) else {
            return Ok(());
        };
        let needs = functions
            .iter()
            .enumerate()
            .map(|(index, (_, function))| Needs {
                function: index,
                bars: function.bar_sizes(),
                bridge: None,
            });
        let behind = Behind {
            reserve: Reserve::default(),
            functions: needs.collect(),
        };
        let bus = [Needs {
            function: functions.len(),
            bars: Vec::new(),
            bridge: Some(behind),
        }];
        for kind in [WindowKind::Memory32, WindowKind::Memory64] {
            find_room(&bus, kind, &windows).map_err(|missing| RunError::SlotTooSmall {
                device: functions
                    .get(missing.function)
                    .map_or_else(String::new, |(_, function)| function.name().to_owned()),
                bar: missing.bar,
                size: missing.size,
                window: kind,
                room: windows.largest(kind),
            })?;
        }
        Ok(())
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

    /// What the report says of the host's functions, in the order in which they were added. Waits for none of them, so
    /// that it can be asked while one is being reset.
    pub(super) fn assigned(&self) -> Vec<AssignedDevice> {
        let of = |(id, function): &(FunctionId, Weak<AssignedFunction>)| {
            let function = function.upgrade()?;
            Some(AssignedDevice {
                host: function.name().to_owned(),
                guest: self.topology.bdf(*id)?.to_string(),
                reset: function.reset_method().word(),
            })
        };
        self.assigned.iter().filter_map(of).collect()
    }

    /// The host's functions that are still there, in the order in which they were added.
    pub(super) fn host_functions(&self) -> Vec<Arc<dyn PciFunction>> {
        let functions = self.assigned.iter();
        functions
            .filter_map(|(_, function)| function.upgrade())
            .map(|function| function as Arc<dyn PciFunction>)
            .collect()
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

/// The global system interrupts that INTA to INTD of a device lead to that sits in `slot` of bus 0, or behind the root
/// port in it: a link has device 0 only, so the port passes its pins on as they are.
pub(super) fn pins_of(slot: Device) -> [u32; 4] {
    InterruptPin::ALL.map(|pin| gsi::intx(slot, pin.swizzle(Device::default())))
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
