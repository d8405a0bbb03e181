//! The virtio entropy source. Virtio 1.3 §5.4.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::activation::Activation;
use super::config_space::{ConfigSpace, Fields};
use super::device::VirtioDevice;
use super::error::QueueError;
use super::error::StartError;
use super::life::{DeviceState, Progress, Running};
use super::limiter::Limiter;
use super::queue::Virtqueue;
use super::spec;
use super::worker::{Worker, doorbell_events};
use crate::config::RngConfig;
use crate::memory::{GuestRam, RamMap};
use busway_pci::Complaints;

const QUEUE_SIZE: u16 = 64;
/// Most bytes of one request. A driver that wants more asks again.
const MAX_REQUEST: usize = 4096;

/// The source of entropy cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// cannot open {path} as the source of random numbers: {source}; --rng src=FILE names another, such as /dev/urandom
    #[error(
        "cannot open {path} as the source of random numbers: {source}; --rng src=FILE names another, \
         such as /dev/urandom"
    )]
    Open {
        /// The source.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// {path} is no source of random numbers: give a character device such as /dev/urandom, a pipe or a file
    #[error(
        "{path} is no source of random numbers: give a character device such as /dev/urandom, a pipe or a file"
    )]
    Kind {
        /// The path.
        path: PathBuf,
    },
}

/// A virtio entropy source.
#[derive(Debug)]
pub struct Rng {
    name: String,
    source: Arc<File>,
    limiter: Option<Arc<Limiter>>,
    config: Arc<Fields>,
    complaints: Arc<Complaints>,
}

impl Rng {
    /// Opens the source.
    ///
    /// # Errors
    /// [`RngError`]
    pub fn new(name: &str, config: &RngConfig) -> Result<Self, RngError> {
        let open = || -> io::Result<(File, std::fs::FileType)> {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&config.src)?;
            let kind = file.metadata()?.file_type();
            Ok((file, kind))
        };
        let (file, kind) = open().map_err(|source| RngError::Open {
            path: config.src.clone(),
            source,
        })?;
        if kind.is_dir() || kind.is_block_device() {
            return Err(RngError::Kind {
                path: config.src.clone(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            source: Arc::new(file),
            limiter: config
                .rate_limiter()
                .map(|limits| Arc::new(Limiter::new(&limits, Instant::now()))),
            config: Fields::new(Vec::new()),
            complaints: Arc::new(Complaints::first(1)),
        })
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::ENTROPY
    }

    fn class(&self) -> u32 {
        0x10_80_00 // encryption controller, other
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        if let Some(queue) = activation.take_queue(0)? {
            workers.push(Box::new(RngWorker {
                name: self.name.clone(),
                ram: activation.ram().clone(),
                queue,
                source: Arc::clone(&self.source),
                limiter: self.limiter.clone(),
                timer: TimerFd::new().map_err(io::Error::from)?,
                complaints: Arc::clone(&self.complaints),
            }));
        }
        activation.run(workers, DeviceState::None)
    }
}

/// What came of a try to fill a request.
enum Filled {
    One,
    NoRequest,
    /// Nothing for now: the source wakes the worker, or the limiter's timer does.
    NoEntropy,
}

#[derive(Debug)]
struct RngWorker {
    name: String,
    ram: GuestRam,
    queue: Virtqueue,
    source: Arc<File>,
    limiter: Option<Arc<Limiter>>,
    timer: TimerFd,
    complaints: Arc<Complaints>,
}

impl RngWorker {
    /// Fills one request.
    fn fill(&mut self, memory: &RamMap) -> Result<Filled, QueueError> {
        let Some(mut chain) = self.queue.pop(memory)? else {
            return Ok(Filled::NoRequest);
        };
        let room = chain.writable.take_front(MAX_REQUEST);
        if let Some(limiter) = &self.limiter
            && let Err(wait) = limiter.take(room.len() as u64, Instant::now())
        {
            self.queue.undo_pop();
            if let Err(error) = self.timer.reset(wait, None) {
                log::error!("{}: timerfd_settime: {error}", self.name);
            }
            return Ok(Filled::NoEntropy);
        }
        let written = if room.is_empty() {
            0
        } else {
            match room.receive(self.source.as_fd()) {
                Ok(written) if written > 0 => written,
                // An empty answer would have the driver ask again at once, for ever: it waits.
                result => {
                    self.queue.undo_pop();
                    self.complain(result);
                    return Ok(Filled::NoEntropy);
                }
            }
        };
        self.queue.complete(memory, chain.head(), written)?;
        self.queue.interrupt(memory)?;
        Ok(Filled::One)
    }

