//! The kinds of devices that another process can serve, and what of each is said here.

use std::mem::offset_of;
use std::sync::Arc;

use busway_host::Mac;
use virtio_bindings::virtio_blk::virtio_blk_config;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use busway_vfio::EventFd;

use super::connection::{Connection, Needs, NetNeeds};
use super::generic::Passed;
use super::link::Loss;
use crate::config::{DiskConfig, FsConfig, NetConfig};
use crate::virtio::config_space::{ConfigSpace, Fields};
use crate::virtio::net::{CONTROL_QUEUE_SIZE, founded};
use crate::virtio::spec::{blk, device_type, net};
use crate::virtio::vhost::VhostError;

/// Descriptors of a request that are not its data: header and status. Virtio 1.3 §5.2.6.
const REQUEST_OVERHEAD: u32 = 2;

/// Bytes of a disk's configuration up to the limits of zeroing. Back ends older than zoned disks have no more, and refuse
/// to be asked for it. Virtio 1.3 §5.2.4
const BLK_CONFIG_SIZE: usize = offset_of!(virtio_blk_config, write_zeroes_may_unmap) + 4;

/// The features of a disk that can be passed on: those of the fields up to there, and not those whose field a driver
/// writes, for that would have to be told to each back end.
const BLK_FEATURES: u64 = blk::F_SIZE_MAX
    | blk::F_SEG_MAX
    | blk::F_GEOMETRY
    | blk::F_RO
    | blk::F_BLK_SIZE
    | blk::F_FLUSH
    | blk::F_TOPOLOGY
    | blk::F_MQ
    | blk::F_DISCARD
    | blk::F_WRITE_ZEROES;

/// The features of a NIC that are its back end's: what becomes of packets is its to do.
const NET_FEATURES: u64 = net::F_CSUM
    | net::F_GUEST_CSUM
    | net::F_GUEST_TSO4
    | net::F_GUEST_TSO6
    | net::F_GUEST_ECN
    | net::F_HOST_TSO4
    | net::F_HOST_TSO6
    | net::F_HOST_ECN
    | net::F_GUEST_USO4
    | net::F_GUEST_USO6
    | net::F_HOST_USO
    | net::F_MRG_RXBUF;

/// `struct virtio_net_config`, up to its MTU. Virtio 1.3 §5.1.4.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct NetFields {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// `struct virtio_fs_config`, without the queue for notifications. Virtio 1.3 §5.11.4.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct FsFields {
    tag: [u8; 36],
    num_request_queues: U32,
}

/// A configuration.
#[derive(Debug)]
pub(super) struct Made {
    /// What the driver reads.
    pub(super) space: Arc<dyn ConfigSpace>,
    /// The same, where it is said here and by nobody else.
    pub(super) own: Option<Arc<Fields>>,
    /// What keeps it as the back end has it.
    pub(super) back_ends: Option<Box<dyn BackEndsConfig>>,
}

/// What a device is.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) device_type: u16,
    pub(super) class: u32,
    /// The features of this type that a driver may be offered where the back end has them.
    pub(super) features: u64,
    /// The features that the device has of its own, and that are none of the back end's business.
    pub(super) own: u64,
    /// The sizes of the back end's queues.
    pub(super) queue_sizes: Vec<u16>,
    /// What a NIC is besides.
    pub(super) net: Option<NetNeeds>,
    pub(super) contents: Contents,
    pub(super) loss: Loss,
}

/// Where a configuration comes from.
#[derive(Debug)]
pub(super) enum Contents {
    /// It is said here.
    Own(Vec<u8>),
    /// It is a disk's back end's.
    Disk(DiskLimits),
    /// It is the back end's, so many bytes as it has them; the driver may write them.
    Passed(usize),
}

/// What a disk's back end does not know of the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct DiskLimits {
    queues: u16,
    queue_size: u16,
}

/// A configuration that is the back end's, for the thread that speaks with that.
pub(super) trait BackEndsConfig: std::fmt::Debug + Send {
    /// Asks for it anew. The driver hears of a change.
    ///
    /// # Errors
    /// The back end's.
    fn refresh(&self, connection: &Connection) -> Result<(), VhostError>;

    /// Passes on what the driver has written.
    ///
    /// # Errors
    /// The back end's, where the connection is lost.
    fn pass_on(&self, connection: &Connection) -> Result<(), VhostError> {
        let _ = connection;
        Ok(())
    }

    /// There is no back end for now, or there is one again.
    fn set_served(&self, served: bool) {
        let _ = served;
    }
}

/// A disk's.
#[derive(Debug)]
struct DiskConfiguration {
    fields: Arc<Fields>,
    limits: DiskLimits,
}

impl Kind {
    /// A shared folder: a queue for what must not wait, and those for requests. Virtio 1.3 §5.11.2.
    pub(super) fn fs(config: &FsConfig) -> Self {
        let mut tag = [0; 36];
        for (to, from) in tag.iter_mut().zip(config.tag.bytes()) {
            *to = from;
        }
        let fields = FsFields {
            tag,
            num_request_queues: u32::from(config.num_queues).into(),
        };
        let queues = usize::from(config.num_queues).saturating_add(1);
        Self {
            device_type: device_type::FS,
            class: 0x01_80_00, // mass storage, other
            features: 0,
            own: 0,
            queue_sizes: vec![config.queue_size; queues],
            net: None,
            contents: Contents::Own(fields.as_bytes().to_vec()),
            loss: Loss::Session,
        }
    }

