//! An eventfd as virtio uses it: signalled from anywhere, waited for in a worker's epoll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// An eventfd, shared.
///
/// Waited for edge-triggered and never read: each signal wakes its waiter once more, however high
/// the counter stands.
#[derive(Clone, Debug)]
pub struct Event(Arc<OwnedFd>);

impl Event {
    /// A new one, not signalled.
    pub(crate) fn new() -> io::Result<Self> {
        busway_vfio::eventfd().map(Self::from)
    }

    /// Signals it. The only way that this fails is a counter near 2^64, which is a signal too.
    pub(crate) fn signal(&self) {
        let one = 1_u64;
        // SAFETY: `one` is alive, and its size is what is passed.
        unsafe {
            libc::write(
                self.0.as_raw_fd(),
                (&raw const one).cast(),
                size_of_val(&one),
            );
        }
    }

    /// The descriptor, as [`busway_pci::BarPart::Doorbell`] shares it.
    pub(crate) fn shared(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Event {
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}
