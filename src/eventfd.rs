//! Descriptors in the types that others ask for: eventfds as the crates below KVM and the console do, and
//! numbers of what the process inherited.

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

/// Takes over a descriptor that this process inherited, and has it closed on exec. Called once for a
/// descriptor, for something that Busway opens none of by itself.
///
/// # Errors
///
/// `EBADF` where it is not open.
pub(crate) fn inherited(number: u32) -> io::Result<OwnedFd> {
    // SAFETY: whoever started this process opened it for this: nothing else here uses or closes it.
    unsafe { busway_vfio::adopt(number) }.map(OwnedFd::from)
}
