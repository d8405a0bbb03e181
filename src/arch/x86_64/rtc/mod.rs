//! The CMOS clock, a Motorola MC146818, at ports 0x70 and 0x71.
//!
//! It shows the host's time in UTC, plus what the guest has set it off by. All that happens in it is a
//! function of the time: events are worked out when a register is read, and one timer is armed for the
//! next event that has an interrupt, if there is one. References are to the MC146818A data sheet.

mod calendar;
mod clock;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use busway_vfio::EventFd;
use vmm_sys_util::timerfd::TimerFd;

pub use clock::{RtcState, RtcStateError};

use crate::kvm::BusDevice;

/// The index port; the data port is the one behind it.
pub const BASE: u16 = 0x70;
/// Ports.
pub const SIZE: u16 = 2;
/// The CMOS byte that holds the century, as the FADT says.
pub const CENTURY: u8 = 0x32;

/// Bit 7 of the index port masks NMI; it is no part of the index.
const INDEX_MASK: u8 = 0x7f;

/// The clock.
///
/// As a descriptor it is its timer: whoever runs the event loop waits for it to be readable, and then
/// calls [`on_timer`](Self::on_timer).
#[derive(Debug)]
pub struct Rtc {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: RtcState,
    irq: EventFd,
    timer: TimerFd,
}

impl Rtc {
    /// A clock that shows the host's time and whose interrupt, edge-triggered, is `irq`; belongs at [`BASE`].
    ///
    /// # Errors
    /// There is no timer to be had.
    pub fn new(irq: EventFd) -> io::Result<Self> {
        Ok(Self {
            inner: Mutex::new(Inner {
                state: RtcState::new(now()),
                irq,
                timer: TimerFd::new()?,
            }),
        })
    }

    /// The timer expired.
    pub fn on_timer(&self) {
        // Whatever the state: a timer that stays readable would keep the event loop busy for ever.
        // Setting it makes it unreadable, which fails for no value that is set here. timerfd_create(2)
        if let Err(error) = self.lock().timer.clear() {
            log::debug!("cannot clear the clock's timer: {error}");
        }
        self.access(|state, now| {
            state.advance(now);
        });
    }

    /// The machine was reset; the time and the CMOS RAM stay.
    pub fn reset(&self) {
        self.access(RtcState::reset);
    }

    /// Has the CMOS RAM say how much memory there is, as firmware of a PC reads it: bytes below and above
    /// 4 GiB. A guest that writes over it changes that for itself until the next call.
    pub fn tell_memory(&self, below: u64, above: u64) {
        let mut inner = self.lock();
        for (index, value) in memory_bytes(below, above) {
            if let Some(byte) = inner.state.bytes.get_mut(usize::from(index)) {
                *byte = value;
            }
        }
    }

    /// What the clock remembers.
    #[must_use]
    pub fn state(&self) -> RtcState {
        self.lock().state.clone()
    }

    /// Goes on from a state that was saved. What would have happened since happens now.
    ///
    /// # Errors
    /// [`RtcStateError`]; the clock is then as it was.
    pub fn restore(&self, state: &RtcState) -> Result<(), RtcStateError> {
        let state = state.checked()?;
        let mut inner = self.lock();
        inner.state = state;
        // It may be armed for what is due no more.
        if let Err(error) = inner.timer.clear() {
            log::debug!("cannot clear the clock's timer: {error}");
        }
        drop(inner);
        self.access(|state, now| {
            state.advance(now);
        });
        Ok(())
    }

