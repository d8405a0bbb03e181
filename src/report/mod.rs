//! The boot report: when each stage of a start was reached, and what the VM took to run.
//!
//! It owns the numbers and their two forms, the JSON file and the short table. It does not measure
//! them, but for the clock and [`own_memory`]: the machine says what it did, as it does it, from any
//! thread, and nobody waits for anybody.

mod own_memory;
mod placed;
mod snapshot;
mod walls;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use busway_host::files::{Existing, OutputError, open_output, replace};
use rustix::time::{ClockId, clock_gettime};

pub use own_memory::own_memory;
pub use placed::PlacedNode;
pub use snapshot::{AssignedDevice, IommuWay, Mappings, Milliseconds, Snapshot};
pub use walls::Walls;

/// A point on the way from `exec` to a running guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The configuration is read and found sound.
    Parse,
    /// Guest RAM is there, and touched where it is to be. Devices are being opened meanwhile.
    Memory,
    /// The assigned devices are open.
    Open,
    /// RAM is mapped for the devices' DMA.
    DmaMap,
    /// All devices are there, and the machine is built.
    Devices,
    /// The boot processor is about to run the guest's first instruction.
    FirstInstruction,
}

impl Stage {
    /// All of them, in the order in which a start reaches them.
    pub const ALL: [Self; 6] = [
        Self::Parse,
        Self::Memory,
        Self::Open,
        Self::DmaMap,
        Self::Devices,
        Self::FirstInstruction,
    ];

    const fn index(self) -> usize {
        self as usize
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Memory => "memory",
            Self::Open => "open devices",
            Self::DmaMap => "DMA map",
            Self::Devices => "devices",
            Self::FirstInstruction => "first instruction",
        }
    }
}

/// What is called while memory is pinned, with the bytes done and the bytes in all.
pub type ProgressFn = dyn Fn(u64, u64) + Send + Sync;

/// The report of one run, written to by everybody who has something to say.
pub struct Report {
    start: Instant,
    /// Nanoseconds from the start to each stage, 0 where it has not been reached.
    stages: [AtomicU64; Stage::ALL.len()],
    map_calls: AtomicU64,
    device_map_calls: AtomicU64,
    map_bytes: AtomicU64,
    vectors: AtomicU64,
    vector_updates: AtomicU64,
    /// 0 where nobody has measured it.
    own_memory: AtomicU64,
    guest_memory: Mutex<Vec<Range<usize>>>,
    exits: Mutex<BTreeMap<&'static str, u64>>,
    iommu: Mutex<Option<IommuWay>>,
    walls: Mutex<Option<Walls>>,
    devices: Mutex<Vec<AssignedDevice>>,
    placement: Mutex<Option<Vec<PlacedNode>>>,
    running: Mutex<Option<Sender<()>>>,
    progress: OnceLock<Box<ProgressFn>>,
}

impl Report {
    /// Starts the clock; the first thing that `main` does.
    ///
    /// Zero is the start of the process, not of `main`: what the kernel and the dynamic linker did
    /// for it before is on its CPU clock by now. (`/proc/self/stat` has a start time too, in steps of
    /// ten milliseconds, which is longer than a small guest takes.)
    #[must_use]
    pub fn start() -> Self {
        let now = Instant::now();
        Self::starting_at(now.checked_sub(process_cpu_time()).unwrap_or(now))
    }

    fn starting_at(start: Instant) -> Self {
        Self {
            start,
            stages: Default::default(),
            map_calls: AtomicU64::new(0),
            device_map_calls: AtomicU64::new(0),
            map_bytes: AtomicU64::new(0),
            vectors: AtomicU64::new(0),
            vector_updates: AtomicU64::new(0),
            own_memory: AtomicU64::new(0),
            guest_memory: Mutex::default(),
            exits: Mutex::default(),
            iommu: Mutex::default(),
            walls: Mutex::default(),
            devices: Mutex::default(),
            placement: Mutex::default(),
            running: Mutex::default(),
            progress: OnceLock::new(),
        }
    }

