//! The way of a frame from the guest's buffers to the tap.
//!
//! A tap takes a frame a call. Of what the driver has made available as many frames as fit into a batch go one after
//! another, and are returned to it together: the used ring is published once, and it is interrupted once where it wants
//! that.

use std::os::fd::AsFd;

use super::frame::{HEAD, Refused, Rules, Unfinished};
use super::worker::{BATCH, Budget, End};
use crate::memory::RamMap;
use crate::virtio::chain::Chain;
use crate::virtio::error::QueueError;
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::net;

/// One queue's transmitter.
#[derive(Debug)]
pub(super) struct Transmitter {
    rules: Rules,
    unfinished: Unfinished,
    /// Chains whose frames are sent, or lost, and that are not returned yet.
    done: Vec<(u16, usize)>,
}

/// Where a batch has ended.
enum Batch {
    /// There may be more.
    Full,
    /// Nothing is available, or the device is being stopped.
    Empty,
}

impl Transmitter {
    /// For a driver that has agreed on `features`.
    pub(super) fn new(features: u64, rules: Rules) -> Self {
        Self {
            rules,
            unfinished: Unfinished::to_host(features),
            done: Vec::with_capacity(BATCH),
        }
    }

    /// Sends what is available, until that is all and the driver knows that it has to notify, or a round is over.
    pub(super) fn transmit(
        &mut self,
        end: &End<'_>,
        queue: &mut Virtqueue,
        memory: &RamMap,
    ) -> Result<(), QueueError> {
        queue.disable_notification(memory)?;
        let mut budget = Budget::new();
        loop {
            let batch = self.send_batch(end, queue, memory, &mut budget);
            // What is sent is returned, whatever became of the chain behind it.
            queue.complete_batch(memory, &mut self.done)?;
            match batch? {
                _ if budget.is_spent() => {
                    queue.wake_again();
                    return Ok(());
                }
                Batch::Full => {}
                Batch::Empty => {
                    if !queue.enable_notification(memory)? {
                        return Ok(());
                    }
                    queue.disable_notification(memory)?;
                }
            }
        }
    }

    fn send_batch(
        &mut self,
        end: &End<'_>,
        queue: &mut Virtqueue,
        memory: &RamMap,
        budget: &mut Budget,
    ) -> Result<Batch, QueueError> {
        while self.done.len() < BATCH && !budget.is_spent() {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(Batch::Empty);
            };
            budget.spend(chain.readable.len());
            let head = chain.head();
            self.send(end, chain);
            self.done.push((head, 0));
        }
        Ok(Batch::Full)
    }

    /// Sends a frame. One that may not pass, or that the kernel does not take, for its header is wrong or the interface
    /// down, is lost, as on a wire.
    fn send(&self, end: &End<'_>, mut chain: Chain<'_>) {
        if !end.cable.is_plugged() {
            return end.counts.refused();
        }
        // What is looked at is sent as it was looked at: the guest can change its own copy meanwhile.
        let mut head = [0; HEAD];
        let length = chain.readable.len();
        chain.readable.read(&mut head);
        match self.rules.check(&head, length, self.unfinished) {
            Ok(()) => {}
            Err(Refused::Source) => return end.counts.spoofed(),
            Err(_) => return end.counts.refused(),
        }
        match chain.readable.send_behind(&head, end.queue.as_fd()) {
            Ok(sent) => end.counts.sent(sent.saturating_sub(net::HEADER_SIZE)),
            Err(error) => {
                end.counts.refused();
                log::trace!("a packet was not sent: {error}");
            }
        }
    }
}
