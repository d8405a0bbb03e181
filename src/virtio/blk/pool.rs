//! An image's requests by plain calls, on threads of which there are only so many: all of them where the
//! kernel has no io_uring for this process, and else those that io_uring does not take.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use busway_vfio::EventFd;

use super::flight::Flight;
use super::image::Image;
use super::worker::STOP_PATIENCE;
use crate::sandbox::{self, Kind};
use crate::virtio::worker::thread_name;

/// A thread makes one call at a time, which goes no deeper than the kernel's.
const STACK_SIZE: usize = 128 << 10;

/// Threads that make calls, started when there is something for them to do.
#[derive(Debug)]
pub(super) struct Pool {
    most: usize,
    shared: Arc<Shared>,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    image: Arc<Image>,
    /// The device is being stopped.
    stop: Arc<AtomicBool>,
    jobs: Mutex<Jobs>,
    /// There is a job, or there will be none any more.
    news: Condvar,
    /// Something is done.
    event: EventFd,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Box<Flight>>,
    /// What the threads are at, in words, by request.
    running: Vec<(u16, String)>,
    done: Vec<(Box<Flight>, io::Result<usize>)>,
    threads: usize,
    idle: usize,
    /// Calls have been made by the thread that asks for them.
    made_here: bool,
    over: bool,
    /// Nothing will be written any more.
    finished: bool,
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// `most` threads at most, for requests of `image`; where that is none, the caller's own makes the calls. Those
    /// that can be divided are left off where `stop` says so.
    ///
    /// # Errors
    /// There is no descriptor for its event.
    pub(super) fn new(
        name: &str,
        most: usize,
        image: Arc<Image>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        Ok(Self {
            most,
            shared: Arc::new(Shared {
                name: name.to_owned(),
                image,
                stop,
                jobs: Mutex::default(),
                news: Condvar::new(),
                event: EventFd::new()?,
            }),
            in_flight: 0,
            threads: Vec::new(),
        })
    }

    /// Is signalled when something is done.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Forgets the signals so far, and says whether something is done.
    pub(super) fn hear(&self) -> bool {
        let _signals = self.shared.event.take();
        !self.shared.jobs().done.is_empty()
    }

    /// Requests that are not back.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Those requests: the first descriptor of each, and what it is, in words.
    pub(super) fn outstanding(&self) -> Vec<(u16, String)> {
        let jobs = self.shared.jobs();
        let waiting = jobs.waiting.iter();
        let waiting = waiting.map(|flight| (flight.head(), flight.to_string()));
        jobs.running.iter().cloned().chain(waiting).collect()
    }

    /// Has a thread do it.
    pub(super) fn push(&mut self, flight: Box<Flight>) {
        self.in_flight += 1;
        let mut jobs = self.shared.jobs();
        jobs.waiting.push_back(flight);
        if self.most == 0 {
            return self.do_next(jobs);
        }
        if jobs.idle < jobs.waiting.len() && jobs.threads < self.most {
            jobs.threads += 1;
            let shared = Arc::clone(&self.shared);
            let started = thread::Builder::new()
                .name(format!("{}-io", thread_name("disk", &self.shared.name)))
                .stack_size(STACK_SIZE)
                .spawn(move || {
                    sandbox::enter(Kind::Disk);
                    work(&shared);
                });
            match started {
                Ok(thread) => self.threads.push(thread),
                Err(error) => {
                    jobs.threads -= 1;
                    self.without_thread(jobs, &error);
                    return;
                }
            }
        }
        drop(jobs);
        self.shared.news.notify_one();
    }

    /// Where there is no thread for it, it is done here; others do it where there are any.
    fn without_thread(&self, jobs: MutexGuard<'_, Jobs>, error: &io::Error) {
        log::debug!("{}: no further thread: {error}", self.shared.name);
        if jobs.threads == 0 {
            self.do_next(jobs);
        }
    }

    /// Does the next here and now.
    fn do_next(&self, mut jobs: MutexGuard<'_, Jobs>) {
        if let Some(flight) = jobs.waiting.pop_front() {
            jobs.made_here = true;
            drop(jobs);
            let result = carry_out(&self.shared, &flight);
            self.shared.jobs().done.push((flight, result));
            self.shared.event.signal();
        }
    }

    /// Whether the last thread has written what there was to write before patience is at its end.
    fn finishes(&self, jobs: MutexGuard<'_, Jobs>) -> bool {
        let news = &self.shared.news;
        let waited = news.wait_timeout_while(jobs, STOP_PATIENCE, |jobs| !jobs.finished);
        let (jobs, _late) = waited.unwrap_or_else(PoisonError::into_inner);
        jobs.finished
    }

    /// Takes what is done.
    pub(super) fn reap(&mut self, done: &mut Vec<(Box<Flight>, io::Result<usize>)>) {
        if self.in_flight == 0 {
            return;
        }
        let before = done.len();
        done.append(&mut self.shared.jobs().done);
        self.in_flight = self.in_flight.saturating_sub(done.len() - before);
    }
}

impl Drop for Pool {
    /// Threads end when they are done with what they are at, and the last one writes what the image has in memory only.
    /// Where they are at nothing they are waited for, so that the image is closed, and its lock gone, when its disk is;
    /// but not for a host that does not take what is written.
    fn drop(&mut self) {
        let mut jobs = self.shared.jobs();
        jobs.over = true;
        if self.threads.is_empty() {
            let made_here = jobs.made_here;
            drop(jobs);
            if made_here {
                finish(&self.shared);
            }
            return;
        }
        self.shared.news.notify_all();
        if self.in_flight > 0 {
            return;
        }
        let finished = if self.shared.image.has_tables() {
            self.finishes(jobs)
        } else {
            drop(jobs);
            true
        };
        if !finished {
            log::warn!(
                "{} stops, and the host does not take its image's tables within {} s: the image stays locked until it does",
                self.shared.name,
                STOP_PATIENCE.as_secs()
            );
            return;
        }
        for thread in self.threads.drain(..) {
            // Why a thread panicked was reported when it did.
            let _panicked = thread.join();
        }
    }
}

/// Writes what the image has in memory only.
fn finish(shared: &Shared) {
    if let Err(error) = shared.image.write_tables() {
        log::error!(
            "{}: what the guest wrote and did not flush is lost, for the image's tables cannot be written: {error}",
            shared.name
        );
    }
    shared.jobs().finished = true;
    shared.news.notify_all();
}

fn carry_out(shared: &Shared, flight: &Flight) -> io::Result<usize> {
    flight.carry_out(&shared.image, &|| shared.stop.load(Ordering::Relaxed))
}

fn work(shared: &Shared) {
    let mut jobs = shared.jobs();
    loop {
        if let Some(flight) = jobs.waiting.pop_front() {
            let head = flight.head();
            jobs.running.push((head, flight.to_string()));
            drop(jobs);
            let stopped = shared.stop.load(Ordering::Relaxed);
            let result = if stopped {
                Err(io::ErrorKind::Interrupted.into())
            } else {
                carry_out(shared, &flight)
            };
            jobs = shared.jobs();
            if let Some(at) = jobs.running.iter().position(|(other, _)| *other == head) {
                jobs.running.swap_remove(at);
            }
            jobs.done.push((flight, result));
            shared.event.signal();
        } else if jobs.over {
            jobs.threads -= 1;
            if jobs.threads == 0 {
                drop(jobs);
                finish(shared);
            }
            return;
        } else {
            jobs.idle += 1;
            jobs = shared
                .news
                .wait(jobs)
                .unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
        }
    }
}
