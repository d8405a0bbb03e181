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
mod consoles;
mod early;
mod end;
mod error;
mod events;
mod firmware;
mod life;
mod long_work;
mod madvise;
mod panics;
mod passthrough;
mod pci;
mod quiet;
mod requests;
mod restart;
mod signals;
mod virtio;

pub use address_plan::NoRoomError;
pub use assembly::few_arenas;
pub use error::RunError;
pub use life::Ended;
pub(crate) use panics::PanicWatch;
pub use panics::end_on_panic;
pub use requests::{
    Added, AddedFunction, Answer, Control, Files, Info, Request, RequestError, Requests, State,
    VirtioInfo,
};
pub use signals::block_signals;

use std::sync::Arc;

use crate::config::VmConfig;
use crate::report::{Report, Stage};
use assembly::{Begun, Machine};
use early::Early;
use life::{Life, Stop};
use passthrough::OpenDevices;
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
pub fn run(config: &VmConfig, report: &Arc<Report>, requests: Requests) -> Result<Ended, RunError> {
    let signals = Signals::new()?;
    config.validate()?;
    let watch = PanicWatch::start();
    let mut machine = match assemble(config, report, &signals, &requests) {
        Err(RunError::AskedEarly) => return Ok(Ended::Asked),
        machine => machine?,
    };
    watch.tell(&machine.events);
    #[cfg(debug_assertions)]
    panics::panic_where_a_test_asks();
    machine.account(report);
    let mut life = Life::new();
    let ended = loop {
        madvise::forget_the_start();
        report.reached(Stage::FirstInstruction);
        let restarted = match machine.live(&mut life, &signals, &requests) {
            Ok(Stop::Restart) => {
                let info = machine.info(&life);
                machine.restart(&signals, &requests, &info)?
            }
            Ok(Stop::End(ended)) => break Ok(ended),
            Err(error) => break Err(error),
        };
        match restarted {
            (again, Ok(None)) => machine = again,
            (last, ended) => {
                machine = last;
                break ended.map(|ended| ended.unwrap_or(Ended::PowerOff));
            }
        }
    };
    machine.account(report);
    // Whoever still waits is told of the end before all that the machine has is given back.
    drop(requests);
    machine.end(&signals, ended)
}

/// Puts a machine together, unless somebody ends it meanwhile.
fn assemble(
    config: &VmConfig,
    report: &Arc<Report>,
    signals: &Signals,
    requests: &Requests,
) -> Result<Box<Machine>, RunError> {
    let (early, devices) = (Arc::<Early>::default(), OpenDevices::default());
    let work = {
        let (config, report) = (config.clone(), report.clone());
        let (early, devices) = (early.clone(), devices.clone());
        let can_be_asked = requests.can_be_asked();
        let begun = Begun::new(&config)?;
        move || {
            let machine =
                Machine::assemble(begun, &config, &report, &early, &devices, can_be_asked);
            machine.map(Box::new)
        }
    };
    let left = |signal| RunError::unfinished("being put together", signal, &devices);
    early.during(signals, requests, work, left)
}
