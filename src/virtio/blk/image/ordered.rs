//! The file of a qcow2 image, written in an order that leaves the image whole wherever the host crashes.
//!
//! A host that crashes has of what was written since the last fdatasync(2) whatever it happened to write back. `imago` writes
//! tables after what they name, and asks for no fdatasync between. So its writes come through here:
//!
//! - What an L2 table names, data and reference counts, is made last before the table is written; and where clusters are
//!   given up, their L2 table before their counts.
//! - An entry of the L1 table, which makes a new L2 table part of the image, is held back until all that was written before
//!   it has been flushed; one of the refcount table until the counts beside it have been written.
//!
//! What was not flushed can be lost, and clusters of it leak. Nothing else can come of it.
//! QEMU's docs/interop/qcow2.rst has the tables.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};

/// Bytes of a header that are looked at. All versions have them.
const HEADER: usize = 72;
/// Most entries of an L1 table: 32 MiB of them, QEMU's limit and imago's.
const MOST_L1: u32 = 4 << 20;
/// Where the L2 table is, of an entry of the L1 table.
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Nothing else names that table.
const COPIED: u64 = 1 << 63;

/// Makes last what has been written to a file.
pub(super) type MakeLast = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What an image's writes have in common, those of its tables and those of its data.
pub(super) struct Order<S> {
    file: Arc<S>,
    make_last: MakeLast,
    /// Something has been written that an L2 table may name, and has not been made last.
    named: AtomicBool,
    tables: Mutex<Tables>,
}

/// Writes of tables that have not been made, by where they belong.
type Held = BTreeMap<u64, IoBuffer>;

#[derive(Default)]
struct Tables {
    l1: Range<u64>,
    /// What is in it, with what was held back.
    l1_entries: Vec<u64>,
    /// Bytes of the guest's disk that an L2 table is for, as a power of two.
    l2_bits: u32,
    /// The refcount table.
    counts: Range<u64>,
    /// Where the L2 tables are that the L1 table names.
    l2: HashSet<u64>,
    /// One of them has been written, and not made last.
    l2_written: bool,
    /// Whether entries can be held back: others of the file's blocks are not written with them.
    holds: bool,
    held_l1: Held,
    held_counts: Held,
    /// Nothing is written any more.
    ended: bool,
}

/// A file as `imago` uses it: for an image's tables, or for its data.
#[derive(Clone)]
pub(super) struct Part<S> {
    order: Arc<Order<S>>,
    is_tables: bool,
}

/// The order of the writes to `file`, and the ways to it: for its tables, and for its data.
pub(super) fn parts<S: Storage>(file: S, make_last: MakeLast) -> (Arc<Order<S>>, [Part<S>; 2]) {
    let order = Arc::new(Order {
        file: Arc::new(file),
        make_last,
        named: AtomicBool::new(false),
        tables: Mutex::default(),
    });
    let parts = [true, false].map(|is_tables| Part {
        order: Arc::clone(&order),
        is_tables,
    });
    (order, parts)
}

impl<S: Storage> Order<S> {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out where the tables are.
    ///
    /// # Errors
    /// The host's, and of a table that is too large.
    pub(super) fn look(&self) -> io::Result<()> {
        self.look_for(&mut self.tables())
    }

