//! A virtqueue as a device's worker sees it: chains that are whole and lie in RAM, and completions
//! that interrupt only where the driver asked for it.
//!
//! The rings are the `virtio-queue` crate's. The way along a chain is [`chain`]'s, which refuses what that
//! crate lets pass in silence.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use busway_vfio::EventFd;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{self, Chain, Table};
use super::error::{QueueError, StartError};
use super::interrupts::Interrupts;
use super::life::{Progress, QueuePosition};
use super::spec;
use crate::memory::RamMap;

/// One enabled queue: all that somebody needs to serve it, in this process or in another.
///
/// A device of Busway's own builds a [`Virtqueue`] from it. A back end elsewhere is given the addresses,
/// the position and the two events.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// The queue's number.
    pub index: u16,
    /// Descriptors: a power of two.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring.
    pub avail: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Where the device is in the rings.
    pub position: QueuePosition,
    /// Signalled by the driver's notifications.
    pub kick: EventFd,
    /// Interrupts the driver.
    pub call: Call,
}

impl QueueSetup {
    /// The ring, where all of it lies in `memory`.
    ///
    /// # Errors
    /// [`StartError::Queue`]: a size or an address that no queue can have, or a ring outside of RAM.
    pub(super) fn ring(&self, memory: &RamMap) -> Result<Queue, StartError> {
        let failed = |source| StartError::Queue {
            index: self.index,
            source,
        };
        let queue = Queue::try_from(QueueState {
            max_size: self.size,
            size: self.size,
            next_avail: self.position.next_avail,
            next_used: self.position.next_used,
            event_idx_enabled: self.event_idx,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        })
        .map_err(failed)?;
        if !queue.is_valid(memory) {
            return Err(failed(virtio_queue::Error::FindMemoryRegion));
        }
        Ok(queue)
    }
}

/// How the driver is told that a queue has used buffers.
#[derive(Clone, Debug)]
pub struct Call {
    interrupts: Arc<Interrupts>,
    queue: u16,
}

impl Call {
    pub(super) fn new(interrupts: Arc<Interrupts>, queue: u16) -> Self {
        Self { interrupts, queue }
    }

    /// Interrupts the driver by the queue's vector. Whether the driver wants that is the caller's to
    /// find out.
    pub fn signal(&self) {
        self.interrupts.queue(self.queue);
    }

    /// The eventfd that does the same without this process, for a back end in another. `None` while
    /// the driver has never unmasked the vector, or has none: then [`signal`](Self::signal) is the only
    /// way, and whoever has an eventfd of a back end's waits for it and calls that.
    #[must_use]
    pub fn event(&self) -> Option<Arc<OwnedFd>> {
        self.interrupts.queue_event(self.queue)
    }

    /// Has `changed` signalled whenever [`event`](Self::event) may be another, for as long as somebody keeps it.
    pub fn watch(&self, changed: &EventFd) {
        self.interrupts.watch(changed);
    }
}

/// One enabled queue, owned by its worker.
#[derive(Debug)]
pub(crate) struct Virtqueue {
    index: u16,
    queue: Queue,
    /// The used index when the driver was last considered for an interrupt.
    reported_used: u16,
    doorbell: EventFd,
    call: Call,
    stop: Arc<AtomicBool>,
}

/// What became of a chain that was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// It is done, and so many bytes of it have been written.
    Done(usize),
    /// The device is being stopped. The chain stays available, for the next start.
    Left,
}

impl Virtqueue {
    /// `ring` is the one that `setup` describes. Where `stop` says so, nothing more is taken from it.
    pub(crate) fn new(setup: QueueSetup, ring: Queue, stop: Arc<AtomicBool>) -> Self {
        Self {
            index: setup.index,
            reported_used: ring.next_used(),
            queue: ring,
            doorbell: setup.kick,
            call: setup.call,
            stop,
        }
    }

    /// Notes the position in the queue.
    pub(crate) fn leave(&self, progress: &mut Progress) {
        let position = QueuePosition {
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        };
        progress.set_queue(self.index, position);
    }

    /// Its number.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Whether the device is being stopped.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Descriptors in the ring.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// What the driver's notification signals.
    pub(crate) fn doorbell(&self) -> RawFd {
        self.doorbell.as_fd().as_raw_fd()
    }

