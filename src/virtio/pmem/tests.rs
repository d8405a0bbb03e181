use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::memory::{Area, GuestRam, Regions};
use crate::virtio::spec::pmem;
use crate::virtio::testing::{Driver, Ring, eventually, ram};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn slots(ram: &GuestRam) -> Slots {
    Slots::new(
        ram,
        &Arc::<Regions>::default(),
        Area::new(GIB..GIB + 64 * MIB),
    )
}

fn file(folder: &TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("file");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// What is made of `path`, or why nothing is.
fn made(config: &PmemConfig) -> Result<(Pmem, GuestRam), String> {
    let ram = ram();
    let pmem = Pmem::new("pmem0", config, &slots(&ram));
    let pmem = pmem.map_err(|error| error.to_string())?;
    Ok((pmem, ram))
}

fn refusal(config: &PmemConfig) -> String {
    made(config).map(drop).unwrap_err()
}

/// A host that does what a test says: whether it holds flushes up, and whether it fails them.
#[derive(Debug, Default)]
struct Storage {
    held: AtomicBool,
    fails: AtomicBool,
    flushes: AtomicU64,
}

impl Storage {
    fn flush(&self) -> io::Result<()> {
        while self.held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.flushes.fetch_add(1, Ordering::SeqCst);
        match self.fails.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

/// A device of `folder`'s file, whose flushes are `storage`'s.
fn on(storage: &Arc<Storage>, folder: &TempDir) -> Driver {
    let (mut pmem, ram) = made(&PmemConfig::new(file(folder, 2 * MIB))).unwrap();
    let storage = Arc::clone(storage);
    let flusher = Flusher::start("pmem0", EventFd::new().unwrap(), move || storage.flush());
    pmem.flusher = Some(flusher.unwrap());
    Driver::with_ram(pmem, ram)
}

fn begin(driver: &mut Driver) -> Ring {
    driver.negotiate(u64::MAX);
    driver.enable_msix(1);
    let ring = driver.queue(0, 16);
    driver.ready();
    ring
}

/// Puts a request of `kind` into `ring`, without telling of it, and gives where its answer will be.
fn ask(driver: &mut Driver, ring: &mut Ring, kind: u32) -> u64 {
    let at = driver.alloc(16);
    driver.write(at, &kind.to_le_bytes());
    driver.write(at + 8, &[0xee; 4]);
    ring.submit(&[(at, 4, false), (at + 8, 4, true)]);
    at + 8
}

fn answer(driver: &Driver, at: u64) -> u32 {
    u32::from_le_bytes(driver.read(at, 4).try_into().unwrap())
}

#[test]
fn the_guest_finds_the_file_where_its_configuration_says_and_a_flush_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, 4 * MIB);
    let (pmem, ram) = made(&PmemConfig::new(&path)).unwrap();
    let mut driver = Driver::with_ram(pmem, ram);
    let fields: [u8; 16] = driver.bar_read(driver.device);
    let expected = [GIB, 4 * MIB].map(u64::to_le_bytes).concat();
    assert_eq!(fields.to_vec(), expected);
    let mut ring = begin(&mut driver);
    driver.write(GIB + 5, b"kept");
    let at = ask(&mut driver, &mut ring, pmem::REQ_FLUSH);
    driver.notify(&ring);
    assert_eq!(ring.wait_used().1, 4);
    assert_eq!(answer(&driver, at), pmem::RESP_OK);
    let mut bytes = [0; 4];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut bytes, 5)
        .unwrap();
    assert_eq!(&bytes, b"kept");
    drop(driver);
    // Its lock is gone with it.
    made(&PmemConfig::new(&path)).unwrap();
}

#[test]
fn one_flush_is_for_all_that_wait_and_what_comes_meanwhile_has_another() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::<Storage>::default();
    let mut driver = on(&storage, &folder);
    let mut ring = begin(&mut driver);
    storage.held.store(true, Ordering::SeqCst);
    let mut answers: Vec<_> = (0..3)
        .map(|_| ask(&mut driver, &mut ring, pmem::REQ_FLUSH))
        .collect();
    driver.notify(&ring);
    // Nothing comes back while the host keeps the first.
    assert!(driver.route(0).silent());
    assert_eq!(ring.poll_used(), None);
    answers.push(ask(&mut driver, &mut ring, pmem::REQ_FLUSH));
    driver.notify(&ring);
    storage.held.store(false, Ordering::SeqCst);
    for _ in 0..4 {
        assert_eq!(ring.wait_used().1, 4);
    }
    assert!(
        answers
            .iter()
            .all(|at| answer(&driver, *at) == pmem::RESP_OK)
    );
    assert!((2..=3).contains(&storage.flushes.load(Ordering::SeqCst)));
}

