//! What other vCPUs do while a function is busy.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::tests::{BEHIND, BESIDE, Fixture, PORT, bdf, device, read32, write16, write32};
use super::*;
use crate::bar::{BarIndex, BarRegion};
use crate::fake::{FakeFunction, FakeMapper, MEMORY_32};

/// A function that, while 0x40 is not zero, has something to do that its BAR must not be mapped for.
pub(super) struct Busy {
    pub(super) inner: Arc<FakeFunction>,
    mapper: Arc<FakeMapper>,
    /// Held as a host device's own lock is: through all that takes long.
    own: Mutex<()>,
    asked: AtomicBool,
    pub(super) done: AtomicUsize,
    /// Called at each reset, and when something has to be done.
    meanwhile: Mutex<Option<Box<dyn Fn() + Send>>>,
}

/// For another to get through that should not.
pub(super) const MOMENT: Duration = Duration::from_millis(100);
/// For another to get through that should.
const PATIENCE: Duration = Duration::from_secs(10);

impl fmt::Debug for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Busy")
    }
}

impl Busy {
    pub(super) fn new(mapper: &Arc<FakeMapper>) -> Arc<Self> {
        Arc::new(Self {
            inner: FakeFunction::new(&[(BarIndex::Bar(0), MEMORY_32, 0x1000)]),
            mapper: mapper.clone(),
            own: Mutex::default(),
            asked: false.into(),
            done: 0.into(),
            meanwhile: Mutex::default(),
        })
    }

    /// Runs `other` on a vCPU of its own as soon as this is reset, or has something to do, by `this`, and
    /// says whether it got through before `limit` was over, for which this waits.
    pub(super) fn while_it_is_busy(
        &self,
        limit: Duration,
        this: impl FnOnce(),
        other: impl FnOnce() + Send,
    ) -> bool {
        let ((begun, begins), (ended, ends)) = (mpsc::channel(), mpsc::channel());
        let (reported, through) = mpsc::channel();
        *self.meanwhile.lock().unwrap() = Some(Box::new(move || {
            let _once = begun.send(());
            let _once = reported.send(ends.recv_timeout(limit).is_ok());
        }));
        thread::scope(|scope| {
            scope.spawn(move || {
                begins.recv_timeout(PATIENCE).unwrap();
                other();
                let _nobody_waits = ended.send(());
            });
            this();
        });
        *self.meanwhile.lock().unwrap() = None;
        through.recv().unwrap()
    }

    fn wait(&self) {
        if let Some(call) = &*self.meanwhile.lock().unwrap() {
            call();
        }
        assert!(self.mapper.mapped().is_empty());
    }
}

impl PciFunction for Busy {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let _own = self.own.lock().unwrap();
        self.inner.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let _own = self.own.lock().unwrap();
        self.inner.config_write(offset, data);
        if offset == 0x40 {
            self.asked.store(data[0] != 0, Ordering::Relaxed);
        }
    }

    fn bars(&self) -> Vec<BarRegion> {
        self.inner.bars()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        match self.asked.load(Ordering::Relaxed) {
            true => Vec::new(),
            false => self.inner.decoded(),
        }
    }

    fn run_deferred(&self) -> bool {
        let _own = self.own.lock().unwrap();
        if self.asked.load(Ordering::Relaxed) {
            self.wait();
        }
        let asked = self.asked.swap(false, Ordering::Relaxed);
        self.done.fetch_add(asked.into(), Ordering::Relaxed);
        asked
    }

    fn bar_read(&self, _bar: BarIndex, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        let _own = self.own.lock().unwrap();
        self.wait();
        self.inner.reset();
    }
}

fn with_bar_mapped() -> (Arc<FakeMapper>, Topology, Arc<Busy>) {
    let mapper = FakeMapper::new(false);
    let topology = Topology::new(mapper.clone());
    let busy = Busy::new(&mapper);
    topology.add(Place::root(device(2)), busy.clone()).unwrap();
    write32(&topology, bdf(BESIDE), 0x10, 0xc000_0000);
    write16(&topology, bdf(BESIDE), spec::COMMAND, 2);
    (mapper, topology, busy)
}

#[test]
fn what_must_not_happen_while_a_bar_is_mapped_happens_while_none_is_and_it_comes_back() {
    let (mapper, topology, busy) = with_bar_mapped();
    assert_eq!(mapper.mapped().len(), 1);
    write32(&topology, bdf(BESIDE), 0x40, 1);
    assert_eq!(busy.done.load(Ordering::Relaxed), 1);
    assert_eq!(mapper.mapped().len(), 1);
    write16(&topology, bdf(BESIDE), spec::COMMAND, 0);
    write32(&topology, bdf(BESIDE), 0x40, 1);
    assert_eq!(busy.done.load(Ordering::Relaxed), 2);
}

