//! Proves I/O inside a guest, and again on the host: writes a pattern over a whole drive, reads it
//! back, and says in one line of `key=value` words how much, how fast, and where its buffers lay.
//!
//!     lab-io write DEVICE SEED [PLACE]
//!     lab-io verify DEVICE SEED [PLACE]
//!     lab-io churn DEVICE FIRST
//!     lab-io churned DEVICE FLUSHED
//!     lab-io zero DEVICE OFFSET LENGTH
//!
//! PLACE is `low` or `high`: buffers below or above 4 GiB, for proof that DMA reaches both sides of
//! the hole. `churn` writes all over the drive from write number FIRST on until it is killed, and says
//! `flushed=N` after each flush; `churned` looks whether those writes are there. `zero` has the drive zero a range by
//! itself, and not give it up.

use std::alloc::Layout;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use busway_lab::churn::{check_churned, churn};
use busway_lab::pattern::{check, fill};
use busway_lab::physical_address;

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
    if let [action @ ("churn" | "churned"), path, number] = arguments[..] {
        return churned(action == "churn", path, number.parse()?);
    }
    if let ["zero", path, offset, length] = arguments[..] {
        return zero(path, offset.parse()?, length.parse()?);
    }
    let (action, path, seed, place) = match arguments[..] {
        [action @ ("write" | "verify"), path, seed] => (action, path, seed, None),
        [
            action @ ("write" | "verify"),
            path,
            seed,
            place @ ("low" | "high"),
        ] => (action, path, seed, Some(place)),
        _ => bail!("usage: lab-io write|verify DEVICE SEED [low|high], and others"),
    };
    let seed: u64 = seed.parse().context("SEED is a number")?;
    // Past the page cache, but for file systems in memory, which know no such thing.
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(action == "write")
            .custom_flags(flags)
            .open(path)
    };
    let device = match open(libc::O_DIRECT) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => open(0),
        opened => opened,
    };
    let device = device.with_context(|| format!("opening {path}"))?;
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

/// fallocate(2), which block devices have as well
fn zero(path: &str, offset: i64, length: i64) -> Result<()> {
    let device = OpenOptions::new().write(true).open(path)?;
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: it takes numbers only.
    match unsafe { libc::fallocate(device.as_raw_fd(), mode, offset, length) } {
        0 => Ok(device.sync_all()?),
        _ => Err(io::Error::last_os_error()).context("fallocate"),
    }
}

/// Writes all over a drive for ever, or looks whether what was flushed is there.
fn churned(write: bool, path: &str, number: u64) -> Result<()> {
    use std::io::Seek;
    let mut device = OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .with_context(|| format!("opening {path}"))?;
    let size = device.seek(io::SeekFrom::End(0))?;
    if write {
        return churn(&device, size, number, |flushed| {
            println!("flushed={flushed} path={path}");
        });
    }
    let blocks = check_churned(&device, size, number)?;
    println!("blocks={blocks}");
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
