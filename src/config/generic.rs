//! What a device of any kind is to be that another process serves.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::InvalidVirtio;
use super::validate::queue_size;

/// The most queues of one device.
const MOST_QUEUES: usize = 64;
/// What a queue's size can be. Virtio 1.3 §2.7
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 2..=32768;
/// The most bytes of a configuration: what lies beyond has no place in the function's BAR.
const MOST_CONFIG: u16 = 4096;

/// Kinds by name, for who does not know the numbers. Virtio 1.3 §5
const KINDS: &[(&str, u16)] = &[
    ("block", 2),
    ("console", 3),
    ("rng", 4),
    ("scsi", 8),
    ("gpu", 16),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("sound", 25),
    ("fs", 26),
    ("i2c", 34),
    ("can", 36),
    ("gpio", 41),
];

/// Kinds that change what memory the VM has, or where devices find it: no other process can do that. Virtio 1.3 §5:
/// the balloons, the IOMMU, memory that is plugged, persistent memory.
const OF_THE_VMM: &[u16] = &[5, 13, 23, 24, 27];

/// A network card, whose back ends count pairs of queues and serve no control queue.
const NET: u16 = 1;

/// `--generic-vhost-user`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenericConfig {
    /// The kind of device, by its number. Virtio 1.3 §5
    pub virtio_id: u16,
    /// The Unix socket of its back end.
    pub socket: PathBuf,
    /// Descriptors of each queue, powers of two.
    pub queue_sizes: Vec<u16>,
    /// Bytes of its configuration; where it is absent, those of its kind.
    #[serde(default)]
    pub config_size: Option<u16>,
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

impl GenericConfig {
    /// A device of kind `virtio_id`, served at `socket`, with queues of these sizes.
    #[must_use]
    pub fn new(virtio_id: u16, socket: impl Into<PathBuf>, queue_sizes: Vec<u16>) -> Self {
        Self {
            virtio_id,
            socket: socket.into(),
            queue_sizes,
            config_size: None,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }

    /// The number of the kind called `name`, in words or as a number.
    pub(crate) fn kind(name: &str) -> Option<u16> {
        let named = KINDS.iter().find(|(known, _)| *known == name);
        named.map_or_else(|| name.parse().ok(), |(_, number)| Some(*number))
    }

    /// Whether there can be such a device.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        // The PCI device IDs of modern functions are 0x1040 to 0x107f. Virtio 1.3 §4.1.2
        if !(1..=0x3f).contains(&self.virtio_id) {
            return Err(InvalidVirtio::VirtioId(self.virtio_id));
        }
        if self.virtio_id == NET {
            return Err(InvalidVirtio::GenericNet);
        }
        if OF_THE_VMM.contains(&self.virtio_id) {
            return Err(InvalidVirtio::OfTheVmm(self.virtio_id));
        }
        if self.socket.as_os_str().is_empty() {
            return Err(InvalidVirtio::NoSocket);
        }
        if !(1..=MOST_QUEUES).contains(&self.queue_sizes.len()) {
            return Err(InvalidVirtio::QueueSizes(self.queue_sizes.len()));
        }
        if let Some(size) = self.config_size.filter(|size| *size > MOST_CONFIG) {
            return Err(InvalidVirtio::ConfigSize(size));
        }
        let mut sizes = self.queue_sizes.iter();
        sizes.try_for_each(|size| queue_size(*size, QUEUE_SIZES))
    }
}
