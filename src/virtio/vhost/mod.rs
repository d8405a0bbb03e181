//! What every back end of vhost's needs, in the kernel or in another process: the guest's memory, rings
//! that are handed over and taken back, and a look at what the back end says of them.
//!
//! [`Rings`] hands over queues of an [`Activation`](super::Activation) at a start and takes them back at a stop,
//! with the positions that [`life`](super::life) asks for. Notifications and interrupts pass between guest and
//! back end by the queue's own eventfds, without this process. [`Watch`] is the part of a device's worker that
//! does what is left to do here: it hands over another eventfd where the guest changes a vector, interrupts
//! for vectors that have none, and hears of errors. [`MemoryTable`] follows the VM's list of regions.

pub(crate) mod kernel;
mod memory;
mod rings;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt::Debug;
use std::sync::Arc;

use vhost::VhostBackend;

use crate::memory::Region;
pub use kernel::KernelError;
pub use memory::MemoryTable;
pub(crate) use memory::infos;
pub(crate) use rings::{Handed, Rings};
pub(crate) use watch::{Watch, run};

/// A step with a back end failed.
#[derive(Debug, thiserror::Error)]
#[error("vhost: {what} failed: {source}")]
pub struct VhostError {
    /// The step, by the name that the vhost-user protocol has for it.
    pub what: &'static str,
    /// Why.
    pub source: vhost::Error,
}

impl VhostError {
    /// For `map_err`: the step was `what`.
    pub(crate) fn at(what: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self { what, source }
    }
}

/// What kind of address a ring's are in `SET_VRING_ADDR`, as the `vhost` crate's two halves want them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Addresses {
    /// Guest-physical: that half looks them up itself.
    Guest,
    /// Of this process.
    Process,
}

/// A back end: who serves rings in this process's place.
///
/// Its owner (`SET_OWNER`) is set before it is given rings. The rings' numbers are its own, from 0 on.
pub(crate) trait BackEnd: VhostBackend + Debug + Send + Sync + 'static {
    /// The kind of address that its `set_vring_addr` takes.
    const ADDRESSES: Addresses;

    /// The guest's RAM is what `regions` say, from now on. Also called while rings are served.
    ///
    /// # Errors
    /// The back end's: it has the memory that it had before.
    fn set_memory(&self, regions: &[Arc<Region>]) -> Result<(), vhost::Error> {
        self.set_mem_table(&infos(regions)).map(drop)
    }

    /// `rings` are set up: it begins to serve them.
    ///
    /// # Errors
    /// The back end's; [`end`](Self::end) is called then as well.
    fn begin(&self, rings: &[u16]) -> Result<(), vhost::Error>;

    /// It ends to serve `rings`, which may not all have begun. After it, and `GET_VRING_BASE` for each, it
    /// touches neither them nor the buffers in them.
    ///
    /// # Errors
    /// The back end's.
    fn end(&self, rings: &[u16]) -> Result<(), vhost::Error>;
}