#[test]
fn what_one_vcpu_asks_for_is_carried_out_before_another_takes_it_back() {
    let (mapper, topology, busy) = with_bar_mapped();
    let ask = |value| write32(&topology, bdf(BESIDE), 0x40, value);
    assert!(!busy.while_it_is_busy(MOMENT, || ask(1), || ask(0)));
    assert_eq!(busy.done.load(Ordering::Relaxed), 1);
    assert_eq!(mapper.mapped().len(), 1);
}

#[test]
fn nothing_is_mapped_of_any_function_when_the_first_is_reset_with_the_machine() {
    let mapper = FakeMapper::new(false);
    let topology = Topology::new(mapper.clone());
    for (number, at, address) in [(2, BESIDE, 0xc000_0000), (3, "00:03.0", 0xc000_1000)] {
        let busy = Busy::new(&mapper);
        topology.add(Place::root(device(number)), busy).unwrap();
        write32(&topology, bdf(at), 0x10, address);
        write16(&topology, bdf(at), spec::COMMAND, 2);
    }
    assert_eq!(mapper.mapped().len(), 2);
    // Each looks whether anything is mapped.
    topology.reset();
    assert!(mapper.mapped().is_empty());
    write32(&topology, bdf(BESIDE), 0x10, 0xc000_0000);
    write16(&topology, bdf(BESIDE), spec::COMMAND, 2);
    assert_eq!(mapper.mapped().len(), 1, "it can be mapped again");
}

/// A busy function behind the port, with its BAR mapped.
fn with_busy_behind() -> (Fixture, Arc<Busy>) {
    let f = Fixture::new(false);
    f.set_up();
    f.topology.remove(f.topology.functions()[2].0);
    let busy = Busy::new(&f.mapper);
    f.topology.add(Place::behind(f.port), busy.clone()).unwrap();
    write32(&f.topology, bdf(BEHIND), 0x10, 0xc000_0000);
    write16(&f.topology, bdf(BEHIND), spec::COMMAND, 2);
    assert_eq!(f.mapped().len(), 1);
    (f, busy)
}

#[test]
fn a_reset_of_a_bus_that_another_vcpu_ends_is_carried_out_before() {
    let (f, busy) = with_busy_behind();
    let control = |value| write16(&f.topology, bdf(PORT), spec::BRIDGE_CONTROL, value);
    let (begin, end) = (|| control(spec::BRIDGE_CONTROL_RESET), || control(0));
    // Were the other to get through, the BAR would be mapped.
    assert!(!busy.while_it_is_busy(MOMENT, begin, end));
    assert_eq!(busy.inner.resets.load(Ordering::Relaxed), 1);
    assert_eq!(read32(&f.topology, bdf(BEHIND), 0), 0x5678_1234);
}

#[test]
fn the_port_above_and_the_function_beside_go_on_while_one_is_busy() {
    let (f, busy) = with_busy_behind();
    let toggle = |at| {
        for command in [7, 5, 7, 5] {
            write16(&f.topology, bdf(at), spec::COMMAND, command);
        }
    };
    let defer = || write32(&f.topology, bdf(BEHIND), 0x40, 1);
    let both = || [PORT, BESIDE].into_iter().for_each(toggle);
    assert!(busy.while_it_is_busy(PATIENCE, defer, both));
    assert_eq!(busy.done.load(Ordering::Relaxed), 1);
    let reset = || {
        let control = spec::BRIDGE_CONTROL_RESET;
        write16(&f.topology, bdf(PORT), spec::BRIDGE_CONTROL, control);
    };
    assert!(busy.while_it_is_busy(PATIENCE, reset, || toggle(BESIDE)));
    assert_eq!(busy.inner.resets.load(Ordering::Relaxed), 1);
}

#[test]
fn a_write_that_changes_no_decoding_waits_for_nobody_who_changes_mappings() {
    let f = Fixture::new(false);
    f.set_up();
    let ((done, wait), mappings) = (mpsc::channel(), f.topology.mappings());
    let through = thread::scope(|scope| {
        scope.spawn(|| {
            // Decoding stays on, the address as it is.
            write32(&f.topology, bdf(BEHIND), 0x3c, 5);
            write32(&f.topology, bdf(BEHIND), 0x10, 0xc000_0000);
            // Decoding is off while a BAR is sized.
            write32(&f.topology, bdf(BESIDE), 0x10, u32::MAX);
            done.send(()).unwrap();
        });
        let through = wait.recv_timeout(PATIENCE);
        drop(mappings);
        through
    });
    assert_eq!(through, Ok(()));
}
