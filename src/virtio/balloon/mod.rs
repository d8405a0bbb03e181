//! The virtio balloon: memory that the guest gives back to the host, at the host's wish (inflating) or as it becomes
//! free (page reporting). Virtio 1.3 §5.5.
//!
//! What the guest gives is discarded by [`Discards`], which keeps all of it while devices reach memory by DMA: the
//! guest's driver is answered as ever, and the pages stay. With `vfio=remap` it goes by whole blocks then
//! ([`Ballooned`]), where the driver has agreed to use none of them before it is answered
//! (`VIRTIO_BALLOON_F_MUST_TELL_HOST`): the answer comes when devices reach the block again. What is reported stays, for the
//! guest uses that again without a word. A balloon never gets larger by itself than its target, which
//! somebody else sets; a guest that is out of memory takes pages back (`deflate_on_oom=on`), and the target stays.

mod counts;
mod space;
mod worker;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub(crate) use self::counts::BalloonCounts;
pub use self::counts::BalloonTotals;
use self::space::BalloonSpace;
use self::worker::{BalloonWorker, Queues};
use super::activation::Activation;
use super::config_space::ConfigSpace;
use super::counts::Counts;
use super::device::VirtioDevice;
use super::error::StartError;
use super::life::{BalloonState, DeviceState, Running};
use super::spec::{self, balloon};
use super::worker::Worker;
use crate::config::BalloonConfig;
use crate::memory::{Ballooned, Discards};

const QUEUE_SIZE: u16 = 128;

/// A virtio balloon.
#[derive(Debug)]
pub struct Balloon {
    name: String,
    deflate_on_oom: bool,
    reporting: bool,
    space: Arc<BalloonSpace>,
    discards: Arc<Discards>,
    /// Of RAM that goes back by blocks beside devices.
    ballooned: Option<Arc<Ballooned>>,
    counts: Arc<BalloonCounts>,
}

/// How large a balloon is to be, for whoever decides that.
#[derive(Clone, Debug)]
pub struct BalloonTarget {
    space: Arc<BalloonSpace>,
}

/// A balloon cannot be so large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// {asked} bytes are no whole number of pages
    #[error("a balloon of {asked} bytes is no whole number of pages of 4 KiB")]
    Uneven {
        /// What was asked for.
        asked: u64,
    },
    /// {asked} bytes are more than the guest starts with
    #[error(
        "a balloon of {asked} bytes is larger than the RAM that the guest starts with, which has {most}"
    )]
    TooLarge {
        /// What was asked for.
        asked: u64,
        /// Bytes of RAM.
        most: u64,
    },
}

impl BalloonTarget {
    /// Wants the balloon to be of `bytes` bytes, no more than `most`, the RAM that the guest starts with. The guest's
    /// driver hears of it.
    ///
    /// # Errors
    /// [`TargetError`]
    pub fn set(&self, bytes: u64, most: u64) -> Result<(), TargetError> {
        if !bytes.is_multiple_of(balloon::PAGE) {
            return Err(TargetError::Uneven { asked: bytes });
        }
        let pages = u32::try_from(bytes / balloon::PAGE);
        let (Ok(pages), true) = (pages, bytes <= most) else {
            return Err(TargetError::TooLarge { asked: bytes, most });
        };
        self.space.set_target(pages);
        Ok(())
    }

    /// Bytes that the balloon is to have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.space.target()) * balloon::PAGE
    }

    /// Bytes that it has, as the guest's driver says.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.space.actual()) * balloon::PAGE
    }
}

impl Balloon {
    /// A balloon whose pages go by `discards`, and by `ballooned` beside devices, where that is to be. That the guest has
    /// as much RAM as it is to begin with is the configuration's to say.
    ///
    /// # Errors
    /// [`TargetError`]: it cannot have the size that it is to begin with.
    pub fn new(
        name: &str,
        config: &BalloonConfig,
        discards: &Arc<Discards>,
        ballooned: Option<Ballooned>,
    ) -> Result<Self, TargetError> {
        let device = Self {
            name: name.to_owned(),
            deflate_on_oom: config.deflate_on_oom,
            reporting: config.free_page_reporting,
            space: BalloonSpace::new(),
            discards: Arc::clone(discards),
            ballooned: ballooned.map(Arc::new),
            counts: Arc::default(),
        };
        device.target().set(config.size, config.size)?;
        let ballooned = device.ballooned.as_ref();
        device.counts.set_source(&device.space, discards, ballooned);
        Ok(device)
    }

    /// The way to change its size while the guest runs.
    #[must_use]
    pub fn target(&self) -> BalloonTarget {
        BalloonTarget {
            space: Arc::clone(&self.space),
        }
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::BALLOON
    }

    fn class(&self) -> u32 {
        0xff_00_00 // no class of PCI's
    }

    fn features(&self) -> u64 {
        let mut features = balloon::F_STATS_VQ;
        if self.deflate_on_oom {
            features |= balloon::F_DEFLATE_ON_OOM;
        }
        if self.reporting {
            features |= balloon::F_REPORTING;
        }
        if self.ballooned.is_some() {
            features |= balloon::F_MUST_TELL_HOST;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; if self.reporting { 4 } else { 3 }]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.space) as _
    }

    fn counts(&self) -> Counts {
        Counts::of_balloon(Arc::clone(&self.counts))
    }

    fn takes(&self, _features: u64, state: &DeviceState) -> bool {
        matches!(state, DeviceState::None | DeviceState::Balloon(_))
    }

    fn set_state(&mut self, state: &DeviceState) {
        match state {
            DeviceState::Balloon(BalloonState { actual }) => self.space.set_actual(*actual),
            _ => {
                // A driver that begins anew has all pages, and those that were given come back as it touches them.
                self.space.set_actual(0);
                self.discards.returned(u64::MAX);
                if let Some(ballooned) = &self.ballooned
                    && let Err(error) = ballooned.all_returned()
                {
                    log::error!(
                        "{}: {error}; devices do not reach that memory until the guest's driver begins anew",
                        self.name
                    );
                }
            }
        }
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let features = activation.features();
        let has = |feature| features & feature != 0;
        // Queues that a driver has no feature for are not there, and those behind them count on.
        let stats = has(balloon::F_STATS_VQ).then_some(balloon::STATSQ);
        let reporting =
            has(balloon::F_REPORTING).then_some(balloon::STATSQ + u16::from(stats.is_some()));
        let mut take = |queue: Option<u16>| match queue {
            Some(queue) => activation.take_queue(queue),
            None => Ok(None),
        };
        let queues = Queues {
            inflate: take(Some(balloon::INFLATEQ))?,
            deflate: take(Some(balloon::DEFLATEQ))?,
            stats: take(stats)?,
            reporting: take(reporting)?,
        };
        let state = BalloonState {
            actual: self.space.actual(),
        };
        let waits = has(balloon::F_MUST_TELL_HOST);
        let worker = BalloonWorker::new(
            &self.name,
            activation.ram(),
            queues,
            &self.space,
            &self.discards,
            self.ballooned.as_ref().filter(|_| waits),
            &self.counts,
        )?
        .deflating_on_oom(has(balloon::F_DEFLATE_ON_OOM));
        let workers: Vec<Box<dyn Worker>> = vec![Box::new(worker)];
        activation.run(workers, DeviceState::Balloon(state))
    }
}
