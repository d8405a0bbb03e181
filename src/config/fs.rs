//! What a shared folder is to be.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::limits::{FS_QUEUE_SIZES, MAX_QUEUES, TAG_SIZE};
use super::validate::queue_size;
use super::{InvalidVirtio, fs_queue_size, one};

/// `--fs`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The name by which the guest mounts it; 1 to 36 bytes.
    pub tag: String,
    /// The Unix socket of its back end, virtiofsd.
    pub socket: PathBuf,
    /// Request queues; the device has one more, for requests that must not wait behind these.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors of a queue; a power of two.
    #[serde(default = "fs_queue_size")]
    pub queue_size: u16,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
    /// The PCI segment that it is in.
    #[serde(default)]
    pub pci_segment: u16,
    /// Its device number on bus 0 of that segment, 1 to 15; any that is free where absent.
    #[serde(default)]
    pub pci_device_id: Option<u8>,
}

impl FsConfig {
    /// A folder with every choice at its default.
    #[must_use]
    pub fn new(tag: impl Into<String>, socket: impl Into<PathBuf>) -> Self {
        Self {
            tag: tag.into(),
            socket: socket.into(),
            num_queues: one(),
            queue_size: fs_queue_size(),
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }

    /// Whether there can be such a folder.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        let tag = &self.tag;
        if tag.is_empty() || tag.len() > TAG_SIZE || tag.contains('\0') {
            return Err(InvalidVirtio::Tag(tag.clone()));
        }
        if self.socket.as_os_str().is_empty() {
            return Err(InvalidVirtio::NoSocket);
        }
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(InvalidVirtio::Queues(self.num_queues));
        }
        queue_size(self.queue_size, FS_QUEUE_SIZES)
    }
}
