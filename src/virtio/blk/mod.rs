//! The virtio block device: what it tells the guest, and what it is started and stopped with.
//!
//! The host's side of a disk is `image`, the meaning of a request is `request`. A `worker` serves a queue: it
//! turns requests into `flight`s, which go to the host and come back by an `engine`, that is by io_uring
//! (`uring`) or by threads (`pool`). What the host keeps for longer than a stop waits is in `linger`.

mod engine;
mod flight;
#[cfg(test)]
mod gate;
mod hold;
mod image;
mod linger;
pub(crate) mod lock;
mod pool;
#[cfg(test)]
mod qcow2_tests;
mod request;
mod space;
mod state;
mod steps;
mod sys;
#[cfg(test)]
mod tests;
mod uring;
mod worker;
#[cfg(test)]
mod worker_tests;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::activation::Activation;
use super::config_space::ConfigSpace;
use super::counts::Counts;
use super::device::VirtioDevice;
use super::life::{DeviceState, DiskState, Running};
use super::limiter::Limiter;
use super::queue::Virtqueue;
use super::segments::MAX_SEGMENTS;
use super::spec::{self, blk};
use super::worker::Worker;
use crate::config::{DISK_QUEUE_SIZES, DiskConfig, InvalidVirtio, QueueAffinity};
use crate::virtio::error::StartError;
use busway_pci::Complaints;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use engine::{Engine, EngineKind};
pub use image::ImageError;
pub(crate) use image::backing_files;
use image::{Image, ImageMode};
use linger::Lingerers;
use request::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS, Requests};
use space::DiskSpace;
use worker::{BlkWorker, Parts};

/// A request is one descriptor for its header, one for its status, and its data.
const REQUEST_OVERHEAD: u32 = 2;
/// A queue is not larger than the longest chain that is followed.
const _: () = assert!(*DISK_QUEUE_SIZES.end() as usize <= MAX_SEGMENTS);
/// Host errors of one disk that are errors in the log. Where there is one there are many.
const LOGGED_ERRORS: u32 = 8;

/// A disk cannot be as configured, or the host does not let us have it.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// disk {name}: {source}
    #[error("disk {name}: {source}")]
    Config {
        /// The disk.
        name: String,
        /// What is wrong, and what would be right.
        source: InvalidVirtio,
    },
    /// disk {name}: {source}
    #[error("disk {name}: {source}")]
    Image {
        /// The disk.
        name: String,
        /// What became of its image.
        source: ImageError,
    },
}

/// A virtio disk.
#[derive(Debug)]
pub struct Blk {
    name: String,
    serial: String,
    image: Arc<Image>,
    space: Arc<DiskSpace>,
    num_queues: u16,
    queue_size: u16,
    affinity: Vec<QueueAffinity>,
    /// Whether writes may stay in a cache, until the driver says otherwise.
    writeback: bool,
    limiter: Option<Arc<Limiter>>,
    lingerers: Arc<Lingerers>,
    counts: Counts,
    way: EngineKind,
    complaints: Arc<Complaints>,
}

impl Blk {
    /// Opens and locks the image. `name` is the disk's in this VM.
    ///
    /// # Errors
    /// [`BlkError`]
    pub fn new(name: &str, config: &DiskConfig) -> Result<Self, BlkError> {
        config.check().map_err(|source| BlkError::Config {
            name: name.to_owned(),
            source,
        })?;
        engine::look();
        let mode = ImageMode {
            readonly: config.readonly,
            direct: config.direct,
            fd: config.fd,
            image_type: config.image_type,
            backing_files: config.backing_files,
        };
        let image = Image::open(&config.shown(), mode).map_err(|source| BlkError::Image {
            name: name.to_owned(),
            source,
        })?;
        let bytes = config_bytes(&image, config.num_queues, config.queue_size);
        Ok(Self {
            name: name.to_owned(),
            serial: config.serial.clone().unwrap_or_else(|| name.to_owned()),
            image: Arc::new(image),
            space: DiskSpace::new(bytes, config.writeback),
            num_queues: config.num_queues,
            queue_size: config.queue_size,
            affinity: config.queue_affinity.clone(),
            writeback: config.writeback,
            limiter: config
                .rate_limiter()
                .map(|limits| Arc::new(Limiter::new(&limits, Instant::now()))),
            lingerers: Arc::default(),
            counts: Counts::of_disk(config.num_queues),
            way: EngineKind::default(),
            complaints: Arc::new(Complaints::first(LOGGED_ERRORS)),
        })
    }
}

#[cfg(any(test, feature = "hostile"))]
impl Blk {
    /// The disk, whose requests are done on the thread that takes them from a queue.
    pub(super) fn served_here(self) -> Self {
        Self {
            way: EngineKind::Here,
            ..self
        }
    }
}

impl Blk {
    /// The way to tell the guest of another size of the image.
    #[must_use]
    pub fn resizer(&self) -> Resizer {
        Resizer {
            name: self.name.clone(),
            image: Arc::clone(&self.image),
            space: Arc::clone(&self.space),
        }
    }
}

/// Tells the guest of another size of its disk's image. It serves for as long as it is kept.
#[derive(Clone, Debug)]
pub struct Resizer {
    name: String,
    image: Arc<Image>,
    space: Arc<DiskSpace>,
}

