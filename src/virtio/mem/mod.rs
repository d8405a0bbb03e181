//! The virtio memory device: RAM that comes and goes by blocks while the guest runs. Virtio 1.3 §5.15.
//!
//! Somebody else says how much the guest is to have ([`MemTarget`]); its driver plugs and unplugs blocks until it has
//! that, as far as it can. What a plug and an unplug are to devices and to the host is [`Pluggable`]'s. All of the region
//! can be used from the start on, so that a driver finds room for blocks beside those that it cannot release.
//!
//! A driver that resets the device keeps its blocks, as the specification has it; a guest that starts anew has none, and
//! is to have as much as before.

mod worker;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use self::worker::MemWorker;
use super::activation::Activation;
use super::config_space::{ConfigSpace, Fields};
use super::counts::Counts;
use super::device::VirtioDevice;
use super::error::StartError;
use super::life::{DeviceState, Running};
use super::spec::{self, mem};
use super::worker::Worker;
use crate::memory::{PlugError, Pluggable};

const QUEUE_SIZE: u16 = 128;

/// A virtio memory device.
#[derive(Debug)]
pub struct Mem {
    name: String,
    target: MemTarget,
}

/// How much RAM a guest is to have plugged, for whoever decides that.
#[derive(Clone, Debug)]
pub struct MemTarget(Arc<Shared>);

/// What the device, its worker and whoever decides share.
#[derive(Debug)]
struct Shared {
    /// The configuration, `struct virtio_mem_config`.
    fields: Arc<Fields>,
    pluggable: Pluggable,
    /// Bytes that the guest is to have plugged.
    requested: AtomicU64,
}

/// The guest cannot have so much plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemTargetError {
    /// {asked} bytes are no whole number of blocks of {block} bytes
    #[error(
        "{asked} bytes beside the RAM that it started with are no whole number of blocks of {block} bytes"
    )]
    Uneven {
        /// What was asked for.
        asked: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// {asked} bytes are more than can be plugged, which is {most}
    #[error(
        "{asked} bytes beside the RAM that it started with are more than the {most} that can come (hotplug_size=)"
    )]
    TooLarge {
        /// What was asked for.
        asked: u64,
        /// Bytes of the region.
        most: u64,
    },
}

/// What a memory device has plugged, and is to have, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemTotals {
    /// What the guest is to have.
    pub requested: u64,
    /// What it has.
    pub plugged: u64,
    /// What it can have.
    pub region: u64,
    /// Bytes of a block.
    pub block: u64,
}

impl MemTarget {
    /// Wants `bytes` bytes to be plugged. The guest's driver hears of it, and does what it can.
    ///
    /// # Errors
    /// [`MemTargetError`]
    pub fn set(&self, bytes: u64) -> Result<(), MemTargetError> {
        let shared = &*self.0;
        let (block, most) = (shared.pluggable.block_size(), shared.pluggable.size());
        if bytes > most {
            return Err(MemTargetError::TooLarge { asked: bytes, most });
        }
        if !bytes.is_multiple_of(block) {
            return Err(MemTargetError::Uneven {
                asked: bytes,
                block,
            });
        }
        shared.requested.store(bytes, Relaxed);
        let field = mem::CONFIG_REQUESTED_SIZE;
        shared.fields.set(field, &bytes.to_le_bytes());
        Ok(())
    }

    /// What there is.
    #[must_use]
    pub fn totals(&self) -> MemTotals {
        let pluggable = &self.0.pluggable;
        MemTotals {
            requested: self.0.requested.load(Relaxed),
            plugged: pluggable.plugged(),
            region: pluggable.size(),
            block: pluggable.block_size(),
        }
    }

    /// The guest starts anew: it has nothing plugged, and is to have as much as before. Its driver does not run.
    ///
    /// # Errors
    /// [`PlugError`]; the next driver finds blocks plugged, and unplugs them itself.
    pub fn on_restart(&self) -> Result<(), PlugError> {
        let unplugged = self.0.pluggable.unplug_all(|| true);
        self.0.show();
        unplugged
    }
}

impl Shared {
    /// The configuration says how much is plugged, which no driver hears of.
    fn show(&self) {
        let plugged = self.pluggable.plugged().to_le_bytes();
        self.fields.set_untold(mem::CONFIG_PLUGGED_SIZE, &plugged);
    }
}

impl Mem {
    /// A device for blocks of `pluggable`, of which the guest is to have `requested` bytes at first. They are of the
    /// guest's NUMA node `node`, as ACPI's table of affinities has it; of node 0 where the guest has no nodes.
    ///
    /// # Errors
    /// [`MemTargetError`]
    pub fn new(
        name: &str,
        pluggable: Pluggable,
        requested: u64,
        node: u16,
    ) -> Result<Self, MemTargetError> {
        let fields = Fields::new(vec![0; mem::CONFIG_SIZE]);
        fields.set(mem::CONFIG_NODE_ID, &node.to_le_bytes());
        for (offset, value) in [
            (mem::CONFIG_BLOCK_SIZE, pluggable.block_size()),
            (mem::CONFIG_ADDR, pluggable.start()),
            (mem::CONFIG_REGION_SIZE, pluggable.size()),
            (mem::CONFIG_USABLE_REGION_SIZE, pluggable.size()),
        ] {
            fields.set(offset, &value.to_le_bytes());
        }
        let target = MemTarget(Arc::new(Shared {
            fields,
            pluggable,
            requested: AtomicU64::new(0),
        }));
        target.set(requested)?;
        Ok(Self {
            name: name.to_owned(),
            target,
        })
    }

    /// The way to change how much the guest is to have.
    #[must_use]
    pub fn target(&self) -> MemTarget {
        self.target.clone()
    }
}

impl VirtioDevice for Mem {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::MEM
    }

    fn class(&self) -> u32 {
        0xff_00_00 // no class of PCI's
    }

    /// The configuration says of which node the memory is; a driver that does not know that feature takes the node
    /// that ACPI's table of affinities has at its addresses.
    ///
    /// Devices reach nothing that is not plugged. A driver that does not know the feature (Linux before 5.16) may read
    /// such memory, which the processors can.
    fn features(&self) -> u64 {
        mem::F_ACPI_PXM | mem::F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.target.0.fields) as _
    }

    fn counts(&self) -> Counts {
        Counts::of_mem(self.target.clone())
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let queue = activation.take_queue(mem::GUEST_REQUESTQ)?;
        let worker = MemWorker::new(&self.name, activation.ram(), queue, &self.target.0);
        let workers: Vec<Box<dyn Worker>> = vec![Box::new(worker)];
        activation.run(workers, DeviceState::None)
    }
}
