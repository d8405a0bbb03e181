//! The queue of events, of which there is one: the host's ends of all connections are gone. It is sent where a driver finds
//! itself on another device than the one that it began with. Virtio 1.3 §5.10.6.7

use std::os::fd::RawFd;

use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use super::EVENT_QUEUE;
use crate::memory::RamMap;
use crate::virtio::activation::Activation;
use crate::virtio::error::{QueueError, StartError};
use crate::virtio::life::Progress;
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::vsock;
use crate::virtio::worker::doorbell_events;

/// The driver's buffers for events, and what it has to hear.
#[derive(Debug)]
pub(super) struct EventQueue {
    queue: Option<Virtqueue>,
    /// The driver is to be told that its connections are gone.
    reset_is_due: bool,
}

impl EventQueue {
    pub(super) fn take(
        activation: &mut Activation,
        reset_is_due: bool,
    ) -> Result<Self, StartError> {
        Ok(Self {
            queue: activation.take_queue(EVENT_QUEUE)?,
            reset_is_due,
        })
    }

    pub(super) fn reset_is_due(&self) -> bool {
        self.reset_is_due
    }

    /// What wakes the worker that sends events.
    pub(super) fn source(&self) -> Option<(RawFd, EventSet)> {
        let queue = self.queue.as_ref()?;
        Some((queue.doorbell(), doorbell_events()))
    }

    /// Tells the driver that its connections are gone, where it is to hear that and has a buffer for it.
    pub(super) fn send_reset(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut().filter(|_| self.reset_is_due) else {
            return Ok(());
        };
        let event = U32::new(vsock::EVENT_TRANSPORT_RESET);
        let Some(mut chain) = queue.pop(memory)? else {
            queue.enable_notification(memory)?;
            return Ok(());
        };
        if chain.writable.len() < event.as_bytes().len() {
            return Err(chain.malformed("an event's buffer shorter than an event"));
        }
        let head = chain.head();
        let written = chain.writable.write(event.as_bytes());
        queue.complete(memory, head, written)?;
        queue.interrupt(memory)?;
        self.reset_is_due = false;
        Ok(())
    }

    pub(super) fn leave(&self, progress: &mut Progress) {
        if let Some(queue) = &self.queue {
            queue.leave(progress);
        }
    }
}