    /// Says once in the device's life that the source has ended or failed.
    fn complain(&self, result: io::Result<usize>) {
        let reason = match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => error.to_string(),
            Ok(_) => "it has ended".to_owned(),
        };
        log::log!(
            self.complaints.next(log::Level::Warn),
            "{}: no random numbers from their source: {reason}",
            self.name
        );
    }
}

impl Worker for RngWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "rng"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![
            (self.queue.doorbell(), doorbell_events()),
            (self.timer.as_raw_fd(), doorbell_events()),
            (self.source.as_raw_fd(), doorbell_events()),
        ]
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let ram = self.ram.clone();
        let memory = ram.memory();
        for _ in 0..self.queue.size() {
            match self.fill(&memory)? {
                Filled::One => {}
                Filled::NoEntropy => return Ok(()),
                Filled::NoRequest => {
                    if !self.queue.enable_notification(&memory)? {
                        return Ok(());
                    }
                }
            }
        }
        self.queue.wake_again();
        Ok(())
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.queue.leave(progress);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, eventually};
    use std::io::Write;

    fn driver(source: &std::path::Path) -> Driver {
        let config = RngConfig {
            src: source.to_owned(),
            ..RngConfig::default()
        };
        Driver::new(Rng::new("rng0", &config).unwrap())
    }

    #[test]
    fn a_request_waits_for_a_source_that_has_nothing_yet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let mut driver = driver(&path);
        let mut pipe = OpenOptions::new().write(true).open(&path).unwrap();
        driver.negotiate(0);
        let mut ring = driver.queue(0, 16);
        driver.ready();
        let buffer = driver.alloc(64);
        for round in 0..20 {
            ring.submit(&[(buffer, 64, true)]);
            driver.notify(&ring);
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert_eq!(ring.poll_used(), None);
            pipe.write_all(&[round; 5]).unwrap();
            assert_eq!(ring.wait_used().1, 5);
            assert_eq!(driver.read(buffer, 5), [round; 5]);
        }
    }

    #[test]
    fn a_request_is_bounded() {
        let mut driver = driver("/dev/zero".as_ref());
        driver.negotiate(0);
        let mut ring = driver.queue(0, 16);
        driver.ready();
        let len = driver.run(&mut ring, &[(0x100_000, 1 << 20, true)]);
        assert_eq!(len as usize, MAX_REQUEST);
    }

    #[test]
    fn a_guest_gets_no_more_than_its_limit_and_goes_on_when_there_is_more() {
        let config = RngConfig {
            src: "/dev/zero".into(),
            bw_size: Some(1000),
            bw_one_time_burst: Some(24),
            bw_refill_time: Some(1000),
        };
        let start = Instant::now();
        let mut driver = Driver::new(Rng::new("rng0", &config).unwrap());
        driver.negotiate(0);
        let mut ring = driver.queue(0, 16);
        driver.ready();
        // The bucket and the burst, and half of the bucket more.
        for _ in 0..6 {
            ring.submit(&[(0x10_0000, 256, true)]);
        }
        driver.notify(&ring);
        for _ in 0..6 {
            assert_eq!(ring.wait_used().1, 256);
        }
        assert!(start.elapsed().as_millis() >= 250, "{:?}", start.elapsed());
    }

    #[test]
    fn a_source_that_has_ended_is_told_of_once_however_often_the_guest_begins_anew() {
        let config = RngConfig {
            src: "/dev/null".into(),
            ..RngConfig::default()
        };
        let rng = Rng::new("rng0", &config).unwrap();
        let complaints = Arc::clone(&rng.complaints);
        let mut driver = Driver::new(rng);
        for round in 1..4 {
            driver.negotiate(0);
            let mut ring = driver.queue(0, 16);
            driver.ready();
            ring.submit(&[(0x10_0000, 64, true)]);
            driver.notify(&ring);
            eventually("a complaint", || complaints.made() >= round);
        }
        assert_eq!(complaints.next(log::Level::Warn), log::Level::Debug);
    }

    #[test]
    fn what_gives_no_random_numbers_is_refused() {
        for (path, expected) in [("/nonexistent", "--rng src=FILE"), ("/", "is no source")] {
            let config = RngConfig {
                src: path.into(),
                ..RngConfig::default()
            };
            let error = Rng::new("rng0", &config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