impl Resizer {
    /// Measures the image, which somebody has made larger or smaller, and gives its bytes. The guest's
    /// disk has that size from now on, and its driver hears of it. Requests beyond it are refused.
    ///
    /// # Errors
    /// [`BlkError::Image`]; the disk then stays as it was.
    pub fn resize(&self) -> Result<u64, BlkError> {
        let capacity = self.image.measure().map_err(|source| BlkError::Image {
            name: self.name.clone(),
            source,
        })?;
        self.space.set_capacity(capacity / blk::SECTOR);
        Ok(capacity)
    }
}

/// `struct virtio_blk_config`. Virtio 1.3 §5.2.4.
#[derive(Default, Immutable, IntoBytes)]
#[repr(C)]
struct BlkConfig {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// What of the configuration is offered; the rest is zero.
fn config_bytes(image: &Image, num_queues: u16, queue_size: u16) -> Vec<u8> {
    let limits = image.limits();
    let block = limits.block_size;
    let discard_alignment = (limits.discard_granularity / blk::SECTOR as u32).max(1);
    let config = BlkConfig {
        capacity: (image.capacity() / blk::SECTOR).into(),
        seg_max: (u32::from(queue_size) - REQUEST_OVERHEAD).into(),
        blk_size: block.into(),
        physical_block_exp: (limits.physical_block_size / block).max(1).ilog2() as u8,
        min_io_size: u16::try_from(limits.min_io_size / block)
            .unwrap_or(0)
            .into(),
        opt_io_size: (limits.opt_io_size / block).into(),
        num_queues: num_queues.into(),
        max_discard_sectors: MAX_DISCARD_SECTORS.into(),
        max_discard_seg: MAX_RANGES.into(),
        discard_sector_alignment: discard_alignment.into(),
        max_write_zeroes_sectors: MAX_ZERO_SECTORS.into(),
        max_write_zeroes_seg: MAX_RANGES.into(),
        write_zeroes_may_unmap: 1,
        ..BlkConfig::default()
    };
    config.as_bytes().to_vec()
}

impl VirtioDevice for Blk {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::BLOCK
    }

    fn class(&self) -> u32 {
        0x01_00_00 // mass storage, SCSI
    }

    fn features(&self) -> u64 {
        let mut features = blk::F_SEG_MAX | blk::F_BLK_SIZE | blk::F_TOPOLOGY | blk::F_FLUSH;
        if self.num_queues > 1 {
            features |= blk::F_MQ;
        }
        if self.image.readonly() {
            features |= blk::F_RO;
        } else {
            features |= blk::F_CONFIG_WCE | blk::F_WRITE_ZEROES;
            if self.image.limits().discard_granularity > 0 {
                features |= blk::F_DISCARD;
            }
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.num_queues.into()]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn counts(&self) -> Counts {
        self.counts.clone()
    }

    fn takes(&self, _features: u64, state: &DeviceState) -> bool {
        match state {
            DeviceState::None => true,
            DeviceState::Disk(state) => state.fits(self.num_queues, self.queue_size),
            _ => false,
        }
    }

    fn set_state(&mut self, state: &DeviceState) {
        let writeback = match state {
            DeviceState::Disk(state) => state.writeback,
            _ => self.writeback,
        };
        self.space.set_writeback(writeback);
        self.lingerers.forget();
    }

    fn outstanding(&self) -> Option<String> {
        self.lingerers.describe()
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let state = match activation.state() {
            DeviceState::Disk(state) => state.clone(),
            _ => DiskState {
                writeback: self.space.writeback(),
                left: Vec::new(),
            },
        };
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        for index in 0..self.num_queues {
            if let Some(queue) = activation.take_queue(index)? {
                let worker = self.worker(&activation, queue, state.of_queue(index))?;
                workers.push(Box::new(worker));
            }
        }
        let state = DiskState {
            left: Vec::new(),
            ..state
        };
        activation.run(workers, DeviceState::Disk(state))
    }
}

impl Blk {
    /// The worker of `queue`, of which an earlier run has left the requests `left`.
    fn worker(
        &self,
        activation: &Activation,
        queue: Virtqueue,
        left: Vec<u16>,
    ) -> io::Result<BlkWorker> {
        let name = format!("{}-q{}", self.name, queue.index());
        let requests = Requests::new(
            Arc::clone(&self.image),
            Arc::clone(&self.space),
            &self.name,
            &self.serial,
            activation.features(),
            Arc::clone(&self.complaints),
        );
        let image = Arc::clone(&self.image);
        let engine = Engine::new(&name, image, queue.size(), queue.stop(), self.way)?;
        let affinity = self.affinity.iter();
        let affinity = affinity.filter(|affinity| affinity.queue_index == queue.index());
        let parts = Parts {
            name,
            ram: activation.ram().clone(),
            requests,
            space: Arc::clone(&self.space),
            limiter: self.limiter.clone(),
            lingerers: Arc::clone(&self.lingerers),
            counts: self.counts.disk_queue(queue.index()),
            affinity: affinity
                .flat_map(|affinity| affinity.host_cpus.clone())
                .collect(),
        };
        BlkWorker::new(parts, queue, engine, left)
    }
}
