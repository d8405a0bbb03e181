//! What every call into the kernel needs, here and in `busway-vfio`.

use std::io;

/// The result of a call that is below zero where it failed.
///
/// # Errors
/// The kernel's.
pub fn check(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Bytes of a structure, as structures say of themselves (`argsz`, `size`).
#[must_use]
pub const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}
