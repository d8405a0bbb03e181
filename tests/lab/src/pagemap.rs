//! Where a byte of this process lies in memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};

/// A byte's address as a device has to say it, by `/proc/self/pagemap`: bits 0 to 54 are the page frame
/// number, bit 63 says present. Linux, Documentation/admin-guide/mm/pagemap.rst.
///
/// # Errors
/// The page is not present, or this process may not know.
pub fn physical_address(byte: &u8) -> Result<u64> {
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
