//! The virtio entropy source. Virtio 1.3 §5.4.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, DeviceConfig, VirtioDevice, Worker, doorbell_events};
use super::queue::{QueueError, Virtqueue};
use super::spec;
use crate::config::RngConfig;
use crate::memory::{GuestRam, RamMap};

const QUEUE_SIZE: u16 = 64;
/// Most bytes of one request. A driver that wants more asks again.
const MAX_REQUEST: usize = 4096;

/// The source of entropy cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// cannot open {path} as the source of random numbers: {source}
    #[error("cannot open {path} as the source of random numbers: {source}")]
    Open {
        /// The source.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// {path} is no source of random numbers: give a character device such as /dev/urandom, a pipe or a file
    #[error(
        "{path} is no source of random numbers: give a character device such as /dev/urandom, a pipe or a file"
    )]
    Kind {
        /// The path.
        path: PathBuf,
    },
}

/// A virtio entropy source.
#[derive(Debug)]
pub struct Rng {
    name: String,
    source: Arc<File>,
    config: Arc<DeviceConfig>,
}

impl Rng {
    /// Opens the source.
    ///
    /// # Errors
    /// [`RngError`]
    pub fn new(name: &str, config: &RngConfig) -> Result<Self, RngError> {
        let open = || -> io::Result<(File, std::fs::FileType)> {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&config.src)?;
            let kind = file.metadata()?.file_type();
            Ok((file, kind))
        };
        let (file, kind) = open().map_err(|source| RngError::Open {
            path: config.src.clone(),
            source,
        })?;
        if kind.is_dir() || kind.is_block_device() {
            return Err(RngError::Kind {
                path: config.src.clone(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            source: Arc::new(file),
            config: DeviceConfig::new(Vec::new()),
        })
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::ENTROPY
    }

    fn class(&self) -> u32 {
        0x10_80_00 // encryption controller, other
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<Vec<Box<dyn Worker>>> {
        let Some(queue) = activation.take_queue(0) else {
            return Ok(Vec::new());
        };
        Ok(vec![Box::new(RngWorker {
            name: self.name.clone(),
            ram: activation.ram,
            queue,
            source: Arc::clone(&self.source),
            failed: false,
        })])
    }
}

/// What came of a try to fill a request.
enum Filled {
    One,
    NoRequest,
    NoEntropy,
}

#[derive(Debug)]
struct RngWorker {
    name: String,
    ram: GuestRam,
    queue: Virtqueue,
    source: Arc<File>,
    failed: bool,
}

impl RngWorker {
    /// Fills one request.
    fn fill(&mut self, memory: &RamMap) -> Result<Filled, QueueError> {
        let Some(mut chain) = self.queue.pop(memory)? else {
            return Ok(Filled::NoRequest);
        };
        let room = chain.writable.take_front(MAX_REQUEST);
        let written = match room.receive(self.source.as_fd()) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.queue.undo_pop();
                return Ok(Filled::NoEntropy);
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    log::error!("{}: reading random numbers: {error}", self.name);
                }
                0
            }
        };
        self.queue.complete(memory, chain.head(), written)?;
        self.queue.interrupt(memory)?;
        Ok(Filled::One)
    }
}

impl Worker for RngWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![
            (self.queue.doorbell(), doorbell_events()),
            (self.source.as_raw_fd(), doorbell_events()),
        ]
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let ram = self.ram.clone();
        let memory = ram.memory();
        for _ in 0..self.queue.size() {
            match self.fill(&memory)? {
                Filled::One => {}
                // The source's next bytes wake us.
                Filled::NoEntropy => return Ok(()),
                Filled::NoRequest => {
                    if !self.queue.enable_notification(&memory)? {
                        return Ok(());
                    }
                }
            }
        }
        self.queue.wake_again();
        Ok(())
    }
}
