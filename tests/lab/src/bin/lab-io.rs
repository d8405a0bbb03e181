//! Proves I/O inside a guest, and again on the host: writes a pattern over a whole drive, reads it
//! back, and says in one line of `key=value` words how much, how fast, and where its buffers lay.
//!
//!     lab-io write DEVICE SEED [PLACE]
//!     lab-io verify DEVICE SEED [PLACE]
//!
//! PLACE is `low` or `high`: buffers below or above 4 GiB, for proof that DMA reaches both sides of
//! the hole. Every 512-byte sector holds its own number, the seed, and a stream drawn from both, so a
//! sector that is stale, misplaced or torn is found and named.

use std::alloc::Layout;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

const SECTOR: usize = 512;
const CHUNK: usize = 256 << 10;
const BLOCK: usize = 2 << 20;
const FOUR_GIB: u64 = 4 << 30;

/// As large and as aligned as a huge page, so that placing one among gigabytes is quick.
#[repr(C, align(0x20_0000))]
struct Block([u8; BLOCK]);

impl Block {
    fn new() -> Box<Self> {
        let layout = Layout::new::<Self>();
        // SAFETY: the layout is that of a block, which is not empty; the memory is fresh, owned here
        // alone, and zeroed, and a block is bytes, for which all zeroes is a value.
        let mut block = unsafe {
            let memory = std::alloc::alloc_zeroed(layout);
            if memory.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            Box::from_raw(memory.cast::<Self>())
        };
        // Touched, for untouched pages have no address yet.
        block.0.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        block
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (action, path, seed, place) = match arguments[..] {
        [action @ ("write" | "verify"), path, seed] => (action, path, seed, None),
        [
            action @ ("write" | "verify"),
            path,
            seed,
            place @ ("low" | "high"),
        ] => (action, path, seed, Some(place)),
        _ => bail!("usage: lab-io write|verify DEVICE SEED [low|high]"),
    };
    let seed: u64 = seed.parse().context("SEED is a number")?;
    let device = OpenOptions::new()
        .read(true)
        .write(action == "write")
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .with_context(|| format!("opening {path}"))?;
    let size = {
        use std::io::Seek;
        (&device)
            .seek(io::SeekFrom::End(0))
            .with_context(|| format!("sizing {path}"))?
    };
    let (mut block, address) = place_block(place)?;

    let started = Instant::now();
    let mut offset = 0;
    while offset < size {
        let length = usize::try_from(size - offset).unwrap_or(CHUNK).min(CHUNK);
        let at = usize::try_from(offset).unwrap_or(0) % BLOCK;
        let buffer = &mut block.0[at..at + length];
        if action == "write" {
            fill(buffer, offset, seed);
            device
                .write_all_at(buffer, offset)
                .with_context(|| format!("writing at {offset}"))?;
        } else {
            buffer.fill(0xa5);
            device
                .read_exact_at(buffer, offset)
                .with_context(|| format!("reading at {offset}"))?;
            check(buffer, offset, seed)?;
        }
        offset += length as u64;
    }
    device
        .sync_all()
        .with_context(|| format!("flushing {path}"))?;

    let seconds = started.elapsed().as_secs_f64();
    let rate = size as f64 / 1e6 / seconds;
    println!("bytes={size} mb_per_second={rate:.1} buffer_address={address:#x}");
    Ok(())
}

/// A block on the wanted side of 4 GiB, and where it lies. What is found on the other side is held
/// until the end, or the kernel would hand it out again.
fn place_block(place: Option<&str>) -> Result<(Box<Block>, u64)> {
    let mut elsewhere = Vec::new();
    loop {
        let block = Block::new();
        let address = physical_address(&block.0[0])?;
        match place {
            Some("low") if address >= FOUR_GIB => elsewhere.push(block),
            Some("high") if address < FOUR_GIB => elsewhere.push(block),
            _ => return Ok((block, address)),
        }
        ensure!(
            elsewhere.len() < 4096,
            "8 GiB allocated, and none of it on the wanted side"
        );
    }
}

/// From `/proc/self/pagemap`: bits 0 to 54 are the page frame number, bit 63 says present.
/// Linux, Documentation/admin-guide/mm/pagemap.rst.
fn physical_address(byte: &u8) -> Result<u64> {
    let virtual_address = std::ptr::from_ref(byte) as u64;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, virtual_address / 4096 * 8)?;
    let entry = u64::from_ne_bytes(entry);
    let frame = entry & ((1 << 55) - 1);
    ensure!(
        entry >> 63 == 1 && frame != 0,
        "pagemap hides frame numbers: root is needed"
    );
    Ok(frame * 4096 + virtual_address % 4096)
}

fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    for (index, sector) in buffer.chunks_exact_mut(SECTOR).enumerate() {
        let number = offset / SECTOR as u64 + index as u64;
        for (word, bytes) in stream(number, seed).zip(sector.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

fn check(buffer: &[u8], offset: u64, seed: u64) -> Result<()> {
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