    /// A stage is reached now. Only the first time counts: a guest that restarts does not start
    /// Busway again.
    pub fn reached(&self, stage: Stage) {
        let elapsed = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if let Some(slot) = self.stages.get(stage.index()) {
            let _already = slot.compare_exchange(0, elapsed.max(1), Relaxed, Relaxed);
        }
        if stage == Stage::FirstInstruction
            && let Some(waiting) = lock(&self.running).take()
        {
            let _gone = waiting.send(());
        }
    }

    /// The time from the process's start to a stage, where it has been reached.
    #[must_use]
    pub fn time_to(&self, stage: Stage) -> Option<Duration> {
        let nanoseconds = self.stages.get(stage.index())?.load(Relaxed);
        (nanoseconds != 0).then(|| Duration::from_nanos(nanoseconds))
    }

    /// How many DMA map calls the kernel was asked: for memory, and how many bytes of it are mapped
    /// now, and for the BARs of devices.
    pub fn set_mappings(&self, calls: u64, bytes: u64, device_calls: u64) {
        self.map_calls.store(calls, Relaxed);
        self.device_map_calls.store(device_calls, Relaxed);
        self.map_bytes.store(bytes, Relaxed);
    }

    /// How many host interrupt vectors are in use for assigned devices now, and how often one of
    /// them was given another message.
    pub fn set_vectors(&self, vectors: u64, updates: u64) {
        self.vectors.store(vectors, Relaxed);
        self.vector_updates.store(updates, Relaxed);
    }

    /// By which of the kernel's interfaces the assigned devices are reached, in one word, and why.
    pub fn set_iommu(&self, interface: &'static str, why: &str) {
        let why = why.to_owned();
        *lock(&self.iommu) = Some(IommuWay { interface, why });
    }

    /// Which walls stand round the process.
    pub fn set_walls(&self, walls: Walls) {
        *lock(&self.walls) = Some(walls);
    }

    /// What the assigned devices are like now.
    pub fn set_devices(&self, devices: Vec<AssignedDevice>) {
        *lock(&self.devices) = devices;
    }

    /// On which nodes of the host's the guest was placed.
    pub fn set_placement(&self, nodes: Vec<PlacedNode>) {
        *lock(&self.placement) = Some(nodes);
    }

    /// Where guest memory is mapped in this process, so that Busway's own can be told from it.
    pub fn set_guest_memory(&self, mappings: Vec<Range<usize>>) {
        *lock(&self.guest_memory) = mappings;
    }

    /// Measures Busway's own memory, where it is known which is not. It takes as long as
    /// [`own_memory`] does.
    ///
    /// # Errors
    ///
    /// Those of [`own_memory`].
    pub fn measure_own_memory(&self) -> io::Result<()> {
        let guest = lock(&self.guest_memory).clone();
        if !guest.is_empty() {
            self.set_own_memory(own_memory(&guest)?);
        }
        Ok(())
    }

    /// How many bytes of memory are Busway's own, measured by somebody else.
    pub fn set_own_memory(&self, bytes: u64) {
        self.own_memory.store(bytes, Relaxed);
    }

    /// How many exits of one kind (`mmio_write`, `pio_read`, `halt`) came to user space so far.
    pub fn set_exits(&self, kind: &'static str, count: u64) {
        lock(&self.exits).insert(kind, count);
    }

    /// Memory is being pinned (touched, mapped for DMA): `done` bytes of `total` are ready. Cheap
    /// enough to be called for every few megabytes, from any thread; at least before the first byte,
    /// and after the last.
    pub fn pinning(&self, done: u64, total: u64) {
        if let Some(progress) = self.progress.get() {
            progress(done, total);
        }
    }

    /// Says who hears of [`Self::pinning`]. The first one to ask is the only one.
    pub fn on_pinning(&self, progress: Box<ProgressFn>) {
        let _kept = self.progress.set(progress);
    }

    /// A channel that speaks once, when the guest runs its first instruction, and closes without a
    /// word when [`Self::close`] comes first.
    #[must_use]
    pub fn running(&self) -> Receiver<()> {
        let (sender, receiver) = mpsc::channel();
        *lock(&self.running) = Some(sender);
        receiver
    }

