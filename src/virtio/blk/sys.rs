//! The kernel's calls for disk images that no crate in the project wraps.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// `_IO(0x12, 119)`: linux/fs.h `BLKDISCARD`
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 120)`: linux/fs.h `BLKIOMIN`
const BLKIOMIN: libc::Ioctl = 0x1278;
/// `_IOR(0x12, 114, size_t)`: linux/fs.h `BLKGETSIZE64`
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// What direct I/O on a file asks for. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlignment {
    pub(super) memory: u32,
    pub(super) offset: u32,
}

/// A block device's sizes. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) logical: u32,
    pub(super) physical: u32,
    pub(super) min_io: u32,
    pub(super) opt_io: u32,
}

/// Bytes of a block device.
pub(super) fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes a u64, which `size` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// A block device's sizes.
pub(super) fn geometry(file: &File) -> io::Result<Geometry> {
    let mut logical: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes an int, which `logical` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut logical) })?;
    let unsigned = |request| -> io::Result<u32> {
        let mut value: libc::c_uint = 0;
        // SAFETY: the three requests made below write an unsigned int, which `value` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) })?;
        Ok(value)
    };
    Ok(Geometry {
        logical: u32::try_from(logical).unwrap_or(512),
        physical: unsigned(libc::BLKPBSZGET)?,
        min_io: unsigned(BLKIOMIN)?,
        opt_io: unsigned(libc::BLKIOOPT)?,
    })
}

/// Discards a range of a block device.
pub(super) fn discard(file: &File, start: u64, len: u64) -> io::Result<()> {
    let range = [start, len];
    // SAFETY: BLKDISCARD reads two u64, which `range` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// What direct I/O on a file asks for; `None` where the kernel (before 6.1) or the file system does
/// not say.
pub(super) fn direct_alignment(file: &File) -> Option<DirectAlignment> {
    // SAFETY: all zeros is a valid statx, which is plain data.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, as AT_EMPTY_PATH has it, and `stat` is what is written.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    let reported = result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    (reported && stat.stx_dio_offset_align != 0).then_some(DirectAlignment {
        memory: stat.stx_dio_mem_align,
        offset: stat.stx_dio_offset_align,
    })
}

/// Takes an open file description's lock over the whole file, without waiting.
pub(super) fn lock(file: &File, shared: bool) -> io::Result<()> {
    // SAFETY: all zeros is a valid flock, which is plain data; a length of 0 is up to the end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if shared { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: F_OFD_SETLK reads a flock, which `lock` is.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Whether somebody's lock keeps `file` from being locked.
pub(super) fn is_locked(file: &File, shared: bool) -> bool {
    // SAFETY: a flock is integers only, of which 0 means all of the file, from its start.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if shared { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: F_OFD_GETLK reads a flock and writes what is in its way, if anything is; `lock` is one.
    let asked = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) });
    asked.is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// Another descriptor of what this process has inherited by number `number`, which is closed on exec.
pub(super) fn duplicate(number: u32) -> io::Result<File> {
    let number = i32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor, or says that there is none to be made one of.
    let new = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    check(new)?;
    // SAFETY: it is new, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(new) })
}

/// Whether a descriptor is open to be written.
pub(super) fn is_writable(file: &File) -> io::Result<bool> {
    Ok(status_flags(file)? & libc::O_ACCMODE != libc::O_RDONLY)
}

/// Has what is read and written by a descriptor go past the host's page cache.
pub(super) fn set_direct(file: &File) -> io::Result<()> {
    let flags = status_flags(file)? | libc::O_DIRECT;
    // SAFETY: F_SETFL takes flags, and touches no memory.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })
}

fn status_flags(file: &File) -> io::Result<libc::c_int> {
    // SAFETY: F_GETFL gives flags, and touches no memory.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    Ok(flags)
}

/// Has the calling thread run on these of the host's processors only.
pub(super) fn run_on(processors: &[usize]) -> io::Result<()> {
    // SAFETY: all zeros is a valid cpu_set_t, an empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &processor in processors {
        if processor >= libc::CPU_SETSIZE as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the number is below the set's size.
        unsafe { libc::CPU_SET(processor, &mut set) };
    }
    // SAFETY: sched_setaffinity reads a set of the size that it is told; 0 is the calling thread.
    check(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
