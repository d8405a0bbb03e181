//! A device opened through the kernel's VFIO, by its group or as a character device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use busway_iommu::info;
use busway_pci::{AtomicOps, PAGE_SIZE};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_NORESIZE, VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_device_info, vfio_region_info, vfio_region_info_cap_sparse_mmap,
};

use crate::access::read_dword;
use crate::areas::Area;
use crate::atomics;
use crate::attachment::AttachedFile;
use crate::pin::line_users;
use crate::{
    Affected, DeviceIo, DeviceRegion, FunctionReset, IrqError, IrqIndex, IrqInfo, Mapping,
    RegionIndex, sys,
};

/// A VFIO device of the kernel's.
///
/// It goes as it came, in reverse: KVM forgets its file, the descriptor closes, and then the group
/// or the address space that it is attached to is released. Nothing of that can panic; a device that
/// was pulled out meanwhile is closed like any other.
#[derive(Debug)]
pub struct KernelDevice {
    name: String,
    can_reset: bool,
    /// What the kernel says of AtomicOps.
    atomic_ops: Option<AtomicOps>,
    regions: Vec<(u64, DeviceRegion)>,
    irqs: Vec<IrqInfo>,
    opened: AttachedFile,
}

impl KernelDevice {
    /// Asks an opened and attached device what it is made of.
    pub(crate) fn new(name: &str, opened: AttachedFile) -> io::Result<Self> {
        let file = &opened.file;
        let device = sys::device_info(file)?;
        let u32_at = |at| info::u32_at(&device, at).unwrap_or(0);
        let flags = u32_at(std::mem::offset_of!(vfio_device_info, flags));
        let num_regions = u32_at(std::mem::offset_of!(vfio_device_info, num_regions));
        let num_irqs = u32_at(std::mem::offset_of!(vfio_device_info, num_irqs));
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::other("it is no PCI device to VFIO"));
        }
        // A region or interrupt that cannot be asked for keeps its number, as an empty one.
        let regions = (0..VFIO_PCI_NUM_REGIONS.min(num_regions))
            .map(|index| {
                sys::region_info(file, index).map_or_else(
                    |error| {
                        log::debug!("{name}: region {index}: {error}");
                        Default::default()
                    },
                    |answer| parse_region(&answer),
                )
            })
            .collect();
        let irqs = (0..VFIO_PCI_NUM_IRQS.min(num_irqs))
            .map(|index| {
                sys::irq_info(file, index).map_or_else(
                    |_| IrqInfo::default(),
                    |irq| IrqInfo {
                        count: irq.count,
                        resizable: irq.flags & VFIO_IRQ_INFO_NORESIZE == 0,
                    },
                )
            })
            .collect();
        Ok(Self {
            name: name.to_owned(),
            can_reset: flags & VFIO_DEVICE_FLAGS_RESET != 0,
            atomic_ops: atomics::of_info(&device),
            regions,
            irqs,
            opened,
        })
    }

    /// Its name on the host, as sysfs writes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn known(&self, index: RegionIndex) -> io::Result<&(u64, DeviceRegion)> {
        self.regions
            .get(index.number() as usize)
            .filter(|(_, region)| region.size > 0)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// Where in the descriptor an access of `size` bytes goes.
    fn place(&self, index: RegionIndex, offset: u64, size: usize) -> io::Result<u64> {
        let (base, region) = self.known(index)?;
        let end = offset.checked_add(size as u64);
        if end.is_none_or(|end| end > region.size) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        base.checked_add(offset)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

impl DeviceIo for KernelDevice {
    fn region(&self, index: RegionIndex) -> DeviceRegion {
        self.regions
            .get(index.number() as usize)
            .map(|(_, region)| region.clone())
            .unwrap_or_default()
    }

    fn region_read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let place = self.place(index, offset, data.len())?;
        self.opened.file.read_exact_at(data, place)
    }

    fn region_write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        let place = self.place(index, offset, data.len())?;
        self.opened.file.write_all_at(data, place)
    }

    /// By sysfs, which shows 64 bytes to who has no CAP_SYS_ADMIN: the lists begin beyond these.
    fn own_config(&self, offset: u16) -> Option<u32> {
        let mut data = [0; 4];
        let config = self.opened.folder.file("config").ok()?;
        config.read_exact_at(&mut data, offset.into()).ok()?;
        Some(u32::from_le_bytes(data))
    }

    fn map(&self, index: RegionIndex, area: Area) -> io::Result<Mapping> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let (base, region) = self.known(index)?;
        // The last page counts whole, so that a BAR smaller than that can be mapped.
        let end = area.offset.checked_add(area.size);
        let pages = region.size.checked_next_multiple_of(PAGE_SIZE);
        if end.is_none() || end > pages {
            return Err(invalid());
        }
        let place = base.checked_add(area.offset).ok_or_else(invalid)?;
        Mapping::of_file(
            self.opened.file.as_fd(),
            place,
            area.offset,
            area.size,
            region.writable,
        )
    }

    fn dma_buf(&self, index: RegionIndex, area: Area) -> io::Result<OwnedFd> {
        sys::dma_buf(&self.opened.file, index.number(), area.offset, area.size)
    }

    fn irq(&self, index: IrqIndex) -> IrqInfo {
        self.irqs
            .get(index.number() as usize)
            .copied()
            .unwrap_or_default()
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        first: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), IrqError> {
        match sys::set_irq_events(&self.opened.file, index.number(), first, events) {
            Ok(0) => Ok(()),
            Ok(given) => Err(IrqError::Fewer { given }),
            // The one flag that VFIO asks for or not is whether the line may be shared.
            Err(error)
                if index == IrqIndex::Intx
                    && error.raw_os_error() == Some(libc::EBUSY)
                    && !self.is_mediated() =>
            {
                Err(IrqError::LineShared {
                    users: line_users(Path::new("/sys"), &self.name),
                })
            }
            Err(error) => Err(IrqError::Kernel(error)),
        }
    }

    fn unmask_on(&self, index: IrqIndex, event: BorrowedFd<'_>) -> Result<(), IrqError> {
        sys::set_unmask_event(&self.opened.file, index.number(), event)
            .map(drop)
            .map_err(IrqError::Kernel)
    }

    fn unmask(&self, index: IrqIndex) -> Result<(), IrqError> {
        sys::unmask(&self.opened.file, index.number())
            .map(drop)
            .map_err(IrqError::Kernel)
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), IrqError> {
        match sys::disable_irqs(&self.opened.file, index.number()) {
            // EINVAL: that kind is not enabled.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
                Err(IrqError::Kernel(error))
            }
            _ => Ok(()),
        }
    }

    /// What VFIO says counts; an older kernel's does not say it.
    fn atomic_ops(&self) -> AtomicOps {
        let config = |offset| read_dword(self, offset);
        match self.atomic_ops {
            Some(said) => said,
            // No bridge is above it.
            None if self.is_mediated() => AtomicOps::NONE,
            None => atomics::of_path(self.opened.folder.path(), &config),
        }
    }

    fn is_mediated(&self) -> bool {
        self.opened.name.is_mediated()
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        sys::reset(&self.opened.file)
    }

    /// What VFIO says counts: it has tried. What sysfs says names it.
    fn function_reset(&self) -> Option<FunctionReset> {
        if !self.can_reset {
            return None;
        }
        match self.opened.reset_methods() {
            Some(method) => method.or(Some(FunctionReset::Other)),
            None => Some(FunctionReset::of_capabilities(&|offset| {
                read_dword(self, offset)
            })),
        }
    }

    fn is_reset_by_opening(&self) -> bool {
        !self.opened.inherited && !self.is_mediated()
    }

    fn hot_reset_reach(&self) -> io::Result<Vec<Affected>> {
        self.opened.hot_reset_reach()
    }

    fn hot_reset(&self) -> io::Result<()> {
        self.opened.hot_reset()
    }
}

