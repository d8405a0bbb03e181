//! Memory zones: parts of the guest's RAM, each made as it was asked for and of memory of one of the host's nodes.

use serde::{Deserialize, Serialize};

use super::limits::MEMORY_STEP;
use super::validate::is_id;
use super::{InvalidHotplug, MemoryConfig, MemoryToPlan, VmConfig};

/// The most zones: as many as there can be nodes.
const MAX_ZONES: usize = 64;

/// One more than the highest number of a host's node that can be said. Linux, arch/x86/Kconfig, `NODES_SHIFT`: 10 at
/// most.
pub const MAX_HOST_NODES: u32 = 1024;

/// `--memory-zone`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryZoneConfig {
    /// Name, by which `--numa memory_zones=` calls it; unique among zones.
    pub id: String,
    /// Bytes of RAM.
    pub size: u64,
    /// The host's NUMA node that has its memory (mbind(2), `MPOL_BIND`); any where absent.
    #[serde(default)]
    pub host_numa_node: Option<u32>,
    /// Map it shared, so that another process can map it. Zones are shared as well where all RAM is.
    #[serde(default)]
    pub shared: bool,
    /// Take it from hugetlbfs.
    #[serde(default)]
    pub hugepages: bool,
    /// Bytes of a huge page; the host's default where absent.
    #[serde(default)]
    pub hugepage_size: Option<u64>,
    /// Touch it before the guest starts. Absent: as [`MemoryConfig::prefault`] says of all RAM.
    #[serde(default)]
    pub prefault: Option<bool>,
    /// Bytes of RAM that can come to it while the guest runs, beside `size`, by virtio-mem.
    #[serde(default)]
    pub hotplug_size: Option<u64>,
    /// Bytes of `hotplug_size` that the guest is to have from its start on.
    #[serde(default)]
    pub hotplugged_size: Option<u64>,
}

impl MemoryZoneConfig {
    /// A zone of which only this was said.
    #[must_use]
    pub fn new(id: &str, size: u64) -> Self {
        Self {
            id: id.to_owned(),
            size,
            host_numa_node: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: None,
            hotplug_size: None,
            hotplugged_size: None,
        }
    }
}

/// Why RAM cannot be made of such zones.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidZone {
    /// id=`{0}` must have a character, and no spaces, commas or `/`
    #[error("id=`{0}` must have a character, and no spaces, commas or `/`")]
    Id(String),
    /// id={0} is given twice
    #[error("id={0} is given twice: give each zone a name of its own")]
    Twice(String),
    /// there are {0} zones, and can be 64
    #[error("there are {0} zones, and can be {MAX_ZONES}: make fewer")]
    Many(usize),
    /// id={id}: size={size} must be a multiple of 1 MiB, and not 0
    #[error("id={id}: size={size} must be a multiple of 1 MiB, and not 0")]
    Size {
        /// The zone.
        id: String,
        /// Bytes.
        size: u64,
    },
    /// id={id}: hugepage_size={size}: a huge page's size is a power of two, 2M or more, of which the zone has whole ones
    #[error(
        "id={id}: hugepage_size={size}: a huge page's size is a power of two, 2M or more, and size= is a multiple of it"
    )]
    HugePageSize {
        /// The zone.
        id: String,
        /// Bytes.
        size: u64,
    },
    /// id={0}: hugepage_size= needs hugepages=on beside it
    #[error("id={0}: hugepage_size= needs hugepages=on beside it")]
    HugePageSizeAlone(String),
    /// id={id}: host_numa_node={node}: a host's nodes are numbered from 0 to 1023
    #[error(
        "id={id}: host_numa_node={node}: a host's nodes are numbered from 0 to {}",
        MAX_HOST_NODES - 1
    )]
    HostNode {
        /// The zone.
        id: String,
        /// What was said.
        node: u32,
    },
    /// the zones have {sum} bytes together, and --memory size={size}
    #[error(
        "the zones have {sum} bytes together, and --memory size={size}: leave size= out there, which is then their \
         sum, or say {sum}"
    )]
    Sum {
        /// Bytes of all zones.
        sum: u64,
        /// Bytes that were asked for.
        size: u64,
    },
    /// --memory hugepages=on beside zones
    #[error(
        "--memory hugepages=on beside --memory-zone: each zone says what it is made of; say hugepages=on of the zones \
         instead"
    )]
    HugePagesOfAll,
    /// --memory hotplug_size= beside hotplug_size= of zone {0}
    #[error(
        "id={0}: hotplug_size= beside --memory hotplug_size=: RAM comes to all of it or to each zone by itself; leave \
         hotplug_size= and hotplugged_size= of --memory out"
    )]
    HotplugOfAll(String),
    /// id={0}: hotplug_size= needs --memory hotplug_method=virtio-mem
    #[error(
        "id={0}: hotplug_size= needs --memory hotplug_method=virtio-mem (memory.hotplug_method VirtioMem) beside it: \
         RAM does not come to a zone by ACPI"
    )]
    ByAcpi(String),
    /// id={id}: {why}
    #[error("id={id}: {why}")]
    Hotplug {
        /// The zone.
        id: String,
        /// What is wrong.
        why: InvalidHotplug,
    },
}

