//! What `busway ctl` says of persistent memory, and of devices that other processes serve, when it adds one.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::{absolute, size};

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
