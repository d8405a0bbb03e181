//! How often a guest may have the host's kernel do what is costly: an account of time for each function.
//!
//! Resets, interrupts that are enabled, BARs that are mapped and power that is switched cost the host
//! more than the exit that asks for them: they take locks of the whole kernel, interrupt all its
//! processors, or wait for a device. Each has a price here, which is the time between two of them that a
//! guest is held to when it does nothing else. An allowance is free at first and grows back with time, so
//! a driver that is loaded is never slowed. Who has used it up waits, on the thread of the vCPU that asks
//! and after what it asked for is done, with no lock of the machine's held but that of writes to the
//! function.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A reset of a function, whichever way it is done. A function level reset alone takes 100 ms (PCIe 6.0
/// §6.6.2), a bus reset with what the kernel waits after it a second, and one on a bus of the host keeps
/// others waiting.
pub const RESET: Duration = Duration::from_millis(500);
/// A call that enables, connects or disables interrupts. The kernel allocates vectors, changes its tables
/// under a lock of all interrupts, and waits for handlers on other processors: about 0.1 ms, so that
/// this is a fortieth of one processor's time.
pub const INTERRUPTS: Duration = Duration::from_millis(4);
/// A BAR mapped or unmapped. The kernel waits until no vCPU looks at the memory slots, and the IOMMU's
/// tables change: some 0.1 ms, more for a large BAR.
pub const MAPPING: Duration = Duration::from_millis(8);
/// A power state or a slot's power switched. The kernel waits 10 ms for a device that leaves D3hot (PCIe
/// 6.0 §5.9), most of it asleep.
pub const SWITCH: Duration = Duration::from_millis(8);

/// What is free at first, and grows back: 64 resets, or 8000 calls for interrupts, or 4000 mappings. A
/// driver's load has one or two resets, a hundred or two calls (one for each vector) and a dozen
/// mappings: 20 loads in a row cost 32 s at the most, of which those that the loads take have grown back.
const ALLOWANCE: Duration = Duration::from_secs(32);
/// The longest single wait: a vCPU is held, or ended, only between two accesses. What is owed beyond that
/// is remitted.
const LONGEST: Duration = Duration::from_secs(5);

/// What tells the time and lets it pass; the system's, but in tests.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The time since some start, which never goes back.
    fn now(&self) -> Duration;
    /// Waits.
    fn sleep(&self, time: Duration);
}

/// The system's monotonic clock.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// The account of one function.
#[derive(Debug)]
pub struct Pace {
    name: Box<str>,
    clock: Arc<dyn Clock>,
    account: Mutex<Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// The time at which all that was asked for will have been paid by the time that has passed.
    paid_at: Duration,
    /// That the guest is slowed has been said.
    said: bool,
}

impl Pace {
    /// The account of what is called `name` in messages, with all of the allowance in it.
    #[must_use]
    pub fn new(name: impl Into<Box<str>>, clock: Arc<dyn Clock>) -> Self {
        Self {
            name: name.into(),
            clock,
            account: Mutex::default(),
        }
    }

    /// Notes that something was done `count` times. Waits for nothing, so a lock may be held.
    pub fn charge(&self, price: Duration, count: u32) {
        if count == 0 {
            return;
        }
        let mut account = self.account();
        let from = account.paid_at.max(self.clock.now());
        account.paid_at = from.saturating_add(price.saturating_mul(count));
    }

