//! Telling a device from another that comes to its address.

use serde::{Deserialize, Serialize};

use super::device::HostDevice;

/// What kind of device one is: as much as sysfs and udev can compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HardwareIds {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) subsystem_vendor: u16,
    pub(super) subsystem_device: u16,
}

impl HardwareIds {
    pub(super) fn of(device: &HostDevice) -> Self {
        Self {
            vendor: device.vendor,
            device: device.device,
            subsystem_vendor: device.subsystem_vendor,
            subsystem_device: device.subsystem_device,
        }
    }
}
