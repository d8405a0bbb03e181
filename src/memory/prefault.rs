//! Touching all of RAM before the guest starts, on several threads.
//!
//! The IOMMU pins every page of a guest with an assigned device, and pinning cold memory makes the
//! kernel find and clear the pages one by one inside the map call. Populating them first does that
//! work in parallel.

use std::ffi::c_void;
use std::io;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::GuestMemoryRegion;

use super::Ram;
use super::ram::Stretch;
use crate::sandbox::{self, Kind};

/// Bytes populated by one call: enough to make huge pages of, little enough to share out evenly and
/// to show progress by.
const CHUNK: usize = 64 << 20;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);
/// More threads than these wait for each other in the kernel's page allocator.
const MOST_THREADS: usize = 16;

/// RAM could not be populated.
#[derive(Debug, thiserror::Error)]
#[error(
    "populating guest RAM at {guest:#x} failed: {source}; the host or its memory cgroup has no \
     more memory to give: ask for less with --memory size="
)]
pub struct PrefaultError {
    guest: u64,
    source: io::Error,
}

/// A piece of RAM to populate.
struct Chunk {
    guest: u64,
    host: usize,
    size: usize,
}

impl Ram {
    /// Bytes of RAM that are to be populated, where `unsaid` is what becomes of zones that do not say it.
    #[must_use]
    pub fn to_prefault(&self, unsaid: bool) -> u64 {
        let stretches = self.stretches().iter();
        let stretches = stretches.filter(|one| one.backing.prefault.unwrap_or(unsaid));
        stretches.map(|one| one.memory.len()).sum()
    }

    /// Populates RAM, but for zones that are not to be; `progress` is told, a few times a second and at the end, how many
    /// bytes are done, and can have it broken off. `unsaid`: so are zones that do not say it.
    ///
    /// # Errors
    /// [`PrefaultError`], of the first chunk that failed.
    pub fn prefault(
        &self,
        unsaid: bool,
        mut progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), PrefaultError> {
        let chunks = self.chunks(unsaid);
        let threads = thread::available_parallelism()
            .map_or(1, NonZero::get)
            .min(MOST_THREADS)
            .min(chunks.len());
        let (next, done, stop) = (
            AtomicUsize::new(0),
            AtomicU64::new(0),
            AtomicBool::new(false),
        );
        let (finished, result) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..threads {
                let (chunks, next, done, stop) = (&chunks, &next, &done, &stop);
                let finished = finished.clone();
                scope.spawn(move || {
                    sandbox::enter(Kind::Populate);
                    let mut outcome = Ok(());
                    while !stop.load(Ordering::Relaxed)
                        && let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        if let Err(source) = populate(chunk) {
                            stop.store(true, Ordering::Relaxed);
                            outcome = Err(PrefaultError {
                                guest: chunk.guest,
                                source,
                            });
                            break;
                        }
                        done.fetch_add(chunk.size as u64, Ordering::Relaxed);
                    }
                    // The receiver outlives the scope.
                    let _ = finished.send(outcome);
                });
            }
            drop(finished);
            let mut outcome = Ok(());
            loop {
                match result.recv_timeout(TICK) {
                    Ok(one) => outcome = outcome.and(one),
                    Err(RecvTimeoutError::Timeout) => {
                        if progress(done.load(Ordering::Relaxed)).is_break() {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            // It is over either way.
            let _ = progress(done.load(Ordering::Relaxed));
            outcome
        })
    }

    fn chunks(&self, unsaid: bool) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        for Stretch {
            memory: region,
            backing,
            ..
        } in self.stretches()
        {
            if !backing.prefault.unwrap_or(unsaid) {
                continue;
            }
            // A chunk of huge pages is made of whole ones.
            let page = backing
                .huge_page
                .and_then(|page| usize::try_from(page).ok());
            let size = page.map_or(CHUNK, |page| page.max(CHUNK));
            let (base, length) = (region.as_ptr() as usize, region.size());
            chunks.extend((0..length).step_by(size).map(|offset| Chunk {
                guest: region.start_addr().0 + offset as u64,
                host: base + offset,
                size: size.min(length - offset),
            }));
        }
        chunks
    }
}

/// Populates `size` bytes at `host`, which are a part of the guest's RAM that nobody uses yet; `guest` is where it lies
/// there.
///
/// # Errors
/// madvise(2), `MADV_POPULATE_WRITE`: a part may be populated.
pub(super) fn populate_range(guest: u64, host: usize, size: usize) -> io::Result<()> {
    populate(&Chunk { guest, host, size })
}

fn populate(chunk: &Chunk) -> io::Result<()> {
    // SAFETY: the chunk lies in a mapping of `Ram`, which the caller borrows. Populating for
    // writing changes no byte.
    let populated = unsafe {
        let start = chunk.host as *mut c_void;
        madvise(start, chunk.size, Advice::LinuxPopulateWrite)
    };
    match populated {
        // Linux before 5.14 has no MADV_POPULATE_WRITE.
        Err(Errno::INVAL) => {
            touch(chunk);
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Writes a byte of each page, before any guest or device runs.
fn touch(chunk: &Chunk) {
    for offset in (0..chunk.size).step_by(4096) {
        let byte = (chunk.host + offset) as *mut u8;
        // SAFETY: the byte is within a mapping of `Ram` that is readable and writable; nothing else
        // uses the memory yet, and what is written is what was read.
        unsafe { byte.write_volatile(byte.read_volatile()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;

    #[test]
    fn every_page_is_resident_afterwards_and_the_last_progress_is_the_whole() {
        let config = MemoryConfig {
            size: 130 << 20,
            thp: false,
            ..Default::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let mut last = 0;
        assert_eq!(
            (ram.to_prefault(true), ram.to_prefault(false)),
            (config.size, 0)
        );
        ram.prefault(true, |done| {
            last = done;
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(last, config.size);
        for region in ram.stretches().iter().map(|one| &one.memory) {
            let mut resident = vec![0_u8; region.size() / 4096];
            // SAFETY: the range is a mapping, and the vector has a byte for each of its pages.
            let result = unsafe {
                libc::mincore(region.as_ptr().cast(), region.size(), resident.as_mut_ptr())
            };
            assert_eq!(result, 0);
            assert!(resident.iter().all(|page| page & 1 == 1));
        }
    }
}
