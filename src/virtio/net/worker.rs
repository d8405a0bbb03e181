//! The thread that serves a pair of queues, and the control queue beside the first.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::cable::Cable;
use super::control::Control;
use super::receive::Receiver;
use super::tap::Tap;
use super::transmit::Transmitter;
use crate::memory::GuestRam;
use crate::virtio::counts::NetCounts;
use crate::virtio::error::QueueError;
use crate::virtio::life::{DeviceState, Progress, WaitingPacket};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::{Worker, doorbell_events};

/// Most frames of one round of a direction, after which the worker's other queues have their turn, and
/// most bytes of them. A frame may be as long as 64 KiB.
pub(super) const ROUND: usize = 256;
pub(super) const ROUND_BYTES: usize = 1 << 20;
/// Most frames that the driver is told of together: it has to be told of the first before long, and hears once of all.
pub(super) const BATCH: usize = 64;

/// What a round may still do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    frames: usize,
    bytes: usize,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self {
            frames: ROUND,
            bytes: ROUND_BYTES,
        }
    }

    /// A frame of so many bytes is done.
    pub(super) fn spend(&mut self, bytes: usize) {
        self.frames = self.frames.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    pub(super) fn is_spent(&self) -> bool {
        self.frames == 0 || self.bytes == 0
    }
}

/// The host's end of a pair of queues.
#[derive(Debug)]
pub(super) struct End<'a> {
    /// The tap's queue.
    pub(super) queue: &'a File,
    /// The tap.
    pub(super) tap: &'a Tap,
    pub(super) cable: &'a Cable,
    pub(super) counts: &'a NetCounts,
}

/// Serves one pair of queues; the first pair's also the control queue.
#[derive(Debug)]
pub(super) struct NetWorker {
    pub(super) name: String,
    pub(super) pair: u16,
    pub(super) ram: GuestRam,
    pub(super) queue: Arc<File>,
    pub(super) tap: Arc<Tap>,
    pub(super) cable: Arc<Cable>,
    pub(super) counts: Arc<NetCounts>,
    pub(super) receive: Virtqueue,
    pub(super) transmit: Virtqueue,
    pub(super) receiver: Receiver,
    pub(super) transmitter: Transmitter,
    pub(super) control: Option<(Virtqueue, Control)>,
}

const TRANSMIT: usize = 2;
const CONTROL: usize = 3;

impl Worker for NetWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "net"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let mut sources = vec![
            (self.queue.as_raw_fd(), doorbell_events()),
            (self.receive.doorbell(), doorbell_events()),
            (self.transmit.doorbell(), doorbell_events()),
        ];
        if let Some((queue, _)) = &self.control {
            sources.push((queue.doorbell(), doorbell_events()));
        }
        sources
    }

    fn wake(&mut self, source: usize) -> Result<(), QueueError> {
        let memory = self.ram.memory();
        if let (CONTROL, Some((queue, control))) = (source, &mut self.control) {
            return queue.drain(&memory, |chain| control.serve(chain));
        }
        let end = End {
            queue: &self.queue,
            tap: &self.tap,
            cable: &self.cable,
            counts: &self.counts,
        };
        match source {
            TRANSMIT => self.transmitter.transmit(&end, &mut self.transmit, &memory),
            _ => self.receiver.receive(&end, &mut self.receive, &memory),
        }
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.receive.leave(progress);
        self.transmit.leave(progress);
        super::leave_control(self.control.as_ref(), progress);
        let DeviceState::Net(state) = &mut progress.device else {
            return;
        };
        if let Some(packet) = self.receiver.waiting() {
            state.waiting.push(WaitingPacket {
                pair: self.pair,
                bytes: packet.to_vec(),
            });
        }
    }
}
