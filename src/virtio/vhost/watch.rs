//! What is left to do in this process while a back end serves a device's rings.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::{BackEnd, Rings};
use crate::virtio::activation::Activation;
use crate::virtio::error::{QueueError, StartError};
use crate::virtio::life::{DeviceState, Progress, Running};
use crate::virtio::worker::Worker;

/// The first sources of a device's worker, and what it does when one of them is ready.
#[derive(Debug)]
pub(crate) struct Watch<B: BackEnd>(Vec<Arc<Rings<B>>>);

impl<B: BackEnd> Watch<B> {
    /// Of all that a device has handed over.
    pub(crate) fn new(rings: &[Arc<Rings<B>>]) -> Self {
        Self(rings.to_vec())
    }

    /// What wakes it: [`Worker::sources`].
    pub(crate) fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let sources = self.0.iter().flat_map(|rings| {
            let events = rings.events().flat_map(|(error, call)| [error, call]);
            std::iter::once(rings.vectors_changed()).chain(events)
        });
        sources
            .map(|event| (event.as_raw_fd(), EventSet::IN))
            .collect()
    }

    /// Some of its sources is ready, or none is.
    ///
    /// # Errors
    /// [`QueueError`]: the device needs a reset.
    pub(crate) fn wake(&self) -> Result<(), QueueError> {
        for rings in &self.0 {
            rings.update_calls()?;
            rings.pass_on_calls();
            if let Some(index) = rings.broken() {
                return Err(QueueError::BackEnd { index });
            }
        }
        Ok(())
    }
}

/// Runs a device: `rings` are a back end's, and the worker, which has a [`Watch`] of them, does what is left.
/// When the device is stopped, the positions in the queues are those that the back end gives back.
///
/// # Errors
/// A thread or a descriptor could not be made; nothing runs then.
pub(crate) fn run<B: BackEnd>(
    activation: Activation,
    rings: Vec<Arc<Rings<B>>>,
    worker: Box<dyn Worker>,
    device: DeviceState,
) -> Result<Box<dyn Running>, StartError> {
    let worker = activation.run(vec![worker], device)?;
    Ok(Box::new(Served { rings, worker }))
}

/// A device whose rings a back end serves. The back end ends before the worker that looks after it.
#[derive(Debug)]
struct Served<B: BackEnd> {
    rings: Vec<Arc<Rings<B>>>,
    worker: Box<dyn Running>,
}

impl<B: BackEnd> Running for Served<B> {
    fn stop(self: Box<Self>) -> Progress {
        let positions: Vec<_> = self.rings.iter().flat_map(|rings| rings.stop()).collect();
        let mut progress = self.worker.stop();
        for (index, position) in positions {
            progress.set_queue(index, position);
        }
        progress
    }
}
