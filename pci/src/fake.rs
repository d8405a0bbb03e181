//! Stand-ins for the machine and for functions, to be watched by tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::address::Segment;
use crate::bar::{BarIndex, BarKind, BarRegion};
use crate::bars::Bars;
use crate::config::{ConfigSpace, Identity};
use crate::function::{BarMapper, PciFunction};
use crate::interrupt::{
    InterruptLine, InterruptLines, InterruptRoute, InterruptRoutes, MsiMessage, PinOwner,
    RouteError, VectorOwner,
};
use crate::pin::InterruptPin;

pub(crate) const MEMORY_32: BarKind = BarKind::Memory32 {
    prefetchable: false,
};
pub(crate) const MEMORY_64: BarKind = BarKind::Memory64 {
    prefetchable: false,
};
pub(crate) const PREFETCHABLE_64: BarKind = BarKind::Memory64 { prefetchable: true };

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// A guest's interrupt controller: it keeps what arrives.
#[derive(Debug, Default)]
pub(crate) struct FakeRoutes {
    arrived: Arc<Mutex<Vec<MsiMessage>>>,
    updates: Arc<AtomicUsize>,
    pub(crate) exhausted: Mutex<bool>,
}

impl FakeRoutes {
    pub(crate) fn arrived(&self) -> Vec<MsiMessage> {
        lock(&self.arrived).clone()
    }

    pub(crate) fn updates(&self) -> usize {
        self.updates.load(Ordering::Relaxed)
    }
}

impl InterruptRoutes for FakeRoutes {
    fn connect(&self, _: u16, message: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        if *lock(&self.exhausted) {
            return Err(RouteError::Exhausted { limit: 0 });
        }
        Ok(Arc::new(FakeRoute {
            arrived: self.arrived.clone(),
            updates: self.updates.clone(),
            event: File::open("/dev/null").unwrap(),
            state: Mutex::new(RouteState {
                message,
                masked: false,
                pending: false,
            }),
        }))
    }
}

#[derive(Debug)]
struct RouteState {
    message: MsiMessage,
    masked: bool,
    pending: bool,
}

#[derive(Debug)]
struct FakeRoute {
    arrived: Arc<Mutex<Vec<MsiMessage>>>,
    updates: Arc<AtomicUsize>,
    event: File,
    state: Mutex<RouteState>,
}

impl InterruptRoute for FakeRoute {
    fn update(&self, message: MsiMessage) -> Result<(), RouteError> {
        self.updates.fetch_add(1, Ordering::Relaxed);
        lock(&self.state).message = message;
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), RouteError> {
        let mut state = lock(&self.state);
        assert_ne!(state.masked, masked, "a mask is set that was set");
        state.masked = masked;
        if !masked && std::mem::take(&mut state.pending) {
            lock(&self.arrived).push(state.message);
        }
        Ok(())
    }

    fn pending(&self) -> bool {
        lock(&self.state).pending
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn trigger(&self) {
        let mut state = lock(&self.state);
        if state.masked {
            state.pending = true;
        } else {
            lock(&self.arrived).push(state.message);
        }
    }
}

/// A source of interrupts that keeps what it was told.
#[derive(Debug, Default)]
pub(crate) struct FakeOwner {
    /// First vector and how many, of each call.
    pub(crate) connects: Vec<(u16, usize)>,
    pub(crate) disconnects: usize,
    pub(crate) enables: usize,
    pub(crate) refuses: bool,
    /// What it refuses costs it all that it had.
    pub(crate) loses: bool,
}

impl VectorOwner for FakeOwner {
    fn enable(&mut self) -> io::Result<()> {
        self.enables += 1;
        Ok(())
    }

    fn connect(&mut self, first: u16, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.refuses {
            return Err(io::Error::other("refused"));
        }
        self.connects.push((first, events.len()));
        Ok(())
    }

    fn has_lost_all(&self) -> bool {
        self.loses
    }

    fn disconnect_all(&mut self) {
        self.disconnects += 1;
    }
}

/// Lines to a guest, counted.
#[derive(Debug, Default)]
pub(crate) struct FakeLines {
    made: Mutex<Vec<InterruptPin>>,
    up: Arc<AtomicUsize>,
    exhausted: Mutex<bool>,
}

impl FakeLines {
    /// The pins that were ever connected.
    pub(crate) fn made(&self) -> Vec<InterruptPin> {
        lock(&self.made).clone()
    }

    /// How many lines there are now.
    pub(crate) fn up(&self) -> usize {
        self.up.load(Ordering::Relaxed)
    }

