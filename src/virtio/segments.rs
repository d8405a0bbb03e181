//! One direction of a descriptor chain: a list of slices of guest memory, consumed from the front,
//! that system calls read into and write from without a copy.
//!
//! The guest can change these bytes at any time. Whatever is decided upon is copied out first.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};
use zerocopy::{FromBytes, IntoBytes};

use crate::memory::RamMap;

/// Most slices that one system call takes: `UIO_MAXIOV` in linux/uio.h. A chain is held to it, so
/// that a request is one call.
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// Most bytes of one read or write of a file, so that whoever waits for it waits no longer than for
/// these; more than any driver asks for at once.
pub(crate) const MAX_TRANSFER: usize = 8 << 20;

/// Slices of guest memory, in the order of their chain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Segments<'m> {
    slices: Vec<VolatileSlice<'m>>,
    /// How many of `slices` are consumed.
    first: usize,
    len: usize,
}

impl<'m> Segments<'m> {
    /// Adds a slice at the end; says whether there was room.
    pub(crate) fn push(&mut self, slice: VolatileSlice<'m>) -> bool {
        if slice.is_empty() {
            return true;
        }
        let Some(len) = self.len.checked_add(slice.len()) else {
            return false;
        };
        if self.slices.len() >= MAX_SEGMENTS {
            return false;
        }
        self.len = len;
        self.slices.push(slice);
        true
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn rest(&self) -> &[VolatileSlice<'m>] {
        self.slices.get(self.first..).unwrap_or_default()
    }

    /// The slices that are left.
    pub(crate) fn slices(&self) -> &[VolatileSlice<'m>] {
        self.rest()
    }

    /// Drops `count` bytes from the front, or all there are.
    pub(crate) fn advance(&mut self, count: usize) {
        let mut left = count;
        while left > 0 {
            let Some(slice) = self.slices.get_mut(self.first) else {
                break;
            };
            match slice.offset(left) {
                Ok(after) if !after.is_empty() => {
                    *slice = after;
                    break;
                }
                _ => {
                    left = left.saturating_sub(slice.len());
                    self.first += 1;
                }
            }
        }
        self.len = self.len.saturating_sub(count);
    }

    /// Takes the first `count` bytes, or all there are, off the front.
    pub(crate) fn take_front(&mut self, count: usize) -> Segments<'m> {
        let mut front = Segments::default();
        for slice in self.rest() {
            let want = count.saturating_sub(front.len);
            if want == 0 {
                break;
            }
            let part = slice.subslice(0, want.min(slice.len())).unwrap_or(*slice);
            front.push(part);
        }
        self.advance(front.len);
        front
    }

