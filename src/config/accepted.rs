//! What clients of Cloud Hypervisor's API say of a VM that Busway keeps and shows, and that changes nothing in the guest
//! yet.

use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Bits of a physical address.
    pub max_phys_bits: Option<u8>,
    /// Bytes of RAM that could come.
    pub hotplug_size: Option<u64>,
    /// How they would.
    pub hotplug_method: Option<HotplugMethod>,
    /// PCI segments.
    pub num_pci_segments: Option<u16>,
}

/// By what RAM is added to a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// ACPI's memory devices.
    Acpi,
    /// virtio-mem.
    VirtioMem,
}
