//! The worker of a balloon: page numbers that come and go, free memory that is reported, and statistics.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use busway_pci::Complaints;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::counts::BalloonCounts;
use super::space::BalloonSpace;
use crate::memory::{Ballooned, Discarded, Discards, GuestRam, RamMap, ReturnError};
use crate::virtio::error::QueueError;
use crate::virtio::life::{BalloonState, DeviceState, Progress};
use crate::virtio::queue::{Served, Virtqueue};
use crate::virtio::segments::Segments;
use crate::virtio::spec::balloon;
use crate::virtio::worker::{Worker, doorbell_events};

/// Most page numbers of one request that are looked at: four times what Linux's driver sends at once.
pub(super) const MAX_PAGES: usize = 1024;
/// Most entries of the statistics that are looked at: twice what there are names for.
const MAX_STATS: usize = 32;
/// How often the guest is asked for its statistics.
const STATS_INTERVAL: Duration = Duration::from_secs(5);
/// How long it is until a mapping that could not be made is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Failures to give memory away that are warnings in the log.
const LOUD: u32 = 2;

/// The queues of a balloon, as far as its driver has them.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) inflate: Option<Virtqueue>,
    pub(super) deflate: Option<Virtqueue>,
    pub(super) stats: Option<Virtqueue>,
    pub(super) reporting: Option<Virtqueue>,
}

/// What wakes the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Inflate,
    Deflate,
    Stats,
    Reporting,
    Clock,
    Retry,
}

/// Serves all of a balloon's queues.
#[derive(Debug)]
pub(super) struct BalloonWorker {
    name: String,
    ram: GuestRam,
    queues: Queues,
    timer: TimerFd,
    /// Expires when pages that wait for a mapping are to be looked at again.
    retry: TimerFd,
    /// The driver's buffer for statistics is here, taken from its queue, and goes back when they are wanted again.
    has_stats: Option<u16>,
    space: Arc<BalloonSpace>,
    discards: Arc<Discards>,
    /// Where blocks go back beside devices, and the driver waits for its answers.
    ballooned: Option<Arc<Ballooned>>,
    counts: Arc<BalloonCounts>,
    /// The driver may take pages out of want (`VIRTIO_BALLOON_F_DEFLATE_ON_OOM`).
    deflates_on_oom: bool,
    complaints: Complaints,
}

impl BalloonWorker {
    /// # Errors
    /// There is no timer.
    pub(super) fn new(
        name: &str,
        ram: &GuestRam,
        queues: Queues,
        space: &Arc<BalloonSpace>,
        discards: &Arc<Discards>,
        ballooned: Option<&Arc<Ballooned>>,
        counts: &Arc<BalloonCounts>,
    ) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            ram: ram.clone(),
            queues,
            timer: TimerFd::new().map_err(io::Error::from)?,
            retry: TimerFd::new().map_err(io::Error::from)?,
            has_stats: None,
            space: Arc::clone(space),
            discards: Arc::clone(discards),
            ballooned: ballooned.cloned(),
            counts: Arc::clone(counts),
            deflates_on_oom: false,
            complaints: Complaints::first(LOUD),
        })
    }

    /// The same for a driver that may, or may not, take pages out of want.
    pub(super) fn deflating_on_oom(self, deflates_on_oom: bool) -> Self {
        Self {
            deflates_on_oom,
            ..self
        }
    }

    fn all_sources(&self) -> Vec<(Source, RawFd)> {
        let queues = [
            (Source::Inflate, &self.queues.inflate),
            (Source::Deflate, &self.queues.deflate),
            (Source::Stats, &self.queues.stats),
            (Source::Reporting, &self.queues.reporting),
        ];
        let queues = queues
            .into_iter()
            .filter_map(|(source, queue)| Some((source, queue.as_ref()?.doorbell())));
        queues
            .chain([
                (Source::Clock, self.timer.as_raw_fd()),
                (Source::Retry, self.retry.as_raw_fd()),
            ])
            .collect()
    }

    fn inflate(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues.inflate else {
            return Ok(());
        };
        let (discards, complaints, name) = (&self.discards, &self.complaints, &self.name);
        let (ballooned, stop) = (&self.ballooned, queue.stop());
        queue.drain(memory, |mut chain| {
            for (address, length) in runs(&mut chain.readable) {
                // Zones of RAM follow one another, and a run may go over from one to the next. Where no RAM is, it is the
                // guest's mistake, which costs it nothing.
                for slice in memory.get_slices(GuestAddress(address), length) {
                    let Ok(slice) = slice else { break };
                    complain(complaints, name, discards.discard(memory, &slice, true));
                }
                if let Some(ballooned) = ballooned {
                    ballooned.taken(&span(address, length), || !stop.load(Relaxed));
                }
            }
            Ok(Served::Done(0))
        })
    }

    fn deflate(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues.deflate else {
            return Ok(());
        };
        let (discards, counts, space) = (&self.discards, &self.counts, &self.space);
        let (name, deflates_on_oom) = (&self.name, self.deflates_on_oom);
        let (ballooned, stop) = (&self.ballooned, queue.stop());
        let mut waits = false;
        let drained = queue.drain(memory, |mut chain| {
            let all = runs(&mut chain.readable);
            if let Some(ballooned) = ballooned {
                if !chain.readable.is_empty() {
                    return Err(
                        chain.malformed("more pages that leave the balloon than are looked at")
                    );
                }
                // The answer says that devices reach the pages: it waits until that is so.
                for &(address, length) in &all {
                    let go_on = || !stop.load(Relaxed);
                    if let Err(error) = ballooned.returned(&span(address, length), go_on) {
                        waits = matches!(error, ReturnError::Map(_));
                        return Ok(Served::Left);
                    }
                }
            }
            let bytes = all.iter().map(|(_, length)| *length as u64).sum();
            discards.returned(bytes);
            // The driver says how large the balloon is when it is done with all of its requests. One that has not
            // agreed to take pages out of want ends here, or sleeps, and takes all of them.
            if deflates_on_oom && space.actual() <= space.target() {
                counts.taken_for_want(name, bytes);
            }
            Ok(Served::Done(0))
        });
        if waits && let Err(error) = self.retry.reset(RETRY, None) {
            log::error!("{}: timerfd_settime: {error}", self.name);
        }
        drained
    }

    /// Pages that the guest does not use now. They are the chain's own buffers. Virtio 1.3 §5.5.6.7.
    fn report(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues.reporting else {
            return Ok(());
        };
        let (discards, counts) = (&self.discards, &self.counts);
        let (complaints, name) = (&self.complaints, &self.name);
        queue.drain(memory, |chain| {
            for slice in chain.writable.slices() {
                let given = discards.discard(memory, slice, false);
                if let Ok(Discarded::Given) = given {
                    counts.reported(slice.len() as u64);
                }
                complain(complaints, name, given);
            }
            Ok(Served::Done(0))
        })
    }

    /// Takes the driver's buffer with its statistics, which it gives once of its own accord and then as often as it has
    /// it back. Virtio 1.3 §5.5.6.3.
    fn take_stats(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        let Some(queue) = &mut self.queues.stats else {
            return Ok(());
        };
        // A driver has one buffer; of more, those before the last are given back at once.
        for _ in 0..queue.size() {
            let Some(mut chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(());
            };
            for _ in 0..MAX_STATS {
                // `struct virtio_balloon_stat`
                let (Some(tag), Some(value)) = (chain.readable.take(), chain.readable.take())
                else {
                    break;
                };
                self.counts
                    .stat(u16::from_le_bytes(tag), u64::from_le_bytes(value));
            }
            if let Some(earlier) = self.has_stats.replace(chain.head()) {
                queue.complete(memory, earlier, 0)?;
                queue.interrupt(memory)?;
            }
        }
        queue.wake_again();
        Ok(())
    }

    /// Asks for statistics, where the driver's buffer is here.
    fn ask_for_stats(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        if self.queues.stats.is_some()
            && let Err(error) = self.timer.reset(STATS_INTERVAL, None)
        {
            log::error!("{}: timerfd_settime: {error}", self.name);
        }
        if let (Some(queue), Some(head)) = (&mut self.queues.stats, self.has_stats.take()) {
            queue.complete(memory, head, 0)?;
            queue.interrupt(memory)?;
        }
        Ok(())
    }
}

