//! RAM that can come while the guest runs: in which pieces, and by which blocks.

use super::memory::{BlockOf, check_plugged};
use super::zones::InvalidZone;
use super::{MemoryConfig, MemoryZoneConfig, VmConfig};

/// A piece of RAM that can come while the guest runs: one of all RAM (`--memory hotplug_size=`), or one for each zone that
/// says so (`--memory-zone hotplug_size=`), in the order of the zones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PluggableConfig {
    /// The zone that it belongs to, by its place among the zones; none where it is of all RAM.
    pub zone: Option<usize>,
    /// Bytes that can come; more than 0.
    pub size: u64,
    /// Bytes of a block by which they come: a power of two. All pieces together have
    /// [`MOST_BLOCKS`](super::MOST_BLOCKS) at most.
    pub block: u64,
}

impl PluggableConfig {
    /// All pieces of a VM with such memory.
    #[must_use]
    pub fn all(memory: &MemoryConfig, zones: &[MemoryZoneConfig]) -> Vec<Self> {
        let of_all = memory.pluggable().map(|size| Self {
            zone: None,
            size,
            block: memory.block_size(),
        });
        let total = zones.iter().filter_map(MemoryZoneConfig::pluggable);
        let total = total.fold(0, u64::saturating_add);
        let of_zones = zones.iter().enumerate().filter_map(|(at, zone)| {
            Some(Self {
                zone: Some(at),
                size: zone.pluggable()?,
                block: zone.block_size(total),
            })
        });
        of_all.into_iter().chain(of_zones).collect()
    }
}

/// What is to be known of a VM's RAM to find room for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryToPlan {
    /// Bytes that the guest starts with.
    pub size: u64,
    /// Bytes of the largest of the huge pages that it is said to be made of: what RAM goes round ends with such.
    pub page: Option<u64>,
    /// Bytes of each piece that can come.
    pub pluggable: Vec<u64>,
}

impl MemoryToPlan {
    /// That of a VM with such memory.
    #[must_use]
    pub fn new(memory: &MemoryConfig, zones: &[MemoryZoneConfig]) -> Self {
        let of_all = memory.hugepage_size.filter(|_| memory.hugepages);
        let of_zones = zones.iter().filter(|zone| zone.hugepages);
        let of_zones = of_zones.filter_map(|zone| zone.hugepage_size);
        let pieces = PluggableConfig::all(memory, zones).into_iter();
        Self {
            size: memory.size,
            page: of_zones.chain(of_all).max(),
            pluggable: pieces.map(|piece| piece.size).collect(),
        }
    }
}

impl MemoryZoneConfig {
    /// Bytes that can come to it while the guest runs; nothing where none can.
    #[must_use]
    pub fn pluggable(&self) -> Option<u64> {
        self.hotplug_size.filter(|size| *size > 0)
    }

    /// Bytes that the guest can have of it at most.
    #[must_use]
    pub fn most(&self) -> u64 {
        self.size.saturating_add(self.pluggable().unwrap_or(0))
    }

    /// Bytes of its blocks, where `total` bytes can come to all zones.
    fn block_size(&self, total: u64) -> u64 {
        BlockOf {
            acpi: false,
            huge_page: self.hugepage_size.filter(|_| self.hugepages),
            total,
        }
        .size()
    }

    /// Bytes that have to be plugged for the guest to have `bytes` bytes of this zone, with those that it started with.
    ///
    /// # Errors
    /// [`ZoneSizeError`]
    pub fn to_plug(&self, bytes: u64) -> Result<u64, ZoneSizeError> {
        let (zone, least, most) = (&self.id, self.size, self.most());
        if self.pluggable().is_none() && bytes != least {
            return Err(ZoneSizeError::Fixed {
                zone: zone.clone(),
                size: least,
            });
        }
        match bytes.checked_sub(least) {
            Some(more) if bytes <= most => Ok(more),
            _ => Err(ZoneSizeError::Range {
                zone: zone.clone(),
                bytes,
                least,
                most,
            }),
        }
    }
}

/// A zone cannot have so much RAM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ZoneSizeError {
    /// memory zone `{zone}` has {size} bytes of RAM, and no room for another amount
    #[error(
        "memory zone `{zone}` has {size} bytes of RAM, and no room for another amount: start the VM with \
         hotplug_size=SIZE of that --memory-zone (memory.zones.hotplug_size)"
    )]
    Fixed {
        /// The zone.
        zone: String,
        /// Bytes.
        size: u64,
    },
    /// memory zone `{zone}` can have {least} to {most} bytes of RAM, and not {bytes}
    #[error(
        "memory zone `{zone}` can have {least} to {most} bytes of RAM, and not {bytes}: what it started with (size=) \
         stays, and hotplug_size= of its --memory-zone is what can come"
    )]
    Range {
        /// The zone.
        zone: String,
        /// What was asked for.
        bytes: u64,
        /// What it started with.
        least: u64,
        /// That, and what can come.
        most: u64,
    },
}

