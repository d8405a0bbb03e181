//! The MC146818's registers as a function of the time: no thread, no timer, no descriptor.

use serde::{Deserialize, Serialize};

use super::calendar::DateTime;
use super::{CENTURY, INDEX_MASK};

/// The version of [`RtcState`] that is written and read. It changes with the meaning of a field.
const VERSION: u16 = 1;

const SECOND: i64 = 1_000_000_000;
/// What the guest can set the time to, in seconds since the start of 1970: the years 1900 to 2199. A
/// number of nanoseconds in 64 bits ends with 2262-04-11 23:47:16, which a guest could set otherwise,
/// and a clock that was set runs on.
const SETTABLE: std::ops::RangeInclusive<i64> = -2_208_988_800..=7_258_118_399;
/// The update takes place at the second's end; UIP shows this long before it that it is near. Data
/// sheet, "Update cycle".
const UPDATE_NEAR: i64 = 244_000;
/// After the divider is released, the first update comes half a second later. Data sheet, "Divider
/// control".
const AFTER_SET: i64 = SECOND / 2;

// Registers.
const SECONDS: u8 = 0;
const SECONDS_ALARM: u8 = 1;
const MINUTES: u8 = 2;
const MINUTES_ALARM: u8 = 3;
const HOURS: u8 = 4;
const HOURS_ALARM: u8 = 5;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const A: u8 = 10;
const B: u8 = 11;
const C: u8 = 12;
const D: u8 = 13;

/// Register A: update in progress.
const A_UIP: u8 = 1 << 7;
/// Register A: the rate of the periodic interrupt.
const A_RATE: u8 = 0xf;
/// Register A at power-on: a 32.768 kHz base and 1024 Hz.
const A_DEFAULT: u8 = 0x26;
/// Register B: the time stands still, to be set.
const B_SET: u8 = 1 << 7;
/// Register B: interrupt enables; register C: the flags they enable.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
/// Register B: square wave.
const B_SQUARE_WAVE: u8 = 1 << 3;
/// Register B: values are binary, not BCD.
const B_BINARY: u8 = 1 << 2;
/// Register B: hours count to 24.
const B_24_HOURS: u8 = 1 << 1;
/// Register C: an enabled flag is set.
const C_IRQ: u8 = 1 << 7;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
/// The hour's bit that means afternoon, where hours count to 12.
const AFTERNOON: u8 = 1 << 7;
/// An alarm value from here on matches any time.
const ANY: u8 = 0xc0;

/// Bytes of CMOS, clock and RAM together.
const BYTES: usize = 128;

/// What the clock remembers. The time is not in it, but what the guest's is off the host's by: a clock that is
/// restored has gone on meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    /// The version of this structure.
    pub version: u16,
    /// The register that the data port shows.
    pub index: u8,
    /// Registers as written; those that the time fills are unused.
    #[serde(with = "cmos")]
    pub bytes: [u8; BYTES],
    /// Interrupt flags, register C without IRQF.
    pub flags: u8,
    /// Nanoseconds that the guest's time is ahead of the host's.
    pub offset: i64,
    /// While the time stands still to be set: what it will be, in seconds since the start of 1970.
    pub stopped: Option<i64>,
    /// The guest's time up to which events are in `flags`, in nanoseconds since the start of 1970.
    pub seen: i64,
}

/// A saved state is none that a clock can go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RtcStateError {
    /// the clock's state was saved in version {0} of the format, and this Busway knows 1: restore it with the Busway that saved it
    #[error(
        "the clock's state was saved in version {0} of the format, and this Busway knows {VERSION}: restore it \
         with the Busway that saved it"
    )]
    Version(u16),
    /// the clock's saved state is damaged: its registers disagree on whether it stands still to be set
    #[error(
        "the clock's saved state is damaged: its registers disagree on whether it stands still to be set"
    )]
    Stopped,
}

/// The bytes of CMOS as a list, for serde's arrays end at 32.
mod cmos {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::BYTES;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; BYTES], to: S) -> Result<S::Ok, S::Error> {
        bytes.as_slice().serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<[u8; BYTES], D::Error> {
        let bytes = Vec::<u8>::deserialize(from)?;
        let count = bytes.len();
        let wrong = |_| D::Error::invalid_length(count, &"128 bytes of CMOS");
        bytes.try_into().map_err(wrong)
    }
}

