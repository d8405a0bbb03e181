//! The iommufd I/O address space: the newer of the kernel's interfaces. linux/iommufd.h
//!
//! An I/O address space (IOAS) maps with no device attached, keeps its mappings when the last one
//! leaves, and pins memory once for all of them.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_ioctls::{IommuFd, IommufdError};
use vfio_ioctls::{VfioError, VfioIommufd};

use crate::ledger::{self, Ledger};
use crate::memlock::Accounting;
use crate::obstacle::{self, Obstacle};
use crate::ranges::normalise;
use crate::stats::Shown;
use crate::{
    Backing, DmaMapping, DmaSpace, Iova, IovaRange, MapError, OpenDmaBuf, OpenError, Stats,
    SysRoot, sys,
};

/// What a kernel needs for [`DmaSpace::map_device`], and the way round it.
const NO_DMA_BUF: &str = "the host's kernel maps no VFIO device's memory into iommufd (it takes \
                          Linux 6.19 or later with CONFIG_VFIO_PCI_DMABUF): use such a kernel, or \
                          `--platform iommufd=off`";

/// What a device's driver needs for it: a variant of vfio-pci may have left it out
/// (drivers/vfio/pci/vfio_pci_dmabuf.c, vfio_pci_core_feature_dma_buf).
const NO_DMA_BUF_OF_DRIVER: &str = "its driver hands out no dma-buf of it: bind it to plain vfio-pci, \
                                    or use `--platform iommufd=off`";

const FEATURE_DMA_BUF: &str = "VFIO_DEVICE_FEATURE_DMA_BUF";
const MAP_FILE: &str = "IOMMU_IOAS_MAP_FILE";

/// Why a part of a device was not mapped, by the call that failed.
fn no_peer(what: &'static str, error: &io::Error) -> String {
    match (what, error.raw_os_error()) {
        // No such feature, no such call; before Linux 6.19 the call takes a memfd only.
        (_, Some(libc::ENOTTY)) | (MAP_FILE, Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            NO_DMA_BUF.to_owned()
        }
        (FEATURE_DMA_BUF, Some(libc::EOPNOTSUPP)) => NO_DMA_BUF_OF_DRIVER.to_owned(),
        (_, Some(libc::ENODEV)) => format!("{what}: its memory is switched off"),
        _ => format!("{what}: {error}"),
    }
}

