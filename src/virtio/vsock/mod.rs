//! The virtio socket device: connections between programs in the guest and programs on the host. Virtio 1.3 §5.10.
//!
//! The host's end is one of two. The host's kernel has it ([`kernel`]): its programs use AF_VSOCK, and the guest's address
//! is one that no other VM of the host has. Or this process has it ([`socket`]): programs connect to a Unix socket and say
//! the port that they want, and listen for the guest at Unix sockets whose names end in a port.

mod connection;
mod credit;
mod events;
mod handshake;
mod hub;
mod kernel;
mod packet;
mod ports;
mod socket;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;

use super::device::VirtioDevice;
use super::vhost::MemoryTable;
use super::vhost::kernel::KernelError;
use crate::config::{InvalidVirtio, VsockConfig};
use crate::memory::GuestRam;
use crate::unix_socket::SocketError;
use kernel::KernelDevice;
use socket::SocketDevice;

const QUEUE_SIZE: u16 = 128;
/// The queues. Virtio 1.3 §5.10.2
const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;
const EVENT_QUEUE: u16 = 2;

/// A vsock device cannot be as configured, or the host does not let us have it.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// vsock {name}: {source}
    #[error("vsock {name}: {source}")]
    Config {
        /// The device.
        name: String,
        /// What is wrong, and what would be right.
        source: InvalidVirtio,
    },
    /// vsock {name}: {source}
    #[error("vsock {name}: {source}")]
    Kernel {
        /// The device.
        name: String,
        /// Why the kernel does not serve it.
        source: KernelError,
    },
    /// vsock {name}: {source}
    #[error("vsock {name}: {source}")]
    Socket {
        /// The device.
        name: String,
        /// Why its Unix socket cannot be had.
        source: SocketError,
    },
    /// vsock {name}: {source}
    #[error("vsock {name}: {source}")]
    System {
        /// The device.
        name: String,
        /// What the host refused.
        source: io::Error,
    },
    /// vsock {name}: cid={cid} is another VM's on this host: give each VM its own
    #[error("vsock {name}: cid={cid} is another VM's on this host: give each VM its own")]
    CidTaken {
        /// The device.
        name: String,
        /// The address.
        cid: u32,
    },
}

/// The device that `config` wants, with what it needs of the host. The kernel is told of the guest's memory by `memory`.
///
/// # Errors
/// [`VsockError`]
pub fn open(
    name: &str,
    config: &VsockConfig,
    ram: &GuestRam,
    memory: &Arc<MemoryTable>,
) -> Result<Box<dyn VirtioDevice>, VsockError> {
    config.check().map_err(|source| VsockError::Config {
        name: name.to_owned(),
        source,
    })?;
    Ok(match &config.socket {
        Some(socket) => Box::new(SocketDevice::new(name, config.cid, socket)?),
        None => Box::new(KernelDevice::new(name, config, ram, memory)?),
    })
}
