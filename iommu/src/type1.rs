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

use crate::ledger::{self, Ledger};
use crate::memlock::Accounting;
use crate::obstacle::{self, Obstacle};
use crate::ranges::normalise;
use crate::stats::Shown;
use crate::{
    DmaMapping, DmaSpace, Iova, IovaRange, MapError, OpenDmaBuf, OpenError, Stats, SysRoot, info,
    sys,
};

/// The module whose parameters rule Type1.
const MODULE: &str = "vfio_iommu_type1";

/// A VM's DMA mappings in a VFIO container.
#[derive(Debug)]
pub struct Container {
    file: File,
    paths: SysRoot,
    state: Mutex<State>,
    shown: Arc<Shown>,
}

#[derive(Debug, Default)]
struct State {
    ledger: Ledger,
    groups: usize,
    limits: Limits,
}

impl State {
    /// Where the kernel maps now; nothing while no group is attached, for then it maps nowhere.
    fn usable(&self) -> Option<Vec<IovaRange>> {
        (self.groups > 0).then(|| self.limits.ranges.clone())
    }
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
    pub fn open(paths: &SysRoot) -> Result<Arc<Self>, OpenError> {
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
        let state = State::default();
        Ok(Arc::new(Self {
            file,
            paths: paths.clone(),
            shown: state.ledger.shown(),
            state: Mutex::new(state),
        }))
    }

    /// Attaches a group. The first one starts the IOMMU and has everything mapped for it.
    pub(crate) fn attach(&self, group: &File, number: u32) -> Result<(), OpenError> {
        let mut state = self.lock();
        let refused = |error: io::Error| {
            // EINVAL has several causes; that the group reserves what is mapped can be looked up.
            if error.raw_os_error() == Some(libc::EINVAL)
                && let Some(conflict) = state.ledger.conflict(&self.paths, number)
            {
                return OpenError::Map(conflict);
            }
            OpenError::Attach {
                what: format!("IOMMU group {number}"),
                obstacle: Obstacle::attaching(&self.paths, MODULE, Some(number), error),
            }
        };
        sys::set_container(group, &self.file).map_err(refused)?;
        state.ledger.joined(number);
        match self.start(&mut state, number) {
            Ok(limits) => {
                state.limits = limits;
                state.groups += 1;
                Ok(())
            }
            Err(error) => {
                // With the last group the kernel drops whatever was mapped up to the failure.
                let _ = sys::unset_container(group);
                state.ledger.left(number);
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
                obstacle: Obstacle::attaching(&self.paths, MODULE, Some(number), error),
            })?;
        }
        let limits = self.limits().map_err(|source| OpenError::Kernel {
            what: format!("VFIO_IOMMU_GET_INFO with IOMMU group {number} attached"),
            source,
        })?;
        if first {
            let needed = state.ledger.mappings() as u64;
            check_room(&limits, needed, 0, "guest memory")?;
            state
                .ledger
                .map_all(&self.paths, &limits.ranges, |mapping, range| {
                    self.map_now(mapping, range)
                })?;
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
        state.ledger.left(number);
        if state.groups == 0 {
            state.limits = Limits::default();
        }
    }

    fn limits(&self) -> io::Result<Limits> {
        sys::type1_info(&self.file).map(|answer| parse_limits(&answer))
    }

    fn map_now(&self, mapping: &DmaMapping, range: IovaRange) -> Result<(), MapError> {
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
        .map_err(|source| {
            let accounting = Accounting::Process;
            ledger::refused(
                &self.paths,
                accounting,
                "VFIO_IOMMU_MAP_DMA",
                mapping,
                range,
                source,
            )
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaSpace for Container {
    /// Maps, or remembers for the first group to come. How many more mappings the kernel takes is
    /// asked first: its own answer, ENOSPC, says neither how many there are nor what to do.
    ///
    /// A device's memory is taken by its address: Type1 looks up what the page tables say.
    fn add(&self, mapping: DmaMapping, _dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError> {
        let mut state = self.lock();
        if state.groups > 0
            && let Ok(limits) = self.limits()
        {
            let made = state.ledger.mappings() as u64;
            check_room(&limits, 1, made, &mapping.owner)?;
        }
        let usable = state.usable();
        state
            .ledger
            .map(&self.paths, mapping, usable.as_deref(), |mapping, range| {
                self.map_now(mapping, range)
            })
    }

    fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError> {
        let mut state = self.lock();
        let call =
            (state.groups > 0).then_some(|| sys::unmap_dma(&self.file, iova.0, size).map(drop));
        state.ledger.unmap(iova, size, "VFIO_IOMMU_UNMAP_DMA", call)
    }

    fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
        Ok(self.lock().limits.ranges.clone())
    }

    fn room(&self) -> Option<u64> {
        let state = self.lock();
        let limits = (state.groups > 0).then(|| self.limits().ok())?;
        limits?.available.map(u64::from)
    }

    fn stats(&self) -> Stats {
        self.shown.seen()
    }
}

/// That the container takes `needed` more mappings, as far as the kernel says.
fn check_room(limits: &Limits, needed: u64, made: u64, owner: &str) -> Result<(), MapError> {
    match limits.available.map(u64::from) {
        Some(left) if left < needed => Err(MapError::TooMany {
            owner: owner.to_owned(),
            needed,
            left,
            made,
        }),
        _ => Ok(()),
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
    fn the_limit_of_mappings_is_foreseen_with_its_figures_and_the_way_out() {
        let limits = |available| Limits {
            available,
            ..Limits::default()
        };
        let room = |available, needed| check_room(&limits(available), needed, 7, "guest RAM");
        assert!(room(Some(2), 2).is_ok() && room(None, 1000).is_ok());
        assert_eq!(
            room(Some(1), 2).unwrap_err().to_string(),
            "guest RAM cannot be mapped for devices: 2 more mappings are needed and the VFIO \
             container takes 1 more beside the 7 it has; raise its limit before Busway starts: \
             `echo 65535 > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit`"
        );
    }

    #[test]
    fn a_kernel_that_says_nothing_limits_nothing() {
        assert_eq!(parse_limits(&answer(0)), Limits::default());
        assert_eq!(parse_limits(&[]), Limits::default());
    }
}
