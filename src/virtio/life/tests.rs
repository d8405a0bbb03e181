//! Starts and stops, with a device that numbers its requests: one that is lost, or done twice, shows.

use super::*;
use crate::memory::GuestRam;
use crate::virtio::activation::Activation;
use crate::virtio::config_space::{ConfigSpace, Fields};
use crate::virtio::device::VirtioDevice;
use crate::virtio::error::QueueError;
use crate::virtio::error::StartError;
use crate::virtio::pci::{StateError, VirtioPciState};
use crate::virtio::queue::{Served, Virtqueue};
use crate::virtio::spec::{self, pci::common, status};
use crate::virtio::testing::{Driver, Ring, eventually, function};
use crate::virtio::worker::{Worker, doorbell_events};
use busway_pci::PciFunction;
use proptest::prelude::*;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

/// What the test and all incarnations of its device share.
#[derive(Clone, Debug, Default)]
struct Host {
    /// Requests that were completed.
    done: Arc<AtomicU64>,
    /// A request takes for ever while this is set.
    slow: Arc<AtomicBool>,
    /// A request is in the worker's hands.
    in_flight: Arc<AtomicBool>,
    /// The next request makes the worker panic.
    panics: Arc<AtomicBool>,
}

/// A device that writes to each request how many came before it.
#[derive(Debug)]
struct Numbering {
    host: Host,
    config: Arc<Fields>,
}

impl Numbering {
    fn new(host: &Host) -> Self {
        Self {
            host: host.clone(),
            config: Fields::new(vec![0; 8]),
        }
    }
}

impl VirtioDevice for Numbering {
    fn name(&self) -> &str {
        "numbering"
    }

    fn device_type(&self) -> u16 {
        spec::device_type::ENTROPY
    }

    fn class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        1
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        if let Some(queue) = activation.take_queue(0)? {
            workers.push(Box::new(Numberer {
                host: self.host.clone(),
                ram: activation.ram().clone(),
                queue,
            }));
        }
        activation.run(workers, DeviceState::None)
    }
}

#[derive(Debug)]
struct Numberer {
    host: Host,
    ram: GuestRam,
    queue: Virtqueue,
}

impl Worker for Numberer {
    fn name(&self) -> String {
        "numbering".to_owned()
    }

    fn kind(&self) -> &'static str {
        "numberer"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.queue.doorbell(), doorbell_events())]
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        let memory = self.ram.memory();
        let (host, stop) = (&self.host, self.queue.stop());
        self.queue.drain(&memory, |mut chain| {
            host.in_flight.store(true, Ordering::SeqCst);
            assert!(!host.panics.swap(false, Ordering::SeqCst), "as asked");
            while host.slow.load(Ordering::SeqCst) {
                if stop.load(Ordering::SeqCst) {
                    return Ok(Served::Left);
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            host.in_flight.store(false, Ordering::SeqCst);
            let number = host.done.fetch_add(1, Ordering::SeqCst);
            Ok(Served::Done(chain.writable.write(&number.to_le_bytes())))
        })
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.queue.leave(progress);
    }
}

const SIZE: u16 = 64;

/// A driver that submits requests and checks each completion.
struct Checked {
    host: Host,
    driver: Driver,
    ring: Ring,
    buffer: u64,
    submitted: u64,
    completed: u64,
}

impl Checked {
    fn new() -> Self {
        let host = Host::default();
        let mut driver = Driver::new(Numbering::new(&host));
        driver.enable_msix(3);
        let (ring, buffer) = Self::bring_up(&mut driver, 0);
        Self {
            host,
            driver,
            ring,
            buffer,
            submitted: 0,
            completed: 0,
        }
    }

    fn bring_up(driver: &mut Driver, features: u64) -> (Ring, u64) {
        driver.negotiate(features);
        let ring = driver.queue(0, SIZE);
        driver.set_common(common::CONFIG_MSIX_VECTOR, &2_u16.to_le_bytes());
        let buffer = driver.alloc(u64::from(SIZE) * 8);
        driver.ready();
        (ring, buffer)
    }

    fn place(&self, number: u64) -> u64 {
        self.buffer + number % u64::from(SIZE) * 8
    }

    fn submit(&mut self) {
        if self.submitted - self.completed < u64::from(SIZE) {
            let place = self.place(self.submitted);
            self.ring.submit(&[(place, 8, true)]);
            self.driver.notify(&self.ring);
            self.submitted += 1;
        }
    }

    /// Takes what has been completed: each in its turn, with its number.
    fn collect(&mut self) {
        while let Some((head, len)) = self.ring.poll_used() {
            assert_eq!(u64::from(head), self.completed % u64::from(SIZE));
            assert_eq!(len, 8);
            let bytes = self.driver.read(self.place(self.completed), 8);
            assert_eq!(
                u64::from_le_bytes(bytes.try_into().unwrap()),
                self.completed
            );
            self.completed += 1;
        }
    }

