//! How long completions are held so that they gather: the driver hears of many at once, and makes as many
//! available at once.
//!
//! Half of what the host has is waited for, while it works on the other half, so that it never runs dry;
//! and for no longer than half of what a request takes, so that none takes much longer than it would have.

use std::time::Duration;

/// Fewer requests than this are not waited for: whoever has as few out waits for each.
const LEAST: usize = 4;
/// The longest wait, however slow the host is.
const LONGEST: Duration = Duration::from_micros(500);
/// A request counts for so many parts in the mean.
const WEIGHT: u32 = 8;

/// How long requests take, as far as that is known.
#[derive(Debug, Default)]
pub(super) struct Hold {
    mean: Duration,
}

impl Hold {
    /// A request took so long.
    pub(super) fn took(&mut self, time: Duration) {
        self.mean = if self.mean.is_zero() {
            time
        } else {
            (self.mean * (WEIGHT - 1) + time.min(Duration::from_secs(1))) / WEIGHT
        };
    }

    /// How many of the `in_flight` requests that the host has are waited for, and for how long.
    pub(super) fn patience(&self, in_flight: usize) -> Option<(usize, Duration)> {
        let patience = (self.mean / 2).min(LONGEST);
        (in_flight >= LEAST && !patience.is_zero()).then_some((in_flight / 2, patience))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_is_waited_for_and_no_longer_than_half_of_what_one_takes() {
        let mut hold = Hold::default();
        assert_eq!(hold.patience(16), None, "nothing is known");
        hold.took(Duration::from_micros(100));
        assert_eq!(hold.patience(16), Some((8, Duration::from_micros(50))));
        assert_eq!(hold.patience(3), None);
        for _ in 0..100 {
            hold.took(Duration::from_millis(10));
        }
        assert_eq!(hold.patience(5), Some((2, LONGEST)));
    }
}
