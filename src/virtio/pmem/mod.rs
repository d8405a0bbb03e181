//! The virtio persistent memory device: a file that is memory of the guest's, and a queue on which the guest asks that
//! what it has written be on the host's storage. Virtio 1.3 §5.19
//!
//! The file is mapped by `memory::Slots`. A [`worker`] takes requests, and a [`flusher`] writes back, on a thread that
//! nobody waits for: a file system that is frozen keeps neither a pause nor a reset.

mod flusher;
mod open;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use busway_vfio::EventFd;
use zerocopy::little_endian::U64;
use zerocopy::{Immutable, IntoBytes};

use super::activation::Activation;
use super::config_space::{ConfigSpace, Fields};
use super::device::VirtioDevice;
use super::error::StartError;
use super::life::{DeviceState, Running};
use super::spec;
use super::worker::Worker;
use crate::config::{InvalidVirtio, PMEM_ALIGNMENT, PmemConfig};
use crate::memory::{FileMemory, FileMemoryError, Slots};
use flusher::Flusher;
use open::open;
use worker::PmemWorker;

const QUEUE_SIZE: u16 = 64;

/// Persistent memory cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("pmem {name}: {source}")]
pub struct PmemError {
    /// The device.
    pub name: String,
    /// Why.
    pub source: PmemFault,
}

/// Why persistent memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PmemFault {
    /// It cannot be as configured.
    #[error(transparent)]
    Config(#[from] InvalidVirtio),
    /// cannot open {path}: {source}{hint}
    #[error("cannot open {path}: {source}{hint}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What helps.
        hint: &'static str,
    },
    /// {path} is neither a file nor a block device nor a folder
    #[error("{path} is neither a file nor a block device, nor a folder for a file without a name")]
    Kind {
        /// What was named.
        path: PathBuf,
    },
    /// {path} is in use by {holder}
    #[error(
        "{path} is in use by {holder}: two VMs that write one file would destroy what is in it; discard_writes=on only \
         reads it, where nobody writes"
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// {path} is a folder, and nothing says how large the file in it is to be
    #[error(
        "{path} is a folder, and nothing says how large the file in it is to be: say size=SIZE"
    )]
    NoSize {
        /// The folder.
        path: PathBuf,
    },
    /// {path} has {size} bytes, which is no multiple of 2 MiB
    #[error(
        "{path} has {size} bytes, which is no multiple of 2 MiB, or nothing: make it longer by `truncate`, or say \
         size=SIZE"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// {path} has {have} bytes, and size={asked} asks for more
    #[error(
        "{path} has {have} bytes, and size={asked} asks for more: make it longer by `truncate -s {asked}`, or ask for \
         less"
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        have: u64,
        /// What was asked for.
        asked: u64,
    },
    /// there is no thread that has {path} written back: {source}
    #[error("there is no thread that has {path} written back: {source}")]
    Flusher {
        /// The file.
        path: PathBuf,
        /// Why there is none.
        source: io::Error,
    },
    /// {path}: {source}
    #[error("{path}: {source}")]
    Plug {
        /// The file.
        path: PathBuf,
        /// Why it is no memory of the guest's.
        source: FileMemoryError,
    },
}

/// `struct virtio_pmem_config`. Virtio 1.3 §5.19.4
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct PmemFields {
    start: U64,
    size: U64,
}

/// Persistent memory.
#[derive(Debug)]
pub struct Pmem {
    name: String,
    config: Arc<Fields>,
    /// Writes back what the guest writes; `None` where that ends with the VM.
    flusher: Option<Arc<Flusher>>,
    _memory: FileMemory,
}

impl Pmem {
    /// Opens and locks the file, and makes it memory of the guest's.
    ///
    /// # Errors
    /// [`PmemError`]
    pub fn new(name: &str, config: &PmemConfig, slots: &Slots) -> Result<Self, PmemError> {
        let failed = |source| PmemError {
            name: name.to_owned(),
            source,
        };
        config.check().map_err(PmemFault::from).map_err(failed)?;
        let (file, size) = open(config).map_err(failed)?;
        let called = format!("persistent memory {name}");
        let memory = slots.plug(&called, &file, size, PMEM_ALIGNMENT, config.discard_writes);
        let memory = memory.map_err(|source| {
            let path = config.file.clone();
            failed(PmemFault::Plug { path, source })
        })?;
        let no_thread = |source| {
            let path = config.file.clone();
            failed(PmemFault::Flusher { path, source })
        };
        let flusher = match config.discard_writes {
            true => None,
            false => {
                let done = EventFd::new().map_err(no_thread)?;
                let flush = move || file.sync_data();
                Some(Flusher::start(name, done, flush).map_err(no_thread)?)
            }
        };
        let fields = PmemFields {
            start: memory.start().into(),
            size: size.into(),
        };
        Ok(Self {
            name: name.to_owned(),
            config: Fields::new(fields.as_bytes().to_vec()),
            flusher,
            _memory: memory,
        })
    }
}

impl VirtioDevice for Pmem {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::PMEM
    }

    fn class(&self) -> u32 {
        0x05_80_00 // memory controller, other
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        if let Some(queue) = activation.take_queue(0)? {
            let ram = activation.ram().clone();
            let flusher = self.flusher.clone();
            workers.push(Box::new(PmemWorker::new(&self.name, ram, queue, flusher)));
        }
        activation.run(workers, DeviceState::None)
    }
}
