//! The kernel's calls on what is the host's, one safe function each. Nothing here decides anything.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, RawFd};

use busway_iommu::ioctl::check;

/// Gives what a descriptor stands for to a user, one that only says what is there (`O_PATH`) included,
/// which fchown(2) does not take.
pub(crate) fn give_to(file: &File, user: u32) -> io::Result<()> {
    let (fd, same_group) = (file.as_raw_fd(), u32::MAX);
    // SAFETY: the path is an empty string that lives for ever, and the call keeps nothing.
    let given = unsafe { libc::fchownat(fd, c"".as_ptr(), user, same_group, libc::AT_EMPTY_PATH) };
    check(given).map(drop)
}

/// Where the link `name` of a folder leads: as many bytes of it as `target` holds. Quicker than by its
/// whole path, and without a byte allocated.
pub(crate) fn read_link_at<'a>(
    folder: &File,
    name: &CStr,
    target: &'a mut [u8],
) -> io::Result<&'a [u8]> {
    // SAFETY: the name ends with a zero byte, and the kernel writes no more than the buffer's length.
    let length = unsafe {
        libc::readlinkat(
            folder.as_raw_fd(),
            name.as_ptr(),
            target.as_mut_ptr().cast(),
            target.len(),
        )
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok(target.get(..length).unwrap_or_default())
}

/// A socket to the kernel's routing, which closes when the file does.
pub(crate) fn route_socket() -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes three numbers.
    let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
    // SAFETY: the descriptor was just made, and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(fd as RawFd) })
}
