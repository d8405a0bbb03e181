//! Devices that another process serves, by the vhost-user protocol: shared folders by virtiofsd, and disks by
//! qemu-storage-daemon and the like. QEMU, docs/interop/vhost-user.rst
//!
//! A back end maps the guest's RAM and serves the device's rings; notifications and interrupts pass between it and the
//! guest without this process. What it says is another program's word: every wait for it has an end, nothing of it is
//! an index or a size here, and a device whose back end lies or dies stalls or needs a reset, and harms no other.
//!
//! [`Connection`](connection::Connection) speaks with it, a [`guard`] cuts a connection whose back end does not
//! answer, and the thread of a [`link`] does all that has to do with it: neither a vCPU nor the event loop waits.

mod channel;
mod connection;
mod guard;
mod kind;
mod link;
mod run;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use busway_vfio::EventFd;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::activation::Activation;
use super::config_space::{ConfigSpace, Fields};
use super::counts::ServedBy;
use super::device::VirtioDevice;
use super::error::StartError;
use super::life::{DeviceState, Progress, Running};
use super::spec::feature;
use super::vhost::MemoryTable;
use crate::config::{DiskConfig, FsConfig, InvalidVirtio};
use crate::memory::GuestRam;
pub use connection::BackEndError;
use connection::{Connection, Needs, PRIVATE_MEMORY};
use kind::Kind;
use link::{Link, Purpose, Shared};
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
    config: Arc<Fields>,
    /// What the back end offered when the device was made.
    offered: u64,
    link: Link,
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
        let socket = config.socket.clone();
        Self::open(
            name,
            device,
            Kind::fs(config),
            socket,
            PATIENCE,
            ram,
            memory,
        )
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
        Self::open(
            name,
            device,
            Kind::disk(config),
            socket,
            PATIENCE,
            ram,
            memory,
        )
    }

    fn open(
        name: &str,
        device: String,
        kind: Kind,
        socket: PathBuf,
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
            socket: socket.clone(),
            source,
        };
        let wake = EventFd::new().map_err(no_descriptor).map_err(failed)?;
        let needs = Needs {
            queues: kind.queue_sizes.len(),
            config: kind.contents.size(),
        };
        let connection = Connection::open(&socket, needs, patience, &wake, drop).map_err(failed)?;
        let (config, back_ends) = kind.contents.make(&connection).map_err(|source| {
            failed(BackEndError::Step {
                socket: socket.clone(),
                source,
            })
        })?;
        let purpose = Purpose {
            name: name.to_owned(),
            described: device.clone(),
            thread: super::worker::thread_name(kind.word, name),
            socket: socket.clone(),
            needs,
            queue_size: kind.queue_sizes.iter().copied().max().unwrap_or(0),
            loss: kind.loss,
            config: back_ends,
            memory: Arc::clone(memory),
        };
        let offered = connection.features();
        let link = Link::start(purpose, connection, wake).map_err(no_descriptor);
        Ok(Self {
            name: name.to_owned(),
            config,
            offered,
            link: link.map_err(failed)?,
            kind,
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
        self.offered & self.kind.features
    }

    fn ring_features(&self) -> u64 {
        self.offered & (feature::EVENT_IDX | feature::INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.kind.queue_sizes.clone()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn served_by(&self) -> ServedBy {
        ServedBy::BackEnd
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
        let count = u16::try_from(self.kind.queue_sizes.len()).unwrap_or(u16::MAX);
        let run = Run::of(&mut activation, count);
        let shared = Arc::clone(self.link.shared());
        shared.serve(run);
        Ok(Box::new(Served {
            shared: Some(shared),
            progress: activation.into_progress(),
        }))
    }
}

/// A device whose queues its back end has, or will have.
#[derive(Debug)]
struct Served {
    shared: Option<Arc<Shared>>,
    progress: Progress,
}

impl Running for Served {
    fn stop(mut self: Box<Self>) -> Progress {
        let positions = self.shared.take().map(|shared| shared.stop());
        for (index, position) in positions.into_iter().flatten() {
            self.progress.set_queue(index, position);
        }
        std::mem::take(&mut self.progress)
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
