//! The iommufd I/O address space: the newer of the kernel's interfaces. linux/iommufd.h
//!
//! An I/O address space (IOAS) maps with no device attached, keeps its mappings when the last one
//! leaves, and pins memory once for all of them.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_bindings::iommufd::{
    iommu_ioas_alloc, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
};
use iommufd_ioctls::{IommuFd, IommufdError};

use crate::obstacle::{self, Obstacle};
use crate::ranges::{first_gap, normalise};
use crate::type1::{map_failed, unusable};
use crate::{
    Access, DmaSpace, HostPaths, HostVa, Iova, IovaRange, MapError, Mapping, OpenError, Stats,
    Tracker, sys,
};

/// A VM's DMA mappings in an iommufd. Devices that are bound to it hold it.
pub struct Ioas {
    // Closing the iommufd destroys the address space with it.
    iommufd: IommuFd,
    id: u32,
    paths: HostPaths,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tracker: Tracker,
    map_calls: u64,
    unmap_calls: u64,
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ioas")
            .field("id", &self.id)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Ioas {
    /// Opens the host's iommufd and makes an empty address space in it.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(paths: &HostPaths) -> Result<Arc<Self>, OpenError> {
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
    pub fn in_iommufd(file: File, paths: &HostPaths) -> Result<Arc<Self>, OpenError> {
        let iommufd = IommuFd::new_from_fd(file);
        let mut alloc = iommu_ioas_alloc {
            size: size_of::<iommu_ioas_alloc>() as u32,
            ..Default::default()
        };
        iommufd
            .alloc_iommu_ioas(&mut alloc)
            .map_err(|error| OpenError::Kernel {
                what: "IOMMU_IOAS_ALLOC".to_owned(),
                source: cause(error),
            })?;
        Ok(Arc::new(Self {
            iommufd,
            id: alloc.out_ioas_id,
            paths: paths.clone(),
            state: Mutex::default(),
        }))
    }

    /// The number that devices are attached by (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`).
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The iommufd that devices are bound to (`VFIO_DEVICE_BIND_IOMMUFD`).
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        sys::borrow(&self.iommufd)
    }

    fn ranges(&self) -> io::Result<Vec<IovaRange>> {
        let ranges = sys::ioas_ranges(&self.iommufd, self.id)?;
        Ok(normalise(
            ranges
                .into_iter()
                .map(|(start, last)| IovaRange { start, last })
                .collect(),
        ))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaSpace for Ioas {
    fn map(
        &self,
        iova: Iova,
        host: HostVa,
        size: u64,
        access: Access,
        owner: &str,
    ) -> Result<(), MapError> {
        let mut state = self.lock();
        let mapping = Mapping {
            iova,
            host,
            size,
            access,
            owner: owner.to_owned(),
        };
        let range = state.tracker.check(&mapping)?;
        let usable = self.ranges().map_err(|source| MapError::Kernel {
            what: "IOMMU_IOAS_IOVA_RANGES",
            owner: mapping.owner.clone(),
            range,
            source,
        })?;
        if let Some(gap) = first_gap(range, &usable) {
            return Err(unusable(&mapping, range, gap, &usable));
        }
        let mut flags = MAP_FIXED_IOVA | MAP_READABLE;
        if access.writes() {
            flags |= MAP_WRITEABLE;
        }
        let map = iommu_ioas_map {
            size: size_of::<iommu_ioas_map>() as u32,
            flags,
            ioas_id: self.id,
            user_va: host.0 as u64,
            length: size,
            iova: iova.0,
            ..Default::default()
        };
        self.iommufd.map_iommu_ioas(&map).map_err(|error| {
            map_failed(&self.paths, "IOMMU_IOAS_MAP", &mapping, range, cause(error))
        })?;
        state.map_calls += 1;
        state.tracker.insert(mapping)
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
        let mut state = self.lock();
        let range = state.tracker.check_removal(iova, size)?;
        let mut unmap = iommu_ioas_unmap {
            size: size_of::<iommu_ioas_unmap>() as u32,
            ioas_id: self.id,
            iova: iova.0,
            length: size,
        };
        self.iommufd
            .unmap_iommu_ioas(&mut unmap)
            .map_err(|error| MapError::Kernel {
                what: "IOMMU_IOAS_UNMAP",
                owner: "what is mapped".to_owned(),
                range,
                source: cause(error),
            })?;
        state.unmap_calls += 1;
        state.tracker.remove(iova, size)
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
        let state = self.lock();
        Stats {
            map_calls: state.map_calls,
            unmap_calls: state.unmap_calls,
            bytes: state.tracker.bytes(),
        }
    }
}

/// The errno behind an error of `iommufd-ioctls`.
fn cause(error: IommufdError) -> io::Error {
    match error {
        IommufdError::IommuIoasAlloc(error)
        | IommufdError::IommuIoasMap(error)
        | IommufdError::IommuIoasUnmap(error) => io::Error::from_raw_os_error(error.errno()),
        other => io::Error::other(other.to_string()),
    }
}
