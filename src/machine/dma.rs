//! What assigned devices reach by DMA: the guest's RAM, in the VM's DMA space.

use std::fmt;
use std::sync::Arc;

use busway_iommu::{Access, DmaSpace, HostVa, Iova};

use crate::memory::{Region, RegionError, RegionKind, RegionListener};

/// Keeps one DMA space in step with the list of regions: guest-physical addresses are its I/O virtual
/// ones.
pub(super) struct DmaListener {
    space: Arc<dyn DmaSpace>,
}

impl fmt::Debug for DmaListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DmaListener").field(&self.space).finish()
    }
}

impl DmaListener {
    pub(super) fn new(space: Arc<dyn DmaSpace>) -> Self {
        Self { space }
    }
}

impl RegionListener for DmaListener {
    fn name(&self) -> &str {
        "DMA space of the assigned devices"
    }

    /// Device memory is left out: nothing depends on peer-to-peer DMA yet.
    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        match region.kind() {
            RegionKind::Ram => Ok(self.space.map(
                Iova(region.guest()),
                HostVa(region.host()),
                region.size(),
                Access::ReadWrite,
                region.name(),
            )?),
            RegionKind::Device => Ok(()),
        }
    }

    fn removed(&self, region: &Arc<Region>) {
        if region.kind() == RegionKind::Ram
            && let Err(error) = self.space.unmap(Iova(region.guest()), region.size())
        {
            log::error!("{error}; devices may still reach it");
        }
    }
}