/// Reads a `vfio_region_info` and the capabilities behind it: where in the descriptor the region
/// begins, and what it is.
fn parse_region(answer: &[u8]) -> (u64, DeviceRegion) {
    let u32_at = |at| info::u32_at(answer, at).unwrap_or(0);
    let u64_at = |at| info::u64_at(answer, at).unwrap_or(0);
    let flags = u32_at(std::mem::offset_of!(vfio_region_info, flags));
    let size = u64_at(std::mem::offset_of!(vfio_region_info, size));
    let mut areas = Vec::new();
    if flags & VFIO_REGION_INFO_FLAG_MMAP != 0 {
        let first = if flags & VFIO_REGION_INFO_FLAG_CAPS != 0 {
            u32_at(std::mem::offset_of!(vfio_region_info, cap_offset))
        } else {
            0
        };
        // Without the capability all of the region can be mapped.
        areas = match info::capability(answer, first, VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16) {
            Some(sparse) => {
                type Cap = vfio_region_info_cap_sparse_mmap;
                let count = info::u32_at(sparse, std::mem::offset_of!(Cap, nr_areas)).unwrap_or(0);
                info::pairs_at(sparse, std::mem::offset_of!(Cap, areas), count)
                    .into_iter()
                    .map(|(offset, size)| Area { offset, size })
                    .collect()
            }
            None => vec![Area { offset: 0, size }],
        };
    }
    let region = DeviceRegion {
        size,
        readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
        writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        areas,
    };
    let base = u64_at(std::mem::offset_of!(vfio_region_info, offset));
    (base, region)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(flags: u32, sparse: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0, flags, 0, 32] {
            bytes.extend(u32::to_ne_bytes(word));
        }
        for value in [0x4000_u64, 7 << 40] {
            bytes.extend(value.to_ne_bytes());
        }
        bytes.extend([1_u16, 1].map(u16::to_ne_bytes).concat());
        bytes.extend([0, sparse.len() as u32, 0].map(u32::to_ne_bytes).concat());
        for (offset, size) in sparse {
            bytes.extend([*offset, *size].map(u64::to_ne_bytes).concat());
        }
        bytes
    }

    #[test]
    fn sparse_areas_are_what_can_be_mapped_and_else_all_of_it() {
        let (base, region) = parse_region(&answer(0xf, &[(0, 0x2000), (0x3000, 0x1000)]));
        assert_eq!(base, 7 << 40);
        assert!(region.readable && region.writable);
        let spans: Vec<_> = region.areas.iter().map(|a| (a.offset, a.size)).collect();
        assert_eq!(spans, [(0, 0x2000), (0x3000, 0x1000)]);
        let (_, whole) = parse_region(&answer(0x7, &[]));
        assert_eq!(whole.areas.len(), 1);
        let (_, none) = parse_region(&answer(0x3, &[]));
        assert!(none.areas.is_empty());
        // A sparse list with nothing in it means that nothing can be mapped.
        let (_, empty) = parse_region(&answer(0xf, &[]));
        assert!(empty.areas.is_empty());
        assert_eq!(parse_region(&[]), Default::default());
    }
}
