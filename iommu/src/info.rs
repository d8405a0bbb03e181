//! VFIO's information ioctls: a structure that starts with its own size, and behind it, where the
//! kernel has more to say, a chain of capabilities. linux/vfio.h, `struct vfio_info_cap_header`

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::c_ulong;

use vmm_sys_util::ioctl::ioctl_with_mut_ptr;
use zerocopy::IntoBytes;

use crate::ioctl::check;

/// The longest answer that is believed: 2 MiB of sparse areas would be 131072 of them.
const LONGEST: usize = 2 << 20;

/// How many capabilities a chain may have before it counts as a loop.
const MOST_CAPS: usize = 64;

/// Runs an information ioctl on `fd` until its whole answer fits, and returns the answer's bytes.
/// `request_data` is the structure to pass; its first four bytes, `argsz`, are filled in here.
///
/// # Safety
/// `request` is an ioctl of the driver behind `fd` whose argument is a structure that starts with a
/// 32-bit `argsz`, and which reads and writes at most `argsz` bytes of it.
///
/// # Errors
/// The kernel's, and `InvalidData` where it asks for an absurd size.
pub unsafe fn query(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    request_data: &[u8],
) -> io::Result<Vec<u8>> {
    let mut size = request_data.len();
    loop {
        let argsz = u32::try_from(size).map_err(|_| absurd(size))?;
        // Doublewords, so that the kernel's structures are aligned; zeroes behind what is passed.
        let mut buffer = vec![0_u64; size.div_ceil(size_of::<u64>())];
        let passed = request_data.iter().skip(size_of_val(&argsz));
        let passed = argsz.as_bytes().iter().chain(passed);
        for (to, from) in buffer.as_mut_bytes().iter_mut().zip(passed) {
            *to = *from;
        }
        // SAFETY: the caller says that the ioctl uses at most `argsz` bytes, and `buffer` has them.
        check(unsafe { ioctl_with_mut_ptr(&fd.as_raw_fd(), request, buffer.as_mut_ptr()) })?;
        let mut answer = buffer.as_bytes().to_vec();
        answer.truncate(size);
        let needed = u32_at(&answer, 0).map_or(0, |argsz| argsz as usize);
        if needed <= size {
            return Ok(answer);
        }
        if needed > LONGEST {
            return Err(absurd(needed));
        }
        size = needed;
    }
}

fn absurd(size: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's answer is {size} bytes long"),
    )
}

/// The 16 bits at `offset`, in the host's byte order.
#[must_use]
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The 32 bits at `offset`, in the host's byte order.
#[must_use]
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The 64 bits at `offset`, in the host's byte order.
#[must_use]
pub fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The pairs of 64-bit values that make a table of ranges: `count` at most, from `offset`.
#[must_use]
pub fn pairs_at(bytes: &[u8], offset: usize, count: u32) -> Vec<(u64, u64)> {
    bytes
        .get(offset..)
        .unwrap_or_default()
        .chunks_exact(16)
        .take(count as usize)
        .filter_map(|pair| Some((u64_at(pair, 0)?, u64_at(pair, 8)?)))
        .collect()
}

/// The capability numbered `id` in the chain that starts at `first` (0: none): its bytes, header
/// included, to the answer's end.
#[must_use]
pub fn capability(answer: &[u8], first: u32, id: u16) -> Option<&[u8]> {
    let mut at = first as usize;
    for _ in 0..MOST_CAPS {
        if at == 0 {
            return None;
        }
        let here = answer.get(at..)?;
        if u16_at(here, 0)? == id {
            return Some(here);
        }
        at = u32_at(here, 4)? as usize;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(id: u16, next: u32) -> Vec<u8> {
        let mut bytes = id.to_ne_bytes().to_vec();
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_capability_is_found_along_the_chain_and_a_loop_ends() {
        let mut answer = vec![0; 8];
        answer.extend(header(3, 16));
        answer.extend(header(5, 8));
        answer.extend([0xaa; 4]);
        assert_eq!(capability(&answer, 8, 5).unwrap()[8..], [0xaa; 4]);
        assert_eq!(capability(&answer, 8, 4), None);
        assert_eq!(capability(&answer, 0, 3), None);
        assert_eq!(capability(&answer, 4000, 3), None);
    }

    #[test]
    fn a_table_longer_than_the_answer_is_read_as_far_as_it_goes() {
        let mut bytes = vec![0; 4];
        for value in [1_u64, 2, 3, 4, 5] {
            bytes.extend(value.to_ne_bytes());
        }
        assert_eq!(pairs_at(&bytes, 4, 100), [(1, 2), (3, 4)]);
        assert_eq!(pairs_at(&bytes, 4, 1), [(1, 2)]);
        assert_eq!(pairs_at(&bytes, 400, 1), []);
    }

    proptest! {
        #[test]
        fn any_bytes_at_all_are_walked_without_harm(
            bytes in prop::collection::vec(any::<u8>(), 0..256),
            first: u32,
            id: u16,
        ) {
            let _ = capability(&bytes, first % 300, id);
            let _ = capability(&bytes, first, id);
        }
    }
}
