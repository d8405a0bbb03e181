//! The kernel's calls, one safe function each: VFIO containers and groups, what `iommufd-ioctls`
//! and `vfio-ioctls` lack, and resource limits. Nothing here decides anything.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_TYPE, iommu_ioas_iova_ranges, iommu_ioas_map,
    iommu_iova_range, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_iommu_type1_info,
};
use vfio_ioctls::{VfioError, VfioIommufd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;

use crate::ioctl::{check, size_of_u32};
use crate::{Access, DmaMapping, info};

// linux/vfio.h
ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_UNSET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 5);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);
// linux/iommufd.h
ioctl_io_nr!(
    IOMMU_IOAS_IOVA_RANGES,
    IOMMUFD_TYPE as u32,
    IOMMUFD_CMD_IOAS_IOVA_RANGES
);

pub(crate) fn api_version(container: &File) -> io::Result<i32> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(container, VFIO_GET_API_VERSION()) }).map(|version| version as i32)
}

pub(crate) fn check_extension(container: &File, extension: u32) -> io::Result<bool> {
    // SAFETY: takes a number.
    let result = unsafe { ioctl_with_val(container, VFIO_CHECK_EXTENSION(), extension.into()) };
    check(result).map(|answer| answer > 0)
}

pub(crate) fn set_iommu(container: &File, kind: u32) -> io::Result<()> {
    // SAFETY: takes a number.
    check(unsafe { ioctl_with_val(container, VFIO_SET_IOMMU(), kind.into()) }).map(drop)
}

/// The bytes of a `vfio_iommu_type1_info` and the capabilities behind it.
pub(crate) fn type1_info(container: &File) -> io::Result<Vec<u8>> {
    let empty = [0; size_of::<vfio_iommu_type1_info>()];
    // SAFETY: the structure starts with `argsz`, which the kernel keeps to.
    unsafe { info::query(container.as_fd(), VFIO_IOMMU_GET_INFO(), &empty) }
}

pub(crate) fn map_dma(
    container: &File,
    vaddr: usize,
    iova: u64,
    size: u64,
    flags: u32,
) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<vfio_iommu_type1_dma_map>(),
        flags,
        vaddr: vaddr as u64,
        iova,
        size,
    };
    // SAFETY: the kernel reads `map` only. It looks the memory at `vaddr` up itself and pins it, or
    // fails where there is none; that devices may write to it is what `HostVa` stands for.
    check(unsafe { ioctl_with_ref(container, VFIO_IOMMU_MAP_DMA(), &map) }).map(drop)
}

/// Unmaps, and says how many bytes that was.
pub(crate) fn unmap_dma(container: &File, iova: u64, size: u64) -> io::Result<u64> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio_iommu_type1_dma_unmap>(),
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: without flags the kernel reads and writes the structure's fixed part only.
    check(unsafe { ioctl_with_mut_ref(container, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) })?;
    Ok(unmap.size)
}

pub(crate) fn group_status(group: &File) -> io::Result<u32> {
    let mut status = vfio_group_status {
        argsz: size_of_u32::<vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: the structure is the one that the ioctl takes.
    check(unsafe { ioctl_with_mut_ref(group, VFIO_GROUP_GET_STATUS(), &mut status) })?;
    Ok(status.flags)
}

pub(crate) fn set_container(group: &File, container: &File) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the kernel reads one descriptor number.
    check(unsafe { ioctl_with_ref(group, VFIO_GROUP_SET_CONTAINER(), &fd) }).map(drop)
}

pub(crate) fn unset_container(group: &File) -> io::Result<()> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(group, VFIO_GROUP_UNSET_CONTAINER()) }).map(drop)
}

pub(crate) fn group_device(group: &File, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: the kernel reads a terminated string, which outlives the call.
    let fd = check(unsafe {
        vmm_sys_util::ioctl::ioctl_with_ptr(group, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr())
    })?;
    // SAFETY: the kernel made the descriptor for this call, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The ranges that an I/O address space allows, both ends included.
pub(crate) fn ioas_ranges(iommufd: &impl AsRawFd, ioas: u32) -> io::Result<Vec<(u64, u64)>> {
    let mut room = 16_u32;
    loop {
        let mut ranges = vec![iommu_iova_range::default(); room as usize];
        let mut query = iommu_ioas_iova_ranges {
            size: size_of_u32::<iommu_ioas_iova_ranges>(),
            ioas_id: ioas,
            num_iovas: room,
            allowed_iovas: ranges.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel writes at most `num_iovas` ranges to `allowed_iovas`, which has room
        // for them and outlives the call.
        let result = check(unsafe {
            ioctl_with_mut_ref(&iommufd.as_raw_fd(), IOMMU_IOAS_IOVA_RANGES(), &mut query)
        });
        match result {
            Err(error)
                if error.raw_os_error() == Some(libc::EMSGSIZE)
                    && query.num_iovas > room
                    && query.num_iovas <= 1 << 16 =>
            {
                room = query.num_iovas;
            }
            Err(error) => return Err(error),
            Ok(_) => {
                ranges.truncate(query.num_iovas as usize);
                return Ok(ranges
                    .iter()
                    .map(|range| (range.start, range.last))
                    .collect());
            }
        }
    }
}

/// Maps memory of this process into an I/O address space, at the address that `mapping` says.
pub(crate) fn ioas_map(space: &VfioIommufd, mapping: &DmaMapping) -> Result<(), VfioError> {
    match mapping.access {
        Access::ReadWrite => {
            let length = usize::try_from(mapping.size).unwrap_or(usize::MAX);
            let memory = mapping.host.0 as *mut u8;
            // SAFETY: the kernel looks the memory up itself and pins it, or fails where there is none;
            // that devices may write to it until it is unmapped is what `HostVa` stands for.
            unsafe { space.vfio_dma_map(mapping.iova.0, length, memory) }
        }
        // What `vfio-ioctls` maps can be written.
        Access::Read => {
            let map = iommu_ioas_map {
                size: size_of_u32::<iommu_ioas_map>(),
                flags: MAP_FIXED_IOVA | MAP_READABLE,
                ioas_id: space.ioas().id(),
                user_va: mapping.host.0 as u64,
                length: mapping.size,
                iova: mapping.iova.0,
                ..Default::default()
            };
            let mapped = space.iommufd().map_iommu_ioas(&map);
            mapped.map_err(VfioError::IommufdIoctlError)
        }
    }
}

/// The effective user id of this process: the user whose rights it has.
#[must_use]
pub fn effective_user() -> u32 {
    geteuid().as_raw()
}

/// A soft and a hard limit, in bytes; `u64::MAX` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

pub(crate) fn memlock_limit() -> Limit {
    let limit = getrlimit(Resource::Memlock);
    Limit {
        soft: limit.current.unwrap_or(u64::MAX),
        hard: limit.maximum.unwrap_or(u64::MAX),
    }
}

pub(crate) fn set_memlock_limit(limit: Limit) -> io::Result<()> {
    let limited = |bytes| Some(bytes).filter(|&bytes| bytes != u64::MAX);
    let limit = Rlimit {
        current: limited(limit.soft),
        maximum: limited(limit.hard),
    };
    Ok(setrlimit(Resource::Memlock, limit)?)
}

/// The descriptor behind something that only says its number.
pub(crate) fn borrow(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the owner's, and stays open for as long as the owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
