//! The way of a frame from the tap to the guest's buffers.
//!
//! A tap hands over a frame a call. As many as fit into a batch go into the guest's buffers one after another, and the
//! driver hears of them together: the used ring is published once, and it is interrupted once where it wants that.

use std::io::{self, Read};

use super::frame::{HEAD, Rules, Unfinished};
use super::worker::{BATCH, Budget, End};
use crate::memory::RamMap;
use crate::virtio::chain::Chain;
use crate::virtio::error::QueueError;
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::net;

/// The largest packet that the kernel hands over at once: 64 KiB of segments with their headers.
const MAX_PACKET: usize = net::HEADER_SIZE + 65536 + 18;
/// Most buffers that one packet is spread over. A driver with smaller ones loses large packets.
const MAX_BUFFERS: usize = 256;

/// One queue's receiver. A packet that finds no buffers waits here, and those behind it in the tap,
/// whose own queue is bounded and drops.
#[derive(Debug)]
pub(super) struct Receiver {
    packet: Vec<u8>,
    /// Bytes of `packet` that wait for buffers.
    pending: usize,
    mergeable: bool,
    rules: Rules,
    dropped: u64,
    /// Buffers that are filled and that the driver has not heard of yet.
    filled: Vec<(u16, usize)>,
    /// How many frames they are.
    frames: usize,
}

/// Whether a tap could have given these bytes.
pub(super) fn is_packet(bytes: &[u8]) -> bool {
    (net::HEADER_SIZE..=MAX_PACKET).contains(&bytes.len())
}

/// What became of the waiting packet.
enum Delivery {
    Done,
    Dropped,
    NoBuffers,
}

impl Receiver {
    /// `waiting` is a packet that waits for buffers, or empty.
    pub(super) fn new(features: u64, rules: Rules, waiting: &[u8]) -> Self {
        let mut packet = vec![0; MAX_PACKET];
        for (to, from) in packet.iter_mut().zip(waiting) {
            *to = *from;
        }
        Self {
            packet,
            pending: waiting.len().min(MAX_PACKET),
            mergeable: features & net::F_MRG_RXBUF != 0,
            rules,
            dropped: 0,
            filled: Vec::with_capacity(BATCH),
            frames: 0,
        }
    }

    /// The packet that waits for buffers.
    pub(super) fn waiting(&self) -> Option<&[u8]> {
        self.packet
            .get(..self.pending)
            .filter(|packet| !packet.is_empty())
    }

    /// Moves packets until the tap is empty or the guest has no buffers, or a round is over.
    pub(super) fn receive(
        &mut self,
        end: &End<'_>,
        queue: &mut Virtqueue,
        memory: &RamMap,
    ) -> Result<(), QueueError> {
        queue.disable_notification(memory)?;
        let round = self.round(end, queue, memory);
        // The driver hears of what it has, whatever became of the buffers behind.
        self.publish(queue, memory)?;
        round
    }

    fn round(
        &mut self,
        end: &End<'_>,
        queue: &mut Virtqueue,
        memory: &RamMap,
    ) -> Result<(), QueueError> {
        let mut tap = end.queue;
        let mut budget = Budget::new();
        while !budget.is_spent() {
            if self.pending == 0 {
                match tap.read(&mut self.packet) {
                    Ok(size) if size >= net::HEADER_SIZE => self.pending = size,
                    Ok(_) => {
                        budget.spend(0);
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // Empty, or the pair is detached or the interface gone: its next event tells.
                    Err(_) => return Ok(()),
                }
            }
            let size = self.pending;
            if !end.cable.is_plugged() || !self.may_pass(end) {
                end.counts.dropped();
                self.pending = 0;
                budget.spend(size);
                continue;
            }
            match self.deliver(queue, memory)? {
                Delivery::Done => {
                    end.counts.received(size.saturating_sub(net::HEADER_SIZE));
                    self.pending = 0;
                    budget.spend(size);
                }
                Delivery::Dropped => {
                    end.counts.dropped();
                    self.pending = 0;
                    budget.spend(size);
                }
                Delivery::NoBuffers => {
                    self.publish(queue, memory)?;
                    if !queue.enable_notification(memory)? {
                        return Ok(());
                    }
                    queue.disable_notification(memory)?;
                    // A driver that makes nothing available again and again has its round, too.
                    budget.spend(0);
                }
            }
        }
        queue.wake_again();
        Ok(())
    }

    /// Whether the waiting packet is one that the driver takes: of those that came before it chose what it takes
    /// unfinished some are not.
    fn may_pass(&mut self, end: &End<'_>) -> bool {
        let unfinished = Unfinished::to_guest(end.tap.offloads());
        let Some(head) = self.packet.first_chunk::<HEAD>() else {
            return false;
        };
        if let Err(why) = self.rules.check(head, self.pending, unfinished) {
            log::trace!("a packet for the guest is lost: {why:?}");
            return false;
        }
        // A driver that knows nothing of checksums knows no flag of theirs. Virtio 1.3 §5.1.6.4.1
        if let (false, Some(flags)) = (unfinished.checksums(), self.packet.first_mut()) {
            *flags = 0;
        }
        true
    }

    /// Has the driver hear of the buffers that are filled.
    fn publish(&mut self, queue: &mut Virtqueue, memory: &RamMap) -> Result<(), QueueError> {
        self.frames = 0;
        queue.complete_batch(memory, &mut self.filled)
    }

    fn deliver(&mut self, queue: &mut Virtqueue, memory: &RamMap) -> Result<Delivery, QueueError> {
        let mut chains: Vec<Chain<'_>> = Vec::new();
        let mut room = 0_usize;
        let enough = loop {
            let Some(chain) = queue.pop(memory)? else {
                break None;
            };
            if chain.writable.len() < net::HEADER_SIZE {
                return Err(chain.malformed("a receive buffer shorter than a packet's header"));
            }
            room = room.saturating_add(chain.writable.len());
            chains.push(chain);
            if room >= self.pending {
                break Some(true);
            }
            if !self.mergeable || chains.len() == MAX_BUFFERS {
                break Some(false);
            }
        };
        if enough != Some(true) {
            for _ in &chains {
                queue.undo_pop();
            }
            if enough.is_none() {
                return Ok(Delivery::NoBuffers);
            }
            self.dropped = self.dropped.saturating_add(1);
            log::debug!(
                "{} packets dropped: larger than the driver's buffers",
                self.dropped
            );
            return Ok(Delivery::Dropped);
        }
        let count = (chains.len() as u16).to_le_bytes();
        let field = net::HEADER_NUM_BUFFERS..net::HEADER_SIZE;
        if let Some(num_buffers) = self.packet.get_mut(field) {
            num_buffers.copy_from_slice(&count);
        }
        let mut rest = self.packet.get(..self.pending).unwrap_or_default();
        for mut chain in chains {
            let written = chain.writable.write(rest);
            rest = rest.get(written..).unwrap_or_default();
            self.filled.push((chain.head(), written));
        }
        self.frames = self.frames.saturating_add(1);
        if self.frames >= BATCH || self.filled.len() >= MAX_BUFFERS {
            self.publish(queue, memory)?;
        }
        Ok(Delivery::Done)
    }
}
