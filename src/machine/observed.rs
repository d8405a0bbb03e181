//! What is seen of a machine that runs: what its vCPUs and devices have done so far.
//!
//! It is gathered on the event loop, which waits for nothing in it: no function's lock is taken, and no worker's.

use std::time::Duration;

use busway_pci::Seen;

use super::assembly::Machine;
use super::life::Life;
use super::requests::{Info, State};
use crate::kvm::VcpuSeen;
use crate::virtio::{DriverState, Totals};

/// What is seen of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// What it is doing.
    pub state: State,
    /// How long ago the guest started, the last time; none where it does not live.
    pub uptime: Option<Duration>,
    /// Bytes of RAM that the guest has; 0 while it has none.
    pub memory: u64,
    /// What each vCPU has done, in the order of their numbers; none where the guest does not live.
    pub vcpus: Vec<VcpuSeen>,
    /// Its devices, assigned ones first.
    pub devices: Vec<DeviceSeen>,
    /// What is mapped for assigned devices; none where there is no DMA space.
    pub dma: Option<DmaSeen>,
    /// How often an interrupt of an assigned device was given another message.
    pub vector_updates: u64,
}

impl Observed {
    /// Of a machine that is not, or that is busy with its start or its end.
    pub(super) fn of(info: &Info) -> Self {
        Self {
            state: info.state,
            memory: info.memory,
            ..Self::default()
        }
    }
}

/// What is mapped in the DMA space of assigned devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaSeen {
    /// Mappings that there are now.
    pub mappings: u64,
    /// Bytes of the guest's memory in them.
    pub bytes: u64,
    /// Calls to the kernel so far that mapped memory.
    pub map_calls: u64,
    /// Calls to the kernel so far that mapped a device's memory for others.
    pub device_map_calls: u64,
}

/// A device of the guest's, or one that is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSeen {
    /// What it is called.
    pub id: String,
    /// What kind of device it is: `assigned`, `disk`, `net`, `console` or `rng`.
    pub kind: &'static str,
    /// Its address on the host, or its UUID, where it is the host's.
    pub host: Option<String>,
    /// Its address in the guest, where it has one.
    pub guest: Option<String>,
    /// Whether the guest has it.
    pub state: DeviceState,
    /// What it does; none while it is on its way.
    pub doing: Option<Doing>,
}

/// Whether a guest has a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceState {
    /// It has it.
    #[default]
    Present,
    /// It is being made or opened.
    Coming,
    /// It is asked of the guest, or is being given back.
    Going,
    /// The guest is paused for an error of it.
    Held,
    /// The guest has switched the power of its slot off.
    Off,
}

impl DeviceState {
    /// Its word in answers and tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Coming => "coming",
            Self::Going => "going",
            Self::Held => "held",
            Self::Off => "off",
        }
    }
}

/// What a device does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doing {
    /// Its accesses that left the guest, and how it interrupts.
    pub function: Seen,
    /// The vectors that the guest can have.
    pub vectors: u16,
    /// What there is of an assigned device alone.
    pub assigned: Option<AssignedDoing>,
    /// What there is of a virtio device alone.
    pub virtio: Option<VirtioDoing>,
}

/// What there is of an assigned device alone. The kernel delivers its interrupts: nobody counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedDoing {
    /// How it is reset, in the report's word.
    pub reset: Option<&'static str>,
    /// Bytes of its BARs that the guest reaches without an exit.
    pub direct_bytes: u64,
    /// Uncorrectable errors that the host has told of.
    pub errors: u64,
}

/// What there is of a virtio device alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioDoing {
    /// How far the guest's driver is.
    pub driver: DriverState,
    /// How often it has interrupted the guest.
    pub interrupts: u64,
    /// What its queues have counted.
    pub totals: Totals,
}

impl Machine {
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
            memory: self.ram.size(),
            vcpus: self.vcpus.seen(),
            devices,
            dma: self.passthrough.dma(),
            vector_updates: self.passthrough.vector_updates(),
        }
    }
}
