//! RAM that can come while the guest runs: its pieces, where each lies to the guest, and what each is made of.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::backing::{Backing, map_error};
use super::error::RamError;
use super::huge_blocks::HugeBlocks;
use super::pluggable::Pages;
use super::{Pluggable, Ram, Region, Regions};
use crate::arch::layout;
use crate::config::{MemoryConfig, MemoryZoneConfig, PluggableConfig};

/// A piece of RAM that is plugged and unplugged by blocks.
#[derive(Clone, Debug)]
pub(super) struct PluggableRam {
    /// The zone that it is of, by its place among the zones; none where it is of all RAM.
    zone: Option<usize>,
    pub(super) memory: Arc<GuestRegionMmap>,
    pub(super) region: Arc<Region>,
    pages: Pages,
}

impl PluggableRam {
    /// At `range`, whole blocks of `block` bytes.
    fn map(
        zone: Option<usize>,
        backing: &Backing,
        range: &Range<u64>,
        block: u64,
    ) -> Result<Self, RamError> {
        let memory = backing.map(range)?;
        let huge = backing.huge_page.map(|page| {
            let made = HugeBlocks::new(&memory, page, backing.host_node);
            made.map_err(map_error("mmap", memory.len()))
        });
        let region = Region::pluggable("pluggable guest RAM", memory.clone(), block);
        Ok(Self {
            zone,
            memory,
            region: Arc::new(region),
            pages: match huge.transpose()? {
                Some(huge) => Pages::Huge(Arc::new(huge)),
                None if backing.prefault == Some(true) => Pages::Populated,
                None => Pages::Ordinary,
            },
        })
    }

    /// All pieces that can come, behind RAM that ends at `top` and is made as `backings` say, round the `holes`.
    pub(super) fn map_all(
        config: &MemoryConfig,
        zones: &[MemoryZoneConfig],
        backings: &[Backing],
        top: u64,
        holes: &[Range<u64>],
    ) -> Result<Vec<Self>, RamError> {
        let mut pieces = Vec::new();
        for piece in PluggableConfig::all(config, zones) {
            let of_zone = piece.zone.and_then(|zone| backings.get(zone));
            let backing = match of_zone {
                Some(zone) => zone.by_blocks(),
                None => backing_of_all(config, backings).by_blocks(),
            };
            let block = piece.block.max(backing.huge_page.unwrap_or(0));
            // The host's own huge pages may be larger than those that a configuration was checked for.
            let blocks = piece.size.checked_div(block).unwrap_or(0);
            if blocks > 0 {
                pieces.push((piece.zone, backing, block, blocks.saturating_mul(block)));
            }
        }
        let sizes = pieces.iter().map(|(.., size)| *size);
        let ranges = layout::pluggable_ranges(sizes, top, holes);
        let places = pieces.iter().zip(&ranges);
        places
            .map(|((zone, backing, block, _), range)| Self::map(*zone, backing, range, *block))
            .collect()
    }

    fn range(&self) -> Range<u64> {
        let start = self.region.guest();
        start..start.saturating_add(self.region.size())
    }
}

impl Ram {
    /// What of it comes and goes by blocks, for the list that it is on: each piece with the place of its zone among the
    /// zones, or none where it is of all RAM.
    pub fn pluggable(
        &self,
        regions: &Arc<Regions>,
    ) -> impl Iterator<Item = (Option<usize>, Pluggable)> {
        self.pluggable.iter().map(|piece| {
            let pages = piece.pages.clone();
            let made = Pluggable::new(regions, &piece.region, &piece.memory, pages);
            (piece.zone, made)
        })
    }

    /// Where RAM can be plugged, to the guest, in ascending order. It lies behind all other RAM.
    #[must_use]
    pub fn pluggable_ranges(&self) -> Vec<Range<u64>> {
        self.pluggable.iter().map(PluggableRam::range).collect()
    }

    /// The same, each with the place of its zone among the zones; none where it is of all RAM.
    pub fn pluggable_zones(&self) -> impl Iterator<Item = (Option<usize>, Range<u64>)> {
        let pieces = self.pluggable.iter();
        pieces.map(|piece| (piece.zone, piece.range()))
    }
}

/// What RAM is made of that can be plugged and is of no zone: pages of the node that the RAM before it is of, huge ones where
/// all RAM is of such (`hugepages=` of `--memory`, which zones stand in place of).
fn backing_of_all(config: &MemoryConfig, backings: &[Backing]) -> Backing {
    let last = backings.last();
    let huge_page = last.and_then(|backing| backing.huge_page);
    let huge_page = huge_page.filter(|_| config.hugepages);
    Backing {
        host_node: last.and_then(|backing| backing.host_node),
        ..Backing::of_all(config, huge_page)
    }
}

/// What the kernel says of the policy of a mapping at this address; nothing where it knows no nodes.
#[cfg(test)]
pub(super) fn policy(host: usize) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/numa_maps").ok()?;
    let line = maps
        .lines()
        .find(|line| line.starts_with(&format!("{host:x} ")))?;
    line.split_whitespace().nth(1).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::HotplugMethod;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn what_can_come_to_a_zone_is_made_as_it_says_and_lies_behind_all_ram_piece_by_piece() {
        let zone = |id: &str, more: u64| MemoryZoneConfig {
            hotplug_size: Some(more * MIB),
            ..MemoryZoneConfig::new(id, 4 * MIB)
        };
        let mut zones = [zone("a", 128), zone("b", 0), zone("c", 256), zone("d", 128)];
        if Path::new("/sys/devices/system/node/node0").exists() {
            zones[0].host_numa_node = Some(0);
        }
        (zones[2].shared, zones[2].prefault) = (true, Some(true));
        let config = MemoryConfig {
            size: 16 * MIB,
            hotplug_method: HotplugMethod::VirtioMem,
            ..Default::default()
        };
        let ram = Ram::around(&config, &zones, false, layout::MMIO32_START, &[]).unwrap();
        let expected = [
            (Some(0), 4 * GIB..4 * GIB + 128 * MIB),
            (Some(2), 6 * GIB..6 * GIB + 256 * MIB),
            (Some(3), 8 * GIB..8 * GIB + 128 * MIB),
        ];
        assert_eq!(ram.pluggable_zones().collect::<Vec<_>>(), expected);
        // None of it is RAM that the guest starts with.
        assert_eq!(ram.size(), 16 * MIB);
        assert_eq!(ram.guest_ranges(), std::slice::from_ref(&(0..16 * MIB)));
        let regions = Arc::<Regions>::default();
        ram.regions()
            .for_each(|region| regions.add(region).unwrap());
        let pieces = ram.regions().filter(|region| region.is_pluggable());
        let shared: Vec<_> = pieces.map(|region| region.file().is_some()).collect();
        assert_eq!(shared, [false, true, false]);
        for (piece, memory) in ram.pluggable.iter().zip(ram.pluggable(&regions)) {
            assert_eq!(piece.zone, memory.0);
            let populated = matches!(piece.pages, Pages::Populated);
            assert_eq!(populated, piece.zone == Some(2));
            let host = piece.memory.as_ptr() as usize;
            let bound = policy(host).is_none_or(|policy| policy == "bind:0");
            assert_eq!(
                bound,
                zones[0].host_numa_node.is_none() || piece.zone == Some(0)
            );
        }
        let all: Vec<_> = ram.pluggable(&regions).map(|(_, memory)| memory).collect();
        all[1].plug(&(0..4), || true).unwrap();
        let plugged: Vec<_> = all.iter().map(Pluggable::plugged).collect();
        assert_eq!(plugged, [0, 8 * MIB, 0]);
    }
}
