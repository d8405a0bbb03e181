//! A qcow2 image on a host that crashes: it has what was made last, and of what was written since whatever sectors chance
//! has written back. Whatever those are, the image is whole, and has what the guest flushed.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage,
    StorageOpenOptions,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use super::qcow2::{Qcow2Image, open_image};
use crate::virtio::segments::Segments;

const SECTOR: usize = 512;
/// Clusters of so many bytes: an L2 table has 64 of them, and a block of counts 256.
const CLUSTER: usize = 512;
/// What the guest writes, discards and zeroes is so long.
const BLOCK: usize = 1024;
const BLOCKS: usize = 512;

/// What became of the file.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Size(u64),
    /// All before it is there for good.
    Last,
}

type Log = Arc<Mutex<Vec<Op>>>;

/// A file whose changes are written down.
#[derive(Debug)]
struct Recorded {
    file: File,
    log: Log,
}

impl Recorded {
    fn note(&self, op: Op) {
        self.log.lock().unwrap().push(op);
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(formatter)
    }
}

impl Storage for Recorded {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.file.resolve_relative_path(relative)
    }

    unsafe fn pure_readv(&self, data: IoVectorMut<'_>, at: u64) -> io::Result<()> {
        // SAFETY: the caller's.
        unsafe { self.file.pure_readv(data, at) }
    }

    unsafe fn pure_writev(&self, data: IoVector<'_>, at: u64) -> io::Result<()> {
        let mut bytes = vec![0; data.len() as usize];
        data.copy_into_slice(&mut bytes);
        self.note(Op::Write(at, bytes));
        // SAFETY: the caller's.
        unsafe { self.file.pure_writev(data, at) }
    }

    unsafe fn pure_write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.note(Op::Zero(at, len));
        // SAFETY: the caller's.
        unsafe { self.file.pure_write_zeroes(at, len) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.note(Op::Zero(at, len));
        // SAFETY: the caller's.
        unsafe { self.file.pure_write_allocated_zeroes(at, len) }
    }

    unsafe fn pure_discard(&self, at: u64, len: u64) -> io::Result<()> {
        self.note(Op::Zero(at, len));
        // SAFETY: the caller's.
        unsafe { self.file.pure_discard(at, len) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.note(Op::Last);
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller's.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.note(Op::Size(size));
        self.file.resize(size, mode)
    }
}

