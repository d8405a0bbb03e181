//! The worker of persistent memory's queue: takes requests, and answers them when what was written before is on the
//! host's storage. Virtio 1.3 §5.19.6

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::flusher::{Flusher, Ticket};
use crate::memory::{GuestRam, RamMap};
use crate::virtio::chain::Chain;
use crate::virtio::error::QueueError;
use crate::virtio::life::Progress;
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::pmem;
use crate::virtio::worker::{Worker, doorbell_events};

/// Bytes of a request, and of its answer: a number each.
const NUMBER: usize = 4;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Flush,
    /// Something that nobody knows.
    Unknown,
}

#[derive(Debug)]
pub(super) struct PmemWorker {
    name: String,
    ram: GuestRam,
    queue: Virtqueue,
    flusher: Option<Arc<Flusher>>,
    /// Requests that were taken and are to be answered when `ticket` is over; one flush is for all of them.
    batch: Vec<(u16, Asked)>,
    ticket: Ticket,
}

impl PmemWorker {
    pub(super) fn new(
        name: &str,
        ram: GuestRam,
        queue: Virtqueue,
        flusher: Option<Arc<Flusher>>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            ram,
            queue,
            flusher,
            batch: Vec::new(),
            ticket: 0,
        }
    }

    /// Takes what is available, and asks for one flush for all that wants one.
    fn take(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        while self.batch.len() < usize::from(self.queue.size()) {
            let Some(mut chain) = self.queue.pop(memory)? else {
                break;
            };
            let asked = asked(&mut chain);
            self.batch.push((chain.head(), asked));
        }
        if let Some(flusher) = &self.flusher
            && self.batch.iter().any(|(_, asked)| *asked == Asked::Flush)
        {
            self.ticket = flusher.ask();
        }
        Ok(())
    }

    /// What the batch is answered with; `None` while the flush goes on.
    fn outcome(&self) -> Option<bool> {
        match &self.flusher {
            Some(flusher) => flusher.outcome(self.ticket),
            None => Some(true),
        }
    }

    /// Answers the batch.
    fn answer(&mut self, memory: &RamMap, is_there: bool) -> Result<(), QueueError> {
        let mut answered = Vec::new();
        for (head, asked) in std::mem::take(&mut self.batch) {
            // The driver can have changed the chain meanwhile.
            let mut chain = self.queue.chain(memory, head)?;
            let result = match asked {
                Asked::Flush if is_there => pmem::RESP_OK,
                Asked::Flush | Asked::Unknown => pmem::RESP_EIO,
            };
            let written = match chain.writable.len() {
                NUMBER.. => chain.writable.write(&result.to_le_bytes()),
                _ => 0,
            };
            answered.push((head, written));
        }
        self.queue.complete_together(memory, &answered)?;
        self.queue.interrupt(memory)
    }
}

/// What `chain` asks for. A request that is too short asks for nothing that is known.
fn asked(chain: &mut Chain<'_>) -> Asked {
    let mut number = [0; NUMBER];
    let read = chain.readable.read(&mut number);
    match (read, u32::from_le_bytes(number)) {
        (NUMBER, pmem::REQ_FLUSH) => Asked::Flush,
        _ => Asked::Unknown,
    }
}

impl Worker for PmemWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "pmem"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let done = self.flusher.as_ref().map(|flusher| flusher.done());
        let done = done.map(|done| done.as_fd().as_raw_fd());
        let sources = std::iter::once(self.queue.doorbell()).chain(done);
        sources.map(|fd| (fd, doorbell_events())).collect()
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let ram = self.ram.clone();
        let memory = ram.memory();
        // A driver that never stops asking lets the worker look at its end.
        for _ in 0..self.queue.size() {
            if self.batch.is_empty() {
                self.take(&memory)?;
            }
            if self.batch.is_empty() {
                if !self.queue.enable_notification(&memory)? {
                    return Ok(());
                }
                continue;
            }
            let Some(is_there) = self.outcome() else {
                return Ok(());
            };
            self.answer(&memory, is_there)?;
        }
        self.queue.wake_again();
        Ok(())
    }

    /// What is not answered is asked for again by the next run: to flush twice does no harm.
    fn leave(&mut self, progress: &mut Progress) {
        for _ in self.batch.drain(..) {
            self.queue.undo_pop();
        }
        self.queue.leave(progress);
    }
}
