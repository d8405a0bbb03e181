//! Accesses to a device's configuration space.

use crate::{DeviceIo, RegionIndex};

/// The doubleword of a device's configuration space at `offset`; all ones where it does not answer.
pub(crate) fn read_dword(io: &dyn DeviceIo, offset: u16) -> u32 {
    let mut data = [u8::MAX; 4];
    match io.region_read(RegionIndex::CONFIG, offset.into(), &mut data) {
        Ok(()) => u32::from_le_bytes(data),
        Err(_) => u32::MAX,
    }
}

pub(crate) fn read_byte(io: &dyn DeviceIo, offset: u16) -> u8 {
    let mut data = [0];
    match io.region_read(RegionIndex::CONFIG, offset.into(), &mut data) {
        Ok(()) => data[0],
        Err(_) => 0,
    }
}

/// Writes to a device's configuration space in accesses that are naturally aligned.
pub(crate) fn write_aligned(io: &dyn DeviceIo, mut offset: u16, mut data: &[u8]) {
    while !data.is_empty() {
        let size = [4, 2, 1]
            .into_iter()
            .find(|&size| data.len() >= size && usize::from(offset).is_multiple_of(size))
            .unwrap_or(1);
        let (now, rest) = data.split_at(size);
        if let Err(error) = io.region_write(RegionIndex::CONFIG, offset.into(), now) {
            log::debug!("configuration space, {size} bytes at {offset:#x}: {error}");
        }
        data = rest;
        offset = offset.saturating_add(size as u16);
    }
}
