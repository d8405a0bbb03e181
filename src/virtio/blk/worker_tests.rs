//! A disk with many requests at once: batches, stops in the middle of them, and a host that does not
//! answer.

use super::tests::{disk, image};
use super::*;
use crate::virtio::life::Progress;
use crate::virtio::spec::pci::common;
use crate::virtio::testing::{Driver, Ring, eventually};
use busway_pci::PciFunction;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use tempfile::NamedTempFile;

const MIB: u64 = 1 << 20;
const SIZE: u16 = 64;
/// A request is three descriptors.
const SLOTS: u64 = SIZE as u64 / 4;
const BLOCK: u64 = 512;

/// A driver with many requests at once, each a write of its own number to its own block.
struct Busy {
    driver: Driver,
    ring: Ring,
    image: Arc<Image>,
    file: NamedTempFile,
    /// Its requests read.
    reads: bool,
    headers: u64,
    data: u64,
    statuses: u64,
    /// What each slot's request is, while it is out: its first descriptor and its number.
    out: Vec<Option<(u16, u64)>>,
    submitted: u64,
    completed: u64,
}

impl Busy {
    fn new(device: Blk, file: NamedTempFile, features: u64) -> Self {
        let image = Arc::clone(&device.image);
        let mut driver = Driver::new(device);
        driver.enable_msix(2);
        driver.negotiate(features);
        let ring = driver.queue(0, SIZE);
        driver.ready();
        Self {
            headers: driver.alloc(SLOTS * 16),
            data: driver.alloc(SLOTS * BLOCK),
            statuses: driver.alloc(SLOTS),
            driver,
            ring,
            image,
            file,
            reads: false,
            out: (0..SLOTS).map(|_| None).collect(),
            submitted: 0,
            completed: 0,
        }
    }

    /// Makes a request available where there is a slot for it, and says which block it writes.
    fn submit(&mut self) -> Option<u64> {
        let slot = self.out.iter().position(Option::is_none)?;
        let number = self.submitted;
        let block = slot as u64;
        let mut header = [0; 16];
        let (kind, data_flags) = if self.reads {
            (blk::T_IN, spec::DESC_F_NEXT | spec::DESC_F_WRITE)
        } else {
            (blk::T_OUT, spec::DESC_F_NEXT)
        };
        header[0] = kind as u8;
        header[8..].copy_from_slice(&block.to_le_bytes());
        let (at, data, status) = (
            self.headers + block * 16,
            self.data + block * BLOCK,
            self.statuses + block,
        );
        self.driver.write(at, &header);
        self.driver
            .write(data, &number.to_le_bytes().repeat(BLOCK as usize / 8));
        self.driver.write(status, &[0xee]);
        // Each slot has descriptors of its own, for they come back in any order.
        let first = slot as u16 * 4;
        for (index, (address, len, flags)) in (first..).zip([
            (at, 16, 1),
            (data, BLOCK as u32, data_flags),
            (status, 1, 2),
        ]) {
            self.ring.describe(index, address, len, flags, index + 1);
        }
        self.ring.make_available(first);
        self.out[slot] = Some((first, number));
        self.submitted += 1;
        Some(block)
    }

    fn notify(&self) {
        self.driver.notify(&self.ring);
    }

    /// Takes what has been completed: each once, and on the disk.
    fn collect(&mut self) {
        while let Some((head, len)) = self.ring.poll_used() {
            let slot = head as usize / 4;
            let (first, number) = self.out[slot].take().expect("it was out");
            let read = if self.reads { BLOCK as u32 } else { 0 };
            assert_eq!((u32::from(first), len), (head, read + 1));
            let status = self.driver.read(self.statuses + slot as u64, 1);
            assert_eq!(status, [blk::S_OK]);
            if !self.reads {
                let mut stored = [0; BLOCK as usize];
                let file = self.file.as_file();
                file.read_exact_at(&mut stored, slot as u64 * BLOCK)
                    .unwrap();
                assert!(stored.chunks(8).all(|word| word == number.to_le_bytes()));
            }
            self.completed += 1;
        }
    }

