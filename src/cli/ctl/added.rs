//! What `busway ctl` says of a virtio device when it adds one, and of where in the guest any device is to be.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{absolute, size};

/// Where in the guest a device is to be.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PlaceArgs {
    /// The PCI segment that it comes to; 0, where nothing is given
    #[arg(long, value_name = "N")]
    pub(super) pci_segment: Option<u16>,
    /// Its device number on bus 0 there, or that of the root port that it comes behind; any that is free, where nothing is
    /// given
    #[arg(long, value_name = "N")]
    pub(super) pci_device_id: Option<u8>,
}

impl PlaceArgs {
    /// Says it beside the rest.
    pub(super) fn say(self, body: &mut Value) {
        if let Some(segment) = self.pci_segment {
            body["pci_segment"] = json!(segment);
        }
        if let Some(device) = self.pci_device_id {
            body["pci_device_id"] = json!(device);
        }
    }
}

/// `busway ctl add-pmem`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct AddPmemArgs {
    /// What the memory is; of a folder, a file in it without a name
    pub(super) file: PathBuf,
    /// How much of it the guest has, a multiple of 2M; all of the file, where nothing is given
    #[arg(long, value_parser = size)]
    pub(super) size: Option<u64>,
    /// The file is only read, and what the guest writes ends with the VM
    #[arg(long)]
    pub(super) discard_writes: bool,
    /// What it is called
    #[arg(long)]
    pub(super) id: Option<String>,
    #[command(flatten)]
    pub(super) place: PlaceArgs,
}

impl AddPmemArgs {
    pub(super) fn body(&self) -> Value {
        json!({
            "file": absolute(&self.file), "size": self.size, "discard_writes": self.discard_writes,
            "id": self.id,
        })
    }
}

/// `busway ctl add-vhost-user`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct AddGenericArgs {
    /// The kind of device, by its number or name: 4 or rng
    #[arg(value_name = "KIND")]
    pub(super) virtio_id: String,
    /// The socket where its back end listens
    pub(super) socket: PathBuf,
    /// Descriptors of each queue, powers of two: 64,64
    #[arg(required = true, value_delimiter = ',')]
    pub(super) queue_sizes: Vec<u16>,
    /// What it is called
    #[arg(long)]
    pub(super) id: Option<String>,
    #[command(flatten)]
    pub(super) place: PlaceArgs,
}

impl AddGenericArgs {
    pub(super) fn body(&self) -> Value {
        let kind = match self.virtio_id.parse::<u16>() {
            Ok(number) => json!(number),
            Err(_a_name) => json!(self.virtio_id),
        };
        json!({
            "device_type": kind, "socket": absolute(&self.socket), "queue_sizes": self.queue_sizes,
            "id": self.id,
        })
    }
}

/// `busway ctl add-disk`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct AddDiskArgs {
    /// An image, or a block device
    pub(super) path: PathBuf,
    /// PATH is the socket of another process, which has the image and serves the disk
    #[arg(long, conflicts_with_all = ["qcow2", "readonly", "direct", "serial"])]
    pub(super) vhost_user: bool,
    /// The image is qcow2; one is raw otherwise, whatever is in it
    #[arg(long)]
    pub(super) qcow2: bool,
    /// Open the files that a qcow2 image names, to be read only
    #[arg(long, requires = "qcow2")]
    pub(super) backing_files: bool,
    /// The guest may not write
    #[arg(long)]
    pub(super) readonly: bool,
    /// Bypass the host's page cache
    #[arg(long)]
    pub(super) direct: bool,
    /// The serial number that the guest sees; its id, where none is given
    #[arg(long)]
    pub(super) serial: Option<String>,
    /// What it is called
    #[arg(long)]
    pub(super) id: Option<String>,
    #[command(flatten)]
    pub(super) place: PlaceArgs,
}

/// `busway ctl add-net`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct AddNetArgs {
    /// The tap interface; a new one that the kernel names, where none is given
    pub(super) tap: Option<String>,
    /// TAP is the socket of another process, which serves the NIC
    #[arg(long, requires = "tap")]
    pub(super) vhost_user: bool,
    /// Busway listens at that socket, and the other process connects
    #[arg(long, requires = "vhost_user")]
    pub(super) server: bool,
    /// The longest packet, without its Ethernet header
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    pub(super) mtu: Option<u16>,
    /// Receive and transmit queues together; 2, where nothing is given
    #[arg(long, value_name = "N")]
    pub(super) queues: Option<u16>,
    /// The guest's MAC address; a random one, where none is given
    #[arg(long)]
    pub(super) mac: Option<String>,
    /// Drop what the guest sends from another address than its own
    #[arg(long, conflicts_with = "vhost_user")]
    pub(super) spoofchk: bool,
    /// What it is called
    #[arg(long)]
    pub(super) id: Option<String>,
    #[command(flatten)]
    pub(super) place: PlaceArgs,
}

impl AddNetArgs {
    /// What is said beside the endpoint.
    pub(super) fn body(&self) -> Value {
        let mut body = json!({ "mac": self.mac, "num_queues": self.queues, "id": self.id });
        body["mtu"] = json!(self.mtu);
        if self.spoofchk {
            body["spoofchk"] = json!(true);
        }
        match &self.tap {
            Some(socket) if self.vhost_user => {
                body["vhost_user"] = json!(true);
                body["vhost_socket"] = json!(absolute(Path::new(socket)));
                body["vhost_mode"] = json!(if self.server { "Server" } else { "Client" });
            }
            tap => body["tap"] = json!(tap),
        }
        body
    }
}

/// `busway ctl add-fs`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct AddFsArgs {
    /// What the guest mounts it by
    pub(super) tag: String,
    /// The socket where virtiofsd listens
    pub(super) socket: PathBuf,
    /// What it is called
    #[arg(long)]
    pub(super) id: Option<String>,
    #[command(flatten)]
    pub(super) place: PlaceArgs,
}
