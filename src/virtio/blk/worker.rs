//! The worker of a disk's queue: takes what the driver has made available, gives the host many requests
//! at a time, and returns to the driver what has come back, with one interrupt for all of it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::engine::{Engine, Returned};
use super::flight::{Flight, Next};
use super::hold::Hold;
use super::linger::{Lingerers, Lingering, describe};
use super::request::{Planned, Requests};
use super::space::DiskSpace;
use super::sys;
use crate::memory::{GuestRam, RamMap};
use crate::virtio::counts::DiskCounts;
use crate::virtio::error::QueueError;
use crate::virtio::life::{DeviceState, LeftRequest, Progress};
use crate::virtio::limiter::Limiter;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::{Rest, Worker, doorbell_events};

/// How long a stop waits for what the host has.
pub(super) const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Rounds after which the thread looks at its other events, and at the guest's RAM anew.
const ROUNDS: usize = 64;

/// What a worker is made of that is the disk's.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) ram: GuestRam,
    pub(super) requests: Requests,
    pub(super) space: Arc<DiskSpace>,
    pub(super) limiter: Option<Arc<Limiter>>,
    pub(super) lingerers: Arc<Lingerers>,
    pub(super) counts: Arc<DiskCounts>,
    /// The host's processors that it runs on; any where there are none.
    pub(super) affinity: Vec<usize>,
}

/// Serves one queue.
#[derive(Debug)]
pub(super) struct BlkWorker {
    parts: Parts,
    queue: Virtqueue,
    /// None where it has been left to the requests that an ended run waits for.
    engine: Option<Engine>,
    hold: Hold,
    timer: TimerFd,
    /// Requests of an earlier run that the host has.
    adopted: Vec<Arc<Lingering>>,
    /// Requests of an earlier run that are to be done from their beginning, by their first descriptors.
    again: VecDeque<u16>,
    /// A request that waits until the limiter lets it pass; those behind it wait in the queue.
    limited: Option<Box<Flight>>,
    /// What is to be returned to the driver.
    completed: Vec<(u16, usize)>,
    /// What this run leaves, by first descriptors.
    left: Vec<u16>,
    /// Nothing goes to the host any more.
    ending: bool,
    /// The driver has broken the queue's rules: its rings are not touched any more.
    broken: bool,
    returned: Vec<Returned>,
}

