//! What was needed to start is given back: most of this program is, and with its code the memory that Busway takes.
//!
//! The kernel maps sixteen pages of a program around each that is touched (`fault_around_bytes`), so that after the
//! start almost all of its code is. A guest that runs needs a small part of it: the pages are unmapped, and those that
//! are touched come again from the page cache, by a fault each.

use std::ffi::c_void;
use std::ops::Range;

use busway_pci::PAGE_SIZE;
use rustix::mm::{Advice, madvise};

/// Unmaps the pages of this program's code and constants, and gives back what the heap has free.
pub(super) fn forget_the_start() {
    for range in constant_parts() {
        let start = range.start as *mut c_void;
        // SAFETY: the range is whole pages of this program's file, mapped privately and not to be written, so that
        // each page has what the file has, and comes again from there when it is touched next.
        if let Err(error) = unsafe { madvise(start, range.len(), Advice::LinuxDontNeed) } {
            log::debug!("madvise of the program's own {range:x?}: {error}");
        }
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes any count, and touches nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
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
    use std::fs;

    use super::*;

    /// Kibibytes of a part that are resident, and of those the ones that are the file's no more, by smaps. proc_pid_smaps(5)
    fn resident(part: &Range<usize>) -> (u64, u64) {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &&str| {
            let bounds = line
                .split_once(' ')
                .and_then(|(range, _)| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            let (start, end) = bounds.map_or((None, None), |(a, b)| (number(a), number(b)));
            start.is_some_and(|start| start <= part.start)
                && end.is_some_and(|end| end > part.start)
        };
        let lines = smaps.lines().skip_while(|line| !holds(line));
        let of = |key: &str| {
            let line = lines.clone().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (of("Rss:"), of("Anonymous:"))
    }

    #[test]
    fn after_a_start_the_code_is_mapped_that_is_used_and_the_program_goes_on() {
        let parts = constant_parts();
        let own = forget_the_start as fn() as usize;
        let code = parts.iter().find(|part| part.contains(&own)).unwrap();
        let touch = |at: usize| {
            // SAFETY: the pages are mapped, and may be read.
            unsafe { *(at as *const u8) }
        };
        let sum = || {
            code.clone()
                .step_by(4096)
                .map(|at| u64::from(touch(at)))
                .sum::<u64>()
        };
        let before = sum();
        let (all, written) = resident(code);
        assert_eq!(written, 0, "a relocation in code would be lost");
        forget_the_start();
        let (left, _) = resident(code);
        assert!(left < all / 2, "{left} KiB of {all}");
        assert_eq!(sum(), before);
    }
}