    fn collect_all(&mut self) {
        eventually("all completed", || {
            self.collect();
            self.completed == self.submitted
        });
        assert_eq!(self.host.done.load(Ordering::SeqCst), self.submitted);
    }

    fn state(&self) -> VirtioPciState {
        self.driver.function.state().expect("it is paused")
    }

    /// A request that the worker has and that does not end.
    fn hang(&mut self) {
        self.host.slow.store(true, Ordering::SeqCst);
        self.submit();
        eventually("in flight", || self.host.in_flight.load(Ordering::SeqCst));
    }
}

fn pause_in_time(driver: &Driver) {
    let start = Instant::now();
    driver.function.pause();
    let waited = start.elapsed();
    assert!(waited < Duration::from_secs(5), "{waited:?}");
}

#[test]
fn a_paused_device_does_nothing_and_goes_on_where_it_was() {
    let mut it = Checked::new();
    for _ in 0..3 {
        it.submit();
        it.submit();
        it.collect_all();
        it.driver.route(0).wait();
        let status = it.driver.status();
        let registers = it.driver.function.registers();
        it.driver.function.pause();
        it.driver.function.pause();
        for _ in 0..3 {
            it.submit();
        }
        assert!(it.driver.route(0).silent());
        assert!(it.ring.poll_used().is_none());
        it.driver.function.resume();
        it.driver.function.resume();
        it.collect_all();
        eventually("three interrupts", || {
            it.driver.routes.signals(0) == it.completed
        });
        assert_eq!(it.driver.status(), status);
        assert_eq!(it.driver.function.registers(), registers);
    }
}

#[test]
fn a_pause_and_its_end_interrupt_nobody() {
    let mut it = Checked::new();
    it.submit();
    it.collect_all();
    it.driver.route(0).wait();
    for _ in 0..20 {
        it.driver.function.pause();
        it.driver.function.resume();
    }
    assert!(it.driver.route(0).silent() && it.driver.route(2).silent());
    assert_eq!(it.driver.function.connected_vectors(), 3);
}

#[test]
fn a_request_that_a_stop_leaves_is_done_once_by_the_next_start() {
    let mut it = Checked::new();
    it.submit();
    it.collect_all();
    it.hang();
    it.submit();
    pause_in_time(&it.driver);
    it.collect();
    assert_eq!((it.completed, it.submitted), (1, 3));
    let position = QueuePosition {
        next_avail: 1,
        next_used: 1,
    };
    assert_eq!(it.state().progress.queue(0), position);
    it.host.slow.store(false, Ordering::SeqCst);
    it.driver.function.resume();
    it.collect_all();
}

#[test]
fn a_reset_drops_what_a_stop_has_left_and_the_device_begins_anew() {
    let mut it = Checked::new();
    it.submit();
    it.collect_all();
    it.hang();
    it.driver.function.pause();
    assert_ne!(it.state().progress, Progress::default());
    it.driver.set_common(common::DEVICE_STATUS, &[0]);
    assert_eq!(it.state().progress, Progress::default());
    it.driver.function.resume();
    it.host.slow.store(false, Ordering::SeqCst);
    assert!(it.ring.poll_used().is_none());
    (it.ring, it.buffer) = Checked::bring_up(&mut it.driver, 0);
    assert!(it.ring.poll_used().is_none(), "not what was left");
    (it.submitted, it.completed) = (0, 0);
    it.host.done.store(0, Ordering::SeqCst);
    it.submit();
    it.collect_all();
}

#[test]
fn a_reset_of_a_device_that_hangs_takes_no_longer_than_a_pause() {
    let mut it = Checked::new();
    it.hang();
    let start = Instant::now();
    it.driver.set_common(common::DEVICE_STATUS, &[0]);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(it.driver.status(), 0);
}

#[test]
fn a_device_whose_driver_comes_during_a_pause_starts_when_that_ends() {
    let mut it = Checked::new();
    it.driver.function.pause();
    it.driver.set_common(common::DEVICE_STATUS, &[0]);
    (it.ring, it.buffer) = Checked::bring_up(&mut it.driver, 0);
    it.submit();
    assert!(it.driver.route(0).silent());
    it.driver.function.resume();
    it.collect_all();
    // One whose driver is not ready is not started by that either.
    it.driver.set_common(common::DEVICE_STATUS, &[0]);
    it.driver.function.pause();
    it.driver.function.resume();
    assert!(it.driver.function.state().is_some());
}

