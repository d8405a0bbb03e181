//! The watchdog of Intel's 6300ESB, which stock kernels have a driver for (`i6300esb`): a timer that the guest feeds,
//! and that resets the machine when it does not. Intel 6300ESB datasheet (300641), chapter 21.
//!
//! Its first stage would end in an interrupt, which no driver uses; the second ends in a reset, which the machine
//! carries out: the timer is a descriptor that its event loop waits for.

mod registers;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use busway_pci::{
    BarIndex, BarKind, BarRegion, Bars, ConfigSpace, Identity, PAGE_SIZE, PciFunction,
};
use vmm_sys_util::timerfd::TimerFd;

use registers::{ENABLE, FAST, FREE_RUN, LOCK, NO_OUTPUT, Registers};
pub use registers::{Stage, WatchdogState};

/// WDT_CONFIG. §21.3.6
const CONFIG: u16 = 0x60;
/// WDT_LOCK. §21.3.7
const LOCKING: u16 = 0x68;
/// In WDT_CONFIG: how the first stage tells of its end.
const INTERRUPT: u16 = 3;

/// The least that a timer is set to: zero would be never.
const SOON: Duration = Duration::from_nanos(1);

/// The function.
#[derive(Debug)]
pub struct Watchdog {
    inner: Mutex<Inner>,
    fd: RawFd,
}

#[derive(Debug)]
struct Inner {
    space: ConfigSpace,
    registers: Registers,
    timer: TimerFd,
}

impl Inner {
    /// Has the timer wake the machine when the stage that runs is over.
    fn arm(&mut self) {
        let set = match self.registers.deadline() {
            None => self.timer.clear(),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(SOON), None)
            }
        };
        if let Err(error) = set {
            log::error!("watchdog: timerfd_settime: {error}");
        }
    }
}

impl Watchdog {
    /// The function, whose timer stands still.
    ///
    /// # Errors
    /// There is no timer.
    pub fn new() -> io::Result<Self> {
        let mut bars = Bars::new();
        let kind = BarKind::Memory64 {
            prefetchable: false,
        };
        // 64-bit, for the room below 4 GiB is the assigned devices'; a page, so that nobody's registers share it.
        bars.add(BarIndex::Bar(0), kind, PAGE_SIZE)
            .map_err(io::Error::other)?;
        let identity = Identity {
            vendor: 0x8086,
            device: 0x25ab,
            revision: 0,
            class: 0x08_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut space = ConfigSpace::type0(&identity, bars);
        space.define(CONFIG, 0_u16, INTERRUPT | FAST | NO_OUTPUT);
        space.define(LOCKING, 0_u8, LOCK | ENABLE | FREE_RUN);
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self {
            fd: timer.as_raw_fd(),
            inner: Mutex::new(Inner {
                space,
                registers: Registers::default(),
                timer,
            }),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The timer has woken the machine: whether the guest has not fed it, and is to be reset.
    #[must_use]
    pub fn on_timer(&self) -> bool {
        let mut inner = self.inner();
        let resets = inner.registers.expire(Instant::now());
        // Set anew, the descriptor is not ready any more.
        inner.arm();
        resets
    }

    /// The guest stands still, and its time with it.
    pub fn pause(&self) {
        let mut inner = self.inner();
        inner.registers.pause(Instant::now());
        inner.arm();
    }

    /// The guest goes on.
    pub fn resume(&self) {
        let mut inner = self.inner();
        inner.registers.resume(Instant::now());
        inner.arm();
    }

    /// What it remembers beside its configuration space.
    #[must_use]
    pub fn state(&self) -> WatchdogState {
        self.inner().registers.state().clone()
    }
}

impl AsRawFd for Watchdog {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl PciFunction for Watchdog {
    fn name(&self) -> String {
        "watchdog".to_owned()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.inner().space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.inner();
        inner.space.write(offset, data);
        let config = inner.space.get(CONFIG);
        let lock = inner.space.get(LOCKING);
        let end = offset.saturating_add(data.len() as u16);
        let touches = |register: u16, size: u16| offset < register + size && register < end;
        if touches(CONFIG, 2) {
            inner.registers.set_config(config);
        }
        if touches(LOCKING, 1) {
            inner.registers.set_lock(lock, Instant::now());
            inner.arm();
        }
        // What is locked reads as it was.
        let (config, lock) = (inner.registers.state().config, inner.registers.state().lock);
        inner.space.set(CONFIG, config);
        inner.space.set(LOCKING, lock);
    }

    fn bars(&self) -> Vec<BarRegion> {
        self.inner().space.regions()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        self.inner().space.decoded()
    }

    fn bar_read(&self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.inner().registers.read(offset, data);
    }

    fn bar_write(&self, _bar: BarIndex, offset: u64, data: &[u8]) {
        let mut inner = self.inner();
        let before = inner.registers.deadline();
        inner.registers.write(offset, data, Instant::now());
        if inner.registers.deadline() != before {
            inner.arm();
        }
    }

    fn reset(&self) {
        let mut inner = self.inner();
        inner.space.reset();
        inner.registers.reset();
        inner.arm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use std::os::fd::BorrowedFd;

    fn lock(watchdog: &Watchdog) -> u8 {
        let mut data = [0];
        watchdog.config_read(LOCKING, &mut data);
        data[0]
    }

    #[test]
    fn a_guest_that_does_not_feed_it_wakes_the_machine_and_is_to_be_reset() {
        let watchdog = Watchdog::new().unwrap();
        let unlock = || {
            watchdog.bar_write(BarIndex::Bar(0), 12, &[0x80, 0]);
            watchdog.bar_write(BarIndex::Bar(0), 12, &[0x86, 0]);
        };
        for preload in [0, 4] {
            unlock();
            watchdog.bar_write(BarIndex::Bar(0), preload, &[10, 0, 0, 0]);
        }
        watchdog.config_write(CONFIG, &[3, 0]);
        watchdog.config_write(LOCKING, &[ENABLE]);
        let start = Instant::now();
        // SAFETY: the watchdog keeps the descriptor open.
        let fd = unsafe { BorrowedFd::borrow_raw(watchdog.as_raw_fd()) };
        let mut woken = 0;
        loop {
            assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], None), Ok(1));
            woken += 1;
            if watchdog.on_timer() {
                break;
            }
        }
        assert!(woken >= 2 && start.elapsed().as_millis() >= 19);
        watchdog.reset();
        assert_eq!(lock(&watchdog), 0);
        assert!(watchdog.state().timed_out);
    }

    #[test]
    fn what_is_locked_reads_as_it_was_until_the_reset() {
        let watchdog = Watchdog::new().unwrap();
        let mut id = [0; 4];
        watchdog.config_read(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x25ab_8086);
        watchdog.config_write(LOCKING, &[LOCK | ENABLE]);
        watchdog.config_write(LOCKING, &[0]);
        watchdog.config_write(CONFIG, &[0xff; 4]);
        assert_eq!(lock(&watchdog), LOCK | ENABLE);
        let mut config = [0; 2];
        watchdog.config_read(CONFIG, &mut config);
        assert_eq!(config, [0, 0]);
        watchdog.pause();
        watchdog.resume();
        watchdog.reset();
        assert_eq!(lock(&watchdog), 0);
        watchdog.config_write(LOCKING, &[0xff]);
        assert_eq!(lock(&watchdog), LOCK | ENABLE | FREE_RUN);
    }
}
