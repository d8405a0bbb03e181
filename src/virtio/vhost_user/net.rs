//! A NIC's control queue, which is served here: of its commands one reaches the back end, how many pairs of queues are
//! in use. Filters of what comes in are not offered, for the back end decides that.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use busway_pci::Complaints;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::link::Shared;
use crate::memory::GuestRam;
use crate::virtio::activation::Activation;
use crate::virtio::error::{QueueError, StartError};
use crate::virtio::life::{DeviceState, Progress};
use crate::virtio::net::{Commanded, Control, leave_control};
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::net;
use crate::virtio::worker::{Worker, doorbell_events};

/// Refused control commands of a run that are warnings in the log.
const LOGGED_ERRORS: u32 = 8;

impl Commanded for Shared {
    fn described(&self) -> String {
        self.described.clone()
    }

    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        self.serve_up_to(pairs.saturating_mul(2))
    }

    /// What is handed over unfinished is agreed on at the start, and not changed: the protocol has no word for it.
    fn set_offloads(&self, _offloads: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Serves the control queue. A command waits for the back end here, and its driver for that; nobody else does.
#[derive(Debug)]
pub(super) struct ControlWorker {
    name: String,
    ram: GuestRam,
    control: Option<(Virtqueue, Control)>,
}

impl ControlWorker {
    /// For the NIC `name`, whose control queue comes after its first `queues` queues; `None` where its driver has
    /// none.
    ///
    /// # Errors
    /// [`StartError`]: the queue is not in RAM.
    pub(super) fn of(
        name: &str,
        shared: &Arc<Shared>,
        queues: u16,
        state: &DeviceState,
        activation: &mut Activation,
    ) -> Result<Option<Self>, StartError> {
        let features = activation.features();
        let DeviceState::Net(state) = state else {
            return Ok(None);
        };
        if features & net::F_CTRL_VQ == 0 {
            return Ok(None);
        }
        let Some(queue) = activation.take_queue(queues)? else {
            return Ok(None);
        };
        let complaints = Arc::new(Complaints::first(LOGGED_ERRORS));
        let end = Arc::clone(shared) as _;
        let control = Control::new(end, queues / 2, features, state, complaints);
        Ok(Some(Self {
            name: name.to_owned(),
            ram: activation.ram().clone(),
            control: Some((queue, control)),
        }))
    }
}

impl Worker for ControlWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "net"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let control = self.control.iter();
        control
            .map(|(queue, _)| (queue.doorbell(), doorbell_events()))
            .collect()
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let Some((queue, control)) = &mut self.control else {
            return Ok(());
        };
        let memory = self.ram.memory();
        queue.drain(&memory, |chain| control.serve(chain))
    }

    fn leave(&mut self, progress: &mut Progress) {
        leave_control(self.control.as_ref(), progress);
    }
}