#[test]
fn a_device_that_waits_for_a_reset_goes_on_waiting_after_a_pause() {
    let mut it = Checked::new();
    it.ring.submit(&[(u64::MAX - 100, 8, true)]);
    it.driver.notify(&it.ring);
    assert_eq!(it.driver.route(2).wait(), 1);
    it.driver.function.pause();
    it.driver.function.resume();
    assert!(it.driver.route(2).silent());
    assert!(it.driver.status() & status::DEVICE_NEEDS_RESET != 0);
    assert!(it.state().needs_reset);
    (it.ring, it.buffer) = Checked::bring_up(&mut it.driver, 0);
    (it.submitted, it.completed) = (0, 0);
    it.submit();
    it.collect_all();
}

#[test]
fn a_worker_that_panics_costs_its_device_a_reset_and_nobody_else_anything() {
    let mut it = Checked::new();
    it.host.panics.store(true, Ordering::SeqCst);
    it.submit();
    eventually("panicked", || !it.host.panics.load(Ordering::SeqCst));
    it.driver.function.pause();
    it.driver.function.resume();
    assert!(it.driver.status() & status::DEVICE_NEEDS_RESET != 0);
    (it.ring, it.buffer) = Checked::bring_up(&mut it.driver, 0);
    (it.submitted, it.completed) = (0, 0);
    it.submit();
    it.collect_all();
}

#[test]
fn a_device_goes_on_in_another_process_s_function_from_what_was_saved() {
    let mut it = Checked::new();
    it.driver
        .function
        .config_write(0x10, &0xfe00_0000_u32.to_le_bytes());
    for _ in 0..5 {
        it.submit();
    }
    it.collect_all();
    it.hang();
    let before = it.driver.function.decoded();
    it.driver.move_to(Numbering::new(&it.host));
    assert_eq!(it.driver.function.decoded(), before);
    assert_eq!(it.driver.function.connected_vectors(), 3);
    it.host.slow.store(false, Ordering::SeqCst);
    it.submit();
    it.driver.function.resume();
    it.collect_all();
    it.driver.route(0).wait();
    assert!(it.driver.function.state().is_none(), "it runs");
}

#[test]
fn the_driver_hears_of_each_change_of_the_configuration_even_during_a_pause() {
    let host = Host::default();
    let device = Numbering::new(&host);
    let config = Arc::clone(&device.config);
    let mut driver = Driver::new(device);
    driver.enable_msix(3);
    Checked::bring_up(&mut driver, 0);
    let generation = |driver: &Driver| driver.common::<1>(common::CONFIG_GENERATION);
    let mut last = generation(&driver);
    for value in 1..=4_u8 {
        if value > 2 {
            driver.function.pause();
        }
        config.set(3, &[value]);
        config.set(3, &[value]);
        assert_eq!(driver.route(2).wait(), 1);
        assert_eq!(driver.bar_read::<1>(driver.device + 3), [value]);
        assert_ne!(std::mem::replace(&mut last, generation(&driver)), last);
    }
    // What the driver writes to it changes nothing.
    driver.bar_write(driver.device + 3, &[9]);
    assert_eq!(driver.bar_read::<1>(driver.device + 3), [4]);
    assert_eq!(driver.bar_read::<1>(driver.isr), [spec::isr::CONFIG]);
    drop(driver);
    config.set(3, &[0]);
}

#[test]
fn a_driver_that_goes_on_with_another_configuration_hears_of_it() {
    for (value, interrupts) in [(0, 0), (7, 1)] {
        let mut it = Checked::new();
        it.driver.function.pause();
        let state = it.state();
        let device = Numbering {
            host: it.host.clone(),
            config: Fields::new(vec![value; 8]),
        };
        it.driver.function = function(device, &it.driver.ram, &it.driver.routes);
        it.driver.function.restore(&state).unwrap();
        assert_eq!(it.driver.routes.signals(2), interrupts);
        it.driver.function.resume();
        it.submit();
        it.collect_all();
    }
}

#[test]
fn a_queue_s_event_is_there_while_its_vector_is_connected() {
    let it = Checked::new();
    let call = it.driver.function.call(0);
    let event = call.event().expect("connected");
    busway_vfio::EventFd::from(event.try_clone().unwrap()).signal();
    assert_eq!(it.driver.route(0).wait(), 1);
    it.driver
        .function
        .config_write(it.driver.msix_capability + 2, &[0, 0]);
    assert!(call.event().is_none());
    call.signal();
    assert_eq!(it.driver.bar_read::<1>(it.driver.isr), [spec::isr::QUEUE]);
}

type Spoil = fn(&mut VirtioPciState);

