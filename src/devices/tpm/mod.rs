//! The guest's TPM 2.0, which swtpm is: `--tpm`.
//!
//! The guest has a command and response buffer (`crb.rs`); a thread (`worker.rs`) has swtpm carry out what is in it, by the
//! connection to it (`link.rs`). No vCPU waits for swtpm: a command is started by a write, and the guest looks whether it
//! is done. A swtpm that hangs, lies or dies makes a TPM that has failed, and says so to each command: only a reset of the
//! guest connects anew, for a TPM that had lost what was measured would else look like one that has not.

mod command;
mod crb;
mod error;
mod link;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use busway_vfio::EventFd;

use crate::kvm::BusDevice;
pub use crb::{CONTROL_AREA, SIZE};
use crb::{Effect, Registers};
use error::Broken;
pub use error::TpmError;
use link::{Limits, Link, Order, Orders};
use worker::Worker;

/// The worker keeps its buffers on the heap, but for one of the guest's.
const STACK_SIZE: usize = 256 << 10;

/// The TPM, as the machine has it. Dropping it switches the TPM off and ends its thread, in seconds.
#[derive(Debug)]
pub struct Tpm {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the guest's side and the worker share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when there is something to do.
    wake: EventFd,
}

#[derive(Debug)]
struct State {
    registers: Registers,
    /// What was started, and the worker has not begun with.
    command: Option<Vec<u8>>,
    /// The command that is being carried out is to be cancelled.
    cancel: bool,
    /// The platform was reset, and the worker has not seen to it.
    reset: bool,
    /// How often it was: a response of a life before is nobody's.
    life: u64,
    end: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Orders for Shared {
    fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn look(&self) -> Order {
        let _signals = self.wake.take();
        let state = self.state();
        match () {
            () if state.end => Order::End,
            () if state.cancel || state.reset => Order::Cancel,
            () => Order::GoOn,
        }
    }
}

impl Tpm {
    /// Connects to the swtpm whose control socket is at `socket`, and switches its TPM on. `base` is where the guest has its
    /// registers. Waits for swtpm, seconds at most for each thing that it is asked for.
    ///
    /// # Errors
    /// [`TpmError`]
    pub fn open(socket: &Path, base: u64) -> Result<Self, TpmError> {
        Self::open_within(socket, base, Limits::default())
    }

    fn open_within(socket: &Path, base: u64, limits: Limits) -> Result<Self, TpmError> {
        let failed = |why| TpmError {
            socket: socket.to_owned(),
            why,
        };
        let wake = EventFd::new().map_err(|error| failed(Broken::System(error)))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                registers: Registers::new(base),
                command: None,
                cancel: false,
                reset: false,
                life: 0,
                end: false,
            }),
            wake,
        });
        let mut link = Link::connect(socket, limits, &*shared).map_err(failed)?;
        let established = link.initialise(&*shared).map_err(failed)?;
        let family = link
            .execute(&command::GET_FAMILY, &*shared)
            .map_err(failed)?;
        if command::tag(&family) == command::Tag::Old {
            return Err(failed(Broken::Tpm12));
        }
        shared.state().registers.set_established(established);
        let worker = Worker::new(shared.clone(), socket.to_owned(), limits, link);
        let thread = Builder::new()
            .name("tpm".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || worker.run())
            .map_err(|error: io::Error| failed(Broken::System(error)))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// What the guest has at the registers' place.
    #[must_use]
    pub fn registers(&self) -> Arc<dyn BusDevice> {
        Arc::new(Front(self.shared.clone()))
    }

    /// As after power-on. swtpm does the same before the next command of the guest's; nobody waits for it here.
    pub fn reset(&self) {
        let mut state = self.shared.state();
        state.registers.reset();
        state.command = None;
        state.cancel = false;
        state.reset = true;
        state.life = state.life.wrapping_add(1);
        drop(state);
        self.shared.wake.signal();
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        self.shared.state().end = true;
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // Its panic was reported when it happened.
            let _panicked = thread.join();
        }
    }
}

/// The registers, on the guest's side.
struct Front(Arc<Shared>);

impl BusDevice for Front {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.state().registers.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.0.state();
        match state.registers.write(offset, data) {
            Effect::None => return,
            Effect::Start(command) => state.command = Some(command),
            Effect::Cancel => state.cancel = true,
        }
        drop(state);
        self.0.wake.signal();
    }
}