    fn collect_all(&mut self) {
        eventually("all completed", || {
            self.collect();
            self.completed == self.submitted
        });
        assert!(self.ring.poll_used().is_none());
    }

    fn progress(&self) -> Progress {
        self.driver.function.state().expect("it is paused").progress
    }

    fn left(&self) -> usize {
        match self.progress().device {
            DeviceState::Disk(state) => state.left.len(),
            other => panic!("{other:?}"),
        }
    }
}

fn by(way: EngineKind, file: &NamedTempFile, change: impl FnOnce(&mut DiskConfig)) -> Blk {
    let mut device = disk(file, change);
    device.way = way;
    device
}

#[test]
fn what_is_made_available_at_once_is_told_of_by_one_interrupt() {
    for features in [0, spec::feature::EVENT_IDX] {
        let file = image(MIB);
        let mut busy = Busy::new(by(EngineKind::Best, &file, |_| ()), file, features);
        // It is in the host's cache, so that nothing has to be waited for.
        for _ in 0..SLOTS {
            busy.submit();
        }
        busy.notify();
        busy.collect_all();
        busy.driver.function.pause();
        busy.reads = true;
        let before = busy.driver.routes.signals(0);
        for _ in 0..SLOTS {
            busy.submit();
        }
        busy.ring.set_used_event(SLOTS as u16);
        busy.driver.function.resume();
        busy.collect_all();
        eventually("an interrupt", || busy.driver.routes.signals(0) > before);
        let interrupts = busy.driver.routes.signals(0) - before;
        assert!(
            interrupts <= 2,
            "{interrupts} interrupts for {SLOTS} requests"
        );
    }
}

#[test]
fn requests_by_threads_and_by_io_uring_come_to_the_same() {
    for way in [EngineKind::Best, EngineKind::Threads] {
        for direct in [false, true] {
            let file = image(MIB);
            let mut busy = Busy::new(by(way, &file, |config| config.direct = direct), file, 0);
            for _ in 0..50 {
                while busy.submit().is_some() {}
                busy.notify();
                busy.collect_all();
            }
        }
    }
}

#[test]
fn a_host_that_does_not_answer_holds_no_pause_up_and_its_request_is_done_once() {
    let file = image(MIB);
    let device = by(EngineKind::Threads, &file, |_| ());
    let image = Arc::clone(&device.image);
    let mut busy = Busy::new(device, file, 0);
    image.gate.set_closed(true);
    for _ in 0..3 {
        busy.submit();
    }
    busy.notify();
    eventually("with the host", || image.gate.waiting() == 3);
    for round in 0..2 {
        let start = Instant::now();
        busy.driver.function.pause();
        assert!(start.elapsed() < Duration::from_secs(4), "round {round}");
        assert_eq!(busy.left(), 3);
        let what = busy.driver.function.outstanding().expect("with the host");
        assert!(
            what.starts_with("3 requests: a write of 512 bytes from byte "),
            "{what}"
        );
        busy.driver.function.resume();
        assert!(busy.driver.route(0).silent());
        assert_eq!(image.gate.waiting(), 3, "they are not sent again");
    }
    image.gate.set_closed(false);
    busy.collect_all();
    assert_eq!(busy.driver.function.outstanding(), None);
    busy.submit();
    busy.notify();
    busy.collect_all();
    busy.driver.function.pause();
    assert_eq!(busy.left(), 0);
}

