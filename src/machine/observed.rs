//! What is seen of a machine that runs: what its vCPUs and devices have done so far.

use std::time::Duration;

use busway_pci::Seen;
use serde::Serialize;

use crate::kvm::VcpuSeen;
use crate::virtio::{DriverState, ServedBy, Totals};

/// What a machine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum State {
    /// It is known what it is to be; or it is being put together: memory is taken, devices are opened.
    #[default]
    Created,
    /// The guest runs.
    Running,
    /// It was paused, and goes on when it is asked to.
    Paused,
    /// It is paused, or about to be, after an error of a device (`on_error=pause`); it goes on when it is asked to.
    Held,
    /// It has ended, and what it had is being given back.
    Shutdown,
}

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
    pub(super) fn of(state: State, memory: u64) -> Self {
        Self {
            state,
            memory,
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
    /// What kind of device it is: `assigned`, `disk`, `net`, `fs`, `vsock`, `console`, `balloon`, `memory`
    /// or `rng`.
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
    /// Each of them.
    pub const ALL: [Self; 5] = [
        Self::Present,
        Self::Coming,
        Self::Going,
        Self::Held,
        Self::Off,
    ];

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
    /// Who serves its queues.
    pub served_by: ServedBy,
    /// How often Busway has interrupted the guest for it.
    pub interrupts: u64,
    /// What its queues have counted.
    pub totals: Totals,
}
