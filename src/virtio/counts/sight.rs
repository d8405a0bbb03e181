//! A look at a virtio device that waits for nobody: who serves it, how far its driver is, how often it has interrupted, and
//! what its queues have counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};

use busway_pci::{Activity, Seen};

use super::{Counts, Totals};
use crate::virtio::spec::status;

/// Who serves a device's queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServedBy {
    /// Busway's own threads.
    #[default]
    Busway,
    /// The host's kernel: what passes there, and how often it interrupts, is not known here.
    Kernel,
    /// Another process (vhost-user), of which the same holds.
    BackEnd,
}

impl ServedBy {
    /// Its word in answers.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Busway => "busway",
            Self::Kernel => "kernel",
            Self::BackEnd => "back-end",
        }
    }
}

/// How far a guest's driver is with a device, by the status that it has written. Virtio 1.3 §2.1
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverState {
    /// No driver has it.
    #[default]
    None,
    /// A driver sets it up.
    Starting,
    /// A driver uses it.
    Ready,
    /// A driver has given it up.
    Failed,
    /// It waits for its driver to reset it.
    NeedsReset,
}

impl DriverState {
    /// Its word in answers and tables.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::NeedsReset => "needs-reset",
        }
    }

    const fn of(written: u8, broken: bool) -> Self {
        match written {
            0 => Self::None,
            _ if broken => Self::NeedsReset,
            written if written & status::FAILED != 0 => Self::Failed,
            written if written & status::DRIVER_OK != 0 => Self::Ready,
            written if written & status::DRIVER != 0 => Self::Starting,
            _ => Self::None,
        }
    }
}

/// How often one queue has interrupted its guest. Written by what serves the queue.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Sent(AtomicU64);

/// What is seen of a virtio device, shared by what makes it and whoever looks.
#[derive(Debug)]
pub(in crate::virtio) struct Shown {
    pub(in crate::virtio) activity: Activity,
    pub(in crate::virtio) status: AtomicU8,
    pub(in crate::virtio) needs_reset: AtomicBool,
    /// By queue, and one more for the configuration.
    sent: Box<[Sent]>,
    vectors: u16,
}

impl Shown {
    pub(in crate::virtio) fn new(queues: u16, vectors: u16) -> Self {
        Self {
            activity: Activity::default(),
            status: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            sent: (0..=queues).map(|_| Sent::default()).collect(),
            vectors,
        }
    }

    /// A queue interrupts; the configuration does where there is no queue of that number.
    pub(in crate::virtio) fn interrupted(&self, queue: u16) {
        let sent = self.sent.get(usize::from(queue)).or(self.sent.last());
        if let Some(sent) = sent {
            sent.0.fetch_add(1, Relaxed);
        }
    }
}

/// A way to look at a virtio device without waiting for it, for as long as anybody likes.
#[derive(Clone, Debug)]
pub struct Sight {
    pub(in crate::virtio) shown: Arc<Shown>,
    pub(in crate::virtio) counts: Counts,
    pub(in crate::virtio) served_by: ServedBy,
}

/// What a look at a virtio device shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioSeen {
    /// Its accesses that left the guest, and how it interrupts.
    pub function: Seen,
    /// The vectors that the guest can have.
    pub vectors: u16,
    /// Who serves its queues.
    pub served_by: ServedBy,
    /// How often this process has interrupted the guest for it.
    pub interrupts: u64,
    /// How far its driver is.
    pub driver: DriverState,
    /// What its queues have counted.
    pub totals: Totals,
}

impl Sight {
    /// What there is now.
    #[must_use]
    pub fn seen(&self) -> VirtioSeen {
        let Shown {
            activity,
            status,
            needs_reset,
            sent,
            vectors,
        } = &*self.shown;
        let sent = sent.iter().map(|sent| sent.0.load(Relaxed));
        VirtioSeen {
            function: activity.seen(),
            vectors: *vectors,
            served_by: self.served_by,
            interrupts: sent.fold(0, u64::wrapping_add),
            driver: DriverState::of(status.load(Relaxed), needs_reset.load(Relaxed)),
            totals: self.counts.totals(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drivers_state_follows_from_the_status_that_it_wrote() {
        let of = |written| DriverState::of(written, false);
        assert_eq!(of(0), DriverState::None);
        assert_eq!(of(status::ACKNOWLEDGE), DriverState::None);
        let driver = status::ACKNOWLEDGE | status::DRIVER;
        assert_eq!(of(driver), DriverState::Starting);
        let ready = driver | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(of(ready), DriverState::Ready);
        assert_eq!(of(ready | status::FAILED), DriverState::Failed);
        assert_eq!(DriverState::of(ready, true), DriverState::NeedsReset);
    }

    #[test]
    fn interrupts_are_counted_whoever_sends_them() {
        let sight = Sight {
            shown: Arc::new(Shown::new(2, 3)),
            counts: Counts::default(),
            served_by: ServedBy::Busway,
        };
        sight.shown.interrupted(0);
        sight.shown.interrupted(1);
        sight.shown.interrupted(u16::MAX);
        let seen = sight.seen();
        assert_eq!((seen.interrupts, seen.vectors), (3, 3));
    }
}