/// A VM's DMA mappings in an iommufd. Devices that are bound to it hold it.
pub struct Ioas {
    // It takes the address space out of the iommufd, which others may have open as well.
    space: VfioIommufd,
    paths: SysRoot,
    state: Mutex<Ledger>,
    shown: Arc<Shown>,
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ioas")
            .field("id", &self.id())
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Ioas {
    /// Opens the host's iommufd and makes an empty address space in it.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(paths: &SysRoot) -> Result<Arc<Self>, OpenError> {
        let path = paths.iommufd();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| OpenError::Node {
                obstacle: Obstacle::opening_made_by(paths, &path, obstacle::IOMMUFD, error),
                path,
            })?;
        Self::in_iommufd(file, paths)
    }

    /// Makes an empty address space in an iommufd that is open already.
    ///
    /// # Errors
    /// [`OpenError::Kernel`]
    pub fn in_iommufd(file: File, paths: &SysRoot) -> Result<Arc<Self>, OpenError> {
        let iommufd = Arc::new(IommuFd::new_from_fd(file));
        let space = VfioIommufd::new(iommufd, None, None).map_err(|error| OpenError::Kernel {
            what: "IOMMU_IOAS_ALLOC".to_owned(),
            source: cause_of(error),
        })?;
        let ledger = Ledger::default();
        Ok(Arc::new(Self {
            space,
            paths: paths.clone(),
            shown: ledger.shown(),
            state: Mutex::new(ledger),
        }))
    }

    /// The number that devices are attached by (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`).
    #[must_use]
    pub fn id(&self) -> u32 {
        self.space.ioas().id()
    }

    /// The iommufd that devices are bound to (`VFIO_DEVICE_BIND_IOMMUFD`).
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        sys::borrow(self.space.iommufd())
    }

    /// A device of this group is attached: from now on it is named where it is in the way.
    pub fn joined(&self, group: u32) {
        self.lock().joined(group);
    }

    /// One device of this group is not any more.
    pub fn left(&self, group: u32) {
        self.lock().left(group);
    }

    /// What of the mapped memory a device of `group` reserves: why it could not be attached.
    #[must_use]
    pub fn conflict(&self, group: u32) -> Option<MapError> {
        self.lock().conflict(&self.paths, group)
    }

    fn ranges(&self) -> io::Result<Vec<IovaRange>> {
        let ranges = sys::ioas_ranges(self.space.iommufd(), self.id())?;
        Ok(normalise(
            ranges
                .into_iter()
                .map(|(start, last)| IovaRange { start, last })
                .collect(),
        ))
    }

    fn map_memory(&self, mapping: &DmaMapping, range: IovaRange) -> Result<(), MapError> {
        sys::ioas_map(&self.space, mapping).map_err(|error| {
            let accounting = Accounting::User;
            ledger::refused(
                &self.paths,
                accounting,
                "IOMMU_IOAS_MAP",
                mapping,
                range,
                cause_of(error),
            )
        })
    }

    fn map_dma_buf(
        &self,
        mapping: &DmaMapping,
        range: IovaRange,
        dma_buf: io::Result<OwnedFd>,
    ) -> Result<(), MapError> {
        let refused = |what, error: io::Error| MapError::NoPeerToPeer {
            owner: mapping.owner.clone(),
            range,
            why: no_peer(what, &error),
        };
        let dma_buf = dma_buf.map_err(|error| refused(FEATURE_DMA_BUF, error))?;
        // The address space holds the dma-buf from here on; its descriptor has done its work.
        let (fd, writes) = (dma_buf.as_raw_fd(), mapping.access.writes());
        self.space
            .ioas()
            .map_file(fd, 0, mapping.size, mapping.iova.0, writes)
            .map_err(|error| refused(MAP_FILE, cause(error)))
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaSpace for Ioas {
    fn add(&self, mapping: DmaMapping, dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError> {
        let mut state = self.lock();
        let usable = self.usable_ranges()?;
        state.map(
            &self.paths,
            mapping,
            Some(&usable),
            |mapping, range| match mapping.backing {
                Backing::Memory | Backing::Block => self.map_memory(mapping, range),
                Backing::Device => self.map_dma_buf(mapping, range, dma_buf()),
            },
        )
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
        let call = || self.space.ioas().unmap(iova.0, size).map_err(cause);
        self.lock()
            .unmap(iova, size, "IOMMU_IOAS_UNMAP", Some(call))
    }

    fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
        self.ranges().map_err(|source| MapError::Kernel {
            what: "IOMMU_IOAS_IOVA_RANGES",
            owner: "the address space".to_owned(),
            range: IovaRange::ALL,
            source,
        })
    }

    fn stats(&self) -> Stats {
        self.shown.seen()
    }
}

/// The errno behind an error of `iommufd-ioctls`.
fn cause(error: IommufdError) -> io::Error {
    match error {
        IommufdError::IommuIoasAlloc(error)
        | IommufdError::IommuIoasMap(error)
        | IommufdError::IommuIoasMapFile(error)
        | IommufdError::IommuIoasUnmap(error) => io::Error::from_raw_os_error(error.errno()),
        other => io::Error::other(other.to_string()),
    }
}

/// The errno behind an error of `vfio-ioctls` about an address space.
fn cause_of(error: VfioError) -> io::Error {
    match error {
        VfioError::NewVfioIommufd(error) | VfioError::IommufdIoctlError(error) => cause(error),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_to_a_new_address_space_is_told() {
        let file = File::open("/dev/null").unwrap();
        let error = Ioas::in_iommufd(file, &SysRoot::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "IOMMU_IOAS_ALLOC failed: Inappropriate ioctl for device (os error 25)"
        );
    }

    #[test]
    fn a_dma_buf_that_is_not_to_be_had_is_the_kernel_s_or_the_driver_s() {
        let why = |what, number| no_peer(what, &io::Error::from_raw_os_error(number));
        assert_eq!(why(FEATURE_DMA_BUF, libc::ENOTTY), NO_DMA_BUF);
        assert_eq!(why(FEATURE_DMA_BUF, libc::EOPNOTSUPP), NO_DMA_BUF_OF_DRIVER);
        assert_eq!(
            why(FEATURE_DMA_BUF, libc::EINVAL),
            "VFIO_DEVICE_FEATURE_DMA_BUF: Invalid argument (os error 22)"
        );
        for number in [libc::ENOTTY, libc::EOPNOTSUPP, libc::EINVAL] {
            assert_eq!(why(MAP_FILE, number), NO_DMA_BUF);
        }
        assert!(why(MAP_FILE, libc::ENODEV).ends_with("its memory is switched off"));
    }
}
