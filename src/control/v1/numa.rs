//! Memory zones and NUMA nodes in Cloud Hypervisor's words (`MemoryZoneConfig`, `NumaConfig`), as they come in
//! `vm.create` and are shown by `vm.info`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::lacking::{Asked, Fault, Lack};
use crate::config::{MemoryZoneConfig, NumaConfig, NumaDistance};

/// `MemoryZoneConfig`, as it comes.
#[derive(Debug, Deserialize)]
pub(super) struct AddZone {
    id: String,
    size: u64,
    host_numa_node: Option<u32>,
    shared: Option<bool>,
    hugepages: Option<bool>,
    hugepage_size: Option<u64>,
    prefault: Option<bool>,
    #[serde(default)]
    mergeable: Asked,
    #[serde(default)]
    file: Asked,
    hotplug_size: Option<u64>,
    hotplugged_size: Option<u64>,
}

impl AddZone {
    pub(super) fn into_config(self) -> Result<MemoryZoneConfig, Fault> {
        Lack::MergedPages.unless_asked(self.mergeable)?;
        Lack::ZoneFile.unless_asked(self.file)?;
        Ok(MemoryZoneConfig {
            id: self.id,
            size: self.size,
            host_numa_node: self.host_numa_node,
            shared: self.shared.unwrap_or(false),
            hugepages: self.hugepages.unwrap_or(false),
            hugepage_size: self.hugepage_size,
            // As of all RAM: clients write out the default.
            prefault: self.prefault.filter(|prefault| *prefault),
            hotplug_size: self.hotplug_size,
            hotplugged_size: self.hotplugged_size,
        })
    }
}

/// `MemoryZoneConfig`, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Zone {
    id: String,
    size: u64,
    mergeable: bool,
    shared: bool,
    hugepages: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugepage_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_numa_node: Option<u32>,
    prefault: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplug_size: Option<u64>,
    /// What the guest is to have of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplugged_size: Option<u64>,
    /// Beside Cloud Hypervisor's: bytes that the guest has, with those that it has plugged, where some can be.
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
}

impl Zone {
    /// `shared`: all RAM is. `prefault`: what is touched where the zone does not say it.
    pub(super) fn of(zone: &MemoryZoneConfig, shared: bool, prefault: bool) -> Self {
        Self {
            id: zone.id.clone(),
            size: zone.size,
            mergeable: false,
            shared: shared || zone.shared,
            hugepages: zone.hugepages,
            hugepage_size: zone.hugepage_size,
            host_numa_node: zone.host_numa_node,
            prefault: zone.prefault.unwrap_or(prefault),
            hotplug_size: zone.hotplug_size,
            hotplugged_size: zone.hotplugged_size,
            actual_size: None,
        }
    }

    /// What the guest has of it now, where that is among `sizes` by zones' names.
    pub(super) fn has(&mut self, sizes: &BTreeMap<String, u64>) {
        self.actual_size = sizes.get(&self.id).copied();
    }
}

/// `NumaConfig`, as it comes.
#[derive(Debug, Deserialize)]
pub(super) struct AddNode {
    guest_numa_id: u32,
    cpus: Option<Vec<u16>>,
    distances: Option<Vec<NumaDistance>>,
    memory_zones: Option<Vec<String>>,
    pci_segments: Option<Vec<u16>>,
    #[serde(default)]
    device_id: Asked,
}

impl AddNode {
    pub(super) fn into_config(self) -> Result<NumaConfig, Fault> {
        Lack::NumaDevice.unless_asked(self.device_id)?;
        Ok(NumaConfig {
            guest_numa_id: self.guest_numa_id,
            cpus: self.cpus.unwrap_or_default(),
            distances: self.distances.unwrap_or_default(),
            memory_zones: self.memory_zones.unwrap_or_default(),
            pci_segments: self.pci_segments.unwrap_or_default(),
        })
    }
}

/// `NumaConfig`, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Node {
    guest_numa_id: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cpus: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    distances: Vec<NumaDistance>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    memory_zones: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pci_segments: Vec<u16>,
}

