//! The host's functions in a machine, behind root ports or on bus 0, and the ports with their slots.

use std::sync::{Arc, Weak};

use busway_pci::{
    AtomicOps, BarKind, Behind, Device, Function, FunctionId, HotPlug, InterruptLevel,
    InterruptPin, InterruptRoutes, Link, Needs, PciFunction, Place, Reserve, RootPort, RootSlot,
    SlotListener, WindowKind, capabilities, find_room, spec,
};
use busway_vfio::AssignedFunction;

use super::Pci;
use crate::arch::gsi;
use crate::config::PciPlace;
use crate::machine::RunError;
use crate::machine::seats::{LOW_SLOTS, Owner, Seat};
use crate::report::AssignedDevice;

impl Pci {
    /// The slot of bus 0 that an assigned device which is there at the guest's start will have, where one is free.
    ///
    /// # Errors
    /// [`RunError::PortSlot`] or [`RunError::SlotTaken`], where it is asked for by its number.
    pub(in crate::machine) fn low_slot(
        &self,
        name: &str,
        place: PciPlace,
    ) -> Result<Option<RootSlot>, RunError> {
        if place.device.is_some() {
            return self.low_place(name, place).map(Some);
        }
        let segment = place.segment();
        let slot = self.free_slots(segment).trailing_zeros() as u8;
        let device = Device::new(slot).filter(|slot| slot.number() < LOW_SLOTS);
        Ok(device.map(|device| RootSlot { segment, device }))
    }

    /// Adds a function of a host device that sits on bus 0 by itself, in a slot that is free.
    pub(in crate::machine) fn add_low(
        &mut self,
        slot: RootSlot,
        function: &Arc<AssignedFunction>,
    ) -> Result<(), RunError> {
        let id = self.place_in(slot, function.clone())?;
        self.seats.take(slot, Owner::Assigned, id);
        self.assigned.push((id, Arc::downgrade(function)));
        Ok(())
    }

    /// The slot that the root port for the host device `name` will have.
    pub(in crate::machine) fn port_slot(
        &self,
        name: &str,
        place: PciPlace,
    ) -> Result<RootSlot, RunError> {
        let segment = place.segment();
        match place.device() {
            Some(device) => self.root(segment, name)?.asked(device, name),
            None => self.slot_in(segment, name, LOW_SLOTS),
        }
    }

    /// Adds the functions of a host device, function 0 first, behind a root port in `slot` whose link
    /// is as fast as theirs, and which carries out the AtomicOps that their port on the host does. The
    /// device can leave at run time: `slots` hears what the guest does with the port's slot. Gives the
    /// port.
    pub(in crate::machine) fn add_behind_port(
        &mut self,
        slot: RootSlot,
        functions: Vec<(Function, Arc<AssignedFunction>)>,
        routes: Arc<dyn InterruptRoutes>,
        slots: Arc<dyn SlotListener>,
    ) -> Result<FunctionId, RunError> {
        let link = functions.first().map(|(_, function)| link_of(&**function));
        let link = link.unwrap_or_default();
        // They are on one slot of the host, so that what works on the way up works for all of them.
        let atomics = functions.iter().map(|(_, function)| function.atomic_ops());
        let atomics = atomics.fold(AtomicOps::NONE, |all, one| all | one);
        let mut port = RootPort::new(slot.physical_slot(), link, routes)
            .completing(atomics)
            .wired(self.port_pin(slot.device))
            .hot_plug(slots);
        let mut bars = functions.iter().flat_map(|(_, function)| function.bars());
        if !bars.any(|bar| bar.kind == BarKind::Io) {
            port = port.without_io();
        }
        let port = self.with_hint(port);
        let port = self.place_in(slot, Arc::new(port))?;
        self.ports.push((port, slot));
        for (number, function) in functions {
            let place = Place::behind(port).with_function(number);
            let id = self.topology.add(place, function.clone())?;
            self.behind.push((port, Arc::downgrade(&function)));
            self.assigned.push((id, Arc::downgrade(&function)));
        }
        Ok(port)
    }

