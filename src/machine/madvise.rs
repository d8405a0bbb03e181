//! What was needed to start is given back: most of this program is, and with its code the memory that Busway takes.
//!
//! The kernel maps sixteen pages of a program around each that is touched (`fault_around_bytes`), so that after the
//! start almost all of its code is. A guest that runs needs a small part of it: the pages are unmapped, and those that
//! are touched come again from the page cache, by a fault each. The same is done once more when the guest has booted,
//! which configures every device.

use std::ffi::c_void;
use std::ops::Range;
use std::time::{Duration, Instant};

use busway_pci::PAGE_SIZE;
use rustix::mm::{Advice, madvise};

/// By when a guest has most likely booted, after its start. One that has not pays some faults.
const BOOT: Duration = Duration::from_secs(20);

/// What a guest's boot needs, until that is given back.
#[derive(Debug)]
pub(super) struct Boot {
    due: Option<Instant>,
}

impl Boot {
    /// Of a guest that starts now.
    pub(super) fn begins() -> Self {
        Self {
            due: Instant::now().checked_add(BOOT),
        }
    }

    /// When there is something to be given back.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Gives it back, if it is time.
    pub(super) fn on_time(&mut self, now: Instant) {
        if self.due.take_if(|due| *due <= now).is_some() {
            forget_the_start();
        }
    }
}

/// Unmaps the pages of this program's code and constants, and gives back what the heap has free.
pub(super) fn forget_the_start() {
    for part in constant_parts() {
        // SAFETY: these are whole pages of this program's file, mapped privately and not to be written.
        unsafe { unmap(&part) };
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes any count, and touches nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps pages until they are touched next.
///
/// # Safety
/// They are mapped from a file, privately, and nothing has written to them: each page has what the file has, and comes
/// again from there.
unsafe fn unmap(pages: &Range<usize>) {
    let start = pages.start as *mut c_void;
    // SAFETY: what is there again when it is touched is what was there.
    if let Err(error) = unsafe { madvise(start, pages.len(), Advice::LinuxDontNeed) } {
        log::debug!("madvise of the program's own {pages:x?}: {error}");
    }
}

/// The addresses of this program that are mapped from its file and cannot be written, in whole pages.
///
/// What is written by relocations, and cannot be after them (RELRO), is a part of a segment that can be written.
/// System V ABI, "Program Header"; `dl_iterate_phdr(3)`
fn constant_parts() -> Vec<Range<usize>> {
    unsafe extern "C" fn note(
        info: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        parts: *mut c_void,
    ) -> libc::c_int {
        // SAFETY: the C library calls this with an object's description, and with the pointer that it was given, to
        // a list that nobody else has meanwhile.
        let (info, parts) = unsafe { (&*info, &mut *parts.cast::<Vec<Range<usize>>>()) };
        // SAFETY: it has so many headers there, for as long as the object is loaded.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
        let constant = |header: &&libc::Elf64_Phdr| {
            header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
        };
        parts.extend(headers.iter().filter(constant).filter_map(|header| {
            let start = usize::try_from(info.dlpi_addr.checked_add(header.p_vaddr)?).ok()?;
            let end = start.checked_add(usize::try_from(header.p_memsz).ok()?)?;
            Some(start..end)
        }));
        // The program itself is the first, and no other is wanted.
        1
    }
    let mut parts: Vec<Range<usize>> = Vec::new();
    // SAFETY: `note` takes the list, which lives until the call returns.
    unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut parts).cast()) };
    let page = PAGE_SIZE as usize;
    let whole = |part: Range<usize>| part.start.next_multiple_of(page)..part.end / page * page;
    let whole = parts.into_iter().map(whole);
    whole.filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::atomic::{AtomicU32, Ordering};

    use rustix::mm::{MapFlags, ProtFlags, mmap};

    use super::*;

    /// Something that is written to.
    static WRITTEN: AtomicU32 = AtomicU32::new(1);

    /// A number of kibibytes that smaps has for the mapping that starts at an address. proc_pid_smaps(5)
    fn kibibytes(start: usize, key: &str) -> u64 {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let begins = format!("{start:x}-");
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&begins));
        let line = lines.find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_unmapped_is_there_again_when_it_is_touched() {
        let program = File::open("/proc/self/exe").unwrap();
        let length = 64 * PAGE_SIZE as usize;
        let (read, private) = (ProtFlags::READ, MapFlags::PRIVATE);
        // SAFETY: a new mapping, which stays.
        let start = unsafe { mmap(std::ptr::null_mut(), length, read, private, &program, 0) };
        let start = start.unwrap();
        let sum = || {
            // SAFETY: so many bytes are mapped, and nobody writes to them.
            let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), length) };
            bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>()
        };
        let before = sum();
        assert_eq!(kibibytes(start as usize, "Rss:"), length as u64 / 1024);
        // SAFETY: they are a file's, and not to be written.
        unsafe { unmap(&(start as usize..start as usize + length)) };
        assert_eq!(kibibytes(start as usize, "Rss:"), 0);
        assert_eq!(sum(), before);
    }

    #[test]
    fn code_and_constants_are_unmapped_and_nothing_that_is_written_to() {
        let parts = constant_parts();
        let has = |at: usize| parts.iter().any(|part| part.contains(&at));
        assert!(has(forget_the_start as fn() as usize));
        assert!(!has(WRITTEN.as_ptr() as usize));
        for part in &parts {
            assert!(part.start.is_multiple_of(4096) && part.end.is_multiple_of(4096));
        }
        forget_the_start();
        WRITTEN.fetch_add(1, Ordering::Relaxed);
        assert_eq!(WRITTEN.load(Ordering::Relaxed), 2);
    }
    #[test]
    fn what_a_boot_needs_is_given_back_once_when_its_time_is_over() {
        let mut boot = Boot::begins();
        let due = boot.deadline().unwrap();
        boot.on_time(due - Duration::from_millis(1));
        assert_eq!(boot.deadline(), Some(due));
        boot.on_time(due);
        assert_eq!(boot.deadline(), None);
        boot.on_time(due);
    }
}