    /// Copies out of the guest and consumes; the number of bytes is the shorter of both sides'.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.rest() {
            match buffer.get_mut(done..) {
                Some(room) if !room.is_empty() => done += slice.copy_to(room),
                _ => break,
            }
        }
        self.advance(done);
        done
    }

    /// Copies a value out of the guest and consumes its bytes; nothing where there are fewer.
    pub(crate) fn take<T: FromBytes + IntoBytes>(&mut self) -> Option<T> {
        let mut value = T::new_zeroed();
        (self.read(value.as_mut_bytes()) == size_of::<T>()).then_some(value)
    }

    /// Copies into the guest and consumes; the number of bytes is the shorter of both sides'.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.rest() {
            match bytes.get(done..) {
                Some(left) if !left.is_empty() => {
                    let count = left.len().min(slice.len());
                    slice.copy_from(left.get(..count).unwrap_or_default());
                    done += count;
                }
                _ => break,
            }
        }
        self.advance(done);
        done
    }

    /// Whether each slice starts and ends on a multiple of `alignment`, a power of two.
    pub(crate) fn aligned(&self, alignment: usize) -> bool {
        let mask = alignment.wrapping_sub(1);
        self.rest()
            .iter()
            .all(|slice| (slice.ptr_guard().as_ptr() as usize | slice.len()) & mask == 0)
    }

    /// `preadv`: from `file` at `offset` into the guest, at most [`MAX_TRANSFER`] bytes. Consumes
    /// nothing.
    pub(crate) fn read_from(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let iov = self.iovecs(MAX_TRANSFER);
        let offset = file_offset(offset)?;
        // SAFETY: each entry of `iov` is a live slice of guest memory, whose mapping `'m` keeps; the
        // guest's own use of it is outside of Rust's aliasing, for no reference to it exists.
        let result = unsafe { libc::preadv64(file.as_raw_fd(), iov.as_ptr(), count(&iov), offset) };
        size(result)
    }

    /// `pwritev`: from the guest to `file` at `offset`, at most [`MAX_TRANSFER`] bytes. Consumes
    /// nothing.
    pub(crate) fn write_to(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let iov = self.iovecs(MAX_TRANSFER);
        let offset = file_offset(offset)?;
        // SAFETY: as in `read_from`; the kernel only reads the slices.
        let result =
            unsafe { libc::pwritev64(file.as_raw_fd(), iov.as_ptr(), count(&iov), offset) };
        size(result)
    }

    /// `readv`: from a stream into the guest. Consumes nothing.
    pub(crate) fn receive(&self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        let iov = self.iovecs(usize::MAX);
        // SAFETY: as in `read_from`.
        size(unsafe { libc::readv(stream.as_raw_fd(), iov.as_ptr(), count(&iov)) })
    }

    /// `writev`: from the guest to a stream. Consumes nothing.
    pub(crate) fn send(&self, stream: BorrowedFd<'_>) -> io::Result<usize> {
        self.send_behind(&[], stream)
    }

    /// `writev`: `head`, and behind it what is here, from the guest to a stream, as one. Consumes nothing.
    pub(crate) fn send_behind(&self, head: &[u8], stream: BorrowedFd<'_>) -> io::Result<usize> {
        let first = libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        };
        let mut iov = Vec::with_capacity(self.rest().len() + 1);
        if !head.is_empty() {
            iov.push(first);
        }
        self.add_iovecs(usize::MAX, &mut iov);
        // SAFETY: as in `write_to`; `head` is alive as well, and only read.
        size(unsafe { libc::writev(stream.as_raw_fd(), iov.as_ptr(), count(&iov)) })
    }

    /// The first bytes, as many as `most` of them.
    fn iovecs(&self, most: usize) -> Vec<libc::iovec> {
        let mut iov = Vec::with_capacity(self.rest().len());
        self.add_iovecs(most, &mut iov);
        iov
    }

    fn add_iovecs(&self, most: usize, iov: &mut Vec<libc::iovec>) {
        let mut left = most;
        let entry = |slice: &VolatileSlice<'m>| {
            let len = slice.len().min(left);
            left -= len;
            (len > 0).then(|| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: len,
            })
        };
        iov.extend(self.rest().iter().map_while(entry));
    }
}

/// Slices of guest memory that outlive the look at the ring, for the kernel or another thread to read and
/// write meanwhile: the mapping that they lie in stays for as long as they do, whatever becomes of the
/// guest's RAM.
pub(crate) struct Held {
    entries: Vec<libc::iovec>,
    /// How many of `entries` are consumed.
    first: usize,
    len: usize,
    /// The first entries, where all of them are more than one call takes.
    window: Vec<libc::iovec>,
    _memory: Arc<RamMap>,
}

// SAFETY: the pointers are into a mapping that `_memory` keeps and that any thread may use; the guest uses
// it at any time as well.
unsafe impl Send for Held {}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("len", &self.len).finish()
    }
}

impl Held {
    /// Keeps `segments` of `memory`; `None` where one of them lies outside of it.
    pub(crate) fn new(memory: &Arc<RamMap>, segments: &Segments<'_>) -> Option<Self> {
        let entries = segments.iovecs(usize::MAX);
        let inside = |entry: &libc::iovec| {
            memory.iter().any(|region| {
                let start = region.as_ptr() as usize;
                let end = start.saturating_add(usize::try_from(region.len()).unwrap_or(0));
                let at = entry.iov_base as usize;
                at >= start && at.checked_add(entry.iov_len).is_some_and(|to| to <= end)
            })
        };
        entries.iter().all(inside).then(|| Self {
            len: segments.len(),
            entries,
            first: 0,
            window: Vec::new(),
            _memory: Arc::clone(memory),
        })
    }