    /// The run is over: whoever still waits for the first instruction need not.
    pub fn close(&self) {
        lock(&self.running).take();
    }

    /// The numbers as they stand, in the form in which they are written.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let milliseconds = |stage| self.time_to(stage).map(milliseconds);
        Snapshot {
            busway: env!("CARGO_PKG_VERSION"),
            milliseconds: Milliseconds {
                parse: milliseconds(Stage::Parse),
                memory: milliseconds(Stage::Memory),
                open: milliseconds(Stage::Open),
                dma_map: milliseconds(Stage::DmaMap),
                devices: milliseconds(Stage::Devices),
                first_instruction: milliseconds(Stage::FirstInstruction),
            },
            dma_mappings: Mappings {
                calls: self.map_calls.load(Relaxed),
                bytes: self.map_bytes.load(Relaxed),
                device_calls: self.device_map_calls.load(Relaxed),
            },
            vectors: self.vectors.load(Relaxed),
            vector_updates: self.vector_updates.load(Relaxed),
            own_memory_bytes: Some(self.own_memory.load(Relaxed)).filter(|bytes| *bytes != 0),
            iommu: lock(&self.iommu).clone(),
            walls: lock(&self.walls).clone(),
            devices: lock(&self.devices).clone(),
            placement: lock(&self.placement).clone(),
            exits: lock(&self.exits).clone(),
        }
    }

    /// Writes the report to a file, which at any time is either the old one or the new one, whole.
    /// What is no regular file (a pipe, `/dev/stderr`) is written to as it is; a link is not followed.
    ///
    /// # Errors
    ///
    /// Those of creating, writing and renaming a file, and as [`open_output`].
    pub fn write(&self, path: &Path) -> Result<(), OutputError> {
        let mut text = serde_json::to_vec_pretty(&self.snapshot()).map_err(io::Error::from)?;
        text.push(b'\n');
        match fs::symlink_metadata(path) {
            // What is no regular file, and nobody else's, is written as it is.
            Ok(there) if !there.is_file() => {
                open_output(path, Existing::Append)?.file.write_all(&text)?;
            }
            _ => replace(path, &beside(path), &text)?,
        }
        Ok(())
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.snapshot().fmt(f)
    }
}

/// Milliseconds to the microsecond, which is as fine as anybody reads them.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// A name for the file that is to take `path`'s place.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", crate::sandbox::process_id()));
    path.with_file_name(name)
}

/// The CPU time that this process has used, in the kernel and outside.
fn process_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanoseconds)
}

