//! The VFIO container with its Type1 IOMMU: the older of the kernel's two interfaces, and on many
//! kernels the only one. linux/vfio.h
//!
//! A container can map only while a group is attached to it, and forgets everything when the last
//! one leaves. [`Container`] remembers: what was mapped before the first group came, or is still
//! mapped when the last one left, is mapped when the next one comes.

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_TYPE1v2_IOMMU,
    vfio_iommu_type1_info, vfio_iommu_type1_info_cap_iova_range, vfio_iommu_type1_info_dma_avail,
};

use crate::obstacle::{self, Obstacle};
use crate::ranges::{first_gap, normalise};
use crate::{
    Access, DmaSpace, HostPaths, HostVa, Iova, IovaRange, MapError, Mapping, OpenError, Stats,
    Tracker, info, memlock, sys,
};

/// The module whose parameters rule Type1.
const MODULE: &str = "vfio_iommu_type1";

/// A VM's DMA mappings in a VFIO container.
#[derive(Debug)]
pub struct Container {
    file: File,
    paths: HostPaths,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tracker: Tracker,
    groups: usize,
    limits: Limits,
    map_calls: u64,
    unmap_calls: u64,
}

/// What the attached groups' IOMMUs allow.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Limits {
    ranges: Vec<IovaRange>,
    /// How many more mappings the kernel takes; nothing where it does not say (before Linux 5.10).
    available: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ranges: vec![IovaRange::ALL],
            available: None,
        }
    }
}

impl Container {
    /// Opens a container with no group in it.
    ///
    /// # Errors
    /// [`OpenError`]: the node cannot be opened, or is no VFIO container with a Type1 IOMMU.
    pub fn open(paths: &HostPaths) -> Result<Arc<Self>, OpenError> {
        let path = paths.container();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| OpenError::Node {
                obstacle: Obstacle::opening(paths, &path, error),
                path: path.clone(),
            })?;
        let version = sys::api_version(&file).map_err(|source| OpenError::Kernel {
            what: format!("VFIO_GET_API_VERSION on {}", path.display()),
            source,
        })?;
        if version != VFIO_API_VERSION as i32 {
            return Err(OpenError::Version { path, version });
        }
        match sys::check_extension(&file, VFIO_TYPE1v2_IOMMU) {
            Ok(true) => {}
            Ok(false) => {
                return Err(OpenError::NoType1 {
                    path,
                    obstacle: Obstacle::Module {
                        module: obstacle::VFIO_TYPE1.0,
                        option: obstacle::VFIO_TYPE1.1,
                    },
                });
            }
            Err(error) => {
                return Err(OpenError::NoType1 {
                    path,
                    obstacle: Obstacle::Other(error),
                });
            }
        }
        Ok(Arc::new(Self {
            file,
            paths: paths.clone(),
            state: Mutex::default(),
        }))
    }

    /// Attaches a group. The first one starts the IOMMU and has everything mapped for it.
    pub(crate) fn attach(&self, group: &File, number: u32) -> Result<(), OpenError> {
        let mut state = self.lock();
        let attach = |error| OpenError::Attach {
            what: format!("IOMMU group {number}"),
            obstacle: Obstacle::attaching(&self.paths, MODULE, error),
        };
        sys::set_container(group, &self.file).map_err(attach)?;
        match self.start(&mut state, number) {
            Ok(limits) => {
                state.limits = limits;
                state.groups += 1;
                Ok(())
            }
            Err(error) => {
                // With the last group the kernel drops whatever was mapped up to the failure.
                let _ = sys::unset_container(group);
                Err(error)
            }
        }
    }

    /// Starts the IOMMU where the group that was just attached is the first.
    fn start(&self, state: &mut State, number: u32) -> Result<Limits, OpenError> {
        let first = state.groups == 0;
        if first {
            sys::set_iommu(&self.file, VFIO_TYPE1v2_IOMMU).map_err(|error| OpenError::Attach {
                what: format!("IOMMU group {number}"),
                obstacle: Obstacle::attaching(&self.paths, MODULE, error),
            })?;
        }
        let limits = self.limits().map_err(|source| OpenError::Kernel {
            what: format!("VFIO_IOMMU_GET_INFO with IOMMU group {number} attached"),
            source,
        })?;
        if first {
            let mappings: Vec<_> = state.tracker.iter().cloned().collect();
            for mapping in &mappings {
                let Some(range) = mapping.range() else {
                    continue; // The tracker holds none that has no range.
                };
                self.map_now(&limits, state.map_calls, mapping, range)?;
                state.map_calls += 1;
            }
        }
        Ok(limits)
    }

    /// Takes a group out. What is mapped stays remembered when it was the last.
    pub(crate) fn detach(&self, group: &File, number: u32) {
        let mut state = self.lock();
        if let Err(error) = sys::unset_container(group) {
            // Closing the group's descriptor, which follows, does the same.
            log::debug!("VFIO_GROUP_UNSET_CONTAINER on group {number}: {error}");
        }
        state.groups = state.groups.saturating_sub(1);
        if state.groups == 0 {
            state.limits = Limits::default();
        }
    }

    /// How many more mappings the kernel takes, where it says so and a group is attached.
    #[must_use]
    pub fn mappings_left(&self) -> Option<u32> {
        let state = self.lock();
        if state.groups == 0 {
            return None;
        }
        self.limits().ok()?.available
    }

    fn limits(&self) -> io::Result<Limits> {
        sys::type1_info(&self.file).map(|answer| parse_limits(&answer))
    }

    fn map_now(
        &self,
        limits: &Limits,
        made: u64,
        mapping: &Mapping,
        range: IovaRange,
    ) -> Result<(), MapError> {
        if let Some(gap) = first_gap(range, &limits.ranges) {
            return Err(unusable(mapping, range, gap, &limits.ranges));
        }
        let mut flags = VFIO_DMA_MAP_FLAG_READ;
        if mapping.access.writes() {
            flags |= VFIO_DMA_MAP_FLAG_WRITE;
        }
        sys::map_dma(
            &self.file,
            mapping.host.0,
            mapping.iova.0,
            mapping.size,
            flags,
        )
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOSPC) => MapError::TooMany {
                owner: mapping.owner.clone(),
                range,
                made,
            },
            _ => map_failed(&self.paths, "VFIO_IOMMU_MAP_DMA", mapping, range, source),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaSpace for Container {
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
        if state.groups > 0 {
            self.map_now(&state.limits, state.map_calls, &mapping, range)?;
            state.map_calls += 1;
        }
        state.tracker.insert(mapping)
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
        let mut state = self.lock();
        let range = state.tracker.check_removal(iova, size)?;
        if state.groups > 0 {
            sys::unmap_dma(&self.file, iova.0, size).map_err(|source| MapError::Kernel {
                what: "VFIO_IOMMU_UNMAP_DMA",
                owner: "what is mapped".to_owned(),
                range,
                source,
            })?;
            state.unmap_calls += 1;
        }
        state.tracker.remove(iova, size)
    }

    fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
        Ok(self.lock().limits.ranges.clone())
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