    /// Adds root ports with empty slots to a segment, which reserve room for what is plugged in.
    pub(in crate::machine) fn add_empty_ports(
        &mut self,
        segment: u16,
        count: u8,
        reserve: Reserve,
        routes: &Arc<dyn InterruptRoutes>,
        slots: &Arc<dyn SlotListener>,
    ) -> Result<(), RunError> {
        for index in 0..count {
            let name = "a slot for hot-plug";
            let place = PciPlace {
                segment,
                device: None,
            };
            let slot = self.port_slot(name, place)?;
            let port = RootPort::new(slot.physical_slot(), Link::default(), routes.clone())
                .hot_plug(slots.clone())
                .wired(self.port_pin(slot.device))
                .reserving(reserve);
            // One is enough for what lives by I/O ports, and leaves the others to those that are there. They are few, and
            // all segments' together.
            let port = match (segment, index) {
                (0, 0) => port,
                _ => port.without_io(),
            };
            let port = self.with_hint(port);
            let port = self.place_in(slot, Arc::new(port))?;
            self.ports.push((port, slot));
        }
        Ok(())
    }

    /// The interrupt pin of the root port in `slot`.
    fn port_pin(&self, slot: Device) -> Arc<dyn InterruptLevel> {
        Arc::new(self.lines.pin(gsi::intx(slot, RootPort::PIN)))
    }

    /// A root port whose slot is empty, at `place` and none of those that are `taken`.
    ///
    /// One with a window for I/O ports is before others, where the device lives by them; and then one that the
    /// guest is not at.
    pub(in crate::machine) fn empty_port(
        &self,
        taken: &[FunctionId],
        lives_by_io: bool,
        place: PciPlace,
    ) -> Option<(FunctionId, RootSlot)> {
        let is = |port, what: fn(&dyn HotPlug) -> bool| {
            self.topology.with_slot(port, |slot| what(slot)) == Some(true)
        };
        let here = |(_, slot): &(FunctionId, RootSlot)| {
            let asked = place.device().is_none_or(|device| device == slot.device);
            slot.segment == place.segment() && asked
        };
        let mut ports: Vec<_> = self.empty_ports(taken).filter(here).collect();
        ports.sort_by_key(|&(port, _)| {
            let lacks_io = lives_by_io && !is(port, |slot| slot.has_io());
            (lacks_io, !is(port, |slot| slot.steady()))
        });
        ports.into_iter().next()
    }

    /// The same of all of them; those that were made to be empty come first.
    pub(in crate::machine) fn empty_ports(
        &self,
        taken: &[FunctionId],
    ) -> impl Iterator<Item = (FunctionId, RootSlot)> {
        let empty = |(port, _): &&(FunctionId, RootSlot)| {
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
    pub(in crate::machine) fn no_slot(&self, place: PciPlace) -> String {
        let names: Vec<_> = self
            .assigned()
            .into_iter()
            .map(|device| device.host)
            .collect();
        let (whose, key) = match place.segment {
            0 => (String::new(), "hotplug_slots"),
            segment => (
                format!(" in PCI segment {segment}"),
                "segment_hotplug_slots",
            ),
        };
        if let Some(device) = place.device {
            return format!(
                "no empty slot is behind a root port with pci_device_id={device}{whose}: leave pci_device_id out, or remove \
                 what is there"
            );
        }
        let here = |(_, slot): &&(FunctionId, RootSlot)| slot.segment == place.segment();
        match self.ports.iter().filter(here).count() {
            0 => format!(
                "the VM has no slot{whose} for devices that are added: start it with --platform {key}=N"
            ),
            count => format!(
                "each of the VM's {count} slots{whose} is taken or about to be (it has {}): remove a device, or \
                 start the VM with more (--platform {key}=N)",
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
    pub(in crate::machine) fn plug(
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

    /// What the report says of the host's functions, in the order in which they were added. Waits for none of them, so
    /// that it can be asked while one is being reset.
    pub(in crate::machine) fn assigned(&self) -> Vec<AssignedDevice> {
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
    pub(in crate::machine) fn host_functions(&self) -> Vec<Arc<dyn PciFunction>> {
        let functions = self.assigned.iter();
        functions
            .filter_map(|(_, function)| function.upgrade())
            .map(|function| function as Arc<dyn PciFunction>)
            .collect()
    }
}

/// The global system interrupts that INTA to INTD of a device lead to that sits in `slot` of bus 0, or behind the root
/// port in it: a link has device 0 only, so the port passes its pins on as they are.
pub(in crate::machine) fn pins_of(slot: Device) -> [u32; 4] {
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
