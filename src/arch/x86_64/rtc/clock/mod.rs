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
mod tests;
