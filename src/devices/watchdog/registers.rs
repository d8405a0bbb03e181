//! The watchdog's registers and stages, with the time given: pure logic. Intel 6300ESB datasheet (300641), chapter 21.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Preload of the first stage, 20 bits. §21.4.1
const PRELOAD1: u64 = 0x00;
/// Preload of the second. §21.4.2
const PRELOAD2: u64 = 0x04;
/// The reload register, 16 bits. §21.4.4
const RELOAD: u64 = 0x0c;
const PRELOAD_MASK: u32 = 0xf_ffff;
/// The timer begins anew.
const RELOAD_TIMER: u16 = 1 << 8;
/// It has run out and reset the machine; cleared by writing one.
const TIMED_OUT: u16 = 1 << 9;
/// Each write to a register comes behind these two to RELOAD. §21.4.5
const UNLOCK: [u16; 2] = [0x80, 0x86];

/// In WDT_CONFIG (60h): the timer counts microseconds, not milliseconds. §21.3.6
pub(super) const FAST: u16 = 1 << 2;
/// It resets nothing.
pub(super) const NO_OUTPUT: u16 = 1 << 5;
/// In WDT_LOCK (68h): nothing here can be changed until the reset. §21.3.7
pub(super) const LOCK: u8 = 1 << 0;
/// The timer runs.
pub(super) const ENABLE: u8 = 1 << 1;
/// It begins anew when it has run out.
pub(super) const FREE_RUN: u8 = 1 << 2;

/// The clock that is divided: that of conventional PCI.
const CLOCK: u64 = 33_000_000;
/// No stage is shorter, so that a timer that begins anew by itself leaves the machine's event loop its time.
const SHORTEST: Duration = Duration::from_millis(10);

/// Which of its two times runs. When the second is over, the machine is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The first, at whose end an interrupt would come.
    First,
    /// The second.
    Second,
}

/// What a watchdog remembers, beside its configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    /// What the two stages begin with: ticks.
    pub preloads: [u32; 2],
    /// How much of the sequence that lets a register be written has come.
    pub unlocked: u8,
    /// WDT_CONFIG.
    pub config: u16,
    /// WDT_LOCK.
    pub lock: u8,
    /// The machine was reset by it.
    pub timed_out: bool,
    /// The stage that runs, and the nanoseconds that are left of it, where the guest stands still.
    pub held: Option<(Stage, u64)>,
}

impl Default for WatchdogState {
    fn default() -> Self {
        Self {
            preloads: [PRELOAD_MASK; 2],
            unlocked: 0,
            config: 0,
            lock: 0,
            timed_out: false,
            held: None,
        }
    }
}

/// The registers and the timer.
#[derive(Debug, Default)]
pub(super) struct Registers {
    state: WatchdogState,
    running: Option<(Stage, Instant)>,
    /// The guest stands still, and so does the timer.
    paused: bool,
}

impl Registers {
    pub(super) fn state(&self) -> &WatchdogState {
        &self.state
    }