impl VmConfig {
    /// The pieces of RAM that can come while the guest runs.
    #[must_use]
    pub fn pluggable(&self) -> Vec<PluggableConfig> {
        PluggableConfig::all(&self.memory, &self.memory_zone)
    }

    /// Bytes of RAM that the guest can have at most.
    #[must_use]
    pub fn most_memory(&self) -> u64 {
        let pieces = self.pluggable().into_iter();
        let sizes = pieces.map(|piece| piece.size);
        sizes.fold(self.memory.size, u64::saturating_add)
    }

    /// The zone of this name.
    ///
    /// # Errors
    /// [`NoZoneError`]
    pub fn zone(&self, id: &str) -> Result<&MemoryZoneConfig, NoZoneError> {
        let mut zones = self.memory_zone.iter();
        zones.find(|zone| zone.id == id).ok_or_else(|| {
            let names = self.memory_zone.iter().map(|zone| format!("`{}`", zone.id));
            NoZoneError {
                id: id.to_owned(),
                have: names.collect::<Vec<_>>().join(", "),
            }
        })
    }

    /// That RAM can come to zones as they say.
    ///
    /// # Errors
    /// [`InvalidZone`]
    pub(super) fn validate_zones_hotplug(&self) -> Result<(), InvalidZone> {
        let pieces = self.pluggable();
        for (at, zone) in self.memory_zone.iter().enumerate() {
            let id = || zone.id.clone();
            let piece = pieces.iter().find(|piece| piece.zone == Some(at));
            if piece.is_some() && self.memory.pluggable().is_some() {
                return Err(InvalidZone::HotplugOfAll(id()));
            }
            if piece.is_some() && !self.memory.comes_by_virtio() {
                return Err(InvalidZone::ByAcpi(id()));
            }
            let size = piece.map(|piece| piece.size);
            let block = piece.map_or(1, |piece| piece.block);
            let checked = check_plugged(size, zone.hotplugged_size, block);
            checked.map_err(|why| InvalidZone::Hotplug { id: id(), why })?;
        }
        Ok(())
    }
}

/// There is no zone of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the VM has no memory zone `{id}`, {}", have_only(have))]
pub struct NoZoneError {
    id: String,
    /// Those that there are.
    have: String,
}

