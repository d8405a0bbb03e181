//! How much of a device a guest may use: bytes and operations, each by a bucket of tokens that fills at a
//! steady rate, beside a burst that is there once.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{BucketConfig, RateLimiterConfig};

/// The limits of one device, for all of its queues together.
#[derive(Debug)]
pub(super) struct Limiter(Mutex<Buckets>);

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// Tokens. A request takes what it needs as soon as there is any, and the bucket then owes the rest: so a
/// request that is larger than the bucket is done, too, and the rate is kept all the same.
#[derive(Debug)]
struct Bucket {
    size: u64,
    refill: Duration,
    tokens: u64,
    /// What was taken beyond what there was.
    debt: u64,
    /// What is left of the burst that is there once.
    burst: u64,
    /// Up to when it has been filled.
    filled: Instant,
}

impl Bucket {
    fn new(config: &BucketConfig, now: Instant) -> Self {
        Self {
            size: config.size,
            refill: Duration::from_millis(config.refill_time),
            tokens: config.size,
            debt: 0,
            burst: config.one_time_burst,
            filled: now,
        }
    }

    /// Adds what has come since it was filled last. What is less than a token is left for the next time.
    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.filled).as_nanos();
        let refill = self.refill.as_nanos().max(1);
        let came = since.saturating_mul(self.size.into()) / refill;
        let Some(took) = came.saturating_mul(refill).checked_div(self.size.into()) else {
            return;
        };
        let took = Duration::from_nanos(u64::try_from(took).unwrap_or(u64::MAX));
        self.filled = self.filled.checked_add(took).unwrap_or(now);
        let came = u64::try_from(came).unwrap_or(u64::MAX);
        let paid = self.debt.min(came);
        self.debt -= paid;
        self.tokens = self.tokens.saturating_add(came - paid).min(self.size);
    }

    /// How long it is until something can be taken; zero where that is now.
    fn wait(&self) -> Duration {
        if self.burst > 0 || self.tokens > 0 {
            return Duration::ZERO;
        }
        let owed = u128::from(self.debt) + 1;
        let nanos = owed.saturating_mul(self.refill.as_nanos()) / u128::from(self.size.max(1));
        // One more, for what division has cut off.
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            .saturating_add(Duration::from_nanos(1))
    }

    fn take(&mut self, count: u64) {
        let from_burst = self.burst.min(count);
        self.burst -= from_burst;
        let rest = count - from_burst;
        let there = self.tokens.min(rest);
        self.tokens -= there;
        self.debt = self.debt.saturating_add(rest - there);
    }
}

impl Limiter {
    pub(super) fn new(config: &RateLimiterConfig, now: Instant) -> Self {
        let bucket = |config: &Option<BucketConfig>| {
            let config = config.as_ref().filter(|config| config.size > 0);
            config.map(|config| Bucket::new(config, now))
        };
        Self(Mutex::new(Buckets {
            bytes: bucket(&config.bandwidth),
            operations: bucket(&config.ops),
        }))
    }

    /// Takes what one operation of `bytes` bytes needs.
    ///
    /// # Errors
    /// How long to wait before asking again; nothing is taken then.
    pub(super) fn take(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets {
            bytes: of_bytes,
            operations,
        } = &mut *buckets;
        let mut wait = Duration::ZERO;
        for bucket in [of_bytes.as_mut(), operations.as_mut()]
            .into_iter()
            .flatten()
        {
            bucket.fill(now);
            wait = wait.max(bucket.wait());
        }
        if wait > Duration::ZERO {
            return Err(wait);
        }
        for (bucket, count) in [(of_bytes, bytes), (operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(count);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, one_time_burst: u64, refill_time: u64) -> Option<BucketConfig> {
        Some(BucketConfig {
            size,
            one_time_burst,
            refill_time,
        })
    }

    fn limiter(
        bandwidth: Option<BucketConfig>,
        ops: Option<BucketConfig>,
        now: Instant,
    ) -> Limiter {
        Limiter::new(&RateLimiterConfig { bandwidth, ops }, now)
    }

    #[test]
    fn a_burst_is_there_once_and_then_the_rate_holds() {
        let start = Instant::now();
        let limiter = limiter(None, bucket(10, 5, 1000), start);
        for _ in 0..15 {
            limiter.take(1 << 30, start).unwrap();
        }
        assert_eq!(
            limiter.take(0, start).unwrap_err().as_millis(),
            100,
            "ten in a second"
        );
        let later = start + Duration::from_secs(60);
        for _ in 0..10 {
            limiter.take(0, later).unwrap();
        }
        limiter.take(0, later).unwrap_err();
    }

    #[test]
    fn a_request_larger_than_the_bucket_is_done_and_paid_for() {
        let start = Instant::now();
        let limiter = limiter(bucket(1000, 0, 100), None, start);
        limiter.take(10_000, start).unwrap();
        let wait = limiter.take(1, start).unwrap_err();
        assert_eq!(wait.as_millis(), 900, "nine times the bucket is owed");
        limiter.take(1, start + wait).unwrap();
    }

    #[test]
    fn what_has_no_limit_is_not_limited() {
        let start = Instant::now();
        let limiter = limiter(bucket(0, 0, 100), None, start);
        for _ in 0..1000 {
            limiter.take(u64::MAX, start).unwrap();
        }
    }

    proptest! {
        #[test]
        fn no_rate_is_exceeded_by_more_than_the_bucket_the_burst_and_a_request(
            size in 1_u64..10_000, burst in 0_u64..10_000, refill in 1_u64..2000,
            requests in proptest::collection::vec((1_u64..5000, 0_u64..50), 1..100),
        ) {
            let start = Instant::now();
            let limiter = limiter(bucket(size, burst, refill), None, start);
            let (mut now, mut taken, mut largest) = (start, 0, 0);
            for (bytes, pause) in requests {
                now += Duration::from_millis(pause);
                while let Err(wait) = limiter.take(bytes, now) {
                    prop_assert!(wait > Duration::ZERO);
                    now += wait;
                }
                taken += bytes;
                largest = largest.max(bytes);
                let came = (now - start).as_nanos() * u128::from(size)
                    / Duration::from_millis(refill).as_nanos();
                prop_assert!(u128::from(taken) <= came + u128::from(size + burst + largest) + 1);
            }
        }
    }
}
