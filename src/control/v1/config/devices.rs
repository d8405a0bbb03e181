//! The devices of a VM's configuration: those of the host's, and virtio's that have no file of their own.

use serde::Serialize;

use super::{known, text};
use crate::config::{
    BucketConfig, DeviceConfig, DiskConfig, FsConfig, ImageType, NetConfig, OnError, QueueAffinity,
    RateLimiterConfig, VhostMode, VsockConfig,
};

#[derive(Clone, Debug, Serialize)]
pub(super) struct Disk {
    #[serde(skip_serializing_if = "String::is_empty")]
    path: String,
    readonly: bool,
    direct: bool,
    iommu: bool,
    num_queues: u16,
    queue_size: u16,
    vhost_user: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    vhost_socket: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limiter_config: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    queue_affinity: Vec<QueueAffinity>,
    backing_files: bool,
    image_type: &'static str,
}

#[derive(Clone, Debug, Serialize)]
struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<TokenBucket>,
}

#[derive(Clone, Debug, Serialize)]
struct TokenBucket {
    size: u64,
    one_time_burst: u64,
    refill_time: u64,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Net {
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    /// Busway gives a tap no address; some clients do not read a NIC without one.
    ip: &'static str,
    mask: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    iommu: bool,
    num_queues: u16,
    queue_size: u16,
    vhost_user: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    vhost_socket: Option<String>,
    vhost_mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u16>,
    /// Beside Cloud Hypervisor's: whether the host's kernel serves it, where that was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhost: Option<bool>,
    /// Beside Cloud Hypervisor's: what the guest sends from another address is dropped.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    spoofchk: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Fs {
    tag: String,
    socket: String,
    num_queues: u16,
    queue_size: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Vsock {
    cid: u32,
    /// Empty where the host's kernel has the sockets. Some clients do not read a device without one.
    socket: String,
    iommu: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Device {
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fd: Option<u32>,
    iommu: bool,
    pci_segment: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    x_nv_gpudirect_clique: Option<u8>,
    /// Beside Cloud Hypervisor's.
    #[serde(skip_serializing_if = "Option::is_none")]
    root_port: Option<bool>,
    /// Beside Cloud Hypervisor's: what its errors do to the VM, where they do not end it.
    #[serde(skip_serializing_if = "Option::is_none")]
    on_error: Option<OnError>,
}

impl From<&DiskConfig> for Disk {
    fn from(disk: &DiskConfig) -> Self {
        Self {
            path: text(&disk.path),
            readonly: disk.readonly,
            direct: disk.direct,
            iommu: false,
            num_queues: disk.num_queues,
            queue_size: disk.queue_size,
            vhost_user: disk.vhost_user,
            vhost_socket: disk.socket.as_deref().map(text),
            pci_segment: disk.pci_segment,
            pci_device_id: disk.pci_device_id,
            id: disk.id.clone(),
            serial: disk.serial.clone(),
            rate_limiter_config: disk.rate_limiter().map(Into::into),
            queue_affinity: disk.queue_affinity.clone(),
            backing_files: disk.backing_files,
            image_type: match disk.image_type {
                ImageType::Raw => "Raw",
                ImageType::Qcow2 => "Qcow2",
            },
        }
    }
}

impl From<RateLimiterConfig> for RateLimiter {
    fn from(config: RateLimiterConfig) -> Self {
        Self {
            bandwidth: config.bandwidth.map(Into::into),
            ops: config.ops.map(Into::into),
        }
    }
}

impl From<BucketConfig> for TokenBucket {
    fn from(config: BucketConfig) -> Self {
        Self {
            size: config.size,
            one_time_burst: config.one_time_burst,
            refill_time: config.refill_time,
        }
    }
}

impl From<&NetConfig> for Net {
    fn from(net: &NetConfig) -> Self {
        Self {
            tap: net.tap.clone(),
            ip: "0.0.0.0",
            mask: "0.0.0.0",
            mac: net.mac.map(|mac| mac.to_string()),
            iommu: false,
            num_queues: net.num_queues,
            queue_size: net.queue_size,
            vhost_user: net.vhost_user,
            vhost_socket: net.socket.as_deref().map(text),
            vhost_mode: match net.vhost_mode {
                VhostMode::Client => "Client",
                VhostMode::Server => "Server",
            },
            mtu: net.mtu,
            vhost: known(net.vhost),
            spoofchk: net.spoofchk,
            id: net.id.clone(),
            pci_segment: net.pci_segment,
            pci_device_id: net.pci_device_id,
        }
    }
}

impl From<&FsConfig> for Fs {
    fn from(fs: &FsConfig) -> Self {
        Self {
            tag: fs.tag.clone(),
            socket: text(&fs.socket),
            num_queues: fs.num_queues,
            queue_size: fs.queue_size,
            id: fs.id.clone(),
            pci_segment: fs.pci_segment,
            pci_device_id: fs.pci_device_id,
        }
    }
}

impl From<&VsockConfig> for Vsock {
    fn from(vsock: &VsockConfig) -> Self {
        Self {
            cid: vsock.cid,
            socket: vsock.socket.as_deref().map(text).unwrap_or_default(),
            iommu: false,
            id: vsock.id.clone(),
            pci_segment: vsock.pci_segment,
            pci_device_id: vsock.pci_device_id,
        }
    }
}

impl From<&DeviceConfig> for Device {
    fn from(device: &DeviceConfig) -> Self {
        let path = Some(text(&device.path)).filter(|path| !path.is_empty());
        Self {
            path,
            fd: device.fd,
            iommu: false,
            pci_segment: device.pci_segment,
            pci_device_id: device.pci_device_id,
            id: device.id.clone(),
            x_nv_gpudirect_clique: device.x_nv_gpudirect_clique,
            root_port: device.root_port,
            on_error: Some(device.on_error).filter(|on_error| *on_error != OnError::Stop),
        }
    }
}