    pub(crate) fn exhaust(&self, exhausted: bool) {
        *lock(&self.exhausted) = exhausted;
    }
}

impl InterruptLines for FakeLines {
    fn connect(&self, pin: InterruptPin) -> Result<Arc<dyn InterruptLine>, RouteError> {
        if *lock(&self.exhausted) {
            return Err(RouteError::Exhausted { limit: 0 });
        }
        lock(&self.made).push(pin);
        self.up.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(FakeLine {
            event: File::open("/dev/null").unwrap(),
            up: self.up.clone(),
        }))
    }
}

#[derive(Debug)]
struct FakeLine {
    event: File,
    up: Arc<AtomicUsize>,
}

impl InterruptLine for FakeLine {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn resample(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for FakeLine {
    fn drop(&mut self) {
        self.up.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pin that keeps what it was told.
#[derive(Debug)]
pub(crate) struct FakePinOwner {
    lines: Arc<FakeLines>,
    pub(crate) connected: bool,
    pub(crate) refuses: bool,
    /// How many lines there were at each time of being told to be silent.
    pub(crate) lines_at_disconnect: Vec<usize>,
}

impl FakePinOwner {
    pub(crate) fn watching(lines: &Arc<FakeLines>) -> Self {
        Self {
            lines: lines.clone(),
            connected: false,
            refuses: false,
            lines_at_disconnect: Vec::new(),
        }
    }
}

impl PinOwner for FakePinOwner {
    fn connect(&mut self, _event: BorrowedFd<'_>, _resample: BorrowedFd<'_>) -> io::Result<()> {
        assert!(!self.connected, "connected twice");
        if self.refuses {
            return Err(io::Error::other("refused"));
        }
        self.connected = true;
        Ok(())
    }

    fn disconnect(&mut self) {
        assert!(self.connected, "disconnected what was not connected");
        self.connected = false;
        self.lines_at_disconnect.push(self.lines.up());
    }
}

/// An endpoint with BARs and nothing in them.
#[derive(Debug)]
pub(crate) struct FakeFunction {
    space: Mutex<ConfigSpace>,
    pub(crate) resets: AtomicUsize,
}

impl FakeFunction {
    pub(crate) fn new(bars: &[(BarIndex, BarKind, u64)]) -> Arc<Self> {
        let mut state = Bars::new();
        for &(index, kind, size) in bars {
            state.add(index, kind, size).unwrap();
        }
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            ..Identity::default()
        };
        Arc::new(Self {
            space: Mutex::new(ConfigSpace::type0(&identity, state)),
            resets: AtomicUsize::new(0),
        })
    }
}

impl PciFunction for FakeFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(usize::from(offset % 4) + data.len() <= 4 && offset < 4096);
        lock(&self.space).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset % 4) + data.len() <= 4 && offset < 4096);
        lock(&self.space).write(offset, data);
    }

    fn bars(&self) -> Vec<BarRegion> {
        lock(&self.space).regions()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        lock(&self.space).decoded()
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        lock(&self.space).reset();
    }
}

/// A machine's address space that checks what is asked of it.
#[derive(Debug)]
pub(crate) struct FakeMapper {
    /// By the function's address in memory and the BAR.
    mapped: Mutex<BTreeMap<(usize, BarIndex), BarRegion>>,
    /// Refuse what overlaps, as a machine does.
    exclusive: bool,
}

/// What names a function in [`FakeMapper`].
pub(crate) fn key(function: &Arc<dyn PciFunction>) -> usize {
    Arc::as_ptr(function).cast::<()>().addr()
}

impl FakeMapper {
    pub(crate) fn new(exclusive: bool) -> Arc<Self> {
        Arc::new(Self {
            mapped: Mutex::default(),
            exclusive,
        })
    }

    pub(crate) fn mapped(&self) -> BTreeMap<(usize, BarIndex), BarRegion> {
        lock(&self.mapped).clone()
    }
}

impl BarMapper for FakeMapper {
    fn map(
        &self,
        _: Segment,
        function: &Arc<dyn PciFunction>,
        region: &BarRegion,
    ) -> io::Result<()> {
        let mut mapped = lock(&self.mapped);
        let overlaps = |other: &BarRegion| {
            (other.kind == BarKind::Io) == (region.kind == BarKind::Io)
                && other.address <= region.address + (region.size - 1)
                && region.address <= other.address + (other.size - 1)
        };
        if self.exclusive && mapped.values().any(overlaps) {
            return Err(io::Error::other("overlaps"));
        }
        let before = mapped.insert((key(function), region.index), *region);
        assert_eq!(before, None, "mapped twice");
        Ok(())
    }

    fn unmap(&self, function: &Arc<dyn PciFunction>, region: &BarRegion) {
        let before = lock(&self.mapped).remove(&(key(function), region.index));
        assert_eq!(
            before.as_ref(),
            Some(region),
            "unmapped what was not mapped"
        );
    }
}
