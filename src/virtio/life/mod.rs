//! A virtio device's life: it is started with its queues and with what its last run left, and it is
//! stopped with what this run leaves.
//!
//! Pause, reset by the driver, the hand-over to a back end in another process and saving to a file
//! are all made of these two steps; they differ in what becomes of the [`Progress`] in between. A
//! pause keeps it, a reset drops it, a hand-over gives it to somebody else, and saving writes it out.
//!
//! # What holds for every stop
//!
//! - When [`Running::stop`] returns, nothing of the device touches guest memory, and none of its
//!   threads is left; but for requests that the host has had for longer than a stop waits, and that nothing
//!   can take from it, such as a write to a file system that is frozen. Their buffers stay mapped, and
//!   belong to them until the host gives them back: [`VirtioDevice::outstanding`] says so. A start carries
//!   on with them; a reset is not over before they are back, as the driver sees by the status.
//! - What the driver has made available was either completed, in the used ring, or is left for the
//!   next start, which finds it by [`QueuePosition::next_avail`], or, of a disk, which has many in hand at
//!   once, by its list of them. Nothing is completed twice, and nothing is dropped without completion.
//! - What was left in the middle is begun anew or carried on by the next start, as is right for the
//!   device: a disk repeats the request from its beginning, which comes to the same; a console carries
//!   on behind the bytes that are out.
//! - A stop takes bounded time: what a worker is in the middle of is finished where it is short, and
//!   left where it is long.
//!
//! # What holds for every start
//!
//! A start looks at each queue once without having been notified, because a notification may have
//! come, and been lost, while nobody listened. It interrupts the driver only for what it completes.

//!
//! [`VirtioDevice::outstanding`]: super::VirtioDevice::outstanding

mod state;

use std::fmt::Debug;

use serde::{Deserialize, Serialize};

pub use state::{
    BalloonState, ConsoleState, DeviceState, DiskState, LeftRequest, NetState, VsockState,
    WaitingPacket,
};

/// How far a device has come in a queue. Both indices run freely modulo 2^16, as those in guest memory
/// do. Virtio 1.3 §2.7.6 and §2.7.8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Index of the available ring's entry that is taken next.
    pub next_avail: u16,
    /// Index of the used ring's entry that is filled next.
    pub next_used: u16,
}

/// What a run leaves for the next one. The default is what a reset leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The positions in the queues, by their number. A queue that is not here, or not enabled, is at 0.
    pub queues: Vec<QueuePosition>,
    /// What the device itself keeps.
    pub device: DeviceState,
}

impl Progress {
    /// The position in queue `index`.
    #[must_use]
    pub fn queue(&self, index: u16) -> QueuePosition {
        let position = self.queues.get(usize::from(index));
        position.copied().unwrap_or_default()
    }

    /// Notes the position in queue `index`.
    pub(super) fn set_queue(&mut self, index: u16, position: QueuePosition) {
        let index = usize::from(index);
        if index >= self.queues.len() {
            self.queues.resize(index + 1, QueuePosition::default());
        }
        if let Some(slot) = self.queues.get_mut(index) {
            *slot = position;
        }
    }
}

/// A device that runs: its workers in this process, or its back end in another. Dropping it stops it,
/// too, and loses what it leaves.
pub trait Running: Send + Debug {
    /// Stops it, and returns what it leaves when nothing of it runs any more.
    fn stop(self: Box<Self>) -> Progress;

    /// Stops it for a driver that resets the device, and waits for nothing. What it leaves nobody wants. What of it
    /// still runs then is [`outstanding`](super::VirtioDevice::outstanding) until it does not.
    fn reset(self: Box<Self>) {
        drop(self.stop());
    }
}

/// Whether a device runs, and if not, what it starts with.
#[derive(Debug)]
pub(super) enum Life {
    /// It does not run.
    Stopped(Progress),
    /// It runs.
    Running(Box<dyn Running>),
}

impl Life {
    /// What the device starts with; `None` while it runs.
    pub(super) fn progress(&self) -> Option<&Progress> {
        match self {
            Self::Stopped(progress) => Some(progress),
            Self::Running(_) => None,
        }
    }

    /// Stops the device where it runs, and keeps what it leaves.
    pub(super) fn stop(&mut self) {
        match std::mem::replace(self, Self::Stopped(Progress::default())) {
            Self::Running(running) => *self = Self::Stopped(running.stop()),
            stopped @ Self::Stopped(_) => *self = stopped,
        }
    }

    /// Stops the device where it runs, and drops what it leaves.
    pub(super) fn reset(&mut self) {
        if let Self::Running(running) = std::mem::replace(self, Self::Stopped(Progress::default()))
        {
            running.reset();
        }
    }
}

#[cfg(test)]
mod tests;
