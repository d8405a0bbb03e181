//! How an image's requests get to the host and back: by io_uring, and by a few threads that make plain
//! calls for what that does not take, or for all where the host has no io_uring for this process.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::epoll::EventSet;

use super::flight::Flight;
use super::image::Image;
use super::pool::Pool;
use super::uring::Uring;
use crate::virtio::worker::doorbell_events;

/// Threads of a queue that make all its calls.
const THREADS: usize = 8;
/// Threads of a queue that make the calls that io_uring does not.
const HELPERS: usize = 2;

/// A request that is back, and the bytes that are done.
pub(super) type Returned = (Box<Flight>, io::Result<usize>);

/// How requests get to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum EngineKind {
    /// By io_uring, where that is to be had.
    #[default]
    Best,
    /// By threads only.
    #[cfg(test)]
    Threads,
    /// By plain calls of the thread that asks, so that a story comes out the same each time.
    #[cfg(any(test, feature = "hostile"))]
    Here,
}

/// One queue's way to the host.
#[derive(Debug)]
pub(super) struct Engine {
    image: Arc<Image>,
    ring: Option<Uring>,
    pool: Pool,
}

impl Engine {
    /// For `entries` requests of `image` at once. What can be divided is left off where `stop` says so.
    ///
    /// # Errors
    /// There is no descriptor for it.
    pub(super) fn new(
        name: &str,
        image: Arc<Image>,
        entries: u16,
        stop: Arc<AtomicBool>,
        way: EngineKind,
    ) -> io::Result<Self> {
        let ring = match (way, image.file()) {
            (EngineKind::Best, Some(file)) => match Uring::new(entries, file) {
                Ok(ring) => Some(ring),
                Err(error) => {
                    say_why_not(&error);
                    None
                }
            },
            _ => None,
        };
        let threads = match way {
            #[cfg(any(test, feature = "hostile"))]
            EngineKind::Here => 0,
            _ if ring.is_some() => HELPERS,
            _ => THREADS,
        };
        Ok(Self {
            pool: Pool::new(name, threads, Arc::clone(&image), stop)?,
            image,
            ring,
        })
    }

    /// On the thread that will use it.
    pub(super) fn begin(&mut self) {
        if let Some(Err(error)) = self.ring.as_mut().map(Uring::begin) {
            say_why_not(&error);
            self.ring = None;
        }
    }

    /// What wakes the thread: requests have come back.
    pub(super) fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let ring = self
            .ring
            .as_ref()
            .map(|ring| (ring.event().as_raw_fd(), doorbell_events()));
        let pool = (self.pool.event().as_raw_fd(), doorbell_events());
        ring.into_iter().chain([pool]).collect()
    }

    /// Requests that are not back.
    pub(super) fn in_flight(&self) -> usize {
        self.in_ring() + self.pool.in_flight()
    }

    /// Those of them that the kernel has by the ring.
    pub(super) fn in_ring(&self) -> usize {
        self.ring.as_ref().map_or(0, Uring::in_flight)
    }

    /// Those requests: the first descriptor of each, and what it is, in words.
    pub(super) fn outstanding(&self) -> Vec<(u16, String)> {
        let ring = self.ring.iter().flat_map(Uring::flights);
        let mut all: Vec<_> = ring
            .map(|flight| (flight.head(), flight.to_string()))
            .collect();
        all.append(&mut self.pool.outstanding());
        all
    }

    /// Has the host do it: with the next [`enter`](Self::enter), or on a thread at once.
    pub(super) fn start(&mut self, flight: Box<Flight>) {
        let flight = match &mut self.ring {
            Some(ring) if flight.is_for_ring(&self.image) => match ring.push(flight) {
                Ok(()) => return,
                Err(flight) => flight,
            },
            _ => flight,
        };
        self.pool.push(flight);
    }

    /// Whether requests wait for the next [`enter`](Self::enter).
    pub(super) fn has_waiting(&mut self) -> bool {
        self.ring.as_mut().is_some_and(Uring::has_waiting)
    }

    /// Gives the kernel what waits; with `hold`, waits until so many are back, or for so long.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn enter(&mut self, hold: Option<(usize, Duration)>) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |ring| ring.enter(hold))
    }

    /// Takes what is back.
    pub(super) fn reap(&mut self, done: &mut Vec<Returned>) {
        if let Some(ring) = &mut self.ring {
            ring.reap(done);
        }
        self.pool.reap(done);
    }

    /// Has its sources wake the thread from now on, and says whether something is back already.
    pub(super) fn arm(&mut self) -> bool {
        self.ring.as_mut().is_some_and(Uring::arm)
    }

    /// The thread is awake, and its sources need not wake it before it [waits](Self::arm) again.
    pub(super) fn disarm(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.disarm();
        }
    }

    /// Waits until something is back, or for so long.
    pub(super) fn wait(&mut self, patience: Option<Duration>) {
        if let Some(ring) = &self.ring {
            ring.hear();
        }
        if self.pool.hear() || self.arm() {
            return;
        }
        let (ring, pool) = (self.ring.as_ref().map(Uring::event), self.pool.event());
        let fds: Vec<_> = ring.into_iter().chain([pool]).collect();
        let mut polled: Vec<_> = fds
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        // An interruption is as good as a time that is over: whoever waits looks again.
        let _ready = poll(&mut polled, patience.as_ref());
    }
}

/// Whether the host's administrator keeps io_uring from processes: kernel.io_uring_disabled.
static DISABLED: OnceLock<bool> = OnceLock::new();

/// Looks, while files can still be opened, at what would keep disks from io_uring. Those who say so cannot.
pub(super) fn look() {
    let switch = "/proc/sys/kernel/io_uring_disabled";
    let disabled = || std::fs::read_to_string(switch).is_ok_and(|text| text.trim() != "0");
    DISABLED.get_or_init(disabled);
}

/// Says once why disks do without io_uring, and what would change that.
fn say_why_not(error: &io::Error) {
    static SAID: Once = Once::new();
    let disabled = DISABLED.get() == Some(&true);
    let why = match error.raw_os_error() {
        Some(libc::EPERM) if disabled => {
            "the sysctl kernel.io_uring_disabled keeps it from this process; 0 allows it"
        }
        Some(libc::EPERM | libc::EACCES) => "a seccomp filter or a security module refuses it",
        Some(libc::ENOSYS) => "the kernel has none, or a seccomp filter says so",
        Some(libc::ENOMEM) => "the limit of locked memory (ulimit -l) or of the cgroup is too low",
        Some(libc::EMFILE | libc::ENFILE) => "the limit of open files (ulimit -n) is too low",
        _ => "the kernel is older than 5.10, or lacks a part of it",
    };
    SAID.call_once(|| {
        log::warn!("disks are served by threads, not by io_uring ({error}): {why}");
    });
}
