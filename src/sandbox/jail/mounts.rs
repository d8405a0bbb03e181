//! The kernel's calls by which a tree of mounts is put together: mount_setattr(2).

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::io::Errno;

/// linux/mount.h, `struct mount_attr` in its first version
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// linux/mount.h: `MOUNT_ATTR_*`
const READ_ONLY: u64 = 1;
const NO_SET_USER: u64 = 2;
const NO_DEVICES: u64 = 4;
const NO_EXECUTION: u64 = 8;

/// Has nothing in `tree`, which nobody has mounted yet, be executed, nor written or opened as a device where that is said.
///
/// # Errors
/// mount_setattr(2), which came with Linux 5.12
pub(super) fn narrow(tree: &OwnedFd, readonly: bool, devices: bool) -> rustix::io::Result<()> {
    let mut attributes = Attributes {
        set: NO_SET_USER | NO_EXECUTION,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    if readonly {
        attributes.set |= READ_ONLY;
    }
    if !devices {
        attributes.set |= NO_DEVICES;
    }
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a string with its final zero, the structure is the kernel's and as long as is said; both stay
    // until the call is over.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => {
            let error = io::Error::last_os_error();
            Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
        }
    }
}
