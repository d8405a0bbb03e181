//! Output that a thread of its own writes, so that nobody who has something to say waits long for whoever
//! reads it: a guest must not stand still because a pipe is full.
//!
//! What waits is bounded. What does not fit is lost, and a notice in its place says how much.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::provoked;
use crate::sandbox::{self, Kind};
use vmm_sys_util::poll::{PollContext, WatchingEvents};

/// How long [`Outflow::drain`] waits for the reader to take anything more.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of the writing thread's stack: what it calls needs little.
const STACK_SIZE: usize = 64 << 10;

/// What waits to be written.
pub(crate) trait Backlog: Send + 'static {
    /// What is written at once.
    type Batch;

    /// How much waits, in the unit that the bound counts.
    fn size(&self) -> usize;

    /// Takes out what is to be written next.
    fn take(&mut self) -> Option<Self::Batch>;

    /// Adds what stands in the place of as much as was lost.
    fn add_notice(&mut self, lost: u64);
}

/// How much may wait, and who waits for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    /// The most that waits.
    pub(crate) most: usize,
    /// How much may wait for more to be taken, once something was lost: less than `most` keeps losses
    /// together.
    pub(crate) again: usize,
    /// How long a writer waits for room, once; after that all is lost until the reader takes something.
    pub(crate) wait: Duration,
}

/// A bounded backlog and the thread that empties it.
#[derive(Debug)]
pub(crate) struct Outflow<B> {
    bound: Bound,
    state: Mutex<State<B>>,
    /// There is something to write, or nobody writes any more.
    work: Condvar,
    /// Something was written.
    progress: Condvar,
}

#[derive(Debug)]
struct State<B> {
    backlog: B,
    /// The thread has something in hand.
    writing: bool,
    /// Batches ever written.
    written: u64,
    /// Somebody waited in vain, and nothing has been written since.
    stalled: bool,
    /// What was lost since the last notice.
    lost: u64,
    /// Nobody writes any more.
    closed: bool,
    /// The other end is gone for good.
    failed: bool,
}

