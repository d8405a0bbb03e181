//! What a device is started with: the queues as the driver has set them up, each with the device's
//! position in it, and what the last run left.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vm_memory::GuestAddressSpace;

use super::error::StartError;
use super::interrupts::Interrupts;
use super::life::{DeviceState, Progress, Running};
use super::queue::{QueueSetup, Virtqueue};
use super::worker::{Worker, Workers};
use crate::memory::GuestRam;

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    features: u64,
    ram: GuestRam,
    queues: Vec<Option<QueueSetup>>,
    progress: Progress,
    interrupts: Arc<Interrupts>,
    stop: Arc<AtomicBool>,
}

impl Activation {
    /// For a device whose driver agreed on `features` and enabled those of `queues` that are there.
    ///
    /// # Errors
    /// [`StartError::Queue`], where a ring does not lie in RAM.
    pub(super) fn new(
        features: u64,
        ram: GuestRam,
        queues: Vec<Option<QueueSetup>>,
        progress: Progress,
        interrupts: Arc<Interrupts>,
    ) -> Result<Self, StartError> {
        let memory = ram.memory();
        for setup in queues.iter().flatten() {
            setup.ring(&memory)?;
        }
        drop(memory);
        Ok(Self {
            features,
            ram,
            queues,
            progress,
            interrupts,
            stop: Arc::default(),
        })
    }

    /// What was negotiated.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What the last run left of the device's own state.
    #[must_use]
    pub fn state(&self) -> &DeviceState {
        &self.progress.device
    }

    /// How the device interrupts its driver, and has it reset the device.
    pub(super) fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    /// Takes queue `index` for who serves it; `None` where the driver has left it disabled. Its rings
    /// lie in RAM.
    pub fn take_setup(&mut self, index: u16) -> Option<QueueSetup> {
        self.queues.get_mut(usize::from(index))?.take()
    }

    /// Takes queue `index` for a worker in this process, which stops with the device.
    pub(super) fn take_queue(&mut self, index: u16) -> Result<Option<Virtqueue>, StartError> {
        let Some(setup) = self.take_setup(index) else {
            return Ok(None);
        };
        let ring = setup.ring(&self.ram.memory())?;
        Ok(Some(Virtqueue::new(setup, ring, Arc::clone(&self.stop))))
    }

    /// Runs `workers`, each on a thread of its own. What they do not say of their own when they stop
    /// is left as `device` has it, and as it was in the queues that none of them took.
    ///
    /// # Errors
    /// A thread or a descriptor could not be made; none runs then.
    pub(super) fn run(
        self,
        workers: Vec<Box<dyn Worker>>,
        device: DeviceState,
    ) -> Result<Box<dyn Running>, StartError> {
        let progress = Progress {
            device,
            ..self.progress
        };
        #[cfg(any(test, feature = "hostile"))]
        if let Some(stage) = super::hostile::Stage::of_this_thread() {
            return Ok(stage.start(workers, self.stop, self.interrupts, progress)?);
        }
        let running = Workers::start(workers, self.stop, self.interrupts, progress)?;
        Ok(Box::new(running))
    }
}