fn complain(complaints: &Complaints, name: &str, given: io::Result<Discarded>) {
    if let Err(error) = given {
        log::log!(
            complaints.next(log::Level::Warn),
            "{name}: memory of the guest's does not go back to the host: madvise: {error}"
        );
    }
}

fn span(address: u64, length: usize) -> Range<u64> {
    address..address.saturating_add(length as u64)
}

/// The memory that page numbers stand for, each by its guest-physical address and its length: neighbours together.
fn runs(numbers: &mut Segments<'_>) -> Vec<(u64, usize)> {
    let mut all: Vec<(u64, usize)> = Vec::new();
    for _ in 0..MAX_PAGES {
        let mut number = [0; 4];
        if numbers.read(&mut number) < number.len() {
            break;
        }
        let address = u64::from(u32::from_le_bytes(number)) * balloon::PAGE;
        let page = balloon::PAGE as usize;
        match all.last_mut() {
            Some((start, length)) if *start + *length as u64 == address => *length += page,
            // Linux's driver fills its list from the top of free memory downwards.
            Some((start, length)) if address + balloon::PAGE == *start => {
                (*start, *length) = (address, *length + page);
            }
            _ => all.push((address, page)),
        }
    }
    all
}

impl Worker for BalloonWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    /// With blocks that go and come back it has a memory device's calls.
    fn kind(&self) -> &'static str {
        match self.ballooned {
            Some(_) => "memory",
            None => "balloon",
        }
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let all = self.all_sources().into_iter();
        all.map(|(_, fd)| (fd, doorbell_events())).collect()
    }

    fn wake(&mut self, source: usize) -> Result<(), QueueError> {
        let Some((source, _)) = self.all_sources().get(source).copied() else {
            return Ok(());
        };
        let ram = self.ram.clone();
        let memory = ram.memory();
        match source {
            Source::Inflate => self.inflate(&memory),
            Source::Deflate | Source::Retry => self.deflate(&memory),
            Source::Stats => self.take_stats(&memory),
            Source::Reporting => self.report(&memory),
            Source::Clock => self.ask_for_stats(&memory),
        }
    }

    fn leave(&mut self, progress: &mut Progress) {
        if let (Some(queue), Some(_)) = (&mut self.queues.stats, self.has_stats.take()) {
            // It is the last that was taken: the next run finds it again.
            queue.undo_pop();
        }
        let queues = [
            &self.queues.inflate,
            &self.queues.deflate,
            &self.queues.stats,
            &self.queues.reporting,
        ];
        for queue in queues.into_iter().flatten() {
            queue.leave(progress);
        }
        progress.device = DeviceState::Balloon(BalloonState {
            actual: self.space.actual(),
        });
    }
}