/// What a thread that panicked left behind is still a number.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_timed_once_and_from_the_process_start() {
        let report = Report::start();
        report.reached(Stage::Parse);
        let first = report.time_to(Stage::Parse).unwrap();
        assert!(first > Duration::ZERO);
        report.reached(Stage::Parse);
        assert_eq!(report.time_to(Stage::Parse), Some(first));
        assert_eq!(report.time_to(Stage::Memory), None);
    }

    #[test]
    fn the_json_has_the_names_that_others_read() {
        let report = Report::start();
        report.reached(Stage::Memory);
        report.set_mappings(3, 6 << 30, 2);
        report.set_vectors(5, 3);
        report.set_devices(vec![AssignedDevice {
            host: "0000:05:00.0".to_owned(),
            guest: "0000:01:00.0".to_owned(),
            reset: "flr",
        }]);
        assert_eq!(
            serde_json::to_value(report.snapshot())
                .unwrap()
                .get("iommu"),
            Some(&serde_json::Value::Null)
        );
        report.set_iommu("type1", "it is what was asked for");
        report.set_walls(Walls::new("true", Some(7), None));
        report.set_own_memory(4 << 20);
        report.set_exits("mmio_write", 7);
        let json = serde_json::to_value(report.snapshot()).unwrap();
        assert!(json["milliseconds"]["memory"].as_f64().unwrap() > 0.0);
        for stage in ["parse", "open", "dma_map", "devices", "first_instruction"] {
            assert_eq!(
                json["milliseconds"].get(stage),
                Some(&serde_json::Value::Null)
            );
        }
        assert_eq!(json["busway"], env!("CARGO_PKG_VERSION"));
        assert_eq!(json["dma_mappings"]["calls"], 3);
        assert_eq!(json["dma_mappings"]["bytes"], 6_u64 << 30);
        assert_eq!(json["dma_mappings"]["device_calls"], 2);
        assert_eq!(json["vectors"], 5);
        assert_eq!(json["vector_updates"], 3);
        assert_eq!(json["iommu"]["interface"], "type1");
        assert_eq!(json["iommu"]["why"], "it is what was asked for");
        assert_eq!(json["walls"]["seccomp"], "true");
        assert_eq!(json["walls"]["landlock"], 7);
        assert_eq!(json["walls"]["lacking"], serde_json::Value::Null);
        assert_eq!(json["devices"][0]["host"], "0000:05:00.0");
        assert_eq!(json["devices"][0]["guest"], "0000:01:00.0");
        assert_eq!(json["devices"][0]["reset"], "flr");
        assert_eq!(json["own_memory_bytes"], 4 << 20);
        assert_eq!(json["exits"]["mmio_write"], 7);
    }

    #[test]
    fn own_memory_is_measured_where_the_guests_is_known() {
        let report = Report::start();
        report.measure_own_memory().unwrap();
        assert_eq!(report.snapshot().own_memory_bytes, None);
        report.set_guest_memory(vec![0..0x1000, 0x2000..0x3000]);
        report.measure_own_memory().unwrap();
        assert!(report.snapshot().own_memory_bytes.is_some());
    }

    #[test]
    fn a_report_replaces_the_one_before_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let report = Report::start();
        report.write(&path).unwrap();
        report.set_vectors(9, 4);
        report.write(&path).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["vectors"], 9);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_regular_file_is_written_not_replaced() {
        Report::start().write(Path::new("/dev/null")).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn a_report_follows_no_link() {
        let folder = tempfile::tempdir().unwrap();
        let (victim, path) = (folder.path().join("victim"), folder.path().join("report"));
        fs::write(&victim, "secret").unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        let error = Report::start().write(&path).unwrap_err();
        assert!(matches!(error, OutputError::Link), "{error}");
        // Where the new report comes first, a link is no more followed.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&victim, beside(&path)).unwrap();
        Report::start().write(&path).unwrap_err();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "secret");
    }

    #[test]
    fn the_first_instruction_is_announced_once() {
        let report = Report::start();
        let running = report.running();
        report.reached(Stage::Devices);
        assert!(running.try_recv().is_err());
        report.reached(Stage::FirstInstruction);
        assert_eq!(running.recv(), Ok(()));
        assert!(running.recv().is_err());
    }

    #[test]
    fn a_run_that_ends_early_keeps_nobody_waiting() {
        let report = Report::start();
        let running = report.running();
        report.close();
        assert!(running.recv().is_err());
    }

    #[test]
    fn the_table_says_when_and_how_long() {
        let report = Report::starting_at(Instant::now());
        report.stages[0].store(1_500_000, Relaxed);
        report.stages[5].store(21_500_000, Relaxed);
        report.set_mappings(2, 512 << 20, 3);
        report.set_vectors(5, 3);
        report.set_iommu("iommufd", "devices do not reach each other's memory");
        report.set_walls(Walls::new("true", None, Some("the kernel has none")));
        report.set_own_memory(3 << 20);
        let expected = "\
stage                   at ms    took ms
parse                     1.5        1.5
first instruction        21.5       20.0
DMA mappings                2 calls, 512.0 MiB; 3 calls for BARs
vectors                     5 moved 3 times
IOMMU                 iommufd devices do not reach each other's memory
walls                    true seccomp, no Landlock (the kernel has none)
own memory            3.0 MiB
";
        assert_eq!(report.snapshot().to_string(), expected);
    }
}