    /// The flag that says that the device is being stopped.
    pub(crate) fn stop(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Wakes the queue's own worker once more: for a worker that leaves work for the next round, so
    /// that its other sources have their turn.
    pub(crate) fn wake_again(&self) {
        self.doorbell.signal();
    }

    /// The next chain; `None` where there is none, and while the device is being stopped.
    pub(crate) fn pop<'m>(&mut self, memory: &'m RamMap) -> Result<Option<Chain<'m>>, QueueError> {
        if self.is_stopping() {
            return Ok(None);
        }
        let Some(head) = self.queue.iter(memory)?.next() else {
            return Ok(None);
        };
        let head = head.head_index();
        self.chain(memory, head).map(Some)
    }

    /// The chain that begins with descriptor `head`: of what was popped by an earlier run and not completed.
    pub(crate) fn chain<'m>(&self, memory: &'m RamMap, head: u16) -> Result<Chain<'m>, QueueError> {
        let table = Table {
            address: self.queue.desc_table(),
            size: self.queue.size().into(),
        };
        chain::walk(memory, table, head).map_err(|what| QueueError::Chain { head, what })
    }

    /// Gives back the last chain that was popped, to be popped again.
    pub(crate) fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns the chain `head`, of which `written` bytes have been written, to the driver.
    pub(crate) fn complete(
        &mut self,
        memory: &RamMap,
        head: u16,
        written: usize,
    ) -> Result<(), QueueError> {
        self.complete_together(memory, &[(head, written)])
    }

    /// Returns several chains, each with the bytes written to it, of which the driver sees all or
    /// none.
    pub(crate) fn complete_together(
        &mut self,
        memory: &RamMap,
        chains: &[(u16, usize)],
    ) -> Result<(), QueueError> {
        let Some((&last, before)) = chains.split_last() else {
            return Ok(());
        };
        let length = |written| u32::try_from(written).unwrap_or(u32::MAX);
        for &(head, written) in before {
            // `virtq_used_elem`, virtio 1.3 §2.7.8; out of the driver's sight up to `add_used`.
            let next = self.queue.next_used();
            let slot = u64::from(next.checked_rem(self.queue.size()).unwrap_or(0));
            let element = [u32::from(head).to_le(), length(written).to_le()];
            let at = self.queue.used_ring().saturating_add(4 + 8 * slot);
            memory
                .write_obj(element, GuestAddress(at))
                .map_err(virtio_queue::Error::GuestMemory)?;
            self.queue.set_next_used(next.wrapping_add(1));
        }
        Ok(self.queue.add_used(memory, last.0, length(last.1))?)
    }

    /// Returns the chains of `batch`, each with the bytes written to it, of which the driver sees all or none, and
    /// interrupts it once, where it wants that. The batch is empty afterwards.
    pub(crate) fn complete_batch(
        &mut self,
        memory: &RamMap,
        batch: &mut Vec<(u16, usize)>,
    ) -> Result<(), QueueError> {
        if batch.is_empty() {
            return Ok(());
        }
        let completed = self.complete_together(memory, batch);
        batch.clear();
        completed?;
        self.interrupt(memory)
    }

    /// Interrupts the driver for what has been completed, where it wants that.
    pub(crate) fn interrupt(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        if self.wants_interrupt(memory)? {
            self.call.signal();
        }
        Ok(())
    }

    /// Virtio 1.3 §2.7.7: by `used_event`, or by the available ring's flags.
    fn wants_interrupt(&mut self, memory: &RamMap) -> Result<bool, QueueError> {
        let used = self.queue.next_used();
        let reported = std::mem::replace(&mut self.reported_used, used);
        // The used index is stored before the driver's wish is read.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let event_idx = self.queue.event_idx_enabled();
        let offset = if event_idx {
            4 + 2 * u64::from(self.queue.size())
        } else {
            0
        };
        let wish: u16 = memory
            .load(
                GuestAddress(avail.saturating_add(offset)),
                Ordering::Relaxed,
            )
            .map_err(virtio_queue::Error::GuestMemory)?;
        let wish = u16::from_le(wish);
        Ok(if event_idx {
            used.wrapping_sub(wish).wrapping_sub(1) < used.wrapping_sub(reported)
        } else {
            wish & spec::AVAIL_F_NO_INTERRUPT == 0
        })
    }

    /// Asks the driver to notify; says whether chains have come meanwhile, for which it need not.
    pub(crate) fn enable_notification(&mut self, memory: &RamMap) -> Result<bool, QueueError> {
        let more = self.queue.enable_notification(memory)?;
        Ok(more && !self.is_stopping())
    }

    /// Lets the driver know that it need not notify.
    pub(crate) fn disable_notification(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Serves what is available: `serve` handles one chain and says what became of it.
    ///
    /// Ends when the queue is empty and the driver knows that it has to notify, or after a round of
    /// the ring's size, with the worker's next wake-up already signalled, or when a chain is left.
    pub(crate) fn drain(
        &mut self,
        memory: &RamMap,
        mut serve: impl FnMut(Chain<'_>) -> Result<Served, QueueError>,
    ) -> Result<(), QueueError> {
        self.disable_notification(memory)?;
        let mut budget = self.size();
        loop {
            while let Some(chain) = self.pop(memory)? {
                let head = chain.head();
                let Served::Done(written) = serve(chain)? else {
                    self.undo_pop();
                    return Ok(());
                };
                self.complete(memory, head, written)?;
                self.interrupt(memory)?;
                budget = budget.saturating_sub(1);
                if budget == 0 {
                    self.wake_again();
                    return Ok(());
                }
            }
            if !self.enable_notification(memory)? {
                return Ok(());
            }
            self.disable_notification(memory)?;
        }
    }
}
