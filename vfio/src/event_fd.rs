//! The eventfd: what one side signals and the other waits for, in the kernel or in this process.
//! eventfd(2)

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::EventfdFlags;

/// An eventfd that reads without waiting and that no program started later inherits. Clones are the
/// same descriptor, which closes with the last of them.
#[derive(Clone, Debug)]
pub struct EventFd(Arc<OwnedFd>);

impl EventFd {
    /// A new one, not signalled.
    ///
    /// # Errors
    ///
    /// The kernel's: the process, or the host, has as many files open as it may.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(rustix::event::eventfd(0, flags)?.into())
    }

    /// Signals it.
    pub fn signal(&self) {
        signal(self.as_fd());
    }

    /// How often it was signalled since the last time of asking.
    #[must_use]
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        // An error says that it was not signalled.
        match rustix::io::read(&self.0, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// The descriptor, as [`busway_pci::BarPart::Doorbell`] shares it.
    #[must_use]
    pub fn shared(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The descriptor is an eventfd's, one that [`EventFd::new`] made.
impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

/// As [`EventFd::shared`] gave it.
impl From<Arc<OwnedFd>> for EventFd {
    fn from(fd: Arc<OwnedFd>) -> Self {
        Self(fd)
    }
}

/// Signals an eventfd of [`EventFd`]'s, without another descriptor, of which there may be none left.
pub(crate) fn signal(event: BorrowedFd<'_>) {
    match rustix::io::write(event, &1_u64.to_ne_bytes()) {
        // It holds as much as it can, which is a signal as well.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
        Err(error) => log::debug!("eventfd: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_counted_until_they_are_taken_and_a_full_count_is_one_too() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.take(), 0);
        event.signal();
        event.clone().signal();
        assert_eq!((event.take(), event.take()), (2, 0));
        let most = u64::MAX - 1;
        rustix::io::write(&event, &most.to_ne_bytes()).unwrap();
        event.signal();
        assert_eq!(event.take(), most);
    }

    #[test]
    fn it_closes_with_the_last_of_its_owners_and_on_exec() {
        let event = EventFd::new().unwrap();
        let flags = rustix::io::fcntl_getfd(&event).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let shared = event.shared();
        assert_eq!(shared.as_raw_fd(), event.as_raw_fd());
        drop(event);
        assert!(rustix::io::fcntl_getfd(&shared).is_ok());
    }
}
