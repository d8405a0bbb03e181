//! The socket device whose host's end is a Unix socket, as Firecracker and Cloud Hypervisor have it: a program connects,
//! writes `CONNECT port`, and reads `OK port` when the guest has accepted. For what the guest connects to, programs listen
//! at the same path with `_PORT` behind it.
//!
//! The socket is there as long as the device, over resets and pauses. Who connects while no driver is ready waits to be
//! accepted; a pause keeps connections, a reset ends them.

use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::sync::{Arc, Mutex};

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::events::EventQueue;
use super::hub::Hub;
use super::worker::{SocketWorker, lock};
use super::{QUEUE_SIZE, RECEIVE_QUEUE, TRANSMIT_QUEUE, VsockError};
use crate::virtio::activation::Activation;
use crate::virtio::config_space::{ConfigSpace, Fields};
use crate::virtio::device::VirtioDevice;
use crate::virtio::error::StartError;
use crate::virtio::life::{DeviceState, Running, VsockState};
use crate::virtio::spec;
use crate::virtio::worker::Worker;

/// A socket device that this process serves.
#[derive(Debug)]
pub(super) struct SocketDevice {
    name: String,
    config: Arc<Fields>,
    hub: Arc<Mutex<Hub>>,
    /// A number that no other device has, here or in another process.
    session: u64,
}

impl SocketDevice {
    /// Listens at `socket`.
    pub(super) fn new(name: &str, cid: u32, socket: &Path) -> Result<Self, VsockError> {
        let hub = Hub::new(name, cid, socket).map_err(|source| VsockError::Socket {
            name: name.to_owned(),
            source,
        })?;
        Ok(Self {
            name: name.to_owned(),
            config: Fields::new(U64::new(cid.into()).as_bytes().to_vec()),
            hub: Arc::new(Mutex::new(hub)),
            // Its keys are random.
            session: RandomState::new().hash_one(cid),
        })
    }

    /// Whether `state` is of a run of this device.
    fn is_own(&self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Vsock(state) if state.session == self.session)
    }
}

impl VirtioDevice for SocketDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::VSOCK
    }

    fn class(&self) -> u32 {
        0x07_80_00 // communication controller, other
    }

    /// Streams alone: a Unix socket's messages have no ends within them that a guest could be told of.
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn takes(&self, _features: u64, state: &DeviceState) -> bool {
        matches!(state, DeviceState::None | DeviceState::Vsock(_))
    }

    fn set_state(&mut self, state: &DeviceState) {
        if !self.is_own(state) {
            lock(&self.hub).reset();
        }
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let reset_is_due = match activation.state() {
            DeviceState::Vsock(state) => state.reset_is_due || !self.is_own(activation.state()),
            _ => false,
        };
        lock(&self.hub).resume();
        let state = DeviceState::Vsock(VsockState {
            session: self.session,
            reset_is_due,
        });
        let queues = (
            activation.take_queue(RECEIVE_QUEUE)?,
            activation.take_queue(TRANSMIT_QUEUE)?,
        );
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        if let (Some(receive), Some(transmit)) = queues {
            workers.push(Box::new(SocketWorker {
                name: self.name.clone(),
                ram: activation.ram().clone(),
                receive,
                transmit,
                events: EventQueue::take(&mut activation, reset_is_due)?,
                hub: Arc::clone(&self.hub),
                session: self.session,
            }));
        }
        activation.run(workers, state)
    }
}