impl RtcState {
    /// The state to go on with after `self` was saved: what no clock can have is made what one can have.
    ///
    /// # Errors
    /// [`RtcStateError`]
    pub(super) fn checked(&self) -> Result<Self, RtcStateError> {
        if self.version != VERSION {
            return Err(RtcStateError::Version(self.version));
        }
        if self.stopped.is_some() != (self.byte(B) & B_SET != 0) {
            return Err(RtcStateError::Stopped);
        }
        // What 64 bits of nanoseconds hold, as of a time that runs.
        let (first, last) = (i64::MIN.div_euclid(SECOND), i64::MAX.div_euclid(SECOND));
        Ok(Self {
            index: self.index & INDEX_MASK,
            flags: self.flags & (PERIODIC | ALARM | UPDATE),
            stopped: self.stopped.map(|seconds| seconds.clamp(first, last)),
            ..self.clone()
        })
    }

    /// A clock that agrees with the host's time `now`, in nanoseconds since the start of 1970.
    pub(super) fn new(now: i64) -> Self {
        let mut bytes = [0; BYTES];
        bytes[usize::from(A)] = A_DEFAULT;
        bytes[usize::from(B)] = B_24_HOURS;
        Self {
            version: VERSION,
            index: 0,
            bytes,
            flags: 0,
            offset: 0,
            stopped: None,
            seen: now,
        }
    }

    /// The machine was reset: interrupts go off, time and RAM stay. Data sheet, "RESET".
    pub(super) fn reset(&mut self, now: i64) {
        self.advance(now);
        self.index = 0;
        self.flags = 0;
        self.bytes[usize::from(B)] &= !(PERIODIC | ALARM | UPDATE | B_SQUARE_WAVE);
    }

