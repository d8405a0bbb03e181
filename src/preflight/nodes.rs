//! Whether a VM reaches across the host's NUMA nodes: a device on one, and its RAM or vCPUs bound to others.

use busway_host::{Finding, HostDevice, Level, NumaNode, Remedy, numa_nodes};

use super::Preflight;
use crate::config::{Placing, VmConfig};

/// What the findings are about.
const TOPIC: &str = "numa";

impl Preflight {
    /// Adds what is to be known of devices that are on another node of the host's than the VM of this configuration.
    pub fn across(&mut self, config: &VmConfig) {
        let nodes = numa_nodes(self.host.root());
        for device in &mut self.check.devices {
            let on = self.host.device(device.address);
            let on = on.and_then(|device: &HostDevice| device.numa_node);
            device
                .findings
                .extend(on.and_then(|on| across(config, on, &nodes)));
        }
    }
}

/// The finding of a device that is on node `on`, where there is one.
fn across(config: &VmConfig, on: u32, nodes: &[NumaNode]) -> Option<Finding> {
    if config.place == Placing::Auto {
        return None;
    }
    let zones = config.memory_zone.iter();
    let ram = distinct(zones.filter_map(|zone| zone.host_numa_node));
    let places = config.cpus.affinity.iter();
    let cpus = places.flat_map(|place| &place.host_cpus);
    let node_of = |cpu: &usize| {
        let node = nodes.iter().find(|node| node.cpus.contains(cpu))?;
        Some(node.number)
    };
    let vcpus = distinct(cpus.filter_map(node_of));
    let elsewhere: Vec<_> = [("RAM", ram), ("vCPUs", vcpus)]
        .into_iter()
        .filter(|(_, bound)| !bound.is_empty() && !bound.contains(&on))
        .map(|(what, bound)| format!("its {what} on {}", names(&bound)))
        .collect();
    if elsewhere.is_empty() {
        return None;
    }
    let text = format!(
        "the device is on NUMA node {on}, and the VM has {}: what they exchange goes from one node to another",
        elsewhere.join(" and ")
    );
    let remedy = "say --place auto in the place of --memory-zone, --numa and --cpus affinity=, or that node in these";
    Some(Finding::new(Level::Warning, TOPIC, text).remedy(Remedy::words(remedy)))
}

fn distinct(nodes: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut nodes: Vec<u32> = nodes.collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

/// `node 0`, `nodes 0, 2`
fn names(nodes: &[u32]) -> String {
    let numbers: Vec<_> = nodes.iter().map(u32::to_string).collect();
    let several = if nodes.len() == 1 { "" } else { "s" };
    format!("node{several} {}", numbers.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MemoryZoneConfig, VcpuAffinity};

    fn host() -> [NumaNode; 2] {
        [(0, [0, 1]), (1, [2, 3])].map(|(number, cpus)| NumaNode {
            number,
            cpus: cpus.to_vec(),
            ..NumaNode::default()
        })
    }

    fn vm(nodes: &[Option<u32>], cpus: &[usize]) -> VmConfig {
        let zone = |node: &Option<u32>| MemoryZoneConfig {
            host_numa_node: *node,
            ..MemoryZoneConfig::new("a", 1 << 30)
        };
        let mut config = VmConfig {
            memory_zone: nodes.iter().map(zone).collect(),
            ..VmConfig::default()
        };
        let places = (0_u16..).zip(cpus);
        config.cpus.affinity = places
            .map(|(vcpu, cpu)| VcpuAffinity {
                vcpu,
                host_cpus: vec![*cpu],
            })
            .collect();
        config
    }

    #[test]
    fn a_device_elsewhere_than_ram_or_vcpus_is_warned_of_with_the_nodes() {
        let said = |config: &VmConfig, on| across(config, on, &host()).map(|finding| finding.text);
        let text = said(&vm(&[Some(0), None], &[1, 0]), 1).unwrap();
        let expected = "the device is on NUMA node 1, and the VM has its RAM on node 0 and its vCPUs on node 0: ";
        assert!(text.starts_with(expected), "{text}");
        let text = said(&vm(&[], &[0, 1]), 1).unwrap();
        assert!(
            text.contains("its vCPUs on node 0") && !text.contains("RAM"),
            "{text}"
        );
        let text = said(&vm(&[Some(0), Some(1)], &[2]), 2).unwrap();
        assert!(text.contains("its RAM on nodes 0, 1"), "{text}");
    }

    #[test]
    fn what_is_near_or_bound_to_nothing_is_not_warned_of() {
        for config in [
            vm(&[], &[]),
            vm(&[None], &[]),
            vm(&[Some(1)], &[2, 3]),
            // A part of it is there.
            vm(&[Some(0), Some(1)], &[0, 2]),
            // Nobody knows where that processor is.
            vm(&[], &[99]),
        ] {
            assert_eq!(across(&config, 1, &host()), None);
        }
        let mut auto = vm(&[], &[0]);
        auto.place = Placing::Auto;
        assert_eq!(across(&auto, 1, &host()), None);
    }
}