impl VmConfig {
    /// Has RAM be as large as its zones are together, where there are zones and no size was said.
    pub fn sum_zones(&mut self) {
        if self.memory.size == 0 && !self.memory_zone.is_empty() {
            self.memory.size = self.zones_size();
        }
    }

    fn zones_size(&self) -> u64 {
        let sizes = self.memory_zone.iter().map(|zone| zone.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Whether some RAM is taken from hugetlbfs.
    #[must_use]
    pub fn has_huge_pages(&self) -> bool {
        self.memory.hugepages || self.memory_zone.iter().any(|zone| zone.hugepages)
    }

    /// What is to be known of RAM to find room for it.
    #[must_use]
    pub fn memory_to_plan(&self) -> MemoryToPlan {
        MemoryToPlan::new(&self.memory, &self.memory_zone)
    }

    /// That RAM can be made of its zones, where there are any.
    ///
    /// # Errors
    /// [`InvalidZone`]
    pub(super) fn validate_zones(&self) -> Result<(), InvalidZone> {
        let zones = &self.memory_zone;
        if zones.is_empty() {
            return Ok(());
        }
        if zones.len() > MAX_ZONES {
            return Err(InvalidZone::Many(zones.len()));
        }
        for (index, zone) in zones.iter().enumerate() {
            if !is_id(&zone.id) {
                return Err(InvalidZone::Id(zone.id.clone()));
            }
            if zones.iter().take(index).any(|other| other.id == zone.id) {
                return Err(InvalidZone::Twice(zone.id.clone()));
            }
            zone.validate()?;
        }
        let MemoryConfig {
            size, hugepages, ..
        } = self.memory;
        if hugepages {
            return Err(InvalidZone::HugePagesOfAll);
        }
        match self.zones_size() {
            sum if sum != size => Err(InvalidZone::Sum { sum, size }),
            _ => self.validate_zones_hotplug(),
        }
    }
}

impl MemoryZoneConfig {
    fn validate(&self) -> Result<(), InvalidZone> {
        let (id, size) = (self.id.clone(), self.size);
        if size == 0 || !size.is_multiple_of(MEMORY_STEP) {
            return Err(InvalidZone::Size { id, size });
        }
        if let Some(node) = self.host_numa_node.filter(|node| *node >= MAX_HOST_NODES) {
            return Err(InvalidZone::HostNode { id, node });
        }
        match self.hugepage_size {
            Some(_) if !self.hugepages => Err(InvalidZone::HugePageSizeAlone(id)),
            Some(page)
                if !page.is_power_of_two() || page < 2 << 20 || !size.is_multiple_of(page) =>
            {
                Err(InvalidZone::HugePageSize { id, size: page })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn vm(zones: Vec<MemoryZoneConfig>) -> VmConfig {
        let mut config = VmConfig {
            memory_zone: zones,
            ..VmConfig::default()
        };
        config.memory.size = 0;
        config.sum_zones();
        config
    }

    #[test]
    fn ram_is_the_sum_of_its_zones_where_no_size_was_said() {
        let zones = || {
            vec![
                MemoryZoneConfig::new("a", GIB),
                MemoryZoneConfig::new("b", 2 * GIB),
            ]
        };
        let mut config = vm(zones());
        assert_eq!(config.memory.size, 3 * GIB);
        assert_eq!(config.validate_zones(), Ok(()));
        config.memory.size = 2 * GIB;
        config.sum_zones();
        let why = config.validate_zones().unwrap_err().to_string();
        assert!(why.contains("have 3221225472 bytes together"), "{why}");
        let mut without = VmConfig::default();
        without.sum_zones();
        assert_eq!(without, VmConfig::default());
    }

    #[test]
    fn a_zone_that_cannot_be_is_named_with_what_can() {
        let zone = |change: fn(&mut MemoryZoneConfig)| {
            let mut zone = MemoryZoneConfig::new("a", GIB);
            change(&mut zone);
            vec![zone]
        };
        for (zones, words) in [
            (zone(|zone| zone.id = "a b".into()), "id=`a b`"),
            (zone(|zone| zone.size = 0), "not 0"),
            (zone(|zone| zone.size += 4096), "multiple of 1 MiB"),
            (zone(|zone| zone.size = u64::MAX), "multiple of 1 MiB"),
            (zone(|zone| zone.host_numa_node = Some(1024)), "0 to 1023"),
            (
                zone(|zone| zone.hugepage_size = Some(2 << 20)),
                "hugepages=on beside",
            ),
            (
                zone(|zone| (zone.hugepages, zone.hugepage_size) = (true, Some(2 * GIB))),
                "a multiple of it",
            ),
            (
                zone(|zone| (zone.hugepages, zone.hugepage_size) = (true, Some(4096))),
                "2M or more",
            ),
            (
                vec![MemoryZoneConfig::new("a", GIB); 2],
                "id=a is given twice",
            ),
            (
                vec![MemoryZoneConfig::new("a", GIB); 65],
                "there are 65 zones",
            ),
        ] {
            let why = vm(zones).validate_zones().unwrap_err().to_string();
            assert!(why.contains(words), "{why}");
        }
        let mut config = vm(zone(|_| ()));
        config.memory.hugepages = true;
        assert_eq!(config.validate_zones(), Err(InvalidZone::HugePagesOfAll));
    }
}
