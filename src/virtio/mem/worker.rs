//! The worker of a memory device: it takes the driver's requests one after another.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use busway_pci::Complaints;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::Shared;
use crate::memory::{GuestRam, PlugError, Plugged};
use crate::virtio::error::QueueError;
use crate::virtio::life::Progress;
use crate::virtio::queue::{Served, Virtqueue};
use crate::virtio::segments::Segments;
use crate::virtio::spec::mem;
use crate::virtio::worker::{Worker, doorbell_events};

/// Failures of the host's that are warnings in the log.
const LOUD: u32 = 4;

/// Serves the queue of requests.
#[derive(Debug)]
pub(super) struct MemWorker {
    name: String,
    ram: GuestRam,
    queue: Option<Virtqueue>,
    shared: Arc<Shared>,
    complaints: Complaints,
}

/// A request of the driver's. `struct virtio_mem_req`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    kind: u16,
    address: u64,
    blocks: u16,
}

/// The answer to a request, and the state that it asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Response {
    kind: u16,
    state: u16,
}

impl Request {
    /// Nothing, where the driver's buffers hold less than a request.
    fn take(from: &mut Segments<'_>) -> Option<Self> {
        let bytes: [u8; mem::REQUEST_SIZE] = from.take()?;
        let (kind, rest) = bytes.split_first_chunk()?;
        let (address, rest) = rest.get(6..)?.split_first_chunk()?;
        Some(Self {
            kind: u16::from_le_bytes(*kind),
            address: u64::from_le_bytes(*address),
            blocks: u16::from_le_bytes(*rest.first_chunk()?),
        })
    }
}

impl Response {
    const fn of(kind: u16) -> Self {
        Self { kind, state: 0 }
    }

    fn bytes(self) -> [u8; mem::RESPONSE_SIZE] {
        let ([a, b], [c, d]) = (self.kind.to_le_bytes(), self.state.to_le_bytes());
        [a, b, 0, 0, 0, 0, 0, 0, c, d]
    }
}

impl MemWorker {
    pub(super) fn new(
        name: &str,
        ram: &GuestRam,
        queue: Option<Virtqueue>,
        shared: &Arc<Shared>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            ram: ram.clone(),
            queue,
            shared: Arc::clone(shared),
            complaints: Complaints::first(LOUD),
        }
    }
}

impl Shared {
    /// Does what a request asks for, while `go_on` says so; nothing where it was stopped, and all is as before.
    fn answer(
        &self,
        request: Request,
        go_on: impl Fn() -> bool,
        host: impl Fn(&PlugError),
    ) -> Option<Response> {
        let blocks = self.pluggable.range(request.address, request.blocks.into());
        let done = match (request.kind, blocks) {
            (mem::REQ_UNPLUG_ALL, _) => self.pluggable.unplug_all(go_on),
            (mem::REQ_PLUG, Some(blocks)) if self.state_is(&blocks, Plugged::None) => {
                if !self.may_plug(&blocks) {
                    return Some(Response::of(mem::RESP_NACK));
                }
                self.pluggable.plug(&blocks, go_on)
            }
            (mem::REQ_UNPLUG, Some(blocks)) if self.state_is(&blocks, Plugged::All) => {
                self.pluggable.unplug(&blocks, go_on)
            }
            (mem::REQ_STATE, Some(blocks)) => {
                let state = match self.pluggable.state(&blocks) {
                    Plugged::All => mem::STATE_PLUGGED,
                    Plugged::None => mem::STATE_UNPLUGGED,
                    Plugged::Some => mem::STATE_MIXED,
                };
                let kind = mem::RESP_ACK;
                return Some(Response { kind, state });
            }
            _ => return Some(Response::of(mem::RESP_ERROR)),
        };
        self.show();
        match done {
            Ok(()) => Some(Response::of(mem::RESP_ACK)),
            Err(PlugError::Stopped) => None,
            // What the host cannot do now it may do later: the driver asks again.
            Err(error) => {
                host(&error);
                Some(Response::of(mem::RESP_BUSY))
            }
        }
    }

    fn state_is(&self, blocks: &Range<u64>, state: Plugged) -> bool {
        self.pluggable.state(blocks) == state
    }

    /// Whether the guest would have no more with `blocks` than it is to have.
    fn may_plug(&self, blocks: &Range<u64>) -> bool {
        let count = blocks.end.saturating_sub(blocks.start);
        let more = count.saturating_mul(self.pluggable.block_size());
        let then = self.pluggable.plugged().saturating_add(more);
        then <= self.requested.load(Relaxed)
    }
}

impl Worker for MemWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "memory"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let queue = self.queue.iter();
        queue
            .map(|queue| (queue.doorbell(), doorbell_events()))
            .collect()
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let memory = self.ram.memory();
        let (shared, complaints, name) = (&self.shared, &self.complaints, &self.name);
        let stop = queue.stop();
        queue.drain(&memory, |mut chain| {
            let host = |error: &PlugError| {
                log::log!(
                    complaints.next(log::Level::Warn),
                    "{name}: the guest is told to try again later: {error}"
                );
            };
            let go_on = || !stop.load(Relaxed);
            let response = match Request::take(&mut chain.readable) {
                Some(request) => shared.answer(request, go_on, host),
                None => Some(Response::of(mem::RESP_ERROR)),
            };
            Ok(match response {
                Some(response) => Served::Done(chain.writable.write(&response.bytes())),
                None => Served::Left,
            })
        })
    }

    fn leave(&mut self, progress: &mut Progress) {
        if let Some(queue) = &self.queue {
            queue.leave(progress);
        }
    }
}
