//! The kernel's calls on a VFIO device, one safe function each. Nothing here decides anything.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use busway_iommu::info;
use busway_iommu::ioctl::{check, size_of_u32};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_BIND_FLAG_TOKEN, VFIO_DEVICE_FEATURE_DMA_BUF, VFIO_DEVICE_FEATURE_GET,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE, vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd,
    vfio_device_info, vfio_irq_info, vfio_region_dma_range, vfio_region_info,
};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
};
use vmm_sys_util::ioctl_io_nr;

// linux/vfio.h
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE as u32, VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
ioctl_io_nr!(
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_TYPE as u32,
    VFIO_BASE + 12
);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_DEVICE_FEATURE, VFIO_TYPE as u32, VFIO_BASE + 17);
ioctl_io_nr!(VFIO_DEVICE_BIND_IOMMUFD, VFIO_TYPE as u32, VFIO_BASE + 18);
ioctl_io_nr!(
    VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    VFIO_TYPE as u32,
    VFIO_BASE + 19
);

/// The bytes of a `vfio_device_info` and the capabilities behind it.
pub(crate) fn device_info(device: &File) -> io::Result<Vec<u8>> {
    let request = [0; size_of::<vfio_device_info>()];
    // SAFETY: the structure starts with `argsz`, which the kernel keeps to.
    unsafe { info::query(device.as_fd(), VFIO_DEVICE_GET_INFO(), &request) }
}

/// The bytes of a `vfio_region_info` and the capabilities behind it.
pub(crate) fn region_info(device: &File, index: u32) -> io::Result<Vec<u8>> {
    let mut request = [0; size_of::<vfio_region_info>()];
    let at = std::mem::offset_of!(vfio_region_info, index);
    for (to, from) in request.iter_mut().skip(at).zip(index.to_ne_bytes()) {
        *to = from;
    }
    // SAFETY: the structure starts with `argsz`, which the kernel keeps to.
    unsafe { info::query(device.as_fd(), VFIO_DEVICE_GET_REGION_INFO(), &request) }
}

pub(crate) fn irq_info(device: &File, index: u32) -> io::Result<vfio_irq_info> {
    let mut irq_info = vfio_irq_info {
        argsz: size_of_u32::<vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: the structure is the one that the ioctl takes.
    check(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_IRQ_INFO(), &mut irq_info) })?;
    Ok(irq_info)
}

/// Sets which eventfd each vector from `first` on signals. A result above zero is how many vectors
/// the host could have given.
pub(crate) fn set_irq_events(
    device: &File,
    index: u32,
    first: u32,
    events: &[Option<BorrowedFd<'_>>],
) -> io::Result<u32> {
    let fds = events
        .iter()
        .map(|event| event.as_ref().map_or(-1, |fd| fd.as_raw_fd()));
    set_irqs(
        device,
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        first,
        events.len(),
        fds,
    )
}

/// Has an eventfd's signal unmask the interrupts of a kind.
pub(crate) fn set_unmask_event(
    device: &File,
    index: u32,
    event: BorrowedFd<'_>,
) -> io::Result<u32> {
    set_irqs(
        device,
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK,
        index,
        0,
        1,
        std::iter::once(event.as_raw_fd()),
    )
}

/// Unmasks the first interrupt of a kind now.
pub(crate) fn unmask(device: &File, index: u32) -> io::Result<u32> {
    set_irqs(
        device,
        VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK,
        index,
        0,
        1,
        std::iter::empty(),
    )
}

pub(crate) fn disable_irqs(device: &File, index: u32) -> io::Result<u32> {
    set_irqs(
        device,
        VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        0,
        0,
        std::iter::empty(),
    )
}

fn set_irqs(
    device: &File,
    flags: u32,
    index: u32,
    first: u32,
    count: usize,
    fds: impl Iterator<Item = i32>,
) -> io::Result<u32> {
    let count = u32::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The fields of `vfio_irq_set` in order, then the descriptors: words all.
    let fields = [flags, index, first, count].into_iter();
    let words = with_argsz(fields.chain(fds.map(|fd| fd as u32)))?;
    // SAFETY: the kernel reads at most `argsz` bytes, which are those of `words`.
    check(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) })
}

/// A structure of words behind its `argsz`, which is as many bytes as there are.
fn with_argsz(words: impl Iterator<Item = u32>) -> io::Result<Vec<u32>> {
    let words: Vec<u32> = words.collect();
    let size = size_of::<u32>() + size_of_val(words.as_slice());
    let argsz = u32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok([&[argsz], words.as_slice()].concat())
}

pub(crate) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: takes no argument.
    check(unsafe { ioctl(device, VFIO_DEVICE_RESET()) }).map(drop)
}

/// `struct vfio_device_feature`, whose data is `struct vfio_device_feature_dma_buf` with one
/// `struct vfio_region_dma_range`.
#[repr(C)]
struct DmaBufRequest {
    argsz: u32,
    feature: u32,
    region_index: u32,
    open_flags: u32,
    flags: u32,
    nr_ranges: u32,
    range: vfio_region_dma_range,
}

