//! Reads a BAR inside a guest at every width, which has to come to the same, and says what it read.
//!
//!     lab-bars get FILE OFFSET   reads ports at OFFSET by 1, 2 and 4 bytes
//!     lab-bars peek FILE OFFSET  reads memory at OFFSET by 1, 2 and 4 bytes
//!
//! FILE is a BAR's in sysfs: `resource0`.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const PAGE: usize = 4096;

/// A file, mapped shared.
struct Mapped {
    address: *mut u64,
    words: usize,
}

impl Mapped {
    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        let size = usize::try_from(file.metadata()?.len())?;
        let length = size.next_multiple_of(PAGE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            address != libc::MAP_FAILED,
            "mapping {size:#x} bytes of {}: {}",
            path.display(),
            std::io::Error::last_os_error()
        );
        Ok(Self {
            address: address.cast(),
            words: size / size_of::<u64>(),
        })
    }

    fn at(&self, word: usize) -> *mut u64 {
        assert!(word < self.words);
        // SAFETY: within the mapping, which is never undone.
        unsafe { self.address.add(word) }
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [action, path, number] = &arguments[..] else {
        bail!("usage: lab-bars ACTION PATH NUMBER");
    };
    let number: u64 = number.parse().context("the last word is a number")?;
    let path = Path::new(path);
    match action.as_str() {
        "get" => get(path, number),
        "peek" => peek(path, number),
        other => bail!("{other} is no action"),
    }
}

fn get(path: &Path, offset: u64) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut whole = [0; 4];
    file.read_exact_at(&mut whole, offset)?;
    let mut halves = [0; 4];
    let mut bytes = [0; 4];
    for (at, half) in (offset..).step_by(2).zip(halves.chunks_exact_mut(2)) {
        file.read_exact_at(half, at)?;
    }
    for (at, byte) in (offset..).zip(bytes.chunks_exact_mut(1)) {
        file.read_exact_at(byte, at)?;
    }
    ensure!(
        whole == halves && whole == bytes,
        "by 4, 2 and 1 bytes: {whole:02x?} {halves:02x?} {bytes:02x?}"
    );
    println!("value={:#010x}", u32::from_le_bytes(whole));
    Ok(())
}

fn peek(path: &Path, offset: u64) -> Result<()> {
    let mapped = Mapped::open(path)?;
    let offset = usize::try_from(offset)?;
    ensure!(
        offset % 4 == 0 && offset / 8 < mapped.words,
        "not in the BAR"
    );
    let at = mapped.at(offset / 8).cast::<u8>().wrapping_add(offset % 8);
    // SAFETY: four mapped bytes, at a multiple of four.
    let (whole, halves, bytes) = unsafe {
        (
            at.cast::<u32>().read_volatile(),
            [0, 1].map(|half| at.cast::<u16>().add(half).read_volatile()),
            [0, 1, 2, 3].map(|byte| at.add(byte).read_volatile()),
        )
    };
    let from_halves = u32::from(halves[0]) | u32::from(halves[1]) << 16;
    ensure!(
        whole == from_halves && whole == u32::from_le_bytes(bytes),
        "by 4, 2 and 1 bytes: {whole:#x} {halves:#x?} {bytes:#x?}"
    );
    println!("value={whole:#010x}");
    Ok(())
}
