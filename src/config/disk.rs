//! What a disk is to be.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{disk_queue_size, one, yes};

/// `--disk`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// An image file or a block device. Empty where `fd` says which.
    #[serde(default)]
    pub path: PathBuf,
    /// A descriptor of it that somebody else has opened.
    #[serde(default)]
    pub fd: Option<u32>,
    /// Another process serves the disk, and has its image.
    #[serde(default)]
    pub vhost_user: bool,
    /// The Unix socket of that process.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// What the file is. It is never found out from what is in it.
    #[serde(default)]
    pub image_type: ImageType,
    /// Files that an image names as its backing are opened, to be read only.
    #[serde(default)]
    pub backing_files: bool,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Request queues, one worker each.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors a queue; a power of two.
    #[serde(default = "disk_queue_size")]
    pub queue_size: u16,
    /// The host's processors that the workers of single queues run on.
    #[serde(default)]
    pub queue_affinity: Vec<QueueAffinity>,
    /// Writes may stay in a cache until the guest flushes.
    #[serde(default = "yes")]
    pub writeback: bool,
    /// The serial number that the guest sees, of 20 bytes at most; the disk's name where absent.
    #[serde(default)]
    pub serial: Option<String>,
    /// Bytes of the limit of bandwidth.
    #[serde(default)]
    pub bw_size: Option<u64>,
    /// Bytes beside them that are there once.
    #[serde(default)]
    pub bw_one_time_burst: Option<u64>,
    /// The time in which they come back; milliseconds.
    #[serde(default)]
    pub bw_refill_time: Option<u64>,
    /// Reads and writes of the limit of operations.
    #[serde(default)]
    pub ops_size: Option<u64>,
    /// Reads and writes beside them that are there once.
    #[serde(default)]
    pub ops_one_time_burst: Option<u64>,
    /// The time in which they come back; milliseconds.
    #[serde(default)]
    pub ops_refill_time: Option<u64>,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
    /// Where it stands in firmware's boot order, the lowest first.
    #[serde(default)]
    pub boot_index: Option<u16>,
    /// The PCI segment that it is in.
    #[serde(default)]
    pub pci_segment: u16,
    /// Its device number on bus 0 of that segment, 1 to 15; any that is free where absent.
    #[serde(default)]
    pub pci_device_id: Option<u8>,
}

/// The host's processors that the worker of one queue runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueAffinity {
    /// The queue's number, from 0 on.
    pub queue_index: u16,
    /// Numbers of processors.
    pub host_cpus: Vec<usize>,
}

/// What an image is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// The guest's bytes as they are.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// How much of a device a guest may use: nothing is limited that is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateLimiterConfig {
    /// Bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Reads and writes.
    pub ops: Option<BucketConfig>,
}

/// A bucket of tokens: `size` of them come in each `refill_time`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketConfig {
    /// The most tokens that gather: bytes, or operations.
    pub size: u64,
    /// Tokens beside them that are there once.
    pub one_time_burst: u64,
    /// The time in which an empty bucket fills; milliseconds.
    pub refill_time: u64,
}

impl BucketConfig {
    /// What three keys say of a limit, where it is one.
    pub(super) fn of(size: Option<u64>, burst: Option<u64>, refill: Option<u64>) -> Option<Self> {
        size.filter(|size| *size > 0).map(|size| Self {
            size,
            one_time_burst: burst.unwrap_or(0),
            refill_time: refill.unwrap_or(0),
        })
    }
}

impl DiskConfig {
    /// How much of it the guest may use; `None` where that is not limited.
    #[must_use]
    pub fn rate_limiter(&self) -> Option<RateLimiterConfig> {
        let bucket = BucketConfig::of;
        let bandwidth = bucket(self.bw_size, self.bw_one_time_burst, self.bw_refill_time);
        let ops = bucket(self.ops_size, self.ops_one_time_burst, self.ops_refill_time);
        let limited = bandwidth.is_some() || ops.is_some();
        limited.then_some(RateLimiterConfig { bandwidth, ops })
    }

    /// What messages call it.
    #[must_use]
    pub fn shown(&self) -> PathBuf {
        match self.fd {
            Some(fd) if self.path.as_os_str().is_empty() => format!("fd={fd}").into(),
            _ => match self.back_end() {
                Some(socket) => socket.to_owned(),
                None => self.path.clone(),
            },
        }
    }
}

impl DiskConfig {
    /// The socket of the process that serves the disk, where it is not Busway.
    #[must_use]
    pub fn back_end(&self) -> Option<&Path> {
        self.socket.as_deref().filter(|_| self.vhost_user)
    }

    /// A disk with every choice at its default.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            fd: None,
            vhost_user: false,
            socket: None,
            image_type: ImageType::Raw,
            backing_files: false,
            readonly: false,
            direct: false,
            num_queues: one(),
            queue_size: disk_queue_size(),
            queue_affinity: Vec::new(),
            writeback: true,
            serial: None,
            bw_size: None,
            bw_one_time_burst: None,
            bw_refill_time: None,
            ops_size: None,
            ops_one_time_burst: None,
            ops_refill_time: None,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
            boot_index: None,
        }
    }
}
