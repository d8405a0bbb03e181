//! The thread between a driver's queues and the host's ends of its connections.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::events::EventQueue;
use super::hub::Hub;
use super::packet::Header;
use crate::memory::{GuestRam, RamMap};
use crate::virtio::error::QueueError;
use crate::virtio::life::{DeviceState, Progress, VsockState};
use crate::virtio::queue::{Served, Virtqueue};
use crate::virtio::worker::{Worker, doorbell_events};

/// Packets for the guest in one round, after which its own have their turn.
const ROUND: usize = 128;

/// Serves the queues.
#[derive(Debug)]
pub(super) struct SocketWorker {
    pub(super) name: String,
    pub(super) ram: GuestRam,
    pub(super) receive: Virtqueue,
    pub(super) transmit: Virtqueue,
    pub(super) events: EventQueue,
    pub(super) hub: Arc<Mutex<Hub>>,
    /// The device's number, by which a later run knows that the connections are its own.
    pub(super) session: u64,
}

pub(super) fn lock(hub: &Mutex<Hub>) -> MutexGuard<'_, Hub> {
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SocketWorker {
    /// Takes what the driver has sent. It stays where it is while the driver has no buffers for the answers.
    fn take(&mut self, memory: &RamMap, hub: &mut Hub) -> Result<(), QueueError> {
        self.transmit.drain(memory, |mut chain| {
            if hub.is_full() {
                return Ok(Served::Left);
            }
            let Some(header) = chain.readable.take::<Header>() else {
                return Err(chain.malformed("a packet shorter than its header"));
            };
            let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
            hub.take(&header, &mut chain.readable.take_front(len));
            Ok(Served::Done(0))
        })
    }

    /// Gives the driver what there is for it, as far as it has buffers. Whether there is more, and buffers for it.
    fn give(&mut self, memory: &RamMap, hub: &mut Hub) -> Result<bool, QueueError> {
        let mut given = 0;
        let mut turns = 0..ROUND;
        let more = loop {
            if turns.next().is_none() || !hub.has_more() {
                break hub.has_more();
            }
            let Some(chain) = self.receive.pop(memory)? else {
                match self.receive.enable_notification(memory)? {
                    true => continue,
                    false => break false,
                }
            };
            match hub.next(&chain.writable) {
                Ok(Some(written)) => self.receive.complete(memory, chain.head(), written)?,
                Ok(None) => {
                    self.receive.undo_pop();
                    break false;
                }
                Err(what) => return Err(chain.malformed(what)),
            }
            given += 1;
        };
        if given > 0 {
            self.receive.interrupt(memory)?;
        }
        Ok(more)
    }
}

impl Worker for SocketWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "vsock"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let mut sources = vec![
            (self.receive.doorbell(), doorbell_events()),
            (self.transmit.doorbell(), doorbell_events()),
            (lock(&self.hub).fd(), EventSet::IN),
        ];
        sources.extend(self.events.source());
        sources
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let ram = self.ram.clone();
        let memory = ram.memory();
        self.events.send_reset(&memory)?;
        let hub = Arc::clone(&self.hub);
        let mut hub = lock(&hub);
        hub.hear();
        let was_full = hub.is_full();
        self.take(&memory, &mut hub)?;
        let full = was_full || hub.is_full();
        let more = self.give(&memory, &mut hub)?;
        // What was left for the want of room is looked at again once there is some.
        if more || hub.is_unfinished() || full && !hub.is_full() {
            self.transmit.wake_again();
        }
        Ok(())
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.receive.leave(progress);
        self.transmit.leave(progress);
        self.events.leave(progress);
        progress.device = DeviceState::Vsock(VsockState {
            session: self.session,
            reset_is_due: self.events.reset_is_due(),
        });
    }
}
