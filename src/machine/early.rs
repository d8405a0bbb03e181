//! Who wants a machine no more that is still being put together.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::RunError;
use super::long_work::{LongWork, WorkEvent};
use super::requests::{Info, Requests};
use super::signals::Signals;

/// That the machine is not wanted any more, for those who put it together: they look between two steps.
#[derive(Debug, Default)]
pub(super) struct Early(Mutex<Option<Reason>>);

#[derive(Clone, Copy, Debug)]
enum Reason {
    Signal(i32),
    Asked,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Asked => f.write_str("its control socket asks for the end"),
        }
    }
}

impl Early {
    /// An error where the machine is not wanted any more.
    ///
    /// # Errors
    /// [`RunError::StoppedEarly`] after a signal, or [`RunError::AskedEarly`]
    pub(super) fn check(&self) -> Result<(), RunError> {
        match *self.reason() {
            None => Ok(()),
            Some(Reason::Signal(signal)) => Err(RunError::StoppedEarly { signal }),
            Some(Reason::Asked) => Err(RunError::AskedEarly),
        }
    }

    /// Has `work` put a machine together on a thread of its own. A signal, or a request for the end, is noticed by
    /// it at the next step. The step itself may wait for the kernel: after another signal it is not waited for.
    /// Who asks how the machine is meanwhile is told `info`.
    ///
    /// # Errors
    /// What `work` gives, or `left` makes of the second signal
    pub(super) fn during<T: Send + 'static>(
        self: &Arc<Self>,
        signals: &Signals,
        requests: &Requests,
        info: impl Fn() -> Info,
        work: impl FnOnce() -> Result<T, RunError> + Send + 'static,
        left: impl Fn(i32) -> RunError,
    ) -> Result<T, RunError> {
        let long_work = LongWork {
            signals,
            quit: None,
            requests: Some(requests),
            limit: None,
        };
        long_work.during("assemble", work, |event| {
            let reason = match event {
                WorkEvent::Signal(signal) => Reason::Signal(signal),
                WorkEvent::Request if requests.attend(&info) => Reason::Asked,
                _ => return ControlFlow::Continue(()),
            };
            log::warn!("the VM is not wanted any more ({reason}), and is not put together");
            match (self.reason().replace(reason), event) {
                (Some(_), WorkEvent::Signal(signal)) => ControlFlow::Break(left(signal)),
                _ => ControlFlow::Continue(()),
            }
        })?
    }

    fn reason(&self) -> MutexGuard<'_, Option<Reason>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