impl BlkWorker {
    /// `left` is what an earlier run has left of the queue, by first descriptors.
    ///
    /// # Errors
    /// There is no timer.
    pub(super) fn new(
        parts: Parts,
        queue: Virtqueue,
        engine: Engine,
        left: Vec<u16>,
    ) -> io::Result<Self> {
        let adopted = parts.lingerers.of_queue(queue.index());
        let mut again: VecDeque<u16> = left.into();
        for head in adopted.iter().flat_map(|requests| requests.heads()) {
            if let Some(at) = again.iter().position(|again| *again == head) {
                again.remove(at);
            }
        }
        Ok(Self {
            parts,
            queue,
            engine: Some(engine),
            hold: Hold::default(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            adopted,
            again,
            limited: None,
            completed: Vec::new(),
            left: Vec::new(),
            ending: false,
            broken: false,
            returned: Vec::new(),
        })
    }

    /// Requests that the driver waits for.
    fn in_hand(&self) -> usize {
        let adopted = self.adopted.iter().map(|requests| requests.count());
        let engine = self.engine.as_ref().map_or(0, Engine::in_flight);
        engine + adopted.sum::<usize>() + self.completed.len()
    }

    /// Whether there is no room for another request. A driver can make available more than its ring has.
    fn is_full(&self) -> bool {
        self.in_hand() >= self.queue.size().into()
    }

    /// Takes requests until there is none, or no room, or the limiter has them wait.
    fn take(&mut self, memory: &Arc<RamMap>) -> Result<(), QueueError> {
        if let Some(flight) = self.limited.take() {
            self.start(flight);
        }
        while self.limited.is_none() && !self.is_full() {
            let chain = match self.again.front() {
                Some(&head) => self.queue.chain(memory, head).map(Some)?,
                None => self.queue.pop(memory)?,
            };
            let Some(chain) = chain else {
                break;
            };
            let planned = self.parts.requests.plan(chain, memory)?;
            self.again.pop_front();
            match planned {
                Planned::Answered(head, written) => self.completed.push((head, written)),
                Planned::Host(flight) => self.start(flight),
            }
        }
        Ok(())
    }

    /// Gives it to the host, or has it wait for the limiter.
    fn start(&mut self, flight: Box<Flight>) {
        if let Some(limiter) = &self.parts.limiter
            && flight.is_limited()
            && let Err(wait) = limiter.take(flight.bytes() as u64, Instant::now())
        {
            if let Err(error) = self.timer.reset(wait, None) {
                log::error!("{}: timerfd_settime: {error}", self.parts.name);
            }
            self.limited = Some(flight);
        } else if let Some(engine) = &mut self.engine {
            engine.start(flight);
        }
    }

    /// Deals with what has come back, and returns to the driver what is done: whether there was anything.
    fn complete_returned(&mut self, memory: &RamMap) -> Result<bool, QueueError> {
        if let Some(engine) = &mut self.engine {
            engine.reap(&mut self.returned);
        }
        for requests in &self.adopted {
            requests.collect(&mut self.returned);
        }
        let progress = !self.returned.is_empty() || !self.completed.is_empty();
        let mut returned = std::mem::take(&mut self.returned);
        for (mut flight, result) in returned.drain(..) {
            match flight.returned(result, self.ending) {
                Next::Leave => self.left.push(flight.head()),
                Next::Again => {
                    if let Some(engine) = &mut self.engine {
                        engine.start(flight);
                    }
                }
                Next::Answer(result) => {
                    let took = flight.started().elapsed();
                    self.hold.took(took);
                    let (work, bytes) = flight.asked();
                    self.parts
                        .counts
                        .answered(work, bytes, took, result.is_ok());
                    self.completed
                        .push(self.parts.requests.answer(&flight, result));
                }
            }
        }
        self.returned = returned;
        if !self.completed.is_empty() && !self.broken {
            self.queue.complete_together(memory, &self.completed)?;
            self.queue.interrupt(memory)?;
        }
        self.completed.clear();
        Ok(progress)
    }

    fn enter(&mut self, hold: Option<(usize, Duration)>) -> Result<(), QueueError> {
        let entered = self
            .engine
            .as_mut()
            .map_or(Ok(()), |engine| engine.enter(hold));
        entered.map_err(|source| QueueError::Host {
            call: "io_uring_enter",
            source,
        })
    }

    /// Rounds of taking, giving and returning, until there is nothing to do but to wait. The driver need
    /// not notify while they go on.
    fn rounds(&mut self) -> Result<(), QueueError> {
        let memory = self.parts.ram.memory().into_inner();
        self.awake(&memory)?;
        for _ in 0..ROUNDS {
            self.take(&memory)?;
            let in_ring = self.engine.as_ref().map_or(0, Engine::in_ring);
            self.enter(self.hold.patience(in_ring))?;
            let progress = self.complete_returned(&memory)?;
            if self.queue.is_stopping() {
                return Ok(());
            }
            let waiting = self.engine.as_mut().is_some_and(Engine::has_waiting);
            if progress || waiting {
                continue;
            }
            // What comes back wakes, and so does the timer.
            let blocked = self.is_full() || self.limited.is_some();
            let more = !blocked && self.queue.enable_notification(&memory)?;
            if !more && !self.engine.as_mut().is_some_and(Engine::arm) {
                return Ok(());
            }
            self.awake(&memory)?;
        }
        self.queue.wake_again();
        Ok(())
    }

    /// The thread looks by itself: nobody has to wake it.
    fn awake(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        if let Some(engine) = &mut self.engine {
            engine.disarm();
        }
        self.queue.disable_notification(memory)
    }

    /// Waits for what the host has, but not for long.
    fn wait_for_host(&mut self) -> Result<(), QueueError> {
        let memory = self.parts.ram.memory().into_inner();
        let deadline = Instant::now() + STOP_PATIENCE;
        loop {
            self.enter(None)?;
            self.complete_returned(&memory)?;
            let Some(engine) = &mut self.engine else {
                return Ok(());
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if engine.in_flight() == 0 || left.is_zero() {
                return Ok(());
            }
            engine.wait(Some(left));
        }
    }

    /// What the host still has is waited for on this thread, when the device has stopped. Where it has
    /// nothing, the engine ends, on the thread that began it.
    fn leave_to_host(&mut self) -> Option<Rest> {
        let engine = self.engine.take().filter(|engine| engine.in_flight() > 0)?;
        let outstanding = engine.outstanding();
        let (heads, words): (Vec<u16>, Vec<String>) = outstanding.into_iter().unzip();
        log::warn!(
            "{} stops, and the host does not give back {} after {} s: what they are for stays as it is until it does",
            self.parts.name,
            describe(&words),
            STOP_PATIENCE.as_secs()
        );
        self.left.extend(heads);
        // The host may write to what they are for until it has given them back.
        let memory = self.parts.ram.memory().into_inner();
        let lingerers = &self.parts.lingerers;
        match lingerers.keep(self.queue.index(), engine, Arc::clone(&memory)) {
            Ok(rest) => Some(rest),
            Err(error) => {
                // The engine is gone, and with it what tells when they are back: their memory is leaked.
                log::error!("{}: eventfd: {error}", self.parts.name);
                std::mem::forget(memory);
                None
            }
        }
    }
}

impl Worker for BlkWorker {
    fn name(&self) -> String {
        self.parts.name.clone()
    }

    fn kind(&self) -> &'static str {
        "disk"
    }

    fn begin(&mut self) {
        if !self.parts.affinity.is_empty()
            && let Err(error) = sys::run_on(&self.parts.affinity)
        {
            let (name, processors) = (&self.parts.name, &self.parts.affinity);
            log::warn!("{name} does not run on the processors {processors:?}: {error}");
        }
        if let Some(engine) = &mut self.engine {
            engine.begin();
        }
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let own = [
            (self.queue.doorbell(), doorbell_events()),
            (self.timer.as_raw_fd(), doorbell_events()),
        ];
        let adopted = self.adopted.iter();
        let adopted = adopted.map(|requests| (requests.fd(), doorbell_events()));
        let engine = self.engine.iter().flat_map(Engine::sources);
        own.into_iter().chain(adopted).chain(engine).collect()
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let result = self.rounds();
        self.broken = result.is_err();
        result
    }

    fn end(&mut self) -> Option<Rest> {
        self.ending = true;
        if let Err(error) = self.wait_for_host() {
            log::warn!("{}: {error}", self.parts.name);
            self.broken = true;
        }
        self.leave_to_host()
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.queue.leave(progress);
        let DeviceState::Disk(state) = &mut progress.device else {
            return;
        };
        state.writeback = self.parts.space.writeback();
        let queue = self.queue.index();
        let limited = self.limited.iter().map(|flight| flight.head());
        let adopted = self.adopted.iter().flat_map(|requests| requests.heads());
        let heads = self.left.iter().copied().chain(self.again.iter().copied());
        let all = heads.chain(limited).chain(adopted);
        state
            .left
            .extend(all.map(|head| LeftRequest { queue, head }));
    }
}