    fn look_for(&self, tables: &mut Tables) -> io::Result<()> {
        let mut header = [0; HEADER];
        self.file.read(header.as_mut_slice(), 0)?;
        let number = |at: usize| {
            let bytes = header.get(at..).and_then(<[u8]>::first_chunk);
            bytes.copied().map_or(0, u64::from_be_bytes)
        };
        let (cluster_bits, entries) = ((number(16) as u32).min(63), number(32) as u32);
        if entries > MOST_L1 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("an L1 table of {entries} entries; {MOST_L1} are the most"),
            ));
        }
        let range = |at: u64, bytes: u64| at..at.saturating_add(bytes);
        let clusters = number(56) >> 32;
        tables.l1 = range(number(40), u64::from(entries) * 8);
        tables.counts = range(number(48), clusters.saturating_mul(1 << cluster_bits));
        // Each cluster of entries names as many clusters.
        tables.l2_bits = (cluster_bits * 2).saturating_sub(3).min(63);
        tables.holds = self.file.req_align() as u64 <= 1 << cluster_bits;
        let mut l1 = vec![0; entries as usize * 8];
        self.file.read(l1.as_mut_slice(), tables.l1.start)?;
        tables.l2.clear();
        tables.l1_entries = vec![0; entries as usize];
        tables.learn(0, &l1);
        Ok(())
    }

    /// Makes last what has been written.
    pub(super) fn sync(&self) -> io::Result<()> {
        (self.make_last)()
    }

    /// The same, where something has been written since.
    fn settle(&self, tables: &mut Tables) -> io::Result<()> {
        let named = self.named.swap(false, Ordering::AcqRel);
        if !named && !tables.l2_written {
            return Ok(());
        }
        let result = self.sync();
        if result.is_ok() {
            tables.l2_written = false;
        } else {
            self.wrote();
        }
        result
    }

    fn wrote(&self) {
        self.named.store(true, Ordering::Release);
    }

    /// Writes a piece of a table when it is its turn.
    ///
    /// # Safety
    /// The caller heeds the file's alignments, and keeps off whoever must not write there meanwhile, as of
    /// [`Storage::pure_writev`].
    unsafe fn write_table(&self, data: IoVector<'_>, at: u64) -> io::Result<()> {
        let mut tables = self.tables();
        let tables = &mut *tables;
        let align = self.file.mem_align();
        // SAFETY: the caller's.
        let write = |data| unsafe { self.file.pure_writev(data, at) };
        match tables.place(at, data.len()) {
            _ if tables.ended => return Err(io::Error::other("the image is closed")),
            Place::Header => {
                self.settle(tables)?;
                write(data)?;
                self.wrote();
                // They may have moved, with what was held back of them.
                self.look_for(tables)?;
                tables.held_l1.clear();
                tables.held_counts.clear();
            }
            Place::L1 => {
                let piece = data.try_into_owned(align)?;
                tables.learn(
                    at.saturating_sub(tables.l1.start),
                    piece.as_ref().into_slice(),
                );
                tables.held_l1.insert(at, piece);
            }
            Place::Counts => {
                let piece = data.try_into_owned(align)?;
                tables.held_counts.insert(at, piece);
            }
            Place::L2 => {
                self.release_counts(tables)?;
                if self.named.load(Ordering::Acquire) {
                    self.settle(tables)?;
                }
                tables.l2_written = true;
                write(data)?;
            }
            Place::Other => {
                if tables.l2_written {
                    self.settle(tables)?;
                }
                self.wrote();
                write(data)?;
            }
        }
        Ok(())
    }

    /// Writes the entries of the refcount table that were held back.
    fn release_counts(&self, tables: &mut Tables) -> io::Result<()> {
        let mut held = std::mem::take(&mut tables.held_counts);
        let result = self.release(tables, &mut held);
        put_back(&mut tables.held_counts, held);
        result
    }

    /// Writes what was held back, after all else that was written.
    fn release(&self, tables: &mut Tables, held: &mut Held) -> io::Result<()> {
        if !held.is_empty() {
            self.settle(tables)?;
        }
        while let Some(piece) = held.first_entry() {
            self.wrote();
            let data = IoVector::from(piece.get());
            // SAFETY: it was aligned when it was held back, and is so in its buffer. Nothing else writes to this table.
            unsafe { self.file.pure_writev(data, *piece.key())? };
            piece.remove();
        }
        Ok(())
    }

    /// Has `flush` write all tables, and makes new L2 tables part of the image after that.
    ///
    /// One call at a time: a later one's entries are not to be overwritten by an earlier one's.
    ///
    /// # Errors
    /// The host's, or those of `flush`; what was held back stays so.
    pub(super) fn flush(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Entries that come from now on name what is not flushed here.
        let mut held = std::mem::take(&mut self.tables().held_l1);
        let result = flush();
        let mut tables = self.tables();
        let tables = &mut *tables;
        let result = result.and_then(|()| {
            if !held.is_empty() {
                self.release_counts(tables)?;
            }
            self.release(tables, &mut held)
        });
        put_back(&mut tables.held_l1, held);
        result
    }

    /// Where the part of the guest's disk with byte `at` ends that has its L2 table to itself, and whether it has that
    /// table already and would not have to allocate one.
    pub(super) fn l2_of(&self, at: u64) -> (u64, bool) {
        let tables = self.tables();
        let index = at >> tables.l2_bits;
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| tables.l1_entries.get(index));
        let end = (index + 1)
            .checked_shl(tables.l2_bits)
            .filter(|end| *end > at);
        (
            end.unwrap_or(u64::MAX),
            entry.is_some_and(|entry| entry & COPIED != 0),
        )
    }

    /// Nothing is written from now on.
    pub(super) fn end(&self) {
        self.tables().ended = true;
    }
}

