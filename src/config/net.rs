//! What a NIC is to be.

use std::path::{Path, PathBuf};

use busway_host::Mac;
use serde::{Deserialize, Serialize};

use super::{Choice, net_queue_size, two};

/// `--net`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The tap interface; made where it does not exist, and named by the kernel where absent.
    #[serde(default)]
    pub tap: Option<String>,
    /// Descriptors of a tap that somebody else has opened, one for each pair of queues, in the place of `tap`.
    #[serde(default)]
    pub fd: Vec<u32>,
    /// Another process serves the NIC, and there is no tap.
    #[serde(default)]
    pub vhost_user: bool,
    /// The Unix socket where that process is met.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Who listens at it.
    #[serde(default)]
    pub vhost_mode: VhostMode,
    /// The guest's MAC address; a random, locally administered one where absent.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// The longest packet, in bytes, without its Ethernet header: the guest is told, and so is a tap that Busway opens.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Frames from the guest that are from another address than `mac` are dropped.
    #[serde(default)]
    pub spoofchk: bool,
    /// Receive and transmit queues together; even.
    #[serde(default = "two")]
    pub num_queues: u16,
    /// Descriptors a queue; a power of two.
    #[serde(default = "net_queue_size")]
    pub queue_size: u16,
    /// The host's kernel serves the queues (vhost-net).
    #[serde(default)]
    pub vhost: Choice,
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

/// Which end of the socket Busway is, between it and the process that serves a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostMode {
    /// It connects to the process, which listens.
    #[default]
    Client,
    /// It listens, and the process connects.
    Server,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            fd: Vec::new(),
            vhost_user: false,
            socket: None,
            vhost_mode: VhostMode::Client,
            mac: None,
            mtu: None,
            spoofchk: false,
            num_queues: two(),
            queue_size: net_queue_size(),
            vhost: Choice::Auto,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

impl NetConfig {
    /// The socket of the process that serves the NIC, where it is neither Busway nor the host's kernel.
    #[must_use]
    pub fn back_end(&self) -> Option<&Path> {
        self.socket.as_deref().filter(|_| self.vhost_user)
    }
}