    /// Reads the selected register.
    pub(super) fn read(&mut self, now: i64) -> u8 {
        self.advance(now);
        let date = self.date(now);
        match self.index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(date.weekday),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(date.year.rem_euclid(100) as u8),
            CENTURY => self.encode(date.year.div_euclid(100).rem_euclid(100) as u8),
            A => {
                let rest = self.time(now).rem_euclid(SECOND);
                let near = self.stopped.is_none() && rest >= SECOND - UPDATE_NEAR;
                self.byte(A) & !A_UIP | if near { A_UIP } else { 0 }
            }
            C => {
                let flags = self.flags | if self.asserted() { C_IRQ } else { 0 };
                self.flags = 0;
                flags
            }
            D => D_VALID,
            index => self.byte(index),
        }
    }

    /// Writes the selected register.
    pub(super) fn write(&mut self, value: u8, now: i64) {
        self.advance(now);
        let mut date = self.date(now);
        match self.index {
            SECONDS => date.second = self.decode(value),
            MINUTES => date.minute = self.decode(value),
            HOURS => date.hour = self.decode_hour(value),
            // Follows from the date.
            WEEKDAY => return,
            DAY => date.day = self.decode(value),
            MONTH => date.month = self.decode(value),
            YEAR => {
                let century = date.year.div_euclid(100);
                date.year = century * 100 + i64::from(self.decode(value));
            }
            CENTURY => {
                date.year = i64::from(self.decode(value)) * 100 + date.year.rem_euclid(100);
            }
            A => return self.set_byte(A, value & !A_UIP),
            B => return self.set_b(value, now),
            C | D => return,
            index => return self.set_byte(index, value),
        }
        let seconds = date.to_seconds();
        let seconds = seconds.clamp(*SETTABLE.start(), *SETTABLE.end());
        if self.stopped.is_some() {
            self.stopped = Some(seconds);
        } else {
            let rest = self.time(now).rem_euclid(SECOND);
            self.set_time(seconds.saturating_mul(SECOND).saturating_add(rest), now);
        }
    }

    /// Notes the events up to `now`, and says whether the interrupt is asserted.
    pub(super) fn advance(&mut self, now: i64) -> bool {
        let (from, to) = (self.seen, self.time(now));
        self.seen = to;
        if from < to {
            if let Some(hertz) = self.rate()
                && ticks(from, hertz) != ticks(to, hertz)
            {
                self.flags |= PERIODIC;
            }
            if self.stopped.is_none() {
                if from.div_euclid(SECOND) != to.div_euclid(SECOND) {
                    self.flags |= UPDATE;
                }
                if self.next_alarm(from).is_some_and(|alarm| alarm <= to) {
                    self.flags |= ALARM;
                }
            }
        }
        self.asserted()
    }

    /// Whether the interrupt is asserted.
    pub(super) fn asserted(&self) -> bool {
        self.flags & self.byte(B) & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// Nanoseconds from `now` to the next event that asserts the interrupt; `None` where none will, or
    /// where it is asserted already.
    pub(super) fn next_interrupt(&self, now: i64) -> Option<i64> {
        if self.asserted() {
            return None;
        }
        let time = self.time(now);
        // The first nanosecond of the next of `hertz` ticks a second.
        let boundary = |hertz: i64| {
            let next = (ticks(time, hertz) + 1) * i128::from(SECOND);
            i64::try_from((next + i128::from(hertz) - 1).div_euclid(hertz.into())).ok()
        };
        let enabled = |bit| self.byte(B) & bit != 0;
        let running = self.stopped.is_none();
        let next = [
            self.rate().filter(|_| enabled(PERIODIC)).and_then(boundary),
            (enabled(UPDATE) && running).then(|| boundary(1)).flatten(),
            (enabled(ALARM) && running)
                .then(|| self.next_alarm(time))
                .flatten(),
        ];
        let next = next.into_iter().flatten().min()?;
        // At the end of what 64 bits hold time stands still, and nothing comes any more.
        next.checked_sub(time).filter(|&delay| delay > 0)
    }

    /// The guest's time.
    fn time(&self, now: i64) -> i64 {
        now.saturating_add(self.offset)
    }

    fn date(&self, now: i64) -> DateTime {
        let seconds = self
            .stopped
            .unwrap_or_else(|| self.time(now).div_euclid(SECOND));
        DateTime::from_seconds(seconds)
    }

    fn set_time(&mut self, time: i64, now: i64) {
        self.offset = time.saturating_sub(now);
        // Setting the time is no event.
        self.seen = self.time(now);
    }

    fn set_b(&mut self, value: u8, now: i64) {
        let was_set = self.stopped.is_some();
        // Setting the time disables the update interrupt. Data sheet, "SET".
        let value = if value & B_SET != 0 {
            value & !UPDATE
        } else {
            value
        };
        self.set_byte(B, value);
        match (was_set, value & B_SET != 0) {
            (false, true) => self.stopped = Some(self.time(now).div_euclid(SECOND)),
            (true, false) => {
                if let Some(seconds) = self.stopped.take() {
                    self.set_time(
                        seconds.saturating_mul(SECOND).saturating_add(AFTER_SET),
                        now,
                    );
                }
            }
            _ => {}
        }
    }

    /// Periodic events a second. Data sheet, table 5, for a 32.768 kHz base.
    fn rate(&self) -> Option<i64> {
        match self.byte(A) & A_RATE {
            0 => None,
            1 => Some(256),
            2 => Some(128),
            rate => Some(32_768 >> (rate - 1)),
        }
    }

    /// The first time after `from` that the alarm matches; it does at least once a day, or never.
    fn next_alarm(&self, from: i64) -> Option<i64> {
        let wanted = |index, decode: &dyn Fn(u8) -> u8| {
            let value = self.byte(index);
            (value < ANY).then(|| decode(value))
        };
        let hour = wanted(HOURS_ALARM, &|value| self.decode_hour(value));
        let minute = wanted(MINUTES_ALARM, &|value| self.decode(value));
        let second = wanted(SECONDS_ALARM, &|value| self.decode(value));
        let never = |wanted: Option<u8>, count| wanted.is_some_and(|value| value >= count);
        if never(hour, 24) || never(minute, 60) || never(second, 60) {
            return None;
        }
        let start = from.div_euclid(SECOND) + 1;
        let mut at = start;
        while at <= start + 86_400 {
            let date = DateTime::from_seconds(at);
            if hour.is_some_and(|hour| hour != date.hour) {
                at += 3600 - i64::from(date.minute) * 60 - i64::from(date.second);
            } else if minute.is_some_and(|minute| minute != date.minute) {
                at += 60 - i64::from(date.second);
            } else if second.is_some_and(|second| second != date.second) {
                at += 1;
            } else {
                return Some(at.saturating_mul(SECOND));
            }
        }
        None
    }

    fn encode(&self, value: u8) -> u8 {
        if self.byte(B) & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.byte(B) & B_BINARY != 0 {
            value
        } else {
            // At most 165, for what is no BCD.
            (value >> 4) * 10 + (value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.byte(B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.byte(B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & AFTERNOON != 0 { 12 } else { 0 };
        self.decode(value & !AFTERNOON) % 12 + afternoon
    }

    fn byte(&self, index: u8) -> u8 {
        self.bytes.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn set_byte(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(index)) {
            *byte = value;
        }
    }
}

/// How many ticks of `hertz` a second there were up to `time`.
fn ticks(time: i64, hertz: i64) -> i128 {
    (i128::from(time) * i128::from(hertz)).div_euclid(SECOND.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2023-11-14 22:13:20, a Tuesday.
    const NOW: i64 = 1_700_000_000 * SECOND;

    fn read(clock: &mut RtcState, index: u8, now: i64) -> u8 {
        clock.index = index;
        clock.read(now)
    }

    fn write(clock: &mut RtcState, index: u8, value: u8, now: i64) {
        clock.index = index;
        clock.write(value, now);
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd_or_binary_with_12_or_24_hours() {
        let mut clock = RtcState::new(NOW);
        let all = |clock: &mut RtcState| {
            [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
                .map(|index| read(clock, index, NOW))
        };
        assert_eq!(
            all(&mut clock),
            [0x20, 0x23, 0x11, 0x14, 3, 0x22, 0x13, 0x20]
        );
        clock.set_byte(B, B_BINARY | B_24_HOURS);
        assert_eq!(all(&mut clock), [20, 23, 11, 14, 3, 22, 13, 20]);
        clock.set_byte(B, 0);
        assert_eq!(all(&mut clock)[5], 0x10 | AFTERNOON);
    }

    #[test]
    fn hours_survive_encoding_in_each_mode() {
        let mut clock = RtcState::new(NOW);
        for mode in [0, B_BINARY, B_24_HOURS, B_24_HOURS | B_BINARY] {
            clock.set_byte(B, mode);
            for hour in 0..24 {
                assert_eq!(clock.decode_hour(clock.encode_hour(hour)), hour);
            }
        }
    }

    #[test]
    fn setting_the_time_is_an_offset_that_later_readings_keep() {
        let mut clock = RtcState::new(NOW);
        write(&mut clock, B, B_24_HOURS | B_SET, NOW);
        for (index, value) in [
            (CENTURY, 0x20),
            (YEAR, 0x30),
            (MONTH, 0x02),
            (DAY, 0x28),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x59),
        ] {
            write(&mut clock, index, value, NOW + 5 * SECOND);
            assert_eq!(read(&mut clock, index, NOW + 9 * SECOND), value);
        }
        let set_at = NOW + 20 * SECOND;
        write(&mut clock, B, B_24_HOURS, set_at);
        assert_eq!(read(&mut clock, SECONDS, set_at + SECOND / 4), 0x59);
        // Half a second after it was let go comes the update.
        let later = set_at + SECOND / 2;
        assert_eq!(read(&mut clock, MONTH, later), 0x03);
        assert_eq!(read(&mut clock, DAY, later), 0x01);
        assert_eq!(read(&mut clock, SECONDS, later), 0x00);
    }

    #[test]
    fn a_guest_sets_no_time_beyond_2199_or_before_1900() {
        for (bytes, year) in [([0xff, 0xff], 2199), ([0x22, 0x62], 2199), ([0, 0], 1900)] {
            for set in [0, B_SET] {
                let mut clock = RtcState::new(NOW);
                write(&mut clock, B, B_24_HOURS | set, NOW);
                for _ in 0..1000 {
                    write(&mut clock, CENTURY, bytes[0], NOW);
                    write(&mut clock, YEAR, bytes[1], NOW);
                    for index in [MONTH, DAY, HOURS, MINUTES, SECONDS] {
                        write(&mut clock, index, bytes[1], NOW);
                    }
                }
                // Where bytes carried it on from the end, it is back in the first year.
                write(&mut clock, CENTURY, bytes[0], NOW);
                write(&mut clock, B, B_24_HOURS | UPDATE, NOW);
                assert_eq!(clock.date(NOW).year, year, "{bytes:x?} {set:#x}");
                assert!(clock.next_interrupt(NOW).is_some_and(|due| due <= SECOND));
            }
        }
    }

    #[test]
    fn at_the_end_of_time_nothing_is_due() {
        let mut clock = RtcState::new(NOW);
        clock.offset = i64::MAX;
        for index in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
            write(&mut clock, index, 0xff, NOW);
        }
        write(&mut clock, B, B_24_HOURS | UPDATE | ALARM | PERIODIC, NOW);
        for now in [NOW, NOW + SECOND, i64::MAX - 1, i64::MAX] {
            clock.advance(now);
            assert_eq!(clock.next_interrupt(now), None);
        }
    }

    #[test]
    fn update_in_progress_shows_just_before_the_second_ends() {
        let mut clock = RtcState::new(NOW);
        assert_eq!(read(&mut clock, A, NOW) & A_UIP, 0);
        assert_eq!(read(&mut clock, A, NOW + SECOND - 1) & A_UIP, A_UIP);
        write(&mut clock, B, B_SET, NOW);
        assert_eq!(read(&mut clock, A, NOW + SECOND - 1) & A_UIP, 0);
    }

    #[test]
    fn an_alarm_asserts_the_interrupt_at_its_time_and_reading_c_takes_it_back() {
        let mut clock = RtcState::new(NOW);
        write(&mut clock, SECONDS_ALARM, 0x25, NOW);
        write(&mut clock, MINUTES_ALARM, 0x13, NOW);
        write(&mut clock, HOURS_ALARM, 0x22, NOW);
        assert_eq!(clock.next_interrupt(NOW), None, "not enabled");
        write(&mut clock, B, B_24_HOURS | ALARM, NOW);
        assert_eq!(clock.next_interrupt(NOW), Some(5 * SECOND));
        assert!(!clock.advance(NOW + 5 * SECOND - 1));
        assert!(clock.advance(NOW + 5 * SECOND));
        assert_eq!(clock.next_interrupt(NOW + 5 * SECOND), None, "asserted");
        let flags = read(&mut clock, C, NOW + 5 * SECOND);
        assert_eq!(flags & (C_IRQ | ALARM), C_IRQ | ALARM);
        assert!(!clock.asserted());
        assert_eq!(
            clock.next_interrupt(NOW + 5 * SECOND),
            Some(86_400 * SECOND),
            "the same time tomorrow"
        );
        write(&mut clock, MINUTES_ALARM, 0xff, NOW + 6 * SECOND);
        assert_eq!(
            clock.next_interrupt(NOW + 6 * SECOND),
            Some(59 * SECOND),
            "any minute"
        );
        write(&mut clock, HOURS_ALARM, 0x99, NOW + 6 * SECOND);
        assert_eq!(clock.next_interrupt(NOW + 6 * SECOND), None, "no such hour");
    }

    #[test]
    fn an_alarm_at_a_time_that_there_is_not_is_not_searched_for() {
        let mut clock = RtcState::new(NOW);
        for index in [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM] {
            write(&mut clock, index, 0xff, NOW);
        }
        write(&mut clock, SECONDS_ALARM, 0x99, NOW);
        write(&mut clock, B, B_24_HOURS | ALARM, NOW);
        let start = std::time::Instant::now();
        for step in 0..100_000 {
            assert!(!clock.advance(NOW + step * SECOND));
            assert_eq!(clock.next_interrupt(NOW + step * SECOND), None);
        }
        let took = start.elapsed();
        assert!(took.as_secs() < 30, "{took:?}");
    }

    #[test]
    fn periodic_and_update_interrupts_come_at_their_boundaries() {
        let mut clock = RtcState::new(NOW);
        write(&mut clock, B, B_24_HOURS | PERIODIC | UPDATE, NOW);
        let tick = SECOND / 1024 + 1;
        assert_eq!(clock.next_interrupt(NOW), Some(tick));
        assert!(!clock.advance(NOW + tick - 1));
        assert!(clock.advance(NOW + tick));
        assert_eq!(read(&mut clock, C, NOW + tick), C_IRQ | PERIODIC);
        assert!(clock.advance(NOW + SECOND));
        assert_eq!(
            read(&mut clock, C, NOW + SECOND) & !ALARM,
            C_IRQ | PERIODIC | UPDATE
        );
        clock.reset(NOW + SECOND);
        assert_eq!(clock.next_interrupt(NOW + SECOND), None);
    }

    #[test]
    fn a_host_clock_that_is_set_back_raises_nothing() {
        let mut clock = RtcState::new(NOW);
        write(&mut clock, B, B_24_HOURS | UPDATE, NOW);
        assert!(!clock.advance(NOW - 3600 * SECOND));
        assert_eq!(clock.next_interrupt(NOW - 3600 * SECOND), Some(SECOND));
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics_and_ram_keeps_what_is_written(
            accesses in proptest::collection::vec(
                (0_u8..128, any::<u8>(), prop_oneof![0_i64..1 << 40, 0_i64..1 << 61]), 0..60,
            )
        ) {
            let mut clock = RtcState::new(NOW);
            let mut now = NOW;
            for (index, value, step) in accesses {
                now = i64::saturating_add(now, step);
                write(&mut clock, index, value, now);
                let back = read(&mut clock, index, now);
                if index > D && index != CENTURY {
                    prop_assert_eq!(back, value);
                }
                clock.next_interrupt(now);
            }
        }

        #[test]
        fn a_clock_that_was_saved_goes_on_as_the_one_that_was_not(
            accesses in proptest::collection::vec((0_u8..128, any::<u8>(), 0_i64..1 << 36), 0..60),
            saved_after in 0_usize..60,
        ) {
            let mut clock = RtcState::new(NOW);
            let mut restored = clock.clone();
            let mut now = NOW;
            for (at, (index, value, step)) in accesses.into_iter().enumerate() {
                if at <= saved_after {
                    let json = serde_json::to_string(&clock).unwrap();
                    let saved: RtcState = serde_json::from_str(&json).unwrap();
                    restored = saved.checked().unwrap();
                    prop_assert_eq!(&restored, &clock);
                }
                now += step;
                for clock in [&mut clock, &mut restored] {
                    write(clock, index, value, now);
                }
                let read_back = [&mut clock, &mut restored].map(|clock| read(clock, C, now));
                prop_assert_eq!(read_back[0], read_back[1]);
                prop_assert_eq!(clock.next_interrupt(now), restored.next_interrupt(now));
            }
        }

        #[test]
        fn a_state_from_anybody_is_refused_or_harmless(
            (index, flags, bytes) in (any::<u8>(), any::<u8>(), any::<[[u8; 32]; 4]>()),
            (offset, seen, stopped) in (any::<i64>(), any::<i64>(), any::<Option<i64>>()),
            registers in proptest::collection::vec((0_u8..128, any::<u8>()), 0..20),
        ) {
            let mut cmos = [0; BYTES];
            cmos.copy_from_slice(bytes.as_flattened());
            let state = RtcState {
                version: VERSION, index, bytes: cmos, flags, offset, stopped, seen,
            };
            if let Ok(mut clock) = state.checked() {
                for (index, value) in registers {
                    write(&mut clock, index, value, NOW);
                    read(&mut clock, index, NOW);
                    clock.next_interrupt(NOW);
                }
            }
        }
    }

    #[test]
    fn what_no_clock_can_have_been_is_refused() {
        let newer = RtcState {
            version: 2,
            ..RtcState::new(NOW)
        };
        assert_eq!(newer.checked(), Err(RtcStateError::Version(2)));
        let torn = RtcState {
            stopped: Some(0),
            ..RtcState::new(NOW)
        };
        assert_eq!(torn.checked(), Err(RtcStateError::Stopped));
        let mut short = serde_json::to_value(RtcState::new(NOW)).unwrap();
        short["bytes"] = vec![0_u8; 127].into();
        let error = serde_json::from_value::<RtcState>(short).unwrap_err();
        assert!(error.to_string().contains("128 bytes of CMOS"), "{error}");
    }
}