    /// Bytes left.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// What is left, to be read and written here.
    pub(crate) fn segments(&self) -> Segments<'_> {
        let rest = self.entries.get(self.first..).unwrap_or_default();
        // SAFETY: each entry is a part of the mapping that `_memory` keeps, as `new` has seen, and `self`
        // is borrowed for as long as the slices live.
        let slice = |entry: &libc::iovec| unsafe {
            VolatileSlice::new(entry.iov_base.cast(), entry.iov_len)
        };
        Segments {
            slices: rest.iter().map(slice).collect(),
            first: 0,
            len: self.len,
        }
    }

    /// Drops `count` bytes from the front, or all there are.
    pub(crate) fn advance(&mut self, count: usize) {
        let mut left = count;
        while let Some(entry) = self.entries.get_mut(self.first)
            && left > 0
        {
            if left < entry.iov_len {
                entry.iov_base = entry.iov_base.wrapping_byte_add(left);
                entry.iov_len -= left;
                break;
            }
            left -= entry.iov_len;
            self.first += 1;
        }
        self.len = self.len.saturating_sub(count);
    }

    /// The first bytes, [`MAX_TRANSFER`] at most, as the kernel takes them. They stay where they are until
    /// the next call of a function that changes what is held.
    pub(crate) fn window(&mut self) -> &[libc::iovec] {
        let rest = self.entries.get(self.first..).unwrap_or_default();
        if self.len <= MAX_TRANSFER {
            return rest;
        }
        let mut left = MAX_TRANSFER;
        self.window.clear();
        for entry in rest {
            let len = entry.iov_len.min(left);
            if len == 0 {
                break;
            }
            left -= len;
            self.window.push(libc::iovec {
                iov_base: entry.iov_base,
                iov_len: len,
            });
        }
        &self.window
    }

    /// Whether each slice starts and ends on a multiple of `alignment`, a power of two.
    pub(crate) fn aligned(&self, alignment: usize) -> bool {
        self.segments().aligned(alignment)
    }
}

fn count(iov: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX)
}

fn file_offset(offset: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn size(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn memory() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    fn segments<'m>(memory: &'m GuestMemoryMmap<()>, parts: &[(u64, usize)]) -> Segments<'m> {
        let mut segments = Segments::default();
        for &(address, len) in parts {
            assert!(segments.push(memory.get_slice(GuestAddress(address), len).unwrap()));
        }
        segments
    }

    #[test]
    fn what_is_written_across_slices_is_read_back() {
        let memory = memory();
        let parts = [(0, 3), (0x100, 5), (0x200, 2)];
        let mut out = segments(&memory, &parts);
        assert_eq!(out.write(b"abcdefghijkl"), 10);
        assert!(out.is_empty());
        let mut back = segments(&memory, &parts);
        let mut head = [0; 4];
        assert_eq!(back.read(&mut head), 4);
        let mut tail = [0; 9];
        assert_eq!(back.read(&mut tail), 6);
        assert_eq!((&head, &tail[..6]), (b"abcd", &b"efghij"[..]));
    }

    #[test]
    fn slices_beyond_what_a_system_call_takes_are_refused() {
        let memory = memory();
        let mut segments = Segments::default();
        let slice = memory.get_slice(GuestAddress(0), 1).unwrap();
        for _ in 0..MAX_SEGMENTS {
            assert!(segments.push(slice));
        }
        assert!(!segments.push(slice));
        assert_eq!(segments.len(), MAX_SEGMENTS);
    }

    #[test]
    fn one_system_call_takes_no_more_than_it_is_allowed() {
        let memory = memory();
        let segments = segments(&memory, &[(0, 3), (0x100, 5), (0x200, 2)]);
        let lens = |most| -> Vec<usize> {
            let entries = segments.iovecs(most);
            entries.iter().map(|entry| entry.iov_len).collect()
        };
        assert_eq!(lens(usize::MAX), [3, 5, 2]);
        assert_eq!(lens(7), [3, 4]);
        assert_eq!(lens(8), [3, 5]);
    }

    proptest! {
        #[test]
        fn splitting_keeps_every_byte_and_its_order(
            lens in proptest::collection::vec(0_usize..64, 0..16),
            cut in 0_usize..1100,
        ) {
            let memory = memory();
            let parts: Vec<_> = lens.iter().enumerate().map(|(i, &len)| (i as u64 * 64, len)).collect();
            let total: usize = lens.iter().sum();
            let bytes: Vec<u8> = (0..total).map(|i| i as u8).collect();
            segments(&memory, &parts).write(&bytes);
            let mut rest = segments(&memory, &parts);
            let mut front = rest.take_front(cut);
            prop_assert_eq!(front.len(), cut.min(total));
            prop_assert_eq!(front.len() + rest.len(), total);
            let mut joined = vec![0; total];
            let split = front.read(&mut joined);
            rest.read(&mut joined[split..]);
            prop_assert_eq!(joined, bytes);
        }
    }
}