fn have_only(names: &str) -> String {
    match names {
        "" => "nor any other: zones are made with --memory-zone (memory.zones)".to_owned(),
        names => format!("only {names}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{HotplugMethod, InvalidHotplug, MOST_BLOCKS};
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn zone(id: &str, more: u64) -> MemoryZoneConfig {
        MemoryZoneConfig {
            hotplug_size: Some(more),
            ..MemoryZoneConfig::new(id, GIB)
        }
    }

    fn vm(zones: &[MemoryZoneConfig]) -> VmConfig {
        let mut config = VmConfig {
            memory_zone: zones.to_vec(),
            ..VmConfig::default()
        };
        config.memory.size = 0;
        config.memory.hotplug_method = HotplugMethod::VirtioMem;
        config.sum_zones();
        config
    }

    #[test]
    fn ram_that_can_come_is_of_all_or_of_each_zone_that_says_so() {
        let mut second = zone("b", 2 * GIB);
        second.hotplugged_size = Some(128 * MIB);
        let config = vm(&[MemoryZoneConfig::new("a", GIB), second, zone("c", 0)]);
        config.validate_parts().unwrap();
        let of_zone = PluggableConfig {
            zone: Some(1),
            size: 2 * GIB,
            block: 2 * MIB,
        };
        assert_eq!(config.pluggable(), [of_zone]);
        assert_eq!(config.most_memory(), 5 * GIB);
        let mut whole = VmConfig::default();
        assert_eq!(
            (whole.pluggable().len(), whole.most_memory()),
            (0, 512 * MIB)
        );
        // By ACPI, of any number of bytes.
        whole.memory.hotplug_size = Some(GIB + 4096);
        let of_all = PluggableConfig {
            zone: None,
            size: GIB,
            block: 128 * MIB,
        };
        assert_eq!(whole.pluggable(), [of_all]);
        assert_eq!(whole.most_memory(), GIB + 512 * MIB);
    }

    #[test]
    fn a_zones_size_is_what_it_started_with_and_what_can_come() {
        let config = vm(&[zone("a", GIB), MemoryZoneConfig::new("b", GIB)]);
        let sized = |id: &str, bytes| config.zone(id).unwrap().to_plug(bytes);
        assert_eq!(sized("a", GIB), Ok(0));
        assert_eq!(sized("a", GIB + 2 * MIB), Ok(2 * MIB));
        assert_eq!(sized("a", 2 * GIB), Ok(GIB));
        assert_eq!(sized("b", GIB), Ok(0));
        for (id, bytes, words) in [
            ("a", 0, "can have 1073741824 to 2147483648 bytes"),
            ("a", GIB - MIB, "and not 1072693248"),
            ("a", 2 * GIB + MIB, "hotplug_size="),
            ("a", u64::MAX, "zone `a`"),
            ("b", GIB + MIB, "memory.zones.hotplug_size"),
            ("b", 0, "has 1073741824 bytes"),
        ] {
            let why = sized(id, bytes).unwrap_err().to_string();
            assert!(why.contains(words), "{why}");
        }
        let why = config.zone("c").unwrap_err().to_string();
        assert!(why.ends_with("no memory zone `c`, only `a`, `b`"), "{why}");
        let why = VmConfig::default().zone("mem0").unwrap_err().to_string();
        assert!(why.contains("--memory-zone"), "{why}");
    }

    #[test]
    fn ram_that_cannot_come_to_a_zone_is_refused_by_name_with_what_can() {
        let refused = |config: VmConfig| config.validate_parts().unwrap_err().to_string();
        let mut by_acpi = vm(&[zone("a", GIB)]);
        by_acpi.memory.hotplug_method = HotplugMethod::Acpi;
        let why = refused(by_acpi);
        assert!(
            why.contains("id=a") && why.contains("hotplug_method=virtio-mem"),
            "{why}"
        );
        let mut twice = vm(&[zone("a", GIB)]);
        twice.memory.hotplug_size = Some(GIB);
        let why = refused(twice);
        assert!(why.contains("--memory hotplug_size="), "{why}");
        let why = refused(vm(&[zone("a", GIB), zone("b", GIB + MIB)]));
        assert!(
            why.contains("id=b") && why.contains("134217728 bytes"),
            "{why}"
        );
        let plugged = |size, plugged| {
            let mut zone = MemoryZoneConfig::new("a", GIB);
            (zone.hotplug_size, zone.hotplugged_size) = (size, Some(plugged));
            vm(&[zone])
        };
        plugged(Some(GIB), GIB).validate_parts().unwrap();
        plugged(None, 0).validate_parts().unwrap();
        for (config, words) in [
            (plugged(Some(GIB), GIB + 2 * MIB), "no more than"),
            (plugged(Some(GIB), MIB), "multiple of 2097152"),
            (plugged(None, GIB), "needs hotplug_size="),
        ] {
            let why = refused(config);
            assert!(why.contains("id=a") && why.contains(words), "{why}");
        }
        let mut huge = zone("a", GIB + 128 * MIB);
        (huge.hugepages, huge.hugepage_size) = (true, Some(GIB));
        let why = vm(&[huge]).validate_zones_hotplug();
        assert!(
            matches!(
                why,
                Err(InvalidZone::Hotplug {
                    why: InvalidHotplug::Uneven { step: GIB, .. },
                    ..
                })
            ),
            "{why:?}"
        );
    }

    #[test]
    fn room_is_found_for_each_piece_and_with_the_largest_page() {
        let page = |id: &str, page| MemoryZoneConfig {
            hugepages: true,
            hugepage_size: Some(page),
            ..zone(id, GIB)
        };
        let config = vm(&[page("a", 2 * MIB), page("b", GIB), zone("c", 2 * GIB)]);
        let expected = MemoryToPlan {
            size: 3 * GIB,
            page: Some(GIB),
            pluggable: vec![GIB, GIB, 2 * GIB],
        };
        assert_eq!(
            MemoryToPlan::new(&config.memory, &config.memory_zone),
            expected
        );
    }

    proptest! {
        /// However many zones there are, and however large, blocks are few enough to be mapped one by one.
        #[test]
        fn all_zones_together_have_no_more_blocks_than_can_be_mapped(
            sizes in prop::collection::vec(0_u64..1 << 26, 1..64),
        ) {
            let zones: Vec<_> = sizes.iter().map(|mib| zone("a", mib << 20)).collect();
            let config = vm(&zones);
            let pieces = config.pluggable();
            let blocks: u64 = pieces.iter().map(|piece| piece.size.div_ceil(piece.block)).sum();
            prop_assert!(blocks <= MOST_BLOCKS + 64, "{blocks}");
            prop_assert!(pieces.iter().all(|piece| piece.block.is_power_of_two()));
        }
    }
}