    pub(super) fn disk(config: &DiskConfig) -> Self {
        let mut features = BLK_FEATURES;
        if config.num_queues == 1 {
            features &= !blk::F_MQ;
        }
        Self {
            device_type: device_type::BLOCK,
            class: 0x01_00_00, // mass storage, SCSI
            features,
            own: 0,
            queue_sizes: vec![config.queue_size; config.num_queues.into()],
            net: None,
            contents: Contents::Disk(DiskLimits {
                queues: config.num_queues,
                queue_size: config.queue_size,
            }),
            loss: Loss::Requests,
        }
    }

    /// A NIC of the address `mac`. With several pairs of queues it has a control queue, which is served here: of its
    /// commands a back end knows one, how many pairs are in use, as rings that are enabled.
    /// QEMU, docs/interop/vhost-user.rst, "Multiple queue support"
    pub(super) fn net(config: &NetConfig, mac: Mac) -> Self {
        let pairs = config.num_queues / 2;
        let (mut features, mut own) = (NET_FEATURES, net::F_MAC | net::F_STATUS);
        if pairs > 1 {
            (features, own) = (features | net::F_MQ, own | net::F_CTRL_VQ);
        }
        if config.mtu.is_some() {
            features |= net::F_MTU;
        }
        let fields = NetFields {
            mac: mac.0,
            status: net::S_LINK_UP.into(),
            max_virtqueue_pairs: pairs.into(),
            mtu: config.mtu.unwrap_or(0).into(),
        };
        Self {
            device_type: device_type::NET,
            class: 0x02_00_00, // network controller, Ethernet
            features,
            own,
            queue_sizes: vec![config.queue_size; config.num_queues.into()],
            net: Some(NetNeeds {
                pairs,
                mtu: config.mtu,
            }),
            contents: Contents::Own(fields.as_bytes().to_vec()),
            loss: Loss::Packets,
        }
    }

    /// What its back end has to be able to do.
    pub(super) fn needs(&self) -> Needs {
        Needs {
            queues: self.queue_sizes.len(),
            config: self.contents.size(),
            net: self.net,
        }
    }

    /// What a driver is offered where the back end has `offered`. Some back ends have segments of a kind without what
    /// those stand on, and no driver could take that.
    pub(super) fn offers(&self, offered: u64) -> u64 {
        let features = self.own | offered & self.features;
        match self.net {
            Some(_) => founded(features),
            None => features,
        }
    }

    /// The sizes of all queues: a control queue is the last.
    pub(super) fn all_queue_sizes(&self) -> Vec<u16> {
        let control = (self.own & net::F_CTRL_VQ != 0).then_some(CONTROL_QUEUE_SIZE);
        self.queue_sizes.iter().copied().chain(control).collect()
    }

    /// The back end's queues that a driver knows of which agreed on `features`. Virtio 1.3 §5.1.2
    pub(super) fn queues_known(&self, features: u64) -> u16 {
        match self.net {
            Some(_) if features & net::F_MQ == 0 => 2,
            _ => u16::try_from(self.queue_sizes.len()).unwrap_or(u16::MAX),
        }
    }
}

impl Contents {
    /// How many bytes a back end has to give; `None` where it need not have a configuration.
    pub(super) fn size(&self) -> Option<usize> {
        match self {
            Self::Own(_) | Self::Passed(_) => None,
            Self::Disk(_) => Some(BLK_CONFIG_SIZE),
        }
    }

    /// The configuration, and the way to a newer one. `wake` wakes the thread that speaks with the back end.
    pub(super) fn make(&self, connection: &Connection, wake: &EventFd) -> Result<Made, VhostError> {
        let limits = match self {
            Self::Own(bytes) => {
                let fields = Fields::new(bytes.clone());
                return Ok(Made {
                    space: Arc::clone(&fields) as _,
                    own: Some(fields),
                    back_ends: None,
                });
            }
            Self::Disk(limits) => *limits,
            Self::Passed(size) => {
                let passed = Passed::open(*size, connection, wake)?;
                return Ok(Made {
                    space: Arc::clone(&passed) as _,
                    own: None,
                    back_ends: Some(Box::new(passed)),
                });
            }
        };
        let mut bytes = connection.config(BLK_CONFIG_SIZE)?;
        limits.apply(&mut bytes);
        let fields = Fields::new(bytes);
        let config = DiskConfiguration {
            fields: Arc::clone(&fields),
            limits,
        };
        Ok(Made {
            space: fields,
            own: None,
            back_ends: Some(Box::new(config)),
        })
    }
}

impl BackEndsConfig for DiskConfiguration {
    fn refresh(&self, connection: &Connection) -> Result<(), VhostError> {
        let mut bytes = connection.config(self.fields.size())?;
        self.limits.apply(&mut bytes);
        self.fields.set(0, &bytes);
        Ok(())
    }
}

impl DiskLimits {
    /// Has the configuration say how many queues there are, and no longer requests than a queue holds.
    fn apply(self, bytes: &mut [u8]) {
        let queues = offset_of!(virtio_blk_config, num_queues);
        if let Some(field) = bytes.get_mut(queues..queues + 2) {
            field.copy_from_slice(&self.queues.to_le_bytes());
        }
        let segments = offset_of!(virtio_blk_config, seg_max);
        let most = u32::from(self.queue_size).saturating_sub(REQUEST_OVERHEAD);
        if let Some(field) = bytes.get_mut(segments..segments + 4)
            && let Ok(theirs) = <[u8; 4]>::try_from(&*field)
        {
            let segments = u32::from_le_bytes(theirs).min(most);
            field.copy_from_slice(&segments.to_le_bytes());
        }
    }
}
