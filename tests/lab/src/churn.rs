//! Writes all over a disk, flushed now and then, whose state at any kill can be told: what was flushed is
//! there, and what came later is there or not.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};

use crate::pattern::{check, fill};

/// Bytes of a write.
const BLOCK: usize = 4096;
/// Writes between two flushes.
const FLUSHED_EACH: u64 = 32;

/// Which block write `number` goes to.
fn block(number: u64, blocks: u64) -> u64 {
    let mixed = number
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(31)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 8) % blocks
}

/// Writes number after number, from `first` on, and has `flushed` hear how many are flushed; for ever.
///
/// # Errors
/// The disk's.
pub fn churn(disk: &File, size: u64, first: u64, mut flushed: impl FnMut(u64)) -> Result<()> {
    let blocks = size / BLOCK as u64;
    let mut buffer = vec![0; BLOCK];
    for number in first.. {
        let at = block(number, blocks) * BLOCK as u64;
        fill(&mut buffer, at, number);
        disk.write_all_at(&buffer, at)?;
        if (number + 1).is_multiple_of(FLUSHED_EACH) {
            disk.sync_data()?;
            flushed(number + 1);
        }
    }
    Ok(())
}

/// Whether a disk to which `flushed` writes were flushed, and perhaps some more written, holds them. Gives
/// how many blocks were looked at.
///
/// # Errors
/// A block holds neither the last write to it that was flushed, nor a later one.
pub fn check_churned(disk: &File, size: u64, flushed: u64) -> Result<u64> {
    let blocks = size / BLOCK as u64;
    // No more than these can have been written since: the next flush was not over.
    let most = flushed + FLUSHED_EACH;
    let mut last = vec![None; usize::try_from(blocks)?];
    let mut later = vec![Vec::new(); last.len()];
    for number in 0..most {
        let place = usize::try_from(block(number, blocks))?;
        if number < flushed {
            last[place] = Some(number);
        } else {
            later[place].push(number);
        }
    }
    let mut buffer = vec![0; BLOCK];
    let mut looked = 0;
    for (place, number) in last.iter().enumerate() {
        let Some(number) = *number else { continue };
        let at = place as u64 * BLOCK as u64;
        disk.read_exact_at(&mut buffer, at)?;
        let holds = |number: u64| check(&buffer, at, number).is_ok();
        ensure!(
            holds(number) || later[place].iter().any(|later| holds(*later)),
            "the block at {at} holds neither write {number} nor a later one: {:?}",
            check(&buffer, at, number)
        );
        looked += 1;
    }
    Ok(looked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_flushed_is_found_and_a_write_that_is_missing_is_noticed() {
        let file = scratch("busway-churn");
        let size = 64 * BLOCK as u64;
        file.set_len(size).unwrap();
        // A stop comes as an error of the disk's.
        let mut flushed = 0;
        let stopping = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            churn(&file, size, 0, |count| {
                flushed = count;
                assert!(count < 320, "enough");
            })
        }));
        assert!(stopping.is_err());
        assert_eq!(flushed, 320);
        assert!(check_churned(&file, size, flushed).unwrap() > 30);
        let place = block(flushed - 1, 64) * BLOCK as u64;
        file.write_all_at(&[0; 512], place).unwrap();
        check_churned(&file, size, flushed).unwrap_err();
    }

    fn scratch(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }
}
