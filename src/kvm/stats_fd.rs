//! What KVM itself counts of a vCPU: its binary statistics, by the descriptor of KVM_GET_STATS_FD.
//!
//! KVM API §4.130. A read copies numbers and waits for nothing. Hosts before Linux 5.14 have none.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

/// `_IO(KVMIO, 0xce)`: linux/kvm.h `KVM_GET_STATS_FD`
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;

/// Bytes of `struct kvm_stats_header`: flags, name size, descriptors, and the offsets of the id, of the descriptors and
/// of the data.
const HEADER: usize = 24;
/// Bytes of `struct kvm_stats_desc` before its name: flags, exponent, size, offset, bucket size.
const DESCRIPTOR: usize = 16;
/// What is taken as a number of statistics, or bytes of one's name, at most: Linux has some 60 of 48 bytes.
const MOST: u32 = 1024;

/// What is looked at, under the names that KVM gives them: Linux, arch/x86/kvm/x86.c, `kvm_vcpu_stats_desc`.
const NAMES: [&str; 13] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "irq_window_exits",
    "signal_exits",
    "hypercalls",
    "insn_emulation",
    "irq_injections",
    "nmi_injections",
    "pf_taken",
    "tlb_flush",
];

/// A vCPU's statistics.
#[derive(Debug)]
pub(super) struct VcpuStats {
    file: File,
    /// What there is, and where its number is in the file.
    places: Vec<(&'static str, u64)>,
}

impl VcpuStats {
    /// Those of a vCPU that does not run; nothing where the host has none.
    pub(super) fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu`, and the call takes no argument.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            log::debug!("KVM_GET_STATS_FD: {}", io::Error::last_os_error());
            return None;
        }
        // SAFETY: the descriptor was just made, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        let read = |at: u64, bytes: &mut [u8]| file.read_exact_at(bytes, at);
        match places(&read) {
            Ok(places) => Some(Self { file, places }),
            Err(error) => {
                log::debug!("KVM's statistics cannot be read: {error}");
                None
            }
        }
    }

    /// The numbers as they are now, in the order of [`NAMES`].
    pub(super) fn read(&self) -> Vec<(&'static str, u64)> {
        let number = |&(name, at)| {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, at).ok()?;
            Some((name, u64::from_ne_bytes(bytes)))
        };
        self.places.iter().filter_map(number).collect()
    }
}

/// Where the numbers are that are looked at.
fn places(read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>) -> io::Result<Vec<(&'static str, u64)>> {
    let mut header = [0; HEADER];
    read(0, &mut header)?;
    let [name_size, count, descriptors, data] =
        [4, 8, 16, 20].map(|at| field(&header, at).unwrap_or(0));
    if name_size > MOST || count > MOST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let step = DESCRIPTOR + name_size as usize;
    let mut found = Vec::new();
    let mut descriptor = vec![0; step];
    for index in 0..u64::from(count) {
        read(
            u64::from(descriptors) + index * step as u64,
            &mut descriptor,
        )?;
        let name = descriptor.get(DESCRIPTOR..).unwrap_or_default();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let known = NAMES.iter().find(|known| known.as_bytes() == name);
        if let (Some(name), Some(offset)) = (known, field(&descriptor, 8)) {
            found.push((*name, u64::from(data) + u64::from(offset)));
        }
    }
    Ok(found)
}

fn field(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of KVM's form: two descriptors of names of 8 bytes, and their numbers.
    fn file() -> Vec<u8> {
        let mut file: Vec<u8> = Vec::new();
        for field in [0_u32, 8, 2, 24, 24, 72] {
            file.extend(field.to_ne_bytes());
        }
        for (name, offset) in [(b"unknown\0", 0_u32), (b"exits\0\0\0", 8)] {
            file.extend([0_u32, 0].map(u32::to_ne_bytes).concat());
            file.extend([offset, 0].map(u32::to_ne_bytes).concat());
            file.extend(name);
        }
        file.extend([7_u64, 9].map(u64::to_ne_bytes).concat());
        file
    }

    fn read_from(file: &[u8]) -> io::Result<Vec<(&'static str, u64)>> {
        places(&|at, bytes| {
            let from = file
                .get(at as usize..)
                .and_then(|rest| rest.get(..bytes.len()));
            let from = from.ok_or(io::ErrorKind::UnexpectedEof)?;
            bytes.copy_from_slice(from);
            Ok(())
        })
    }

    #[test]
    fn a_statistic_is_found_by_its_name() {
        let file = file();
        let found = read_from(&file).unwrap();
        assert_eq!(found, [("exits", 80)]);
        assert_eq!(file[80..88], 9_u64.to_ne_bytes());
    }

    #[test]
    fn a_file_that_is_short_or_says_too_much_is_none() {
        let whole = file();
        for length in 0..72 {
            read_from(&whole[..length]).unwrap_err();
        }
        for field in [4, 8] {
            let mut large = file();
            large[field..field + 4].copy_from_slice(&u32::MAX.to_ne_bytes());
            read_from(&large).unwrap_err();
        }
    }
}
