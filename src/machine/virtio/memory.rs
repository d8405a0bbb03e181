//! The devices by which RAM comes and goes: one for all of it, or one for each zone to which some can come.

use super::VirtioDevices;
use crate::machine::RunError;
use crate::machine::pci::Pci;
use crate::memory::Pluggable;
use crate::virtio::mem::{Mem, MemTarget};

/// How their names begin.
pub(super) const MEMORY: &str = "memory";

/// RAM that comes and goes by a device.
#[derive(Debug)]
pub(in crate::machine) struct ComingMemory {
    /// The name of the zone that it is of; none where it is of all RAM.
    pub(in crate::machine) zone: Option<String>,
    /// How much of it the guest is to have plugged.
    pub(in crate::machine) target: MemTarget,
}

impl VirtioDevices {
    /// Adds the device by which blocks of `pluggable` come and go, of the zone of this name or of all RAM. The guest is to have
    /// `requested` bytes of it at first; they are of its NUMA node `node`.
    ///
    /// # Errors
    /// [`RunError`]
    pub(in crate::machine) fn add_memory(
        &mut self,
        zone: Option<String>,
        pluggable: Pluggable,
        requested: u64,
        node: u16,
        pci: &mut Pci,
    ) -> Result<(), RunError> {
        let name = match &zone {
            Some(zone) => format!("{MEMORY}-{zone}"),
            None => MEMORY.to_owned(),
        };
        let device = Mem::new(&name, pluggable, requested, node)?;
        let target = device.target();
        self.memory.push(ComingMemory { zone, target });
        self.add_fixed(Box::new(device), pci)
    }

    /// RAM that comes and goes by devices; nothing where none does.
    pub(in crate::machine) fn memory(&self) -> &[ComingMemory] {
        &self.memory
    }
}
