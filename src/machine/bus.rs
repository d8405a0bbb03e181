//! How PCI is in the guest's address map: configuration space, and BARs that need an exit.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use busway_pci::{Access, BarIndex, Ecam, PciFunction, Segment, Topology};

use crate::arch::q35::EcamListener;
use crate::kvm::{AddressMap, BusDevice, Buses};

/// ECAM as the address map sees it.
pub(super) struct EcamWindow(pub(super) Ecam);

impl BusDevice for EcamWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// Configuration space in memory, where firmware puts it.
pub(super) struct EcamPlace {
    mmio: Arc<AddressMap>,
    topology: Weak<Topology>,
    at: Mutex<Option<u64>>,
}

impl EcamPlace {
    pub(super) fn new(buses: &Buses, topology: &Arc<Topology>) -> Self {
        Self {
            mmio: buses.mmio.clone(),
            topology: Arc::downgrade(topology),
            at: Mutex::default(),
        }
    }
}

impl EcamListener for EcamPlace {
    fn ecam_moved(&self, place: Option<Range<u64>>) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(start) = at.take() {
            self.mmio.remove(start);
        }
        let (Some(place), Some(topology)) = (place, self.topology.upgrade()) else {
            return;
        };
        let window = Arc::new(EcamWindow(Ecam::new(topology, Segment(0))));
        let size = place.end - place.start;
        match self
            .mmio
            .insert("PCI configuration space", place.start, size, window)
        {
            Ok(()) => *at = Some(place.start),
            Err(error) => log::debug!("firmware's place for configuration space: {error}"),
        }
    }
}

/// A BAR.
pub(super) struct Bar {
    pub(super) function: Arc<dyn PciFunction>,
    pub(super) index: BarIndex,
}

impl Bar {
    fn count(&self, access: Access) {
        if let Some(activity) = self.function.activity() {
            activity.count(access);
        }
    }
}

impl BusDevice for Bar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.count(Access::BarRead);
        self.function.bar_read(self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.count(Access::BarWrite);
        self.function.bar_write(self.index, offset, data);
    }
}
