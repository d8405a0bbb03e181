//! The frequency of this machine's time-stamp counter, which the emulated host's follows.

use std::arch::x86_64::_rdtsc;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// The counter's frequency in kHz, measured once.
///
/// A kernel that is emulated on a busy machine measures its own by timers that come late: factors of
/// three were seen. Its clock is then wrong, and KVM, which goes by it, has guests wait for ever.
pub(crate) fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (counter, time) = moment();
        thread::sleep(Duration::from_millis(100));
        let (later_counter, later_time) = moment();
        let micros = later_time.duration_since(time).as_micros().max(1);
        let ticks = u128::from(later_counter.wrapping_sub(counter));
        (ticks * 1000 / micros) as u64
    })
}

/// The counter and the clock at the same moment: the closest of some tries, for the thread can lose
/// its processor between the two.
fn moment() -> (u64, Instant) {
    // SAFETY: every x86_64 processor has the instruction, and it touches nothing but registers.
    let counter = || unsafe { _rdtsc() };
    let tries = (0..16).map(|_| {
        let before = counter();
        let time = Instant::now();
        (counter().wrapping_sub(before), before, time)
    });
    let closest = tries.min_by_key(|(took, ..)| *took);
    closest.map_or_else(|| (counter(), Instant::now()), |(_, at, time)| (at, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_a_processors_and_two_measurements_agree() {
        let measured = khz();
        assert!((500_000..10_000_000).contains(&measured), "{measured} kHz");
        let (counter, time) = moment();
        thread::sleep(Duration::from_millis(200));
        let (later_counter, later_time) = moment();
        let seconds = later_time.duration_since(time).as_secs_f64();
        let again = later_counter.wrapping_sub(counter) as f64 / seconds / 1e3;
        assert!((again / measured as f64 - 1.0).abs() < 0.01, "{again} kHz");
    }
}