    /// When the stage that runs is over.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.running.map(|(_, deadline)| deadline)
    }

    fn length(&self, stage: Stage) -> Duration {
        let [first, second] = self.state.preloads;
        let ticks = match stage {
            Stage::First => first,
            Stage::Second => second,
        };
        let shift = if self.state.config & FAST != 0 { 5 } else { 15 };
        let nanos = u128::from(ticks).saturating_mul(1_000_000_000 << shift) / u128::from(CLOCK);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).max(SHORTEST)
    }

    fn begin(&mut self, stage: Stage, now: Instant) {
        let length = self.length(stage);
        if self.paused {
            let nanos = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
            self.state.held = Some((stage, nanos));
        } else {
            self.running = now.checked_add(length).map(|deadline| (stage, deadline));
        }
    }

    fn stop(&mut self) {
        self.running = None;
        self.state.held = None;
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let reload = if self.state.timed_out { TIMED_OUT } else { 0 };
        if offset == RELOAD {
            for (to, from) in data.iter_mut().zip(reload.to_le_bytes()) {
                *to = from;
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8], now: Instant) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        if offset == RELOAD {
            let [first, second] = UNLOCK.map(u32::from);
            match (value, self.state.unlocked) {
                _ if value == first => return self.state.unlocked = 1,
                (_, 1) if value == second => return self.state.unlocked = 2,
                _ => {}
            }
        }
        if self.state.unlocked < 2 {
            return;
        }
        self.state.unlocked = 0;
        let [first, second] = &mut self.state.preloads;
        match offset {
            PRELOAD1 => *first = value & PRELOAD_MASK,
            PRELOAD2 => *second = value & PRELOAD_MASK,
            RELOAD => {
                if value & u32::from(TIMED_OUT) != 0 {
                    self.state.timed_out = false;
                }
                if value & u32::from(RELOAD_TIMER) != 0 && self.state.lock & ENABLE != 0 {
                    self.begin(Stage::First, now);
                }
            }
            _ => {}
        }
    }

    /// WDT_CONFIG was written.
    pub(super) fn set_config(&mut self, config: u16) {
        if self.state.lock & LOCK == 0 {
            self.state.config = config;
        }
    }

    /// WDT_LOCK was written.
    pub(super) fn set_lock(&mut self, lock: u8, now: Instant) {
        if self.state.lock & LOCK != 0 {
            return;
        }
        let was = std::mem::replace(&mut self.state.lock, lock);
        match (was & ENABLE != 0, lock & ENABLE != 0) {
            (false, true) => self.begin(Stage::First, now),
            (_, false) => self.stop(),
            (true, true) => {}
        }
    }

    /// Looks whether a stage is over; says whether the machine is to be reset.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        match self.running {
            Some((Stage::First, deadline)) if deadline <= now => {
                self.begin(Stage::Second, now);
                false
            }
            Some((Stage::Second, deadline)) if deadline <= now => {
                self.stop();
                if self.state.lock & FREE_RUN != 0 {
                    self.begin(Stage::First, now);
                }
                let resets = self.state.config & NO_OUTPUT == 0;
                self.state.timed_out |= resets;
                resets
            }
            _ => false,
        }
    }

    /// The guest stands still from now on.
    pub(super) fn pause(&mut self, now: Instant) {
        self.paused = true;
        if let Some((stage, deadline)) = self.running.take() {
            let left = deadline.saturating_duration_since(now).as_nanos();
            self.state.held = Some((stage, u64::try_from(left).unwrap_or(u64::MAX)));
        }
    }

    /// It goes on.
    pub(super) fn resume(&mut self, now: Instant) {
        self.paused = false;
        if let Some((stage, left)) = self.state.held.take() {
            let deadline = now.checked_add(Duration::from_nanos(left));
            self.running = deadline.map(|deadline| (stage, deadline));
        }
    }

    /// As at power-on, but for what tells why the machine was reset.
    pub(super) fn reset(&mut self) {
        self.running = None;
        self.state = WatchdogState {
            timed_out: self.state.timed_out,
            ..WatchdogState::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn unlock(registers: &mut Registers, now: Instant) {
        registers.write(RELOAD, &[0x80, 0], now);
        registers.write(RELOAD, &[0x86, 0], now);
    }

    /// As Linux's driver starts it, for `seconds` seconds. drivers/watchdog/i6300esb.c
    fn started(seconds: u32, now: Instant) -> Registers {
        let mut registers = Registers::default();
        registers.set_config(3);
        registers.set_lock(0, now);
        for preload in [PRELOAD1, PRELOAD2] {
            unlock(&mut registers, now);
            registers.write(preload, &(seconds << 9).to_le_bytes(), now);
        }
        unlock(&mut registers, now);
        registers.write(RELOAD, &RELOAD_TIMER.to_le_bytes(), now);
        assert_eq!(registers.deadline(), None, "it is not enabled yet");
        registers.set_lock(ENABLE, now);
        registers
    }

    #[test]
    fn a_driver_that_stops_feeding_it_has_the_machine_reset_after_both_stages() {
        let start = Instant::now();
        let mut registers = started(30, start);
        assert!(!registers.expire(start + 14 * SECOND));
        assert!(!registers.expire(start + 16 * SECOND), "the first stage");
        let deadline = registers.deadline().unwrap();
        assert!(deadline > start + 29 * SECOND && deadline < start + 32 * SECOND);
        assert!(registers.expire(deadline));
        registers.reset();
        assert_eq!(registers.deadline(), None);
        let mut reload = [0; 2];
        registers.read(RELOAD, &mut reload);
        assert_eq!(
            u16::from_le_bytes(reload),
            TIMED_OUT,
            "the next start knows"
        );
        unlock(&mut registers, start);
        registers.write(RELOAD, &TIMED_OUT.to_le_bytes(), start);
        assert!(!registers.state().timed_out);
    }

    #[test]
    fn a_driver_that_feeds_it_in_time_goes_on_for_ever() {
        let mut now = Instant::now();
        let mut registers = started(10, now);
        for _ in 0..100 {
            now += 4 * SECOND;
            assert!(!registers.expire(now));
            unlock(&mut registers, now);
            registers.write(RELOAD, &RELOAD_TIMER.to_le_bytes(), now);
        }
        // Without the sequence before it a write does nothing.
        let deadline = registers.deadline();
        registers.write(RELOAD, &RELOAD_TIMER.to_le_bytes(), now + SECOND);
        assert_eq!(registers.deadline(), deadline);
        registers.set_lock(0, now);
        assert_eq!(registers.deadline(), None);
    }

    #[test]
    fn a_timer_that_is_locked_cannot_be_stopped_and_without_output_resets_nothing() {
        let now = Instant::now();
        let mut registers = started(10, now);
        registers.set_lock(ENABLE | LOCK, now);
        registers.set_lock(0, now);
        registers.set_config(NO_OUTPUT);
        assert!(registers.deadline().is_some());
        assert_eq!(registers.state().config, 3);
        let mut registers = started(10, now);
        registers.set_config(NO_OUTPUT);
        registers.set_lock(ENABLE | FREE_RUN, now);
        for seconds in 1..100 {
            assert!(!registers.expire(now + seconds * SECOND));
        }
        assert!(registers.deadline().is_some(), "it begins anew");
    }

    #[test]
    fn while_the_guest_stands_still_so_does_the_timer() {
        let start = Instant::now();
        let mut registers = started(30, start);
        registers.pause(start + 5 * SECOND);
        assert!(!registers.expire(start + 500 * SECOND));
        assert_eq!(registers.deadline(), None);
        registers.resume(start + 500 * SECOND);
        let left = registers.deadline().unwrap() - (start + 500 * SECOND);
        assert!(left > 9 * SECOND && left < 11 * SECOND, "{left:?}");
        registers.pause(start + 501 * SECOND);
        registers.set_lock(0, start);
        registers.resume(start + 502 * SECOND);
        assert_eq!(registers.deadline(), None, "it was switched off meanwhile");
    }

    proptest! {
        #[test]
        fn no_write_is_too_odd(
            writes in proptest::collection::vec((0_u64..20, any::<[u8; 8]>(), 0_usize..9, any::<u8>()), 0..200),
        ) {
            let mut now = Instant::now();
            let mut registers = Registers::default();
            for (offset, bytes, width, what) in writes {
                now += Duration::from_millis(what.into());
                match what % 5 {
                    0 => registers.set_lock(what >> 4, now),
                    1 => registers.set_config(what.into()),
                    2 => { unlock(&mut registers, now); }
                    3 => { registers.expire(now); }
                    _ => {}
                }
                registers.write(offset, &bytes[..width], now);
                let mut read = bytes;
                registers.read(offset, &mut read[..width]);
                if registers.state().lock & ENABLE == 0 {
                    prop_assert!(registers.deadline().is_none());
                }
            }
        }
    }
}
