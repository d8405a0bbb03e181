//! Devices that another process serves, by the vhost-user protocol: shared folders by virtiofsd, disks by
//! qemu-storage-daemon and the like, NICs by passt, DPDK or Open vSwitch, and devices of any kind. QEMU, docs/interop/vhost-user.rst
//!
//! A back end maps the guest's RAM and serves the device's rings; notifications and interrupts pass between it and the
//! guest without this process. What it says is another program's word: every wait for it has an end, nothing of it is
//! an index or a size here, and a device whose back end lies or dies stalls or needs a reset, and harms no other.
//!
//! [`Connection`](connection::Connection) speaks with it, a [`guard`] cuts a connection whose back end does not
//! answer, and the thread of a [`link`] does all that has to do with it: neither a vCPU nor the event loop waits.

mod channel;
mod connection;
mod generic;
mod guard;
mod kind;
mod link;
mod meeting;
mod net;
mod number;
mod run;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use busway_vfio::EventFd;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::activation::Activation;
use super::config_space::ConfigSpace;
use super::counts::ServedBy;
use super::device::VirtioDevice;
use super::error::StartError;
use super::life::{DeviceState, NetState, Progress, Running};
use super::net::{have_what_they_stand_on, random_mac};
use super::spec::feature;
use super::vhost::MemoryTable;
use crate::config::{DiskConfig, FsConfig, GenericConfig, InvalidVirtio, NetConfig, VhostMode};
use crate::memory::GuestRam;
pub use connection::BackEndError;
use connection::{Connection, PRIVATE_MEMORY};
use kind::Kind;
use link::{Link, Purpose, Shared};
use meeting::Meeting;
use net::ControlWorker;
use run::Run;

/// How long a back end that was started together with the VM has until it listens.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device cannot be as configured, or its back end does not serve it.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// {device}: {source}
    #[error("{device}: {source}")]
    Config {
        /// The device.
        device: String,
        /// What is wrong, and what would be right.
        source: InvalidVirtio,
    },
    /// {device}: {source}
    #[error("{device}: {source}")]
    BackEnd {
        /// The device.
        device: String,
        /// What became of its back end.
        source: BackEndError,
    },
    /// {device}: no random MAC address: {source}; give one with mac=
    #[error("{device}: no random MAC address: {source}; give one with mac=")]
    Mac {
        /// The device.
        device: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Why a device of another process's cannot be added to a VM with this RAM; `None` where it can.
#[must_use]
pub fn private_memory(ram: &GuestRam) -> Option<&'static str> {
    let memory = ram.memory();
    let shared = memory.iter().all(|region| region.file_offset().is_some());
    (!shared).then_some(PRIVATE_MEMORY)
}

/// A device that another process serves.
#[derive(Debug)]
pub struct VhostUser {
    name: String,
    kind: Kind,
    config: Arc<dyn ConfigSpace>,
    /// What the back end offered when the device was made.
    offered: u64,
    link: Link,
    /// A socket that was made goes with the device, after its thread.
    _meeting: Arc<Meeting>,
}