/// Does `op` to a file's bytes, as far as `keeps` says of each sector of a write.
fn apply(bytes: &mut Vec<u8>, op: &Op, mut keeps: impl FnMut() -> bool) {
    let mut put = |at: u64, piece: &[u8]| {
        let (at, end) = (at as usize, at as usize + piece.len());
        bytes.resize(bytes.len().max(end), 0);
        bytes[at..end].copy_from_slice(piece);
    };
    match op {
        Op::Write(at, data) => {
            for (sector, place) in data.chunks(SECTOR).zip((*at..).step_by(SECTOR)) {
                if keeps() {
                    put(place, sector);
                }
            }
        }
        Op::Zero(at, len) if keeps() => put(*at, &vec![0; *len as usize]),
        Op::Size(size) if keeps() => bytes.resize(*size as usize, 0),
        Op::Zero(..) | Op::Size(_) | Op::Last => {}
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What `qemu-img check` would call an error: a cluster that is named more often than it is counted, that is not in the
/// file, or that is marked for one that only one names where that is not so. QEMU's docs/interop/qcow2.rst
fn check(bytes: &[u8]) -> Result<(), String> {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    const COPIED: u64 = 1 << 63;
    let mut named: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
    let mut name = |place: u64, must_be_single: bool| -> Result<usize, String> {
        if place as usize >= bytes.len() {
            return Err(format!("{place:#x} is beyond {:#x}", bytes.len()));
        }
        let entry = named.entry(place).or_default();
        entry.0 += 1;
        entry.1 |= must_be_single;
        Ok(place as usize)
    };
    let whole = |place: usize| {
        let mut table = bytes[place..].to_vec();
        table.resize(CLUSTER, 0);
        table
    };
    name(0, false)?;
    let (l1, l1_entries) = (number(bytes, 40), number(bytes, 32) as u32);
    let (counts, counts_clusters) = (number(bytes, 48), number(bytes, 56) >> 32);
    let mut blocks = Vec::new();
    for cluster in 0..counts_clusters {
        let table = whole(name(counts + cluster * CLUSTER as u64, false)?);
        for at in (0..CLUSTER).step_by(8) {
            let block = number(&table, at) & OFFSET;
            blocks.push(match block {
                0 => None,
                place => Some(whole(name(place, false)?)),
            });
        }
    }
    for at in (l1..l1 + u64::from(l1_entries) * 8).step_by(CLUSTER) {
        name(at, false)?;
    }
    for entry in (l1 as usize..).step_by(8).take(l1_entries as usize) {
        let entry = number(bytes, entry);
        if entry & OFFSET == 0 {
            continue;
        }
        let l2 = whole(name(entry & OFFSET, entry & COPIED != 0)?);
        for at in (0..CLUSTER).step_by(8) {
            let entry = number(&l2, at);
            if entry & OFFSET != 0 {
                name(entry & OFFSET, entry & COPIED != 0)?;
            }
        }
    }
    for (place, (times, single)) in named {
        let cluster = place as usize / CLUSTER;
        let (block, index) = (cluster / (CLUSTER / 2), cluster % (CLUSTER / 2));
        let block = blocks.get(block).and_then(Option::as_ref);
        let count = block.map_or(0, |block| {
            u16::from_be_bytes([block[index * 2], block[index * 2 + 1]])
        });
        if times > u64::from(count) || (single && count != 1) {
            return Err(format!(
                "{place:#x} is named {times} times, and counted {count} times"
            ));
        }
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize),
    Discard(usize, usize),
    Zero(usize, usize, bool),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let at = || 0..BLOCKS;
    let len = || prop_oneof![4 => 1..4_usize, 1 => 1..100_usize];
    prop_oneof![
        6 => (at(), len()).prop_map(|(at, len)| Step::Write(at, len)),
        2 => (at(), len()).prop_map(|(at, len)| Step::Discard(at, len)),
        1 => (at(), len(), any::<bool>()).prop_map(|(at, len, unmap)| Step::Zero(at, len, unmap)),
        2 => Just(Step::Flush),
    ]
}

/// What a block may have in it after a crash. A byte stands for all of them.
type Allowed = Vec<Vec<u8>>;

/// A guest at its disk, and what it may find there after a crash at each point of the file's story.
struct Guest {
    image: Qcow2Image<Recorded>,
    log: Log,
    now: Vec<u8>,
    allowed: Allowed,
    /// Where in the story it may be so from.
    points: Vec<(usize, Allowed)>,
}

impl Guest {
    fn take(&mut self, step: &Step, value: u8) {
        let place = |at: usize| (at * BLOCK) as u64;
        let range = |at: usize, len: usize| at..(at + len).min(BLOCKS);
        match *step {
            Step::Write(at, len) => {
                let range = range(at, len);
                let bytes = vec![value; range.len() * BLOCK];
                self.allow(range, value);
                self.with(&bytes, |image, data| image.write(data, place(at)));
            }
            Step::Discard(at, len) => {
                let range = range(at, len);
                let size = place(range.len());
                self.allow(range, 0);
                self.image.discard(place(at), size).unwrap();
            }
            Step::Zero(at, len, unmap) => {
                let range = range(at, len);
                let size = place(range.len());
                self.allow(range, 0);
                self.image.zero(place(at), size, unmap).unwrap();
            }
            Step::Flush => {
                self.image.flush().unwrap();
                self.allowed = self.now.iter().map(|now| vec![*now]).collect();
                self.point();
            }
        }
    }

    /// From now on the blocks may have `value` in them, as well as what they may have had.
    fn allow(&mut self, blocks: std::ops::Range<usize>, value: u8) {
        for block in blocks {
            self.now[block] = value;
            self.allowed[block].push(value);
        }
        self.point();
    }

    fn point(&mut self) {
        let at = self.log.lock().unwrap().len();
        self.points.push((at, self.allowed.clone()));
    }

    fn with(
        &self,
        bytes: &[u8],
        call: impl FnOnce(&Qcow2Image<Recorded>, &Segments<'_>) -> io::Result<()>,
    ) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut data = Segments::default();
        data.push(memory.get_slice(GuestAddress(0), bytes.len()).unwrap());
        data.clone().write(bytes);
        call(&self.image, &data).unwrap();
    }
}

fn file(path: &Path) -> File {
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false);
    let file = file.open(path).unwrap();
    let options = StorageOpenOptions::new().filename(path).write(true);
    File::from_open_file(file, options).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whatever_a_crash_leaves_unwritten_the_image_is_whole_and_has_what_was_flushed(
        steps in vec(step(), 1..60),
        crashes in vec((any::<prop::sample::Index>(), any::<u64>()), 24),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        Qcow2::<File>::create_builder(file(&path))
            .size((BLOCKS * BLOCK) as u64)
            .cluster_size(CLUSTER)
            .create()
            .unwrap();
        let before = std::fs::read(&path).unwrap();
        let log = Log::default();
        let recorded = Recorded { file: file(&path), log: Arc::clone(&log) };
        let last = Arc::clone(&log);
        let make_last = Box::new(move || {
            last.lock().unwrap().push(Op::Last);
            Ok(())
        });
        let (image, order) = open_image(recorded, make_last, true).unwrap();
        let mut guest = Guest {
            image: Qcow2Image::new(FormatAccess::new(image), order),
            log: Arc::clone(&log),
            now: vec![0; BLOCKS],
            allowed: vec![vec![0]; BLOCKS],
            points: vec![(0, vec![vec![0]; BLOCKS])],
        };
        for (step, value) in steps.iter().zip((1..=u8::MAX).cycle()) {
            guest.take(step, value);
        }
        let points = std::mem::take(&mut guest.points);
        drop(guest);
        let log = log.lock().unwrap().clone();
        for (at, seed) in crashes {
            let crash = at.index(log.len() + 1);
            let durable = log[..crash].iter().rposition(|op| matches!(op, Op::Last)).unwrap_or(0);
            let mut bytes = before.clone();
            for op in &log[..durable] {
                apply(&mut bytes, op, || true);
            }
            let mut chance = TestRng::from_seed(RngAlgorithm::XorShift, &[seed.to_le_bytes(); 2].concat());
            for op in &log[durable..crash] {
                apply(&mut bytes, op, || chance.next_u32() & 1 == 0);
            }
            if let Err(what) = check(&bytes) {
                prop_assert!(false, "crash at {crash} of {}: {what}", log.len());
            }
            std::fs::write(&path, &bytes).unwrap();
            let found = Qcow2::<File>::builder(file(&path)).backing(None).data_file(None);
            let found = FormatAccess::new(found.open(DenyImplicitOpenGate::default()).unwrap());
            // What was flushed by then, and what was written since, or is being written.
            let allowed = points.iter().rev().find(|(point, _)| *point <= crash).map(|(_, allowed)| allowed).unwrap();
            let mut byte = [0; BLOCK];
            for (block, allowed) in allowed.iter().enumerate() {
                found.read(byte.as_mut_slice(), (block * BLOCK) as u64).unwrap();
                let whole = byte.chunks(SECTOR).all(|half| half.iter().all(|byte| *byte == half[0]) && allowed.contains(&half[0]));
                prop_assert!(whole, "crash at {crash} of {}: block {block} has {:?}, and may have {allowed:?}", log.len(), &byte[..8]);
            }
        }
    }
}
