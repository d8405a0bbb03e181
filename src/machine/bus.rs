//! How PCI is in the guest's address map: configuration space, and BARs that need an exit.

use std::sync::Arc;

use busway_pci::{Access, BarIndex, Ecam, PciFunction};

use crate::kvm::BusDevice;

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