    /// Waits until what was done is within the allowance, for 5 s at most. To be called on the thread of
    /// the vCPU that asked, with no lock held that anybody but this guest takes.
    pub fn pay(&self) {
        let mut account = self.account();
        let now = self.clock.now();
        let owed = account.paid_at.saturating_sub(now);
        let Some(over) = owed.checked_sub(ALLOWANCE).filter(|over| !over.is_zero()) else {
            return;
        };
        let wait = over.min(LONGEST);
        account.paid_at = account.paid_at.saturating_sub(over.saturating_sub(wait));
        let said = std::mem::replace(&mut account.said, true);
        drop(account);
        if !said {
            log::warn!(
                "{}: the guest resets it, or changes its interrupts, BARs or power, so often that it is \
                 slowed down",
                self.name
            );
        }
        self.clock.sleep(wait);
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A clock whose time passes only when somebody waits or says so.
#[derive(Debug, Default)]
pub struct StoppedClock(Mutex<Duration>);

impl Clock for StoppedClock {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sleep(&self, time: Duration) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now = now.saturating_add(time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> (Arc<StoppedClock>, Pace) {
        let clock = Arc::<StoppedClock>::default();
        (clock.clone(), Pace::new("a device", clock))
    }

    /// How long `act` had its caller wait.
    fn waited(clock: &StoppedClock, act: impl FnOnce()) -> Duration {
        let before = clock.now();
        act();
        clock.now() - before
    }

    /// A driver of a device with so many vectors is unloaded and loaded again, in half a second.
    fn reload(clock: &StoppedClock, pace: &Pace, vectors: u32) -> Duration {
        let waited = waited(clock, || {
            for (price, count) in [
                (INTERRUPTS, vectors + 3),
                (RESET, 2),
                (MAPPING, 12),
                (SWITCH, 2),
            ] {
                pace.charge(price, count);
                pace.pay();
            }
        });
        clock.sleep(Duration::from_millis(500));
        waited
    }

    #[test]
    fn a_boot_and_twenty_reloads_in_a_row_are_not_slowed() {
        for vectors in [1, 33, 129] {
            let (clock, pace) = account();
            for round in 0..21 {
                let waited = reload(&clock, &pace, vectors);
                assert_eq!(waited, Duration::ZERO, "round {round}, {vectors} vectors");
            }
        }
    }

    #[test]
    fn a_storm_is_held_to_the_price_of_what_it_does() {
        for (price, count) in [(RESET, 1), (INTERRUPTS, 1), (MAPPING, 6), (SWITCH, 1)] {
            let (clock, pace) = account();
            let free = (ALLOWANCE.as_micros() / (price * count).as_micros()) as u32;
            let storm = |rounds| {
                waited(&clock, || {
                    for _ in 0..rounds {
                        pace.charge(price, count);
                        pace.pay();
                    }
                })
            };
            assert_eq!(storm(free), Duration::ZERO, "{price:?}");
            let rest = (price * count).checked_mul(1000).unwrap();
            let slack = price * count;
            let took = storm(1000);
            assert!(took + slack >= rest && took <= rest, "{price:?}: {took:?}");
        }
    }

    #[test]
    fn the_allowance_grows_back_and_no_further() {
        let (clock, pace) = account();
        let all = |pace: &Pace| {
            pace.charge(ALLOWANCE, 1);
            pace.pay();
        };
        all(&pace);
        assert_eq!(waited(&clock, || all(&pace)), LONGEST);
        clock.sleep(ALLOWANCE * 100);
        assert_eq!(waited(&clock, || all(&pace)), Duration::ZERO);
        pace.charge(RESET, 1);
        assert_eq!(waited(&clock, || pace.pay()), RESET);
    }

    #[test]
    fn a_single_wait_is_short_and_what_is_owed_beyond_it_is_let_go() {
        let (clock, pace) = account();
        pace.charge(RESET, u32::MAX);
        pace.charge(Duration::MAX, 2);
        assert_eq!(waited(&clock, || pace.pay()), LONGEST);
        assert_eq!(waited(&clock, || pace.pay()), Duration::ZERO);
        pace.charge(RESET, 1);
        assert_eq!(waited(&clock, || pace.pay()), RESET);
    }

    #[test]
    fn the_systems_clock_waits() {
        let pace = Pace::new("a device", Arc::new(SystemClock::default()));
        let start = Instant::now();
        pace.charge(ALLOWANCE + Duration::from_millis(20), 1);
        pace.pay();
        assert!(start.elapsed() >= Duration::from_millis(19));
    }
}
