//! The network card's control queue: how many pairs of queues are in use, and what the kernel may
//! hand over unfinished. Virtio 1.3 §5.1.6.5.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use super::tap::Tap;
use crate::virtio::chain::Chain;
use crate::virtio::error::QueueError;
use crate::virtio::life::NetState;
use crate::virtio::queue::Served;
use crate::virtio::segments::Segments;
use crate::virtio::spec::net;
use busway_pci::Complaints;
use zerocopy::little_endian::{U16, U64};

/// The host's end of a card, which its commands are about.
pub(in crate::virtio) trait Commanded: Debug + Send + Sync {
    /// What messages call it.
    fn described(&self) -> String;

    /// Packets pass by the first `pairs` pairs of queues alone from now on.
    ///
    /// # Errors
    /// It stays as it was.
    fn use_pairs(&self, pairs: u16) -> io::Result<()>;

    /// What may be handed over unfinished: feature bits, `VIRTIO_NET_F_GUEST_*`.
    ///
    /// # Errors
    /// It stays as it was.
    fn set_offloads(&self, offloads: u64) -> io::Result<()>;
}

impl Commanded for Tap {
    fn described(&self) -> String {
        format!("tap {}", self.name())
    }

    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        Self::use_pairs(self, pairs)
    }

    fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        Self::set_offloads(self, offloads)
    }
}

/// The control queue's commands.
#[derive(Debug)]
pub(in crate::virtio) struct Control {
    end: Arc<dyn Commanded>,
    max_pairs: u16,
    features: u64,
    /// Pairs in use.
    pairs: u16,
    /// What the driver takes unfinished.
    offloads: u64,
    complaints: Arc<Complaints>,
}

impl Control {
    /// `state` is what `end` was set to. What is refused there goes to `complaints`.
    pub(in crate::virtio) fn new(
        end: Arc<dyn Commanded>,
        max_pairs: u16,
        features: u64,
        state: &NetState,
        complaints: Arc<Complaints>,
    ) -> Self {
        Self {
            end,
            max_pairs,
            features,
            pairs: state.pairs,
            offloads: state.offloads,
            complaints,
        }
    }

    /// The pairs in use, and what the driver takes unfinished.
    pub(in crate::virtio) fn chosen(&self) -> (u16, u64) {
        (self.pairs, self.offloads)
    }

    /// Carries out one command.
    ///
    /// # Errors
    /// The chain is no command: there is no room for a header, or none for the answer.
    pub(in crate::virtio) fn serve(&mut self, mut chain: Chain<'_>) -> Result<Served, QueueError> {
        let Some([class, command]) = chain.readable.take::<[u8; 2]>() else {
            return Err(chain.malformed("a control command shorter than its header"));
        };
        if chain.writable.is_empty() {
            return Err(chain.malformed("a control command without room for its answer"));
        }
        let done = match (class, command) {
            (net::CTRL_MQ, net::CTRL_MQ_VQ_PAIRS_SET) => self.set_pairs(chain.readable),
            (net::CTRL_GUEST_OFFLOADS, net::CTRL_GUEST_OFFLOADS_SET) => {
                self.set_offloads(chain.readable)
            }
            _ => false,
        };
        let answer = if done { net::CTRL_OK } else { net::CTRL_ERR };
        Ok(Served::Done(chain.writable.write(&[answer])))
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn set_pairs(&mut self, mut data: Segments<'_>) -> bool {
        let Some(pairs) = data.take::<U16>().filter(|_| self.has(net::F_MQ)) else {
            return false;
        };
        let pairs = pairs.get();
        let done = (1..=self.max_pairs).contains(&pairs) && self.done(self.end.use_pairs(pairs));
        if done {
            self.pairs = pairs;
        }
        done
    }

    fn set_offloads(&mut self, mut data: Segments<'_>) -> bool {
        let offered = self.has(net::F_CTRL_GUEST_OFFLOADS);
        let Some(offloads) = data.take::<U64>().filter(|_| offered) else {
            return false;
        };
        let offloads = offloads.get();
        // The kernel refuses the others too, but that would be an error to tell of.
        let done = offloads & !(self.features & super::GUEST_OFFLOADS) == 0
            && super::have_what_they_stand_on(offloads)
            && self.done(self.end.set_offloads(offloads));
        if done {
            self.offloads = offloads;
        }
        done
    }

    fn done(&self, result: std::io::Result<()>) -> bool {
        if let Err(error) = &result {
            log::log!(
                self.complaints.next(log::Level::Warn),
                "{}: a control command failed: {error}",
                self.end.described()
            );
        }
        result.is_ok()
    }
}
