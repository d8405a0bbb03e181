//! How often the same trouble is told of: what a guest or a device can bring about, it can repeat for
//! ever, and a log that is full of one line hides all others.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

/// Complaints of one kind about one thing, resets and all.
///
/// The first ones are loud. Of those that come later one in each period is, if there is a period, and
/// knows how many were not.
#[derive(Debug)]
pub struct Complaints {
    loud: u32,
    period: Option<Duration>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    made: u32,
    /// When the next is loud.
    next: Option<Instant>,
    /// How many were not loud since the last one that was.
    quiet: u64,
}

impl Complaints {
    /// The first `loud` are loud, and no other.
    #[must_use]
    pub fn first(loud: u32) -> Self {
        Self {
            loud,
            period: None,
            state: Mutex::default(),
        }
    }

    /// One complaint in each `period` is logged at its own level.
    #[must_use]
    pub fn every(period: Duration) -> Self {
        Self {
            loud: 0,
            period: Some(period),
            state: Mutex::default(),
        }
    }

    /// Counts one more. Where it is to be loud: how many before it were not.
    pub fn make(&self, now: Instant) -> Option<u64> {
        let mut state = self.lock();
        let first = state.made < self.loud;
        state.made = state.made.saturating_add(1);
        let due = match self.period {
            Some(period) if state.next.is_none_or(|next| now >= next) => {
                state.next = now.checked_add(period);
                true
            }
            _ => first,
        };
        if due {
            Some(std::mem::take(&mut state.quiet))
        } else {
            state.quiet = state.quiet.saturating_add(1);
            None
        }
    }

    /// Counts one more, and gives its level in the log: `level` where it is loud, else that of what is
    /// only for finding faults.
    pub fn next(&self, level: Level) -> Level {
        match self.make(Instant::now()) {
            Some(_) => level,
            None => Level::Debug,
        }
    }

    /// What was wrong is right again: the next complaint is as the first.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }

    /// How many there were.
    #[must_use]
    pub fn made(&self) -> u32 {
        self.lock().made
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_complaints_are_loud() {
        let complaints = Complaints::first(2);
        let levels = [(); 4].map(|()| complaints.next(Level::Error));
        use Level::{Debug, Error};
        assert_eq!(levels, [Error, Error, Debug, Debug]);
        assert_eq!(complaints.made(), 4);
        complaints.reset();
        assert_eq!(complaints.next(Level::Warn), Level::Warn);
    }

    #[test]
    fn a_storm_is_told_of_now_and_then_with_how_many_there_were() {
        let period = Duration::from_secs(5);
        let (complaints, start) = (Complaints::every(period), Instant::now());
        assert_eq!(complaints.make(start), Some(0));
        for _ in 0..9 {
            assert_eq!(complaints.make(start + period / 2), None);
        }
        assert_eq!(complaints.make(start + period), Some(9));
        assert_eq!(complaints.make(start + 3 * period), Some(0));
    }
}
