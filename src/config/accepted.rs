//! What clients of Cloud Hypervisor's API say of a VM that Busway keeps and shows, and that changes nothing in the guest
//! yet.

use serde::{Deserialize, Serialize};

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// vCPUs that there could be.
    pub max_vcpus: Option<u8>,
    /// How they are to be grouped.
    pub topology: Option<Topology>,
    /// Bits of a physical address.
    pub max_phys_bits: Option<u8>,
    /// Bytes of RAM that could come.
    pub hotplug_size: Option<u64>,
    /// How they would.
    pub hotplug_method: Option<HotplugMethod>,
    /// PCI segments.
    pub num_pci_segments: Option<u16>,
}

/// How processors are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Of a core.
    pub threads_per_core: u16,
    /// Of a die.
    pub cores_per_die: u16,
    /// Of a package.
    pub dies_per_package: u16,
    /// Of the machine.
    pub packages: u16,
}

impl Topology {
    /// How many that are; none where the number is past all bounds.
    #[must_use]
    pub fn processors(self) -> Option<u32> {
        let factors = [self.cores_per_die, self.dies_per_package, self.packages];
        let threads = u32::from(self.threads_per_core);
        factors
            .into_iter()
            .try_fold(threads, |count, factor| count.checked_mul(factor.into()))
    }
}

/// By what RAM is added to a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// ACPI's memory devices.
    Acpi,
    /// virtio-mem.
    VirtioMem,
}
