//! A pattern that tells where it was written: every 512-byte sector holds its own number, the seed, and a stream drawn
//! from both, so that a sector that is stale, misplaced or torn is found and named.

use anyhow::{Result, bail};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Fills whole sectors that begin at byte `offset`.
pub fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    for (index, sector) in buffer.chunks_exact_mut(SECTOR).enumerate() {
        let number = offset / SECTOR as u64 + index as u64;
        for (word, bytes) in stream(number, seed).zip(sector.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Whether these sectors, which begin at byte `offset`, are what [`fill`] makes of the seed; else which is not.
pub fn check(buffer: &[u8], offset: u64, seed: u64) -> Result<()> {
    for (index, sector) in buffer.chunks_exact(SECTOR).enumerate() {
        let number = offset / SECTOR as u64 + index as u64;
        for (place, (word, bytes)) in stream(number, seed).zip(sector.chunks_exact(8)).enumerate() {
            if bytes != word.to_le_bytes() {
                let found: Vec<String> = sector
                    .iter()
                    .take(16)
                    .map(|byte| format!("{byte:02x}"))
                    .collect();
                bail!(
                    "sector {number} differs at byte {}: it begins {}",
                    place * 8,
                    found.join(" ")
                );
            }
        }
    }
    Ok(())
}

/// The sector's number, the seed, then 62 words of SplitMix64 started from both.
fn stream(number: u64, seed: u64) -> impl Iterator<Item = u64> {
    let mut state = number.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ seed;
    let words = std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    });
    [number, seed].into_iter().chain(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_checks_and_a_flipped_bit_or_a_moved_sector_does_not() {
        let mut buffer = vec![0; 4 * SECTOR];
        fill(&mut buffer, 8192, 7);
        check(&buffer, 8192, 7).unwrap();
        assert!(check(&buffer, 8192, 8).is_err());
        assert!(check(&buffer, 4096, 7).is_err());
        buffer[3 * SECTOR - 1] ^= 1;
        assert!(
            check(&buffer, 8192, 7)
                .unwrap_err()
                .to_string()
                .contains("sector 18")
        );
    }
}
