//! Proves, inside a guest or beside it, that a BAR is what it should be: all of it reachable, at every
//! width, and gone while the device sleeps. Says what it found in one line of `key=value` words.
//!
//!     lab-bars fill FILE SEED        writes every word
//!     lab-bars check FILE SEED       finds every word as `fill` left it
//!     lab-bars sprinkle FILE SEED    writes one word of each page
//!     lab-bars find FILE SEED        finds each of those
//!     lab-bars get FILE OFFSET       reads ports at OFFSET by 1, 2 and 4 bytes
//!     lab-bars peek FILE OFFSET      reads memory at OFFSET by 1, 2 and 4 bytes
//!     lab-bars decode FOLDER ROUNDS  turns memory decoding off and on, and times it
//!     lab-bars sleep FOLDER ROUNDS   puts the function into D3hot and back, while its BAR 0 is read
//!     lab-bars reset FOLDER ROUNDS   has the kernel reset the function, while its BAR 0 is read
//!
//! FILE is a BAR's in sysfs (`resource2`), or the file behind it on the outer machine; FOLDER a
//! function's in sysfs. An I/O BAR's file is read, any other mapped.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const PAGE: usize = 4096;

/// A file, mapped shared.
struct Mapped {
    address: *mut u64,
    words: usize,
}

// SAFETY: it is shared memory; every access is volatile and of a whole word.
unsafe impl Sync for Mapped {}

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

    fn read(&self, word: usize) -> u64 {
        // SAFETY: a mapped word.
        unsafe { self.at(word).read_volatile() }
    }

    fn read_u32(&self) -> u32 {
        // SAFETY: a mapped word's lower half.
        unsafe { self.at(0).cast::<u32>().read_volatile() }
    }

    fn write(&self, word: usize, value: u64) {
        // SAFETY: a mapped word.
        unsafe { self.at(word).write_volatile(value) }
    }
}

