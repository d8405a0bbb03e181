//! What a balloon is to be.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// `--balloon`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Bytes that it has at first; a multiple of 4096.
    pub size: u64,
    /// The guest takes memory out where it would end programs for want of it.
    pub deflate_on_oom: bool,
    /// The guest reports memory as it becomes free.
    pub free_page_reporting: bool,
    /// What becomes of it beside assigned devices, which reach all of RAM by DMA.
    pub vfio: BesideDevices,
    /// Bytes of a block of RAM, where the balloon goes back to the host by blocks: a power of two. The smallest of which RAM
    /// has no more than [`MOST_BLOCKS`], where absent.
    pub block: Option<u64>,
}

/// What becomes of a balloon beside assigned devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BesideDevices {
    /// It stays with the VM.
    #[default]
    Keep,
    /// Blocks that it has whole are unmapped from the devices, and go back to the host.
    Remap,
}

/// Bytes that a block can have.
pub const BALLOON_BLOCKS: RangeInclusive<u64> = (2 << 20)..=(128 << 20);
/// Blocks that RAM has at most where nobody says how large they are: a quarter of the mappings that a VFIO container
/// takes, unless it is told otherwise. Linux, drivers/vfio/vfio_iommu_type1.c, `dma_entry_limit`
const MOST_BLOCKS: u64 = 1 << 14;

impl BalloonConfig {
    /// Bytes of the blocks that RAM of `ram` bytes is mapped by for devices; nothing where it is mapped whole.
    #[must_use]
    pub fn block_size(&self, ram: u64) -> Option<u64> {
        if self.vfio == BesideDevices::Keep {
            return None;
        }
        let (least, most) = BALLOON_BLOCKS.into_inner();
        let fitting = ram.div_ceil(MOST_BLOCKS).next_power_of_two();
        Some(self.block.unwrap_or(fitting.clamp(least, most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_as_small_as_the_number_of_mappings_lets_them_be() {
        let mut balloon = BalloonConfig::default();
        assert_eq!(balloon.block_size(1 << 30), None);
        balloon.vfio = BesideDevices::Remap;
        for (ram, block) in [
            (1, 2),
            (32 << 10, 2),
            ((32 << 10) + 1, 4),
            (1 << 20, 64),
            (1 << 30, 128),
        ] {
            assert_eq!(
                balloon.block_size(ram << 20),
                Some(block << 20),
                "{ram} MiB"
            );
        }
        balloon.block = Some(8 << 20);
        assert_eq!(balloon.block_size(1 << 30), Some(8 << 20));
    }
}
