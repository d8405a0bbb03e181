//! The host bridge at 00:00.0: an identity, and no behaviour.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bars::Bars;
use crate::config::{ConfigSpace, Identity};
use crate::function::PciFunction;

/// The host bridge as a function on its own bus 0.
///
/// It says that it is QEMU's generic PCIe host bridge, 1b36:0008, because no guest has a quirk for
/// that one. Intel's host bridges bring along expectations of a chip set that is not here.
#[derive(Debug)]
pub struct HostBridge {
    space: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// The host bridge.
    #[must_use]
    pub fn new() -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            ..Identity::default()
        };
        Self {
            space: Mutex::new(ConfigSpace::type0(&identity, Bars::new())),
        }
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.space().write(offset, data);
    }

    fn reset(&self) {
        self.space().reset();
    }
}