#[test]
fn a_host_that_keeps_a_flush_holds_up_neither_a_pause_nor_a_reset_nor_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::<Storage>::default();
    let mut driver = on(&storage, &folder);
    let mut ring = begin(&mut driver);
    storage.held.store(true, Ordering::SeqCst);
    let at = ask(&mut driver, &mut ring, pmem::REQ_FLUSH);
    driver.notify(&ring);
    assert!(driver.route(0).silent());
    let start = Instant::now();
    driver.function.pause();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(ring.poll_used(), None);
    driver.function.resume();
    storage.held.store(false, Ordering::SeqCst);
    // It was asked for again, and is answered once.
    assert_eq!(ring.wait_used(), (0, 4));
    assert_eq!(answer(&driver, at), pmem::RESP_OK);
    assert_eq!(ring.poll_used(), None);
    storage.held.store(true, Ordering::SeqCst);
    ask(&mut driver, &mut ring, pmem::REQ_FLUSH);
    driver.notify(&ring);
    let start = Instant::now();
    let status = crate::virtio::spec::pci::common::DEVICE_STATUS;
    driver.set_common(status, &[0]);
    assert_eq!(driver.status(), 0);
    let mut ring = begin(&mut driver);
    ask(&mut driver, &mut ring, pmem::REQ_FLUSH);
    driver.notify(&ring);
    drop(driver);
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    storage.held.store(false, Ordering::SeqCst);
}

#[test]
fn what_could_not_be_written_once_is_never_said_to_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::<Storage>::default();
    let mut driver = on(&storage, &folder);
    let mut ring = begin(&mut driver);
    for (fails, expected) in [
        (false, pmem::RESP_OK),
        (true, pmem::RESP_EIO),
        (false, pmem::RESP_EIO),
    ] {
        storage.fails.store(fails, Ordering::SeqCst);
        let at = ask(&mut driver, &mut ring, pmem::REQ_FLUSH);
        driver.notify(&ring);
        assert_eq!(ring.wait_used().1, 4);
        assert_eq!(answer(&driver, at), expected, "{fails}");
    }
}

#[test]
fn changes_that_are_the_vms_own_need_no_writable_file_and_leave_it_as_it_was() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, 2 * MIB);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    let config = PmemConfig {
        discard_writes: true,
        ..PmemConfig::new(&path)
    };
    let (first, ram) = made(&config).unwrap();
    // Two VMs read one file.
    let second = made(&config).unwrap();
    let mut driver = Driver::with_ram(first, ram);
    let mut ring = begin(&mut driver);
    driver.write(GIB, &[9; 8]);
    let at = ask(&mut driver, &mut ring, pmem::REQ_FLUSH);
    driver.notify(&ring);
    assert_eq!(ring.wait_used().1, 4);
    assert_eq!(answer(&driver, at), pmem::RESP_OK);
    assert_eq!(driver.read(GIB, 8), [9; 8]);
    assert_eq!(fs::read(&path).unwrap(), vec![0; 2 * MIB as usize]);
    // Who writes the file has it alone.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let why = refusal(&PmemConfig::new(&path));
    assert!(why.contains("in use by"), "{why}");
    drop((driver, second));
    made(&PmemConfig::new(&path)).unwrap();
}

#[test]
fn a_folder_has_a_file_without_a_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = PmemConfig::new(folder.path());
    assert!(refusal(&config).contains("say size="));
    let config = PmemConfig {
        size: Some(2 * MIB),
        ..config
    };
    let (pmem, ram) = made(&config).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    drop((pmem, ram));
}

#[test]
fn what_is_no_memory_is_refused_with_the_way_to_make_some() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder, 3 * MIB);
    let with = |path: &Path, size| PmemConfig {
        size,
        ..PmemConfig::new(path)
    };
    let missing = folder.path().join("missing");
    for (path, size, word) in [
        (&*path, None, "no multiple of 2 MiB"),
        (&*path, Some(4 * MIB), "truncate -s 4194304"),
        (&*path, Some(MIB), "multiple of 2 MiB"),
        (&*path, Some(0), "multiple of 2 MiB"),
        (&*missing, None, "truncate -s 1G"),
        (Path::new("/dev/null"), None, "neither a file"),
        (Path::new(""), None, "file=PATH"),
    ] {
        let why = refusal(&with(path, size));
        assert!(why.contains(word), "{}: {why}", path.display());
    }
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(128 * MIB)
        .unwrap();
    let why = refusal(&with(&path, None));
    assert!(why.contains("no room"), "{why}");
    made(&with(&path, Some(2 * MIB))).unwrap();
}

proptest! {
    /// Whatever requests are like, each is answered once, as far as it has room for that, and the device goes on.
    #[test]
    fn requests_of_every_shape_are_answered_once(
        requests in prop::collection::vec((any::<u32>(), 0_u32..9, 0_u32..9), 1..20),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let storage = Arc::<Storage>::default();
        let mut driver = on(&storage, &folder);
        let mut ring = begin(&mut driver);
        for (kind, readable, writable) in requests {
            let at = driver.alloc(32);
            driver.write(at, &(kind % 2).to_le_bytes());
            driver.write(at + 16, &[0xee; 16]);
            let mut chain = Vec::new();
            if readable > 0 {
                chain.push((at, readable, false));
            }
            if writable > 0 || readable == 0 {
                chain.push((at + 16, writable.max(1), true));
            }
            ring.submit(&chain);
            driver.notify(&ring);
            let (_, written) = ring.wait_used();
            let flushes = readable >= 4 && kind % 2 == pmem::REQ_FLUSH;
            let expected = if flushes { pmem::RESP_OK } else { pmem::RESP_EIO };
            if writable < 4 {
                prop_assert_eq!(written, 0);
                prop_assert_eq!(driver.read(at + 16, 16), vec![0xee; 16]);
            } else {
                prop_assert_eq!(written, 4);
                prop_assert_eq!(answer(&driver, at + 16), expected);
            }
        }
        eventually("the device goes on", || driver.status() & 0x40 == 0);
    }
}
