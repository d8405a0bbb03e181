//! A memory BAR, mapped by sysfs, which maps those of less than a page as well.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use anyhow::{Context, Result, ensure};

const PAGE: u64 = 4096;

/// A whole memory BAR.
#[derive(Debug)]
pub(crate) struct MappedBar {
    /// Of the page that the BAR begins in.
    mapping: *mut libc::c_void,
    mapped: usize,
    /// From there to the BAR.
    skip: usize,
    size: usize,
}

impl MappedBar {
    /// Maps a BAR of the device at `address`, whose memory has to decode.
    pub(crate) fn open(address: &str, bar: u64) -> Result<Self> {
        let folder = format!("/sys/bus/pci/devices/{address}");
        let table = fs::read_to_string(format!("{folder}/resource"))
            .with_context(|| format!("reading the BARs of {address}"))?;
        let line = usize::try_from(bar)
            .ok()
            .and_then(|bar| table.lines().nth(bar));
        let words: Vec<u64> = line
            .unwrap_or_default()
            .split_ascii_whitespace()
            .filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
            .collect();
        let [start, end, _flags] = words[..] else {
            anyhow::bail!("{address} has no BAR {bar}");
        };
        ensure!(end > start, "BAR {bar} of {address} is empty");
        let size = usize::try_from(end - start + 1)?;
        let skip = usize::try_from(start % PAGE)?;
        let mapped = (size + skip).next_multiple_of(PAGE as usize);
        let path = format!("{folder}/resource{bar}");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {path}"))?;
        // SAFETY: a new mapping of the kernel's choice of address; nothing else is at it.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            mapping != libc::MAP_FAILED,
            "mapping {path}: {}",
            io::Error::last_os_error()
        );
        Ok(Self {
            mapping,
            mapped,
            skip,
            size,
        })
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        let end = offset.checked_add(size_of::<T>());
        assert!(
            end.is_some_and(|end| end <= self.size) && offset.is_multiple_of(align_of::<T>()),
            "{offset:#x} is not within the BAR, or not aligned"
        );
        self.mapping.wrapping_byte_add(self.skip + offset).cast()
    }

    pub(crate) fn read32(&self, offset: usize) -> u32 {
        // SAFETY: `at` gives an aligned address within the mapping, which lives as long as `self`;
        // registers are read once and as a whole by a volatile access.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    pub(crate) fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as for `read32`.
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }

    pub(crate) fn write64(&self, offset: usize, value: u64) {
        // SAFETY: as for `read32`.
        unsafe { self.at::<u64>(offset).write_volatile(value) }
    }

    /// Copies whole words into the BAR.
    pub(crate) fn write_bytes(&self, offset: usize, data: &[u8]) -> Result<()> {
        ensure!(data.len().is_multiple_of(8), "not whole words");
        for (index, word) in data.chunks_exact(8).enumerate() {
            self.write64(offset + index * 8, u64::from_le_bytes(word.try_into()?));
        }
        Ok(())
    }

    /// Copies whole words out of the BAR.
    pub(crate) fn read_bytes(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        ensure!(data.len().is_multiple_of(8), "not whole words");
        for (index, word) in data.chunks_exact_mut(8).enumerate() {
            // SAFETY: as for `read32`.
            let value = unsafe { self.at::<u64>(offset + index * 8).read_volatile() };
            word.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }
}

impl Drop for MappedBar {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `open`, and no address of it outlives `self`.
        unsafe { libc::munmap(self.mapping, self.mapped) };
    }
}