pub(crate) fn unusable(
    mapping: &Mapping,
    range: IovaRange,
    gap: IovaRange,
    usable: &[IovaRange],
) -> MapError {
    let usable: Vec<_> = usable.iter().map(ToString::to_string).collect();
    MapError::Unusable {
        owner: mapping.owner.clone(),
        range,
        gap,
        usable: usable.join(", "),
    }
}

pub(crate) fn map_failed(
    paths: &HostPaths,
    what: &'static str,
    mapping: &Mapping,
    range: IovaRange,
    source: io::Error,
) -> MapError {
    let owner = mapping.owner.clone();
    match source.raw_os_error() {
        Some(libc::ENOMEM) => match memlock::explains(paths, mapping.size) {
            Some(source) => MapError::Memlock {
                owner,
                range,
                source,
            },
            None => MapError::OutOfMemory { owner, range },
        },
        _ => MapError::Kernel {
            what,
            owner,
            range,
            source,
        },
    }
}

/// Reads a `vfio_iommu_type1_info` and the capabilities behind it.
fn parse_limits(answer: &[u8]) -> Limits {
    let mut limits = Limits::default();
    let flags = info::u32_at(answer, std::mem::offset_of!(vfio_iommu_type1_info, flags));
    if flags.is_none_or(|flags| flags & VFIO_IOMMU_INFO_CAPS == 0) {
        return limits;
    }
    let first = info::u32_at(
        answer,
        std::mem::offset_of!(vfio_iommu_type1_info, cap_offset),
    )
    .unwrap_or(0);
    let capability = |id: u32| info::capability(answer, first, id as u16);
    if let Some(capability) = capability(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
        type Cap = vfio_iommu_type1_info_cap_iova_range;
        let count = info::u32_at(capability, std::mem::offset_of!(Cap, nr_iovas)).unwrap_or(0);
        limits.ranges = normalise(
            info::pairs_at(capability, std::mem::offset_of!(Cap, iova_ranges), count)
                .into_iter()
                .map(|(start, last)| IovaRange { start, last })
                .collect(),
        );
    }
    limits.available = capability(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL).and_then(|capability| {
        let offset = std::mem::offset_of!(vfio_iommu_type1_info_dma_avail, avail);
        info::u32_at(capability, offset)
    });
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(flags: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0_u32, flags, 0x1000, 0, 24, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(3_u16.to_ne_bytes());
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(40_u32.to_ne_bytes());
        bytes.extend(65_535_u32.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(1_u16.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(2_u32.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        for value in [0xfef0_0000_u64, (1 << 39) - 1, 0, 0xfedf_ffff] {
            bytes.extend(value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn the_ranges_and_the_limit_of_mappings_are_read_from_the_chain() {
        let limits = parse_limits(&answer(VFIO_IOMMU_INFO_CAPS));
        assert_eq!(
            limits
                .ranges
                .iter()
                .map(|r| (r.start, r.last))
                .collect::<Vec<_>>(),
            [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)]
        );
        assert_eq!(limits.available, Some(65_535));
    }

    #[test]
    fn a_kernel_that_says_nothing_limits_nothing() {
        assert_eq!(parse_limits(&answer(0)), Limits::default());
        assert_eq!(parse_limits(&[]), Limits::default());
    }
}