/// What word `number` holds.
fn value(number: usize, seed: u64) -> u64 {
    (number as u64 ^ seed << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Which word of each page is sprinkled.
fn one_of(page: usize) -> usize {
    page * (PAGE / 8) + page % (PAGE / 8)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [action, path, number] = &arguments[..] else {
        bail!("usage: lab-bars ACTION PATH NUMBER");
    };
    let number: u64 = number.parse().context("the last word is a number")?;
    let path = Path::new(path);
    match action.as_str() {
        "fill" | "check" | "sprinkle" | "find" => pattern(action, path, number),
        "get" => get(path, number),
        "peek" => peek(path, number),
        "decode" => decode(path, number),
        "sleep" => sleep(path, number),
        "reset" => reset(path, number),
        other => bail!("{other} is no action"),
    }
}

fn pattern(action: &str, path: &Path, seed: u64) -> Result<()> {
    let mapped = Mapped::open(path)?;
    let started = Instant::now();
    let pages = mapped.words * 8 / PAGE;
    let compare = |word: usize| {
        let (found, wanted) = (mapped.read(word), value(word, seed));
        ensure!(
            found == wanted,
            "at {:#x}: {found:#x} instead of {wanted:#x}",
            word * 8
        );
        Ok(())
    };
    match action {
        "fill" => (0..mapped.words).for_each(|word| mapped.write(word, value(word, seed))),
        "check" => (0..mapped.words).try_for_each(compare)?,
        "sprinkle" => {
            let words = (0..pages).map(one_of);
            words.for_each(|word| mapped.write(word, value(word, seed)));
        }
        _ => (0..pages).map(one_of).try_for_each(compare)?,
    }
    let milliseconds = started.elapsed().as_millis();
    println!("bytes={} milliseconds={milliseconds}", mapped.words * 8);
    Ok(())
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

/// Configuration space by sysfs.
struct Config(File);

impl Config {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        Ok(Self(
            file.with_context(|| format!("opening {}", path.display()))?,
        ))
    }

    fn read(&self, offset: u16) -> Result<u8> {
        let mut byte = [0];
        self.0.read_exact_at(&mut byte, offset.into())?;
        Ok(byte[0])
    }

    fn write(&self, offset: u16, value: u8) -> Result<()> {
        Ok(self.0.write_all_at(&[value], offset.into())?)
    }

    /// Where the power management capability's control register is.
    fn power(&self) -> Result<u16> {
        let mut at = self.read(0x34)?;
        while at >= 0x40 {
            if self.read(at.into())? == 1 {
                return Ok(u16::from(at) + 4);
            }
            at = self.read(u16::from(at) + 1)?;
        }
        bail!("it has no power management");
    }
}

fn decode(folder: &Path, rounds: u64) -> Result<()> {
    let config = Config::open(folder)?;
    let on = config.read(4)? | 2;
    let mut slowest = 0;
    let mut total = 0;
    for _ in 0..rounds {
        config.write(4, on & !2)?;
        let started = Instant::now();
        config.write(4, on)?;
        let microseconds = started.elapsed().as_micros();
        slowest = slowest.max(microseconds);
        total += microseconds;
    }
    let mean = total / u128::from(rounds.max(1));
    println!("rounds={rounds} mean_microseconds={mean} slowest_microseconds={slowest}");
    Ok(())
}

fn sleep(folder: &Path, rounds: u64) -> Result<()> {
    let config = Config::open(folder)?;
    let control = config.power()?;
    let pause = || std::thread::sleep(Duration::from_millis(20));
    with_reader(folder, rounds, |bar, awake| {
        config.write(control, 3)?;
        ensure!(config.read(control)? & 3 == 3, "it does not sleep");
        ensure!(bar.read_u32() == u32::MAX, "it answers in its sleep");
        pause();
        config.write(control, 0)?;
        pause();
        ensure!(config.read(control)? & 3 == 0, "it does not wake");
        let again = bar.read_u32();
        ensure!(again == awake, "{again:#x}, not {awake:#x}");
        Ok(())
    })
}

fn reset(folder: &Path, rounds: u64) -> Result<()> {
    with_reader(folder, rounds, |bar, awake| {
        std::fs::write(folder.join("reset"), "1").context("the kernel does not reset it")?;
        let again = bar.read_u32();
        ensure!(again == awake, "{again:#x}, not {awake:#x}");
        Ok(())
    })
}

/// Does something to a function while somebody who does not know of it reads a register, which is to
/// be what it was or ones.
fn with_reader(
    folder: &Path,
    rounds: u64,
    mut act: impl FnMut(&Mapped, u32) -> Result<()>,
) -> Result<()> {
    let config = Config::open(folder)?;
    config.write(4, config.read(4)? | 2)?;
    let bar = Mapped::open(&folder.join("resource0"))?;
    let awake = bar.read_u32();
    ensure!(awake != u32::MAX, "BAR 0 reads ones from the beginning");
    let done = AtomicBool::new(false);
    let read = || {
        let (mut alive, mut ones) = (0_u64, 0_u64);
        while !done.load(Ordering::Relaxed) {
            match bar.read_u32() {
                u32::MAX => ones += 1,
                value if value == awake => alive += 1,
                other => bail!("BAR 0 read {other:#x}, not {awake:#x}"),
            }
        }
        Ok((alive, ones))
    };
    let (turns, read) = std::thread::scope(|scope| {
        let reader = scope.spawn(read);
        let turns = (0..rounds).try_for_each(|_| act(&bar, awake));
        done.store(true, Ordering::Relaxed);
        (turns, reader.join())
    });
    turns?;
    let (alive, ones) = read.map_err(|_panic| anyhow::anyhow!("the reader panicked"))??;
    println!("rounds={rounds} register={awake:#x} alive={alive} ones={ones}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_differ_by_place_and_seed_and_each_page_has_one() {
        assert_ne!(value(1, 7), value(2, 7));
        assert_ne!(value(1, 7), value(1, 8));
        assert!((0..2000).all(|page| one_of(page) * 8 / PAGE == page));
    }
}
