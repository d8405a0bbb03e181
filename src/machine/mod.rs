//! The machine: assembled from a configuration, run until its end, taken apart again.
//!
//! What a part does is its module's; here is what belongs together. Parts come and go in this order:
//! KVM's VM, host memory, the host's devices and their DMA space, platform, PCI with its functions,
//! vCPUs; and in reverse at the end, so that no guest runs without its devices, no device has DMA
//! into memory that is gone, and every host device is reset before it is given back.

mod address_plan;
mod aside;
mod assembly;
mod bars;
mod bus;
mod error;
mod events;
mod firmware;
mod life;
mod panics;
mod passthrough;
mod pci;
mod platform;
mod quiet;
mod requests;
mod restart;
mod signals;

pub use address_plan::NoRoomError;
pub use error::RunError;
pub use life::Ended;
pub(crate) use panics::PanicWatch;
pub use panics::end_on_panic;
pub use requests::{Answer, Control, Info, Request, RequestError, Requests, State};
pub use signals::block_signals;

use crate::config::VmConfig;
use crate::report::Report;
use assembly::Machine;
use signals::Signals;

/// Runs a VM until it ends, saying in `report` how far it has come.
///
/// The calling thread is the machine's event loop. [`block_signals`] has to be called before any
/// thread is started, for the signals that end a VM have to come here. Whoever has a [`Control`] of
/// `requests` can ask things of the machine meanwhile.
///
/// # Errors
/// [`RunError`], whose [`exit_status`](RunError::exit_status) tells bad configuration, a host that
/// cannot do it, and failure apart.
pub fn run(config: &VmConfig, report: &Report, requests: Requests) -> Result<Ended, RunError> {
    let signals = Signals::new()?;
    config.validate()?;
    let watch = PanicWatch::start();
    let mut machine = Machine::assemble(config, report, &signals, requests)?;
    watch.tell(&machine.events);
    #[cfg(debug_assertions)]
    panics::panic_where_a_test_asks();
    let ended = machine.live(report, &signals);
    machine.account(report);
    ended
}
