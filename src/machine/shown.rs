//! What a machine that runs tells of itself. It is gathered on the event loop, which waits for nothing in it: no
//! function's lock is taken, and no worker's.

use std::collections::BTreeMap;

use super::assembly::Machine;
use super::life::Life;
use super::memory_devices::MemoryDevices;
use super::observed::{Observed, State};
use super::requests::Info;
use crate::virtio::balloon::BalloonTarget;

impl Machine {
    /// How it is, and what it is made of.
    pub(super) fn info(&self, life: &Life) -> Info {
        let mut config = self.config();
        config.cpus.core_scheduling = Some(self.vcpus.cores().scheduling());
        Info {
            state: life.state(),
            config,
            memory: self.memory(),
            zones: self.zones(),
            balloon: self.virtio.balloon().map_or(0, BalloonTarget::actual),
            devices: self.pci.assigned(),
            ids: self.passthrough.attached.ids(),
            empty_slots: self.passthrough.empty_slots(&self.pci),
            virtio: self.virtio.info(),
            serial: self.serial_terminal.clone(),
            console: self.console_terminal.clone(),
        }
    }

    /// Bytes of RAM that the guest has, with those that are plugged.
    fn memory(&self) -> u64 {
        let by_virtio = self.virtio.memory().iter();
        let by_virtio = by_virtio.map(|memory| memory.target.totals().plugged);
        let by_acpi = self.memory_devices.iter().map(MemoryDevices::plugged);
        let plugged = by_virtio.chain(by_acpi);
        plugged.fold(self.ram.size(), u64::saturating_add)
    }

    /// Bytes of RAM that the guest has of each zone to which some can come, by the zones' names.
    fn zones(&self) -> BTreeMap<String, u64> {
        let memory = self.virtio.memory().iter();
        let zones = memory.filter_map(|memory| {
            let zone = self.started_as().zone(memory.zone.as_deref()?).ok()?;
            let plugged = memory.target.totals().plugged;
            Some((zone.id.clone(), zone.size.saturating_add(plugged)))
        });
        zones.collect()
    }

    /// What is seen of it now.
    pub(super) fn observed(&self, life: &Life) -> Observed {
        let state = life.state();
        let seats = self.pci.seats();
        let mut devices = self.passthrough.observed(seats, state == State::Held);
        for known in self.pci.assigned() {
            let mut same = devices.iter_mut();
            let same = same.find(|device| device.host.as_ref() == Some(&known.host));
            let doing = same.and_then(|device| device.doing.as_mut());
            if let Some(assigned) = doing.and_then(|doing| doing.assigned.as_mut()) {
                assigned.reset = Some(known.reset);
            }
        }
        devices.extend(self.virtio.observed());
        Observed {
            state,
            uptime: Some(life.uptime()),
            memory: self.memory(),
            vcpus: self.vcpus.seen(),
            devices,
            dma: self.passthrough.dma(),
            vector_updates: self.passthrough.vector_updates(),
        }
    }
}
