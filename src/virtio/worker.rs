//! A device's workers: the threads that serve its queues, and how they end.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::interrupts::Interrupts;
use super::life::{Progress, Running};
use super::queue::QueueError;
use crate::provoked;

/// What one thread of a device does: it waits for its sources and is woken with their number.
pub(super) trait Worker: Send + Debug {
    /// Its thread's name, of which Linux keeps 15 bytes.
    fn name(&self) -> String;

    /// What wakes it: descriptors that it keeps open, level- or edge-triggered as the event set says.
    /// Asked at the start.
    fn sources(&self) -> Vec<(RawFd, EventSet)>;

    /// Source number `source` is ready. Each is also woken once at the start, for what came before.
    ///
    /// # Errors
    /// The driver broke a queue's rules. The worker ends, and the device needs a reset.
    fn wake(&mut self, source: usize) -> Result<(), QueueError>;

    /// Its thread has ended: notes what it leaves, the positions in its queues first of all.
    fn leave(&mut self, progress: &mut Progress);
}

/// The events of a doorbell: each notification wakes once.
pub(super) fn doorbell_events() -> EventSet {
    EventSet::IN | EventSet::EDGE_TRIGGERED
}

/// A worker keeps its buffers on the heap and calls nothing deep.
const STACK_SIZE: usize = 256 << 10;

/// The token of the stop event; sources are numbered from 0.
const STOP: u64 = u64::MAX;

/// The running workers of one device.
#[derive(Debug)]
pub(super) struct Workers {
    stop: Arc<AtomicBool>,
    stop_event: EventFd,
    threads: Vec<JoinHandle<Box<dyn Worker>>>,
    interrupts: Arc<Interrupts>,
    /// What no worker says of its own.
    progress: Progress,
}

impl Workers {
    /// Starts each worker on a thread of its own. `stop` is the flag that their queues look at.
    ///
    /// # Errors
    /// A thread or a descriptor could not be made; none runs then.
    pub(super) fn start(
        workers: Vec<Box<dyn Worker>>,
        stop: Arc<AtomicBool>,
        interrupts: Arc<Interrupts>,
        progress: Progress,
    ) -> io::Result<Self> {
        let mut running = Self {
            stop,
            stop_event: EventFd::new()?,
            threads: Vec::new(),
            interrupts,
            progress,
        };
        for mut worker in workers {
            let epoll = watch(&*worker, &running.stop_event)?;
            let stop = Arc::clone(&running.stop);
            let interrupts = Arc::clone(&running.interrupts);
            let thread_name = worker.name();
            let body = move || {
                run(&mut *worker, &epoll, &stop, &interrupts);
                worker
            };
            let thread = Builder::new()
                .name(thread_name)
                .stack_size(STACK_SIZE)
                .spawn(body)?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// Ends the threads and waits for them. What a worker is in the middle of it finishes or leaves.
    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop_event.signal();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            match thread.join() {
                Ok(mut worker) => worker.leave(&mut self.progress),
                Err(_) => self
                    .interrupts
                    .needs_reset(&name, &"its thread has panicked"),
            }
        }
    }
}

impl Running for Workers {
    fn stop(mut self: Box<Self>) -> Progress {
        self.end();
        std::mem::take(&mut self.progress)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end();
    }
}

fn watch(worker: &dyn Worker, stop: &EventFd) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
    epoll.ctl(
        ControlOperation::Add,
        stop.as_fd().as_raw_fd(),
        EpollEvent::new(EventSet::IN, STOP),
    )?;
    for (number, (fd, events)) in (0..).zip(worker.sources()) {
        let event = EpollEvent::new(events, number);
        match epoll.ctl(ControlOperation::Add, fd, event) {
            // A regular file, or /dev/urandom: it is always ready, and nobody has to wait for it.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            result => result?,
        }
    }
    Ok(epoll)
}

fn run(worker: &mut dyn Worker, epoll: &Epoll, stop: &AtomicBool, interrupts: &Interrupts) {
    if let Err(error) = serve(worker, epoll, stop) {
        interrupts.needs_reset(&worker.name(), &error);
    }
}

fn serve(worker: &mut dyn Worker, epoll: &Epoll, stop: &AtomicBool) -> Result<(), QueueError> {
    for source in 0..worker.sources().len() {
        worker.wake(source)?;
    }
    let mut events = [EpollEvent::default(); 8];
    while !stop.load(Ordering::Relaxed) {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("{}: epoll_wait: {error}", worker.name());
                return Ok(());
            }
        };
        for event in events.iter().take(ready) {
            if event.data() == STOP {
                return Ok(());
            }
            provoked::here();
            if let Ok(source) = usize::try_from(event.data()) {
                worker.wake(source)?;
            }
        }
    }
    Ok(())
}