#[test]
fn a_reset_is_not_over_before_the_host_has_given_back_what_it_has() {
    let file = image(MIB);
    let device = by(EngineKind::Threads, &file, |_| ());
    let image = Arc::clone(&device.image);
    let mut busy = Busy::new(device, file, 0);
    image.gate.set_closed(true);
    busy.submit();
    busy.notify();
    eventually("with the host", || image.gate.waiting() == 1);
    let start = Instant::now();
    busy.driver.set_common(common::DEVICE_STATUS, &[0]);
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_ne!(busy.driver.status(), 0);
    // What the driver writes meanwhile is not heard.
    busy.driver.set_common(common::DEVICE_STATUS, &[1]);
    let again = Instant::now();
    busy.driver.function.reset();
    assert!(again.elapsed() < Duration::from_millis(500));
    busy.driver.function.config_write(4, &[6, 0]);
    assert_ne!(busy.driver.status(), 0);
    image.gate.set_closed(false);
    eventually("reset", || busy.driver.status() == 0);
    assert!(
        busy.ring.poll_used().is_none(),
        "nobody asks for it any more"
    );
    assert_eq!(busy.driver.function.outstanding(), None);
    busy.driver.enable_msix(2);
    busy.driver.negotiate(0);
    busy.ring = busy.driver.queue(0, SIZE);
    busy.driver.ready();
    busy.out.fill(None);
    (busy.submitted, busy.completed) = (0, 0);
    busy.submit();
    busy.notify();
    busy.collect_all();
}

#[test]
fn a_device_that_is_dropped_while_the_host_does_not_answer_leaves_its_memory_alone() {
    let file = image(MIB);
    let device = by(EngineKind::Threads, &file, |_| ());
    let image = Arc::clone(&device.image);
    let mut busy = Busy::new(device, file, 0);
    image.gate.set_closed(true);
    busy.submit();
    busy.notify();
    eventually("with the host", || image.gate.waiting() == 1);
    let start = Instant::now();
    drop(busy);
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_eq!(image.gate.waiting(), 1);
    image.gate.set_closed(false);
    eventually("released", || Arc::strong_count(&image) == 1);
}

#[test]
fn what_the_limits_do_not_let_pass_waits_and_is_done_in_time() {
    let file = image(MIB);
    let device = by(EngineKind::Best, &file, |config| {
        (config.ops_size, config.ops_refill_time) = (Some(5), Some(250));
    });
    let mut busy = Busy::new(device, file, 0);
    let start = Instant::now();
    for _ in 0..12 {
        busy.submit();
    }
    busy.notify();
    // In the middle of it: what waits for the limiter is left, and done by the next start.
    busy.driver.function.pause();
    busy.collect();
    assert!(busy.completed <= 6, "{}", busy.completed);
    busy.driver.function.resume();
    busy.collect_all();
    let took = start.elapsed();
    assert!(
        took > Duration::from_millis(300),
        "7 of 20 a second: {took:?}"
    );
}

#[test]
fn a_queue_s_worker_runs_where_it_is_told_to() {
    let file = image(MIB);
    let device = by(EngineKind::Best, &file, |config| {
        config.queue_affinity = vec![QueueAffinity {
            queue_index: 0,
            host_cpus: vec![0],
        }];
    });
    let device = Blk {
        name: "placed".into(),
        ..device
    };
    let mut busy = Busy::new(device, file, 0);
    busy.submit();
    busy.notify();
    busy.collect_all();
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let status = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .find(|status| status.starts_with("Name:\t_disk-placed-q0\n"))
        .expect("it runs");
    assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
}

#[test]
fn the_driver_chooses_whether_writes_may_stay_in_a_cache_until_it_resets_the_device() {
    let file = image(MIB);
    let device = by(EngineKind::Best, &file, |config| config.writeback = false);
    let space = Arc::clone(&device.space);
    let mut busy = Busy::new(device, file, blk::F_CONFIG_WCE | blk::F_FLUSH);
    let field = busy.driver.device + blk::CONFIG_WRITEBACK as u64;
    assert_eq!(busy.driver.bar_read::<1>(field), [0]);
    busy.driver.bar_write(field, &[1]);
    // Nothing else is the driver's to write.
    busy.driver.bar_write(busy.driver.device, &[7; 8]);
    assert_eq!(
        busy.driver.bar_read::<8>(busy.driver.device),
        2048_u64.to_le_bytes()
    );
    assert!(space.writeback());
    let other = image(MIB);
    let moved = by(EngineKind::Best, &other, |config| config.writeback = false);
    let space = Arc::clone(&moved.space);
    busy.driver.move_to(moved);
    assert_eq!(
        busy.driver.bar_read::<1>(busy.driver.isr),
        [0],
        "nothing is another"
    );
    busy.driver.function.resume();
    assert!(space.writeback(), "it is saved");
    busy.driver.set_common(common::DEVICE_STATUS, &[0]);
    assert!(!space.writeback());
}

