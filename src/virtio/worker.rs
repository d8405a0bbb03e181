//! A device's workers: the threads that serve its queues, and how they end.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::error::QueueError;
use super::interrupts::Interrupts;
use super::life::{Progress, Running};
use crate::provoked;
use crate::sandbox::{self, Kind};

/// What one thread of a device does: it waits for its sources and is woken with their number.
pub(super) trait Worker: Send + Debug {
    /// What messages call it: its device's name, and which of its queues it serves.
    fn name(&self) -> String;

    /// What kind of device it is of, in the word that automatic names begin with.
    fn kind(&self) -> &'static str;

    /// On its thread, before it is woken for the first time.
    fn begin(&mut self) {}

    /// What wakes it: descriptors that it keeps open, level- or edge-triggered as the event set says.
    /// Asked at the start.
    fn sources(&self) -> Vec<(RawFd, EventSet)>;

    /// Source number `source` is ready. Each is also woken once at the start, for what came before.
    ///
    /// # Errors
    /// The driver broke a queue's rules. The worker ends, and the device needs a reset.
    fn wake(&mut self, source: usize) -> Result<(), QueueError>;

    /// On its thread, when the device is being stopped, or the driver has broken the queue's rules: finishes
    /// or leaves what it is in the middle of, in bounded time. What only the host can end is returned for
    /// its thread to wait for after the device has stopped.
    fn end(&mut self) -> Option<Rest> {
        None
    }

    /// It has ended: notes what it leaves, the positions in its queues first of all.
    fn leave(&mut self, progress: &mut Progress);
}

/// What a worker's thread is called, of which Linux keeps 15 bytes: those who look after a VM tell the threads that
/// do its I/O from others by `_disk`, `_net` and the like at the beginning.
pub(super) fn thread_name(kind: &str, name: &str) -> String {
    match name.starts_with(kind) {
        true => format!("_{name}"),
        false => format!("_{kind}-{name}"),
    }
}

/// What a thread waits for when its device has stopped already. It touches nothing of the guest's but what
/// the host has had since before the stop.
pub(super) type Rest = Box<dyn FnOnce() + Send>;

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
    threads: Vec<Thread>,
    interrupts: Arc<Interrupts>,
    /// The progress of the queues and of the device that no worker reports for itself.
    progress: Progress,
}

/// A worker's thread.
#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    /// Gives the worker back when it has ended, and whether its thread waits for the host still.
    ended: Receiver<(Box<dyn Worker>, bool)>,
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
            let thread_name = thread_name(worker.kind(), &worker.name());
            let (sender, ended) = sync_channel(1);
            let body = move || {
                sandbox::enter(Kind::of_worker(worker.kind()));
                worker.begin();
                run(&mut *worker, &epoll, &stop, &interrupts);
                let rest = worker.end();
                // Nobody takes it where the start of the device's other workers failed.
                let _nobody = sender.send((worker, rest.is_some()));
                if let Some(rest) = rest {
                    rest();
                }
            };
            let handle = Builder::new()
                .name(thread_name)
                .stack_size(STACK_SIZE)
                .spawn(body)?;
            running.threads.push(Thread { handle, ended });
        }
        Ok(running)
    }

    /// Ends the workers and waits for that. What a worker is in the middle of it finishes or leaves.
    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop_event.signal();
        for thread in self.threads.drain(..) {
            let Thread { handle, ended } = thread;
            let name = handle.thread().name().unwrap_or_default().to_owned();
            let lingers = match ended.recv() {
                Ok((mut worker, lingers)) => {
                    worker.leave(&mut self.progress);
                    lingers
                }
                Err(_panicked) => {
                    self.interrupts
                        .needs_reset(&name, &"its thread has panicked");
                    false
                }
            };
            if !lingers {
                // Why the thread panicked was reported when it did.
                let _panic = handle.join();
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
    let epoll = watch_sources(worker)?;
    epoll.ctl(
        ControlOperation::Add,
        stop.as_fd().as_raw_fd(),
        EpollEvent::new(EventSet::IN, STOP),
    )?;
    Ok(epoll)
}

/// What waits for the sources of `worker`, each by its number.
pub(super) fn watch_sources(worker: &dyn Worker) -> io::Result<Epoll> {
    let epoll = Epoll::new()?;
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