#[test]
fn a_state_that_is_not_this_device_s_is_refused_and_changes_nothing() {
    let it = Checked::new();
    it.driver.function.pause();
    let state = it.state();
    let spoilt: [(&str, Spoil); 13] = [
        ("saved in version 7", |state| state.version = 7),
        ("another kind of device's", |state| state.device_type = 2),
        ("has another size", |state| state.config.truncate(64)),
        ("another number of queues", |state| {
            state.registers.queues.pop();
        }),
        ("feature that this device does not offer", |state| {
            state.registers.driver_features |= 1 << 7;
        }),
        ("none that a driver can set", |state| {
            state.registers.status = status::DRIVER_OK;
        }),
        ("none that a driver can set", |state| {
            state.registers.status |= status::DEVICE_NEEDS_RESET;
        }),
        ("a vector is beyond its table", |state| {
            state.registers.config_vector = 3;
        }),
        ("queue's vector is beyond the table", |state| {
            state.registers.queues[1].vector = 3;
        }),
        ("size that this device does not offer", |state| {
            state.registers.queues[0].size = 128;
        }),
        ("positions in more queues", |state| {
            state.progress.queues = vec![QueuePosition::default(); 3];
        }),
        ("what the device itself keeps is not", |state| {
            state.progress.device = DeviceState::Console(ConsoleState::default());
        }),
        ("4 vectors, and the function 3", |state| {
            state.msix.vectors.push(state.msix.vectors[0]);
        }),
    ];
    for (what, spoil) in spoilt {
        let mut other = state.clone();
        spoil(&mut other);
        let error: StateError = it.driver.function.restore(&other).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(it.state(), state, "{what}");
    }
    let unknown = serde_json::to_string(&state).unwrap();
    let unknown = unknown.replacen('{', "{\"more\":1,", 1);
    serde_json::from_str::<VirtioPciState>(&unknown).unwrap_err();
}

/// What happens to a device.
#[derive(Clone, Debug)]
enum Step {
    Submit,
    Collect,
    Pause,
    Resume,
    Slow(bool),
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Submit),
        2 => Just(Step::Collect),
        2 => Just(Step::Pause),
        2 => Just(Step::Resume),
        2 => any::<bool>().prop_map(Step::Slow),
        1 => Just(Step::Move),
    ];
    proptest::collection::vec(step, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn however_a_device_is_stopped_and_started_each_request_is_done_once_and_in_turn(
        steps in steps(), event_idx in any::<bool>(),
    ) {
        let mut it = Checked::new();
        if event_idx {
            (it.ring, it.buffer) = Checked::bring_up(&mut it.driver, spec::feature::EVENT_IDX);
        }
        for step in steps {
            match step {
                Step::Submit => it.submit(),
                Step::Collect => it.collect(),
                Step::Pause => it.driver.function.pause(),
                Step::Resume => it.driver.function.resume(),
                Step::Slow(slow) => it.host.slow.store(slow, Ordering::SeqCst),
                Step::Move => it.driver.move_to(Numbering::new(&it.host)),
            }
        }
        it.host.slow.store(false, Ordering::SeqCst);
        it.driver.function.resume();
        it.collect_all();
        it.driver.function.pause();
        let position = it.state().progress.queue(0);
        prop_assert_eq!(position.next_avail, it.submitted as u16);
        prop_assert_eq!(position.next_used, it.submitted as u16);
    }

    #[test]
    fn whatever_is_restored_the_device_can_be_resumed_and_reset(
        places in proptest::collection::vec(any::<u64>(), 3),
        small in any::<bool>(),
        position in any::<(u16, u16)>(),
        size in 0_u32..7,
        bits in any::<(u8, bool, u32)>(),
        config in proptest::collection::vec(any::<u8>(), 256),
        vector in any::<(u64, u32, bool, bool)>(),
    ) {
        let mut it = Checked::new();
        it.driver.function.pause();
        let mut state = it.state();
        let place = |at: usize, align: u64| {
            let place = if small { places[at] % crate::virtio::testing::RAM_SIZE } else { places[at] };
            place - place % align
        };
        let queue = &mut state.registers.queues[0];
        (queue.desc, queue.driver, queue.device) = (place(0, 16), place(1, 2), place(2, 4));
        queue.size = 1 << size;
        let (next_avail, next_used) = position;
        state.progress.queues = vec![QueuePosition { next_avail, next_used }];
        (state.isr, state.needs_reset, state.registers.device_feature_select) = bits;
        state.config = config;
        let (address, data, masked, pending) = vector;
        let entry = &mut state.msix.vectors[0];
        (entry.message.address, entry.message.data) = (address, data);
        (entry.masked, entry.pending) = (masked, pending);
        it.driver.function.restore(&state).unwrap();
        it.driver.function.resume();
        it.driver.notify(&it.ring);
        it.driver.function.pause();
        it.driver.function.reset();
        it.driver.function.resume();
        it.driver.function.config_write(4, &[6, 0]);
        it.driver.write(0, &vec![0; crate::virtio::testing::RAM_SIZE as usize]);
        it.driver.enable_msix(3);
        it.host.done.store(0, Ordering::SeqCst);
        (it.ring, it.buffer) = Checked::bring_up(&mut it.driver, 0);
        it.submit();
        it.collect_all();
    }
}