impl<B: Backlog> Outflow<B> {
    /// Starts the thread, of that kind, which keeps the signals that the calling thread keeps blocked. It ends after
    /// [`close`](Self::close), or where `write` fails: then all that comes later is dropped.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub(crate) fn start(
        kind: Kind,
        name: &str,
        backlog: B,
        bound: Bound,
        mut write: impl FnMut(B::Batch) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let outflow = Arc::new(Self {
            bound,
            state: Mutex::new(State {
                backlog,
                writing: false,
                written: 0,
                stalled: false,
                lost: 0,
                closed: false,
                failed: false,
            }),
            work: Condvar::new(),
            progress: Condvar::new(),
        });
        let shared = Arc::clone(&outflow);
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                sandbox::enter(kind);
                while let Some(batch) = shared.next() {
                    provoked::here();
                    let result = write(batch);
                    if !shared.written(result) {
                        return;
                    }
                }
            })?;
        Ok(outflow)
    }

    /// Has `add` put in `size` of the backlog's unit, or counts it as lost where there is no room for it.
    /// What is `urgent` is put in at any rate.
    pub(crate) fn push(&self, size: usize, urgent: bool, add: impl FnOnce(&mut B)) {
        let mut state = self.lock();
        let full = |state: &State<B>| state.is_full(size, self.bound);
        if full(&state) && !urgent && !state.stalled && !self.bound.wait.is_zero() {
            let waited = self
                .progress
                .wait_timeout_while(state, self.bound.wait, |state| full(state));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.stalled = full(&state);
        }
        if state.failed {
            return;
        }
        if !urgent && (full(&state) || size > self.bound.most) {
            state.lost += size as u64;
            return;
        }
        let was_idle = state.backlog.size() == 0 && !state.writing;
        state.add_notice();
        add(&mut state.backlog);
        if was_idle {
            self.work.notify_one();
        }
    }

    /// Waits until all has been written, as long as somebody reads: [`PATIENCE`] for one batch at most,
    /// and for `limit` altogether where there is one. Not at all where somebody has waited in vain.
    pub(crate) fn drain(&self, limit: Option<Duration>) {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = self.lock();
        while state.has_more() && !state.stalled {
            let left = end.map_or(PATIENCE, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return;
            }
            let before = state.written;
            let waited = self.progress.wait_timeout(state, left.min(PATIENCE));
            let (now, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && now.written == before {
                return;
            }
            state = now;
        }
    }

    /// Has the thread end when it has written what waits.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_one();
    }

    /// How much waits.
    pub(crate) fn size(&self) -> usize {
        self.lock().backlog.size()
    }

    /// Waits for something to write; `None`: there will be nothing more.
    fn next(&self) -> Option<B::Batch> {
        let mut state = self.lock();
        loop {
            if state.backlog.size() == 0 {
                state.add_notice();
            }
            if let Some(batch) = state.backlog.take() {
                state.writing = true;
                return Some(batch);
            }
            if state.closed {
                return None;
            }
            let waited = self.work.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether to go on.
    fn written(&self, result: io::Result<()>) -> bool {
        if let Err(error) = &result {
            // Not under the lock, which the log may need.
            log::debug!("output is gone: {error}");
        }
        let mut state = self.lock();
        state.writing = false;
        state.stalled = false;
        state.written = state.written.wrapping_add(1);
        if result.is_err() {
            state.failed = true;
            while state.backlog.take().is_some() {}
        }
        self.progress.notify_all();
        !state.failed
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Backlog> State<B> {
    /// Whether there is no room for as much more. An empty backlog has room for all that the bound allows.
    fn is_full(&self, more: usize, bound: Bound) -> bool {
        let most = if self.lost > 0 {
            bound.again
        } else {
            bound.most
        };
        let size = self.backlog.size();
        !self.failed && size > 0 && size.saturating_add(more) > most
    }

    fn has_more(&self) -> bool {
        !self.failed && (self.writing || self.lost > 0 || self.backlog.size() > 0)
    }

    /// Says what was lost, in its place.
    fn add_notice(&mut self) {
        if self.lost > 0 {
            self.backlog.add_notice(std::mem::take(&mut self.lost));
        }
    }
}

/// As [`Write::write_all`](io::Write::write_all), but waits where the file is non-blocking, as standard
/// output can be when somebody else who has it made it so.
pub(crate) fn write_all(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let poll: PollContext<u32> = PollContext::new()?;
                poll.add_fd_with_events(file, WatchingEvents::empty().set_write(), 0)?;
                poll.wait()?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    /// Numbers, and how many were lost.
    #[derive(Debug, Default)]
    struct Numbers(std::collections::VecDeque<i64>);

    impl Backlog for Numbers {
        type Batch = i64;

        fn size(&self) -> usize {
            self.0.len()
        }

        fn take(&mut self) -> Option<i64> {
            self.0.pop_front()
        }

        fn add_notice(&mut self, lost: u64) {
            self.0.push_back(-i64::try_from(lost).unwrap());
        }
    }

    /// One whose reader takes a number for each message that it is sent.
    fn slow(bound: Bound) -> (Arc<Outflow<Numbers>>, SyncSender<bool>, Receiver<i64>) {
        let (take, taken) = sync_channel::<bool>(100);
        let (tell, reported) = sync_channel(100);
        let outflow = Outflow::start(
            Kind::Log,
            "slow",
            Numbers::default(),
            bound,
            move |number| {
                let _ = tell.send(number);
                match taken.recv() {
                    Ok(true) => Ok(()),
                    _ => Err(io::ErrorKind::BrokenPipe.into()),
                }
            },
        );
        (outflow.unwrap(), take, reported)
    }

    fn push(outflow: &Outflow<Numbers>, number: i64, urgent: bool) {
        outflow.push(1, urgent, |numbers| numbers.0.push_back(number));
    }

    const AT_ONCE: Bound = Bound {
        most: 4,
        again: 2,
        wait: Duration::ZERO,
    };

    #[test]
    fn what_does_not_fit_is_counted_in_its_place_and_losses_stay_together() {
        let (outflow, take, reported) = slow(AT_ONCE);
        push(&outflow, 1, false);
        assert_eq!(reported.recv(), Ok(1));
        // Four wait, two are lost; with room for two only, none is taken before there is.
        for number in 2..=7 {
            push(&outflow, number, false);
        }
        assert_eq!(outflow.size(), 4);
        take.send(true).unwrap();
        assert_eq!(reported.recv(), Ok(2));
        push(&outflow, 8, false);
        take.send(true).unwrap();
        take.send(true).unwrap();
        assert_eq!((reported.recv(), reported.recv()), (Ok(3), Ok(4)));
        push(&outflow, 9, false);
        // Urgent lines are never left out.
        for number in 10..=13 {
            push(&outflow, number, true);
        }
        for _ in 0..8 {
            take.send(true).unwrap();
        }
        let rest: Vec<_> = (0..7).map(|_| reported.recv().unwrap()).collect();
        assert_eq!(rest, [5, -3, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn losses_are_said_without_anything_after_them() {
        let (outflow, take, reported) = slow(AT_ONCE);
        for number in 0..10 {
            push(&outflow, number, false);
        }
        for _ in 0..10 {
            take.send(true).unwrap();
        }
        outflow.close();
        let all: Vec<_> = reported.iter().collect();
        let lost: i64 = all.iter().filter(|number| **number < 0).sum();
        let there = all.iter().filter(|number| **number >= 0).count();
        assert_eq!(there as i64 - lost, 10, "{all:?}");
    }

    #[test]
    fn nobody_waits_again_for_a_reader_that_was_waited_for_in_vain() {
        let wait = Duration::from_millis(200);
        let (outflow, take, reported) = slow(Bound { wait, ..AT_ONCE });
        push(&outflow, 1, false);
        assert_eq!(reported.recv(), Ok(1));
        let start = Instant::now();
        for number in 2..=20 {
            push(&outflow, number, false);
        }
        outflow.drain(None);
        assert!(start.elapsed() >= wait, "it is waited for once");
        assert!(start.elapsed() < 10 * wait, "and not again");
        take.send(true).unwrap();
        assert_eq!(reported.recv(), Ok(2));
    }

    #[test]
    fn the_end_waits_while_somebody_reads_and_no_longer_than_it_may() {
        let (outflow, take, reported) = slow(AT_ONCE);
        push(&outflow, 1, false);
        assert_eq!(reported.recv(), Ok(1));
        let start = Instant::now();
        outflow.drain(Some(PATIENCE / 10));
        let elapsed = start.elapsed();
        assert!(
            elapsed >= PATIENCE / 10 && elapsed < PATIENCE,
            "{elapsed:?}"
        );
        take.send(true).unwrap();
        outflow.drain(None);
        assert_eq!(outflow.size(), 0);
    }

    #[test]
    fn where_the_other_end_is_gone_all_is_dropped() {
        let (outflow, take, reported) = slow(AT_ONCE);
        push(&outflow, 1, false);
        push(&outflow, 2, false);
        take.send(false).unwrap();
        outflow.drain(None);
        push(&outflow, 3, true);
        assert_eq!(outflow.size(), 0);
        assert_eq!(reported.iter().collect::<Vec<_>>(), [1]);
    }
}
