//! Eventfds in the type that the crates below KVM and the console ask for.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// A new eventfd, as [`busway_vfio::eventfd`] makes it.
///
/// # Errors
///
/// Those of [`busway_vfio::eventfd`].
pub(crate) fn eventfd() -> io::Result<EventFd> {
    busway_vfio::eventfd().map(typed)
}

/// `event`, which is an eventfd, in that type.
pub(crate) fn typed(event: OwnedFd) -> EventFd {
    // SAFETY: the descriptor was owned, and its owner has just given it up.
    unsafe { EventFd::from_raw_fd(event.into_raw_fd()) }
}