    /// Does something to the state, then raises the interrupt if that asserted it, and arms the timer.
    fn access<T>(&self, act: impl FnOnce(&mut RtcState, i64) -> T) -> T {
        let mut inner = self.lock();
        let Inner { state, irq, timer } = &mut *inner;
        let now = now();
        let (was_asserted, was_due) = (state.asserted(), state.next_interrupt(now));
        let result = act(state, now);
        if state.asserted() && !was_asserted {
            irq.signal();
        }
        let due = state.next_interrupt(now);
        if due.is_some() || was_due.is_some() {
            let armed = match due {
                Some(delay) => timer.reset(Duration::from_nanos(delay.unsigned_abs()), None),
                None => timer.clear(),
            };
            if let Err(error) = armed {
                log::warn!("cannot arm the clock's timer: {error}; its alarm will not come");
            }
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Rtc {
    fn as_raw_fd(&self) -> RawFd {
        self.lock().timer.as_raw_fd()
    }
}

/// A word written to the index port is an index and then its data.
impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            *byte = match port {
                1 => self.access(RtcState::read),
                // The index port cannot be read on most boards.
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, &byte) in (offset..).zip(data) {
            match port {
                0 => self.lock().state.index = byte & INDEX_MASK,
                1 => self.access(|state, now| state.write(byte, now)),
                _ => {}
            }
        }
    }
}

/// The bytes of CMOS RAM that say how much memory there is: between 1 and 64 MiB in KiB (two copies), and above
/// 16 MiB and above 4 GiB in units of 64 KiB. QEMU hw/i386/x86-cpu.c and pc.c, `pc_cmos_init`.
fn memory_bytes(below: u64, above: u64) -> [(u8, u8); 9] {
    let units = |from: u64, unit: u64| {
        let units = below.saturating_sub(from) / unit;
        u16::try_from(units).unwrap_or(u16::MAX).to_le_bytes()
    };
    let extended = units(1 << 20, 1 << 10);
    let high = units(16 << 20, 64 << 10);
    let above = (above >> 16).min(0xff_ffff).to_le_bytes();
    [
        (0x17, extended[0]),
        (0x18, extended[1]),
        (0x30, extended[0]),
        (0x31, extended[1]),
        (0x34, high[0]),
        (0x35, high[1]),
        (0x5b, above[0]),
        (0x5c, above[1]),
        (0x5d, above[2]),
    ]
}

/// The host's time in nanoseconds since the start of 1970; 64 bits of them last until 2262.
fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| i64::try_from(time.as_nanos()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::poll::{PollContext, PollToken};

    use super::*;

    #[test]
    fn the_ports_show_the_hosts_date() {
        let rtc = Rtc::new(EventFd::new().unwrap()).unwrap();
        let read = |index: u8| {
            rtc.write(0, &[index | 0x80]);
            let mut data = [0];
            rtc.read(1, &mut data);
            data[0]
        };
        let year = loop {
            // Both on one side of a new year.
            let before = SystemTime::now();
            let shown = (read(CENTURY), read(9));
            if before
                .elapsed()
                .is_ok_and(|time| time < Duration::from_secs(1))
            {
                break shown;
            }
        };
        assert_eq!(year.0, 0x20);
        assert!(year.1 >= 0x24, "{year:?}");
        assert_eq!(read(13), 0x80);
    }

    #[test]
    fn the_cmos_ram_says_how_much_memory_there_is() {
        let rtc = Rtc::new(EventFd::new().unwrap()).unwrap();
        rtc.tell_memory(2 << 30, 3 << 30);
        rtc.reset();
        let read = |index: u8| {
            rtc.write(0, &[index]);
            let mut data = [0];
            rtc.read(1, &mut data);
            data[0]
        };
        assert_eq!([read(0x30), read(0x31)], [0xff, 0xff], "63 MiB and more");
        // 2 GiB less 16 MiB, and 3 GiB, in units of 64 KiB.
        assert_eq!([read(0x34), read(0x35)], [0x00, 0x7f]);
        assert_eq!([read(0x5b), read(0x5c), read(0x5d)], [0x00, 0xc0, 0x00]);
    }

    /// Whether the clock's descriptor stays readable, as an event loop would see it.
    fn is_ready(rtc: &Rtc) -> bool {
        let poll: PollContext<u32> = PollContext::new().unwrap();
        let readable = vmm_sys_util::poll::WatchingEvents::empty().set_read();
        poll.add_fd_with_events(rtc, readable, 0).unwrap();
        let events = poll.wait_timeout(Duration::ZERO).unwrap();
        events.iter_readable().count() > 0
    }

    #[test]
    fn the_timer_is_drained_whatever_the_registers_hold() {
        let rtc = Rtc::new(EventFd::new().unwrap()).unwrap();
        for index in 0..14 {
            for value in [0, 0x13, 0x99, 0xc0, 0xff] {
                rtc.write(0, &[index]);
                rtc.write(1, &[value]);
                // The timer expires, whether an event is due or not.
                let soon = Duration::from_nanos(1);
                rtc.lock().timer.reset(soon, None).unwrap();
                while !is_ready(&rtc) {}
                rtc.on_timer();
                // What is due within the test's own time may be ready again.
                let due = rtc.lock().state.next_interrupt(now());
                assert!(
                    !is_ready(&rtc) || due.is_none_or(|due| due < 1_000_000_000),
                    "register {index}: {value:#x}"
                );
            }
        }
        // As a guest does that has update interrupts on at the end of the time that 64 bits hold.
        for (index, value) in [(11, 0x82), (CENTURY, 0x99), (9, 0x99), (11, 0x12)] {
            rtc.write(0, &[index]);
            rtc.write(1, &[value]);
        }
        rtc.lock().state.offset = i64::MAX;
        for _ in 0..3 {
            rtc.lock()
                .timer
                .reset(Duration::from_nanos(1), None)
                .unwrap();
            while !is_ready(&rtc) {}
            rtc.on_timer();
            assert!(!is_ready(&rtc));
        }
    }

    #[test]
    fn a_periodic_interrupt_arrives_by_timer_and_eventfd() {
        let irq = EventFd::new().unwrap();
        let rtc = Arc::new(Rtc::new(irq.clone()).unwrap());
        let write = |index: u8, value: u8| {
            rtc.write(0, &[index]);
            rtc.write(1, &[value]);
        };
        let acknowledge = || {
            rtc.write(0, &[12]);
            let mut flags = [0];
            rtc.read(1, &mut flags);
            flags[0]
        };
        write(11, 0x42);
        // An event from before it was enabled may have asserted it at once.
        acknowledge();
        let _early = irq.take();
        let poll: PollContext<u32> = PollContext::new().unwrap();
        poll.add_fd_with_events(
            &*rtc,
            vmm_sys_util::poll::WatchingEvents::empty().set_read(),
            0,
        )
        .unwrap();
        assert_eq!(0_u32.as_raw_token(), 0);
        for _ in 0..3 {
            let events = poll.wait_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(events.iter_readable().count(), 1, "the timer expires");
            drop(events);
            rtc.on_timer();
            assert_eq!(irq.take(), 1);
            assert_eq!(acknowledge() & 0xc0, 0xc0);
        }
    }

    #[test]
    fn a_clock_that_is_restored_has_its_time_and_goes_on_interrupting() {
        let (irq, other) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let saved = Rtc::new(irq).unwrap();
        // 1999-12-31, and the periodic interrupt.
        for (index, value) in [(CENTURY, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (11, 0x42)] {
            saved.write(0, &[index]);
            saved.write(1, &[value]);
        }
        let restored = Rtc::new(other.clone()).unwrap();
        restored.restore(&saved.state()).unwrap();
        saved.lock().timer.clear().unwrap();
        let shown = |index: u8| {
            restored.write(0, &[index]);
            let mut data = [0];
            restored.read(1, &mut data);
            data[0]
        };
        let date = (shown(CENTURY), shown(9));
        assert!([(0x19, 0x99), (0x20, 0x00)].contains(&date), "{date:x?}");
        shown(12);
        let _early = other.take();
        while !is_ready(&restored) {}
        restored.on_timer();
        assert_eq!((other.take(), shown(12) & 0xc0), (1, 0xc0));
    }
}