impl From<&NumaConfig> for Node {
    fn from(node: &NumaConfig) -> Self {
        Self {
            guest_numa_id: node.guest_numa_id,
            cpus: node.cpus.clone(),
            distances: node.distances.clone(),
            memory_zones: node.memory_zones.clone(),
            pci_segments: node.pci_segments.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;
    use crate::control::json::parse;
    use crate::control::v1::config::Config;
    use crate::control::v1::create::CreateVm;
    use crate::machine::{Files, Info};

    fn config(body: &str) -> Result<VmConfig, Fault> {
        let body = parse::<CreateVm>(body.as_bytes())?;
        body.into_config(&Files::default())
            .map(|(config, _)| config)
    }

    const TWO_NODES: &str = r#"{"cpus":{"boot_vcpus":2},"memory":{"size":0,"zones":[
        {"id":"a","size":1073741824,"host_numa_node":1,"prefault":false,"file":null,"hotplug_size":null},
        {"id":"b","size":2147483648,"shared":true,"hugepages":true,"hugepage_size":1073741824,"prefault":true}]},
        "numa":[{"guest_numa_id":0,"cpus":[0],"memory_zones":["a"],"distances":[{"destination":1,"distance":31}]},
        {"guest_numa_id":1,"cpus":[1],"memory_zones":["b"],"pci_segments":[0],"device_id":null,"distances":null}]}"#;

    #[test]
    fn zones_and_nodes_come_in_cloud_hypervisors_words_and_are_shown_in_them() {
        let config = config(TWO_NODES).unwrap();
        config.validate_parts().unwrap();
        assert_eq!(config.memory.size, 3 << 30);
        let mut first = MemoryZoneConfig::new("a", 1 << 30);
        first.host_numa_node = Some(1);
        let mut second = MemoryZoneConfig::new("b", 2 << 30);
        (second.shared, second.hugepages) = (true, true);
        (second.hugepage_size, second.prefault) = (Some(1 << 30), Some(true));
        assert_eq!(config.memory_zone, [first, second]);
        assert_eq!(config.numa_node_of_segment(0), Some(1));
        assert_eq!(config.numa_distances(), [[10, 31], [31, 10]]);
        let shown = serde_json::to_value(Config::from(&config)).unwrap();
        assert_eq!(shown["memory"]["size"], 3_u64 << 30);
        assert_eq!(shown["memory"]["zones"][0]["host_numa_node"], 1);
        assert_eq!(shown["memory"]["zones"][1]["prefault"], true);
        assert_eq!(shown["numa"][0]["distances"][0]["distance"], 31);
        // What is shown can be asked for.
        let again = super::tests::config(&shown.to_string()).unwrap();
        assert_eq!(
            (again.memory_zone, again.numa),
            (config.memory_zone, config.numa)
        );
    }

    #[test]
    fn of_a_zone_and_a_node_what_busway_cannot_do_is_named() {
        for (body, lack) in [
            (
                r#"{"memory":{"zones":[{"id":"z","size":1,"file":"/dev/shm/z"}]}}"#,
                Lack::ZoneFile,
            ),
            (
                r#"{"memory":{"zones":[{"id":"z","size":1,"mergeable":true}]}}"#,
                Lack::MergedPages,
            ),
            (
                r#"{"numa":[{"guest_numa_id":0,"device_id":"d"}]}"#,
                Lack::NumaDevice,
            ),
        ] {
            assert_eq!(config(body), Err(Fault::Lacks(lack)), "{body}");
        }
    }

    #[test]
    fn zones_to_which_ram_can_come_are_shown_with_what_is_wanted_and_what_there_is() {
        let body = r#"{"memory":{"size":0,"hotplug_method":"VirtioMem","zones":[
            {"id":"a","size":1073741824,"hotplug_size":1073741824,"hotplugged_size":134217728},
            {"id":"b","size":1073741824,"hotplug_size":0}]}}"#;
        let config = config(body).unwrap();
        config.validate_parts().unwrap();
        assert_eq!(config.memory_zone[0].hotplug_size, Some(1 << 30));
        assert_eq!(config.memory_zone[0].hotplugged_size, Some(128 << 20));
        assert_eq!(config.most_memory(), 3 << 30);
        let info = Info {
            config,
            zones: BTreeMap::from([("a".to_owned(), (1 << 30) + (64 << 20))]),
            ..Info::default()
        };
        let shown = serde_json::to_value(Config::from(&info)).unwrap();
        let zones = &shown["memory"]["zones"];
        assert_eq!(zones[0]["hotplugged_size"], 128 << 20);
        assert_eq!(zones[0]["actual_size"], (1 << 30) + (64 << 20));
        assert!(zones[1].get("actual_size").is_none());
        // What was plugged is beside what zones and RAM are said to be.
        assert_eq!(shown["memory"]["size"], 2_u64 << 30);
        let again = super::tests::config(&shown.to_string()).unwrap();
        assert_eq!(again.memory_zone, info.config.memory_zone);
        again.validate_parts().unwrap();
    }

    #[test]
    fn zones_are_as_large_together_as_ram_is_shown_to_be_whatever_has_come_beside_them() {
        for method in ["Acpi", "VirtioMem"] {
            let body = r#"{"memory":{"hotplug_size":1073741824,"hotplugged_size":134217728,"hotplug_method":"METHOD",
                "zones":[{"id":"a","size":536870912},{"id":"b","size":536870912}]}}"#;
            let config = config(&body.replace("METHOD", method)).unwrap();
            config.validate_parts().unwrap();
            let shown = serde_json::to_value(Config::from(&config)).unwrap();
            assert_eq!(shown["memory"]["size"], 1 << 30, "{method}");
            assert_eq!(shown["memory"]["hotplugged_size"], 128 << 20, "{method}");
            let again = super::tests::config(&shown.to_string()).unwrap();
            again.validate_parts().unwrap();
            assert_eq!(again.memory, config.memory, "{method}");
        }
    }
}