#[test]
fn a_driver_that_never_flushes_has_each_write_last() {
    let file = image(MIB);
    let device = disk(&file, |_| ());
    let planned = |features, writeback| {
        device.space.set_writeback(writeback);
        let requests = Requests::new(
            Arc::clone(&device.image),
            Arc::clone(&device.space),
            "disk0",
            "serial",
            features,
            Arc::clone(&device.complaints),
        );
        requests.write_through()
    };
    assert!(planned(0, true));
    assert!(planned(blk::F_FLUSH, false));
    assert!(!planned(blk::F_FLUSH, true));
}

/// What happens to a disk.
#[derive(Clone, Debug)]
enum Step {
    Submit(usize),
    Collect,
    Pause,
    Resume,
    Closed(bool),
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (1_usize..6).prop_map(Step::Submit),
        3 => Just(Step::Collect),
        2 => Just(Step::Pause),
        2 => Just(Step::Resume),
        1 => Just(Step::Move),
    ];
    proptest::collection::vec(step, 0..60)
}

fn in_turns() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1_usize..6).prop_map(Step::Submit),
        1 => Just(Step::Collect),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        1 => any::<bool>().prop_map(Step::Closed),
    ];
    proptest::collection::vec(step, 0..16)
}

fn run(busy: &mut Busy, way: EngineKind, steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Submit(count) => {
                for _ in 0..count {
                    busy.submit();
                }
                busy.notify();
            }
            Step::Collect => busy.collect(),
            Step::Pause => busy.driver.function.pause(),
            Step::Resume => busy.driver.function.resume(),
            Step::Closed(closed) => busy.image.gate.set_closed(closed),
            Step::Move => {
                busy.driver.function.pause();
                // The lock on the image is its present owner's, for as long as that is there.
                let other = image(MIB);
                let mut bytes = vec![0; MIB as usize];
                busy.file.as_file().read_exact_at(&mut bytes, 0).unwrap();
                other.as_file().write_all_at(&bytes, 0).unwrap();
                let device = by(way, &other, |_| ());
                busy.image = Arc::clone(&device.image);
                busy.driver.move_to(device);
                busy.file = other;
            }
        }
    }
    busy.image.gate.set_closed(false);
    busy.driver.function.resume();
    busy.collect_all();
    busy.driver.function.pause();
    assert_eq!(busy.left(), 0);
    let position = busy.progress().queue(0);
    assert_eq!(position.next_avail, busy.submitted as u16);
    assert_eq!(position.next_used, busy.submitted as u16);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn however_a_disk_is_stopped_and_started_each_of_its_requests_is_done_once(
        steps in steps(), event_idx in any::<bool>(), threads in any::<bool>(),
    ) {
        let file = image(MIB);
        let way = if threads { EngineKind::Threads } else { EngineKind::Best };
        let features = if event_idx { spec::feature::EVENT_IDX } else { 0 };
        let mut busy = Busy::new(by(way, &file, |_| ()), file, features);
        run(&mut busy, way, steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn however_a_host_stalls_each_request_is_done_once(steps in in_turns()) {
        let file = image(MIB);
        let mut busy = Busy::new(by(EngineKind::Threads, &file, |_| ()), file, 0);
        run(&mut busy, EngineKind::Threads, steps);
    }
}
