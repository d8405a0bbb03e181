//! How much of the process's memory is Busway's own.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// The proportional set size of this process in bytes, less that of the mappings that hold guest
/// memory: each range is from the first to beyond the last address of one, as `mmap` made it. (The
/// kernel merges neighbours that are alike, so a mapping that only touches a range is the guest's.)
///
/// The kernel walks the page tables of all RAM for this, which is milliseconds for a guest of many
/// gigabytes: ask after the guest has started, and not on a thread that it waits for.
///
/// # Errors
///
/// Those of reading `/proc/self/smaps`.
pub fn own_memory(guest: &[Range<usize>]) -> io::Result<u64> {
    sum(BufReader::new(File::open("/proc/self/smaps")?), guest)
}

fn sum(smaps: impl BufRead, guest: &[Range<usize>]) -> io::Result<u64> {
    let mut total = 0_u64;
    let mut counts = true;
    for line in smaps.lines() {
        let line = line?;
        if let Some(mapping) = mapping(&line) {
            counts = !guest
                .iter()
                .any(|guest| guest.start < mapping.end && mapping.start < guest.end);
        } else if let Some(kibibytes) = line.strip_prefix("Pss:")
            && counts
        {
            let kibibytes: u64 = kibibytes
                .trim()
                .strip_suffix("kB")
                .and_then(|number| number.trim().parse().ok())
                .unwrap_or(0);
            total = total.saturating_add(kibibytes.saturating_mul(1024));
        }
    }
    Ok(total)
}

/// The range in a mapping's first line: `7f00-7f80 rw-p 00000000 00:00 0  [heap]`.
fn mapping(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    let hex = |digits| usize::from_str_radix(digits, 16).ok();
    Some(hex(start)?..hex(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
1000-3000 r-xp 00000000 fe:01 7 /usr/bin/busway
Rss:                   8 kB
Pss:                   6 kB
Pss_Dirty:             2 kB
10000-20000 rw-s 00000000 00:01 9 /memfd:ram (deleted)
Pss:                  64 kB
20000-30000 rw-p 00000000 00:00 0
Pss:                   4 kB
VmFlags: rd wr
";

    #[test]
    fn guest_memory_is_left_out() {
        let whole = 0x10000..0x20000;
        assert_eq!(sum(SMAPS.as_bytes(), &[]).unwrap(), 74 * 1024);
        assert_eq!(sum(SMAPS.as_bytes(), &[whole]).unwrap(), 10 * 1024);
    }

    #[test]
    fn this_process_has_some() {
        assert!(own_memory(&[]).unwrap() > 0);
    }
}
