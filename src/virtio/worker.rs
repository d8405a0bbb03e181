//! The threads on which a device's workers run, and how they end.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::Worker;
use super::interrupts::Interrupts;

/// A worker keeps its buffers on the heap and calls nothing deep.
const STACK_SIZE: usize = 256 << 10;

/// The token of the stop event; sources are numbered from 0.
const STOP: u64 = u64::MAX;

/// The running workers of one device. Dropping it stops them and waits until they have.
#[derive(Debug)]
pub(crate) struct Workers {
    stop: Arc<AtomicBool>,
    stop_event: EventFd,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts each worker on a thread of its own. `stop` is the flag that their queues look at.
    ///
    /// # Errors
    /// A thread or a descriptor could not be made; none runs then.
    pub(crate) fn start(
        workers: Vec<Box<dyn Worker>>,
        stop: Arc<AtomicBool>,
        interrupts: &Arc<Interrupts>,
    ) -> io::Result<Self> {
        let mut running = Self {
            stop,
            stop_event: EventFd::new()?,
            threads: Vec::new(),
        };
        for mut worker in workers {
            let epoll = watch(&*worker, &running.stop_event)?;
            let stop = Arc::clone(&running.stop);
            let interrupts = Arc::clone(interrupts);
            let thread = Builder::new()
                .name(worker.name())
                .stack_size(STACK_SIZE)
                .spawn(move || run(&mut *worker, &epoll, &stop, &interrupts))?;
            running.threads.push(thread);
        }
        Ok(running)
    }
}

impl Drop for Workers {
    /// A request that a worker is in the middle of is finished first.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop_event.signal();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                log::error!("virtio worker {name} has panicked");
            }
        }
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

fn serve(
    worker: &mut dyn Worker,
    epoll: &Epoll,
    stop: &AtomicBool,
) -> Result<(), super::queue::QueueError> {
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
            if let Ok(source) = usize::try_from(event.data()) {
                worker.wake(source)?;
            }
        }
    }
    Ok(())
}