impl VhostUser {
    /// A shared folder, called `name` in this VM. Waits up to five seconds for its back end.
    ///
    /// # Errors
    /// [`VhostUserError`]
    pub fn fs(
        name: &str,
        config: &FsConfig,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, VhostUserError> {
        let device = format!("fs {name}");
        config.check().map_err(|source| VhostUserError::Config {
            device: device.clone(),
            source,
        })?;
        let at = (&*config.socket, VhostMode::Client);
        let kind = Kind::fs(config);
        Self::open(name, device, kind, at, PATIENCE, ram, memory)
    }

    /// A disk, called `name` in this VM. Waits up to five seconds for its back end.
    ///
    /// # Errors
    /// [`VhostUserError`]
    pub fn disk(
        name: &str,
        config: &DiskConfig,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, VhostUserError> {
        let device = format!("disk {name}");
        config.check().map_err(|source| VhostUserError::Config {
            device: device.clone(),
            source,
        })?;
        let socket = config.socket.clone().unwrap_or_default();
        let at = (&*socket, VhostMode::Client);
        let kind = Kind::disk(config);
        Self::open(name, device, kind, at, PATIENCE, ram, memory)
    }

    /// A NIC, called `name` in this VM. Waits up to five seconds for its back end.
    ///
    /// # Errors
    /// [`VhostUserError`]
    pub fn net(
        name: &str,
        config: &NetConfig,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, VhostUserError> {
        let device = format!("net {name}");
        config.check().map_err(|source| VhostUserError::Config {
            device: device.clone(),
            source,
        })?;
        let mac = match config.mac {
            Some(mac) => mac,
            None => random_mac().map_err(|source| VhostUserError::Mac {
                device: device.clone(),
                source,
            })?,
        };
        let socket = config.socket.clone().unwrap_or_default();
        let at = (&*socket, config.vhost_mode);
        let kind = Kind::net(config, mac);
        Self::open(name, device, kind, at, PATIENCE, ram, memory)
    }

    /// A device of any kind, called `name` in this VM. Waits up to five seconds for its back end.
    ///
    /// # Errors
    /// [`VhostUserError`]
    pub fn generic(
        name: &str,
        config: &GenericConfig,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, VhostUserError> {
        let device = format!("vhost-user {name}");
        config.check().map_err(|source| VhostUserError::Config {
            device: device.clone(),
            source,
        })?;
        let at = (&*config.socket, VhostMode::Client);
        let kind = generic::kind(config);
        Self::open(name, device, kind, at, PATIENCE, ram, memory)
    }

    fn open(
        name: &str,
        device: String,
        kind: Kind,
        (socket, mode): (&Path, VhostMode),
        patience: Duration,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, VhostUserError> {
        let failed = |source| VhostUserError::BackEnd {
            device: device.clone(),
            source,
        };
        if private_memory(ram).is_some() {
            return Err(failed(BackEndError::PrivateMemory));
        }
        let no_descriptor = |source| BackEndError::Connect {
            socket: socket.to_owned(),
            source,
        };
        let wake = EventFd::new().map_err(no_descriptor).map_err(failed)?;
        let needs = kind.needs();
        let meeting =
            Meeting::at(socket, mode).map_err(|error| failed(BackEndError::Listen(error)))?;
        let meeting = Arc::new(meeting);
        let connection =
            Connection::open(&meeting, needs, patience, &wake, drop).map_err(failed)?;
        let made = kind.contents.make(&connection, &wake).map_err(|source| {
            failed(BackEndError::Step {
                socket: socket.to_owned(),
                source,
            })
        })?;
        let purpose = Purpose {
            name: name.to_owned(),
            described: device.clone(),
            thread: format!("vu-{name}"),
            meeting: Arc::clone(&meeting),
            needs,
            queue_size: kind.queue_sizes.iter().copied().max().unwrap_or(0),
            loss: kind.loss,
            config: made.back_ends,
            carrier: made.own.filter(|_| kind.net.is_some()),
            memory: Arc::clone(memory),
        };
        let offered = connection.features();
        let link = Link::start(purpose, connection, wake).map_err(no_descriptor);
        Ok(Self {
            name: name.to_owned(),
            config: made.space,
            offered,
            link: link.map_err(failed)?,
            kind,
            _meeting: meeting,
        })
    }
}

impl VirtioDevice for VhostUser {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        self.kind.device_type
    }

    fn class(&self) -> u32 {
        self.kind.class
    }

    fn features(&self) -> u64 {
        self.kind.offers(self.offered)
    }

    fn ring_features(&self) -> u64 {
        self.offered & (feature::EVENT_IDX | feature::INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.kind.all_queue_sizes()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn served_by(&self) -> ServedBy {
        ServedBy::BackEnd
    }

    fn accepts(&self, features: u64) -> bool {
        self.kind.net.is_none() || have_what_they_stand_on(features)
    }

    fn takes(&self, features: u64, state: &DeviceState) -> bool {
        match (self.kind.net, state) {
            (_, DeviceState::None) => true,
            (Some(_), DeviceState::Net(state)) => {
                let pairs = self.kind.queues_known(features) / 2;
                state.fits(features, pairs) && state.waiting.is_empty()
            }
            _ => false,
        }
    }

    fn set_state(&mut self, state: &DeviceState) {
        if *state == DeviceState::None {
            self.link.shared().reset();
        }
    }

    fn outstanding(&self) -> Option<String> {
        self.link.shared().outstanding()
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let features = activation.features();
        let count = self.kind.queues_known(features);
        let run = Run::of(&mut activation, count, self.kind.own);
        let shared = Arc::clone(self.link.shared());
        let (state, active) = match (self.kind.net, activation.state()) {
            (None, state) => (state.clone(), u16::MAX),
            (Some(_), DeviceState::Net(state)) => {
                let active = state.pairs.saturating_mul(2);
                (DeviceState::Net(state.clone()), active)
            }
            (Some(_), _) => (DeviceState::Net(NetState::at_reset(features)), 2),
        };
        let control = ControlWorker::of(&self.name, &shared, count, &state, &mut activation)?;
        shared.serve(run, active);
        let mut served = Served {
            shared: Some(shared),
            rest: None,
        };
        let workers = control.into_iter().map(|worker| Box::new(worker) as _);
        served.rest = Some(activation.run(workers.collect(), state)?);
        Ok(Box::new(served))
    }
}

/// A device whose queues its back end has, or will have.
#[derive(Debug)]
struct Served {
    shared: Option<Arc<Shared>>,
    /// What this process does for it.
    rest: Option<Box<dyn Running>>,
}

impl Running for Served {
    fn stop(mut self: Box<Self>) -> Progress {
        let positions = self.shared.take().map(|shared| shared.stop());
        let rest = self.rest.take();
        let mut progress = rest.map(|rest| rest.stop()).unwrap_or_default();
        for (index, position) in positions.into_iter().flatten() {
            progress.set_queue(index, position);
        }
        progress
    }

    fn reset(mut self: Box<Self>) {
        if let Some(shared) = self.shared.take() {
            shared.reset();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.stop();
        }
    }
}
