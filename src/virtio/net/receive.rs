//! The way of a packet from the tap to the guest's buffers.

use std::fs::File;
use std::io::{self, Read};

use super::cable::Cable;
use crate::memory::RamMap;
use crate::virtio::chain::Chain;
use crate::virtio::counts::NetCounts;
use crate::virtio::error::QueueError;
use crate::virtio::queue::Virtqueue;
use crate::virtio::spec::net;

/// The largest packet that the kernel hands over at once: 64 KiB of segments with their headers.
const MAX_PACKET: usize = net::HEADER_SIZE + 65536 + 18;
/// Most buffers that one packet is spread over. A driver with smaller ones loses large packets.
const MAX_BUFFERS: usize = 256;
/// Packets in one round, after which the device's other queues have their turn.
const ROUND: usize = 256;

/// One queue's receiver. A packet that finds no buffers waits here, and those behind it in the tap,
/// whose own queue is bounded and drops.
#[derive(Debug)]
pub(super) struct Receiver {
    packet: Vec<u8>,
    /// Bytes of `packet` that wait for buffers.
    pending: usize,
    mergeable: bool,
    dropped: u64,
}

/// Whether a tap could have given these bytes.
pub(super) fn is_packet(bytes: &[u8]) -> bool {
    (net::HEADER_SIZE..=MAX_PACKET).contains(&bytes.len())
}

/// Where packets come from.
#[derive(Debug)]
pub(super) struct End<'a> {
    pub(super) tap: &'a File,
    pub(super) cable: &'a Cable,
    pub(super) counts: &'a NetCounts,
}

/// What became of the waiting packet.
enum Delivery {
    Done,
    Dropped,
    NoBuffers,
}

impl Receiver {
    /// `waiting` is a packet that waits for buffers, or empty.
    pub(super) fn new(features: u64, waiting: &[u8]) -> Self {
        let mut packet = vec![0; MAX_PACKET];
        for (to, from) in packet.iter_mut().zip(waiting) {
            *to = *from;
        }
        Self {
            packet,
            pending: waiting.len().min(MAX_PACKET),
            mergeable: features & net::F_MRG_RXBUF != 0,
            dropped: 0,
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
        let mut tap = end.tap;
        queue.disable_notification(memory)?;
        for _ in 0..ROUND {
            if self.pending == 0 {
                match tap.read(&mut self.packet) {
                    Ok(size) if size >= net::HEADER_SIZE => self.pending = size,
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    // Empty, or the pair is detached or the interface gone: its next event tells.
                    Err(_) => return Ok(()),
                }
            }
            if !end.cable.is_plugged() {
                end.counts.dropped();
                self.pending = 0;
                continue;
            }
            match self.deliver(queue, memory)? {
                Delivery::Done => {
                    let packet = self.pending.saturating_sub(net::HEADER_SIZE);
                    end.counts.received(packet);
                    self.pending = 0;
                }
                Delivery::Dropped => {
                    end.counts.dropped();
                    self.pending = 0;
                }
                Delivery::NoBuffers => {
                    if !queue.enable_notification(memory)? {
                        return Ok(());
                    }
                    queue.disable_notification(memory)?;
                }
            }
        }
        queue.wake_again();
        Ok(())
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
        let mut used = Vec::with_capacity(chains.len());
        for mut chain in chains {
            let written = chain.writable.write(rest);
            rest = rest.get(written..).unwrap_or_default();
            used.push((chain.head(), written));
        }
        queue.complete_together(memory, &used)?;
        queue.interrupt(memory)?;
        Ok(Delivery::Done)
    }
}