/// A part of a BAR as a dma-buf. `VFIO_DEVICE_FEATURE_DMA_BUF`, from Linux 6.19 on.
pub(crate) fn dma_buf(device: &File, region: u32, offset: u64, size: u64) -> io::Result<OwnedFd> {
    let request = DmaBufRequest {
        argsz: size_of_u32::<DmaBufRequest>(),
        feature: VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
        region_index: region,
        open_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
        flags: 0,
        nr_ranges: 1,
        range: vfio_region_dma_range {
            offset,
            length: size,
        },
    };
    // SAFETY: the kernel reads as many bytes as `argsz` says, which are those of the structure.
    let fd = check(unsafe { ioctl_with_ref(device, VFIO_DEVICE_FEATURE(), &request) })?;
    // SAFETY: the kernel made the descriptor for this call, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The most functions that a hot reset is believed to touch: those of all buses of a segment.
const MOST_AFFECTED: u32 = 1 << 16;

/// What `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO` answers: a `vfio_pci_hot_reset_info` and its devices, as
/// words.
pub(crate) fn hot_reset_info(device: &File) -> io::Result<Vec<u32>> {
    // argsz, flags, count; two words for each device.
    const HEADER: usize = 3;
    let mut room = 8_u32;
    loop {
        let mut words = with_argsz(std::iter::repeat_n(0, HEADER - 1 + 2 * room as usize))?;
        // SAFETY: the kernel writes the header, and devices as far as `argsz` says that there is room:
        // `words` has as many bytes.
        let result = check(unsafe {
            ioctl_with_mut_ptr(
                device,
                VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(),
                words.as_mut_ptr(),
            )
        });
        let count = words.get(2).copied().unwrap_or(0);
        match result {
            Ok(_) => {
                words.truncate(HEADER + 2 * count as usize);
                return Ok(words);
            }
            Err(error)
                if error.raw_os_error() == Some(libc::ENOSPC)
                    && (room + 1..=MOST_AFFECTED).contains(&count) =>
            {
                room = count;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Resets slot or bus. `groups` prove whose the devices on it are; none for a character device, whose
/// iommufd does.
pub(crate) fn hot_reset(device: &File, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = u32::try_from(groups.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The fields of `vfio_pci_hot_reset` in order, then the descriptors: words all.
    let fds = groups.iter().map(|group| group.as_raw_fd() as u32);
    let words = with_argsz([0, count].into_iter().chain(fds))?;
    // SAFETY: the kernel reads the header and `count` numbers behind it, which `words` holds.
    check(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_PCI_HOT_RESET(), words.as_ptr()) }).map(drop)
}

/// Binds a device to an iommufd, with the 16 bytes of a VF token where one is given. linux/vfio.h
pub(crate) fn bind_iommufd(
    device: &File,
    iommufd: BorrowedFd<'_>,
    token: Option<&[u8; 16]>,
) -> io::Result<()> {
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of_u32::<vfio_device_bind_iommufd>(),
        flags: token.map_or(0, |_| VFIO_DEVICE_BIND_FLAG_TOKEN),
        iommufd: iommufd.as_raw_fd(),
        token_uuid_ptr: token.map_or(0, |token| token.as_ptr() as u64),
        ..Default::default()
    };
    // SAFETY: the structure is the one that the ioctl takes; with the token flag the kernel reads 16
    // bytes through its pointer, which are borrowed for the call, and without it reads none.
    check(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_BIND_IOMMUFD(), &mut bind) }).map(drop)
}

pub(crate) fn attach_ioas(device: &File, ioas: u32) -> io::Result<()> {
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: size_of_u32::<vfio_device_attach_iommufd_pt>(),
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: the structure is the one that the ioctl takes.
    check(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut attach) })
        .map(drop)
}

/// Takes over a descriptor that this process inherited, and has it closed on exec.
///
/// # Safety
/// It is open, and nothing else in this process uses or closes it.
///
/// # Errors
/// `EBADF` where it is not open.
pub unsafe fn adopt(number: u32) -> io::Result<File> {
    let number = i32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: setting the flag touches no memory.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the caller says that it is nobody else's.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(number) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_bindings::bindings::vfio::{
        vfio_device_feature, vfio_device_feature_dma_buf, vfio_irq_set, vfio_pci_dependent_device,
        vfio_pci_hot_reset, vfio_pci_hot_reset_info,
    };

    #[test]
    fn the_interrupt_set_is_five_words_and_then_descriptors() {
        assert_eq!(size_of::<vfio_irq_set>(), 20);
        assert_eq!(std::mem::offset_of!(vfio_irq_set, count), 16);
        assert_eq!(std::mem::offset_of!(vfio_irq_set, data), 20);
    }

    #[test]
    fn a_dma_buf_is_asked_for_by_three_structures_behind_each_other() {
        let (feature, dma_buf) = (
            size_of::<vfio_device_feature>(),
            size_of::<vfio_device_feature_dma_buf>(),
        );
        assert_eq!(std::mem::offset_of!(DmaBufRequest, region_index), feature);
        assert_eq!(
            std::mem::offset_of!(DmaBufRequest, range),
            feature + dma_buf
        );
        assert_eq!(size_of::<DmaBufRequest>(), 40);
    }

    #[test]
    fn argsz_counts_itself_and_every_word_behind_it() {
        assert_eq!(with_argsz([7, 8].into_iter()).unwrap(), [12, 7, 8]);
        assert_eq!(with_argsz(std::iter::empty()).unwrap(), [4]);
    }

    #[test]
    fn a_hot_reset_is_three_words_and_then_two_for_each_device_or_one_for_each_group() {
        assert_eq!(size_of::<vfio_pci_hot_reset_info>(), 12);
        assert_eq!(size_of::<vfio_pci_dependent_device>(), 8);
        assert_eq!(size_of::<vfio_pci_hot_reset>(), 12);
    }

    #[test]
    fn the_numbers_are_the_kernels() {
        assert_eq!(VFIO_DEVICE_SET_IRQS(), 0x3b6e);
        assert_eq!(VFIO_DEVICE_RESET(), 0x3b6f);
        assert_eq!(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(), 0x3b70);
        assert_eq!(VFIO_DEVICE_PCI_HOT_RESET(), 0x3b71);
        assert_eq!(VFIO_DEVICE_FEATURE(), 0x3b75);
        assert_eq!(VFIO_DEVICE_BIND_IOMMUFD(), 0x3b76);
    }
}
