//! Which of a device's log lines are loud: what its guest can bring about, it can repeat for ever.

use std::sync::atomic::{AtomicU32, Ordering};

use log::Level;

/// What was complained of in one device's life, resets and all.
#[derive(Debug)]
pub(crate) struct Complaints {
    made: AtomicU32,
    loud: u32,
}

impl Complaints {
    /// The first `loud` are seen.
    pub(crate) fn new(loud: u32) -> Self {
        Self {
            made: AtomicU32::new(0),
            loud,
        }
    }

    /// The level of one more: `level` for the first ones, then that of what is only for finding faults.
    pub(crate) fn next(&self, level: Level) -> Level {
        let more = |made: u32| Some(made.saturating_add(1));
        let made = self
            .made
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        match made {
            Ok(made) if made < self.loud => level,
            _ => Level::Debug,
        }
    }

    /// How many there were.
    #[cfg(test)]
    pub(crate) fn made(&self) -> u32 {
        self.made.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_complaints_are_loud() {
        let complaints = Complaints::new(2);
        let levels = [(); 4].map(|()| complaints.next(Level::Error));
        use Level::{Debug, Error};
        assert_eq!(levels, [Error, Error, Debug, Debug]);
        assert_eq!(complaints.made(), 4);
    }
}