/// Holds pieces back again where no later one has taken their place.
fn put_back(held: &mut Held, pieces: Held) {
    for (at, piece) in pieces {
        held.entry(at).or_insert(piece);
    }
}

/// What a piece of the tables belongs to.
enum Place {
    Header,
    L1,
    Counts,
    /// An L2 table that the image has.
    L2,
    /// Counts, and tables that nothing names yet.
    Other,
}

impl Tables {
    fn place(&self, at: u64, len: u64) -> Place {
        let within = |table: &Range<u64>| at < table.end && at.saturating_add(len) > table.start;
        if at < HEADER as u64 {
            Place::Header
        } else if self.holds && within(&self.l1) {
            Place::L1
        } else if self.holds && within(&self.counts) {
            Place::Counts
        } else if self.l2.contains(&at) {
            Place::L2
        } else {
            Place::Other
        }
    }

    /// Remembers a piece of the L1 table, from byte `at` of it on.
    fn learn(&mut self, at: u64, piece: &[u8]) {
        let (pieces, _rest) = piece.as_chunks();
        let index = usize::try_from(at / 8).unwrap_or(usize::MAX);
        let known = self.l1_entries.iter_mut().skip(index);
        for (known, entry) in known.zip(pieces) {
            *known = u64::from_be_bytes(*entry);
            self.l2.insert(*known & L2_OFFSET);
        }
    }
}

impl<S: Storage> Part<S> {
    /// Has `write` change data, or tables in a way that is not by a piece of one.
    fn change(&self, write: impl FnOnce(&S) -> io::Result<()>) -> io::Result<()> {
        let order = &self.order;
        let mut tables = self.is_tables.then(|| order.tables());
        if let Some(tables) = &mut tables {
            order.settle(tables)?;
        }
        let result = write(&order.file);
        // After the write: what is made last before a table is written must be whole by then. `imago` has a table name
        // it later still.
        order.wrote();
        result
    }
}

impl<S: Storage> Storage for Part<S> {
    fn mem_align(&self) -> usize {
        self.order.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.order.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.order.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.order.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.order.file.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.order.file.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.order.file.get_filename()
    }

    unsafe fn pure_readv(&self, data: IoVectorMut<'_>, at: u64) -> io::Result<()> {
        // SAFETY: the alignments that the caller heeds are this file's.
        unsafe { self.order.file.pure_readv(data, at) }
    }

    unsafe fn pure_writev(&self, data: IoVector<'_>, at: u64) -> io::Result<()> {
        if self.is_tables {
            // SAFETY: the alignments that the caller heeds are this file's, and so are the ranges that it blocks.
            return unsafe { self.order.write_table(data, at) };
        }
        // SAFETY: the same.
        self.change(|file| unsafe { file.pure_writev(data, at) })
    }

    unsafe fn pure_write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        // SAFETY: as for a write.
        self.change(|file| unsafe { file.pure_write_zeroes(at, len) })
    }

    unsafe fn pure_write_allocated_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        // SAFETY: as for a write.
        self.change(|file| unsafe { file.pure_write_allocated_zeroes(at, len) })
    }

    unsafe fn pure_discard(&self, at: u64, len: u64) -> io::Result<()> {
        // SAFETY: as for a write.
        self.change(|file| unsafe { file.pure_discard(at, len) })
    }

    /// What is written is in the kernel's hands: no buffer of this process has any of it.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// For both parts, which are of one file.
    fn sync(&self) -> io::Result<()> {
        if self.is_tables {
            self.order.sync()
        } else {
            Ok(())
        }
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.order.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller knows that nobody needs what is in it.
        unsafe { self.order.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.order.file.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.change(|file| file.resize(size, mode))
    }
}

impl<S: Storage> fmt::Display for Part<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.order.file.fmt(formatter)
    }
}

impl<S: fmt::Debug> fmt::Debug for Part<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tables = self.is_tables;
        write!(
            formatter,
            "Part {{ tables: {tables}, of: {:?} }}",
            self.order
        )
    }
}

impl<S: fmt::Debug> fmt::Debug for Order<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(formatter)
    }
}
