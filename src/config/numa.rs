//! NUMA nodes of the guest: which processors, memory and PCI segments are near each other.

use serde::{Deserialize, Serialize};

use super::VmConfig;

/// The most nodes, and one more than the highest number of a node: the SLIT has a byte for each pair of them, and lies
/// below 1 MiB. ACPI 6.5 §5.2.17.
pub const MAX_NUMA_NODES: u32 = 64;

/// The distance of a node from itself. ACPI 6.5 §5.2.17; Linux, include/linux/topology.h, `LOCAL_DISTANCE`.
pub const LOCAL_DISTANCE: u8 = 10;

/// The distance of two nodes of which nothing was said. Linux, include/linux/topology.h, `REMOTE_DISTANCE`.
pub const REMOTE_DISTANCE: u8 = 20;

/// The name of all RAM where there are no `--memory-zone`s.
pub const DEFAULT_ZONE: &str = "mem0";

/// `--numa`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NumaConfig {
    /// The node's number, which is its proximity domain; below [`MAX_NUMA_NODES`].
    pub guest_numa_id: u32,
    /// The numbers of its vCPUs, from 0 on.
    pub cpus: Vec<u16>,
    /// How far it is from other nodes. What was said of one direction holds for the other as well.
    pub distances: Vec<NumaDistance>,
    /// The names of its memory zones.
    pub memory_zones: Vec<String>,
    /// The PCI segments whose root bridges are near it.
    pub pci_segments: Vec<u16>,
}

/// How far a node is from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumaDistance {
    /// The other node's number.
    pub destination: u32,
    /// Ten times what an access takes of what one takes within a node: [`LOCAL_DISTANCE`] is a node's to itself.
    pub distance: u8,
}

/// Why the nodes of a guest cannot be so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNuma {
    /// guest_numa_id={0}: nodes are numbered from 0 to 63
    #[error(
        "guest_numa_id={0}: nodes are numbered from 0 to {last}: take a lower number",
        last = MAX_NUMA_NODES - 1
    )]
    Number(u32),
    /// guest_numa_id={0} is given twice
    #[error("guest_numa_id={0} is given twice: say all of a node in one --numa")]
    Twice(u32),
    /// guest_numa_id={node}: there is no vCPU {cpu}
    #[error(
        "guest_numa_id={node}: there is no vCPU {cpu}, only 0 to {last}: leave it out of cpus=, or give the VM more \
         with --cpus"
    )]
    NoCpu {
        /// The node.
        node: u32,
        /// What there is none of.
        cpu: u16,
        /// The highest number of a vCPU that there can be.
        last: u16,
    },
    /// vCPU {cpu} is in node {first} and in node {second}
    #[error("vCPU {cpu} is in node {first} and in node {second}: leave it out of cpus= of one")]
    CpuTwice {
        /// The vCPU.
        cpu: u16,
        /// A node that has it.
        first: u32,
        /// Another one; the same where it stands there twice.
        second: u32,
    },
    /// vCPU {0} is in no node
    #[error(
        "vCPU {0} is in no node: where there are nodes each vCPU that there can be (--cpus max=) is in one; add it to \
         cpus= of one"
    )]
    CpuNowhere(u16),
    /// guest_numa_id={node}: there is no memory zone `{zone}`
    #[error(
        "guest_numa_id={node}: there is no memory zone `{zone}`: make it with --memory-zone id={zone},size=SIZE, or \
         leave it out of memory_zones="
    )]
    NoZone {
        /// The node.
        node: u32,
        /// What there is none of.
        zone: String,
    },
    /// memory zone `{zone}` is in node {first} and in node {second}
    #[error(
        "memory zone `{zone}` is in node {first} and in node {second}: leave it out of memory_zones= of one, or make \
         two zones of it"
    )]
    ZoneTwice {
        /// The zone.
        zone: String,
        /// A node that has it.
        first: u32,
        /// Another one; the same where it stands there twice.
        second: u32,
    },
    /// memory zone `{0}` is in no node
    #[error(
        "memory zone `{0}` is in no node: where there are nodes all RAM is in one; add memory_zones={0} to one{more}",
        more = of_all(.0)
    )]
    ZoneNowhere(String),
    /// there is no PCI segment {segment}, only {segments} from 0 on
    #[error(
        "pci_segments=: there is no PCI segment {segment}, only {segments} from 0 on: give the VM more (--platform \
         num_pci_segments=N), or leave it out"
    )]
    NoSegment {
        /// The segment.
        segment: u16,
        /// How many there are.
        segments: u16,
    },
    /// PCI segment {segment} is in node {first} and in node {second}
    #[error(
        "PCI segment {segment} is in node {first} and in node {second}: leave it out of pci_segments= of one"
    )]
    SegmentTwice {
        /// The segment.
        segment: u16,
        /// A node that has it.
        first: u32,
        /// Another one; the same where it stands there twice.
        second: u32,
    },
    /// guest_numa_id={node}: distances= names node {destination}, which there is not
    #[error(
        "guest_numa_id={node}: distances= names node {destination}, which there is not: make it with --numa \
         guest_numa_id={destination}, or leave it out"
    )]
    NoDestination {
        /// The node.
        node: u32,
        /// What there is none of.
        destination: u32,
    },
    /// guest_numa_id={node}: distances={node}@{distance}: a node is 10 from itself
    #[error(
        "guest_numa_id={node}: distances={node}@{distance}: a node is {LOCAL_DISTANCE} from itself: say that, or \
         nothing"
    )]
    Itself {
        /// The node.
        node: u32,
        /// What was said.
        distance: u8,
    },
    /// guest_numa_id={node}: distances={destination}@{distance}: must be from 11 to 254
    #[error(
        "guest_numa_id={node}: distances={destination}@{distance}: another node is farther than {LOCAL_DISTANCE}, \
         which is a node's distance from itself: say 11 to 254, as {REMOTE_DISTANCE} for twice as far"
    )]
    Distance {
        /// The node.
        node: u32,
        /// The other one.
        destination: u32,
        /// What was said.
        distance: u8,
    },
    /// node {first} is {there} from node {second}, and that is {back} from it
    #[error(
        "node {first} is {there} from node {second}, which is {back} from it: Linux takes distances that are the same \
         both ways; say one of the two in distances="
    )]
    Asymmetric {
        /// A node.
        first: u32,
        /// Another one.
        second: u32,
        /// What the first says.
        there: u8,
        /// What was said before.
        back: u8,
    },
}

/// What else is to be known of a zone that nobody has made.
fn of_all(zone: &str) -> &'static str {
    match zone {
        DEFAULT_ZONE => ", which is all RAM where there is no --memory-zone",
        _ => "",
    }
}

impl VmConfig {
    /// The number of the guest's node that a PCI segment's root bridge is near (`_PXM`); nothing where none was said.
    #[must_use]
    pub fn numa_node_of_segment(&self, segment: u16) -> Option<u32> {
        let has = |node: &&NumaConfig| node.pci_segments.contains(&segment);
        self.numa.iter().find(has).map(|node| node.guest_numa_id)
    }

    /// The number of the guest's node that a vCPU is in; nothing where there are no nodes.
    #[must_use]
    pub fn numa_node_of_cpu(&self, cpu: u16) -> Option<u32> {
        let has = |node: &&NumaConfig| node.cpus.contains(&cpu);
        self.numa.iter().find(has).map(|node| node.guest_numa_id)
    }

    /// The number of the guest's node that a memory zone is in; nothing where there are no nodes.
    #[must_use]
    pub fn numa_node_of_zone(&self, zone: &str) -> Option<u32> {
        let has = |node: &&NumaConfig| node.memory_zones.iter().any(|name| name == zone);
        self.numa.iter().find(has).map(|node| node.guest_numa_id)
    }

    /// How far each node is from each, by their numbers from 0 to the highest that there is. The distance of a number
    /// that is no node's is [`REMOTE_DISTANCE`].
    #[must_use]
    pub fn numa_distances(&self) -> Vec<Vec<u8>> {
        let numbers = self.numa.iter().map(|node| node.guest_numa_id);
        let count = numbers.max().map_or(0, |last| last.saturating_add(1));
        let between = |from: u32, to: u32| match from == to {
            true => LOCAL_DISTANCE,
            false => {
                let said = self.distance(from, to).or_else(|| self.distance(to, from));
                said.unwrap_or(REMOTE_DISTANCE)
            }
        };
        let count = count.min(MAX_NUMA_NODES);
        let row = |from| (0..count).map(|to| between(from, to)).collect();
        (0..count).map(row).collect()
    }

    /// What was said of one direction.
    fn distance(&self, from: u32, to: u32) -> Option<u8> {
        let node = self.numa.iter().find(|node| node.guest_numa_id == from)?;
        let mut said = node.distances.iter();
        let said = said.find(|said| said.destination == to)?;
        Some(said.distance)
    }

    /// That each vCPU and all RAM is in one node, and distances can be so; nothing where there are no nodes.
    ///
    /// # Errors
    /// [`InvalidNuma`]
    pub(super) fn validate_numa(&self) -> Result<(), InvalidNuma> {
        if self.numa.is_empty() {
            return Ok(());
        }
        for (index, node) in self.numa.iter().enumerate() {
            let number = node.guest_numa_id;
            if number >= MAX_NUMA_NODES {
                return Err(InvalidNuma::Number(number));
            }
            let mut before = self.numa.iter().take(index);
            if before.any(|other| other.guest_numa_id == number) {
                return Err(InvalidNuma::Twice(number));
            }
        }
        self.validate_numa_cpus()?;
        self.validate_numa_zones()?;
        let segments = self.numa.iter().flat_map(|node| {
            let segments = node.pci_segments.iter();
            segments.map(|segment| (*segment, node.guest_numa_id))
        });
        if let Some((segment, first, second)) = twice(segments) {
            return Err(InvalidNuma::SegmentTwice {
                segment,
                first,
                second,
            });
        }
        let known = self.platform.segments();
        let named = self.numa.iter().flat_map(|node| node.pci_segments.iter());
        if let Some(segment) = named.copied().find(|segment| *segment >= known) {
            return Err(InvalidNuma::NoSegment {
                segment,
                segments: known,
            });
        }
        self.validate_distances()
    }

    fn validate_numa_cpus(&self) -> Result<(), InvalidNuma> {
        let most = u16::from(self.cpus.most());
        let cpus = self.numa.iter().flat_map(|node| {
            let cpus = node.cpus.iter();
            cpus.map(|cpu| (*cpu, node.guest_numa_id))
        });
        for (cpu, node) in cpus.clone() {
            if cpu >= most {
                let last = most.saturating_sub(1);
                return Err(InvalidNuma::NoCpu { node, cpu, last });
            }
        }
        if let Some((cpu, first, second)) = twice(cpus) {
            return Err(InvalidNuma::CpuTwice { cpu, first, second });
        }
        match (0..most).find(|cpu| self.numa_node_of_cpu(*cpu).is_none()) {
            Some(cpu) => Err(InvalidNuma::CpuNowhere(cpu)),
            None => Ok(()),
        }
    }

    fn validate_numa_zones(&self) -> Result<(), InvalidNuma> {
        let mut names: Vec<&str> = self.memory_zone.iter().map(|zone| &*zone.id).collect();
        if names.is_empty() {
            names.push(DEFAULT_ZONE);
        }
        let zones = self.numa.iter().flat_map(|node| {
            let zones = node.memory_zones.iter();
            zones.map(|zone| (zone.as_str(), node.guest_numa_id))
        });
        if let Some((zone, node)) = zones.clone().find(|(zone, _)| !names.contains(zone)) {
            let zone = zone.to_owned();
            return Err(InvalidNuma::NoZone { node, zone });
        }
        if let Some((zone, first, second)) = twice(zones) {
            let zone = zone.to_owned();
            return Err(InvalidNuma::ZoneTwice {
                zone,
                first,
                second,
            });
        }
        let mut names = names.into_iter();
        match names.find(|zone| self.numa_node_of_zone(zone).is_none()) {
            Some(zone) => Err(InvalidNuma::ZoneNowhere(zone.to_owned())),
            None => Ok(()),
        }
    }

    fn validate_distances(&self) -> Result<(), InvalidNuma> {
        for from in &self.numa {
            let node = from.guest_numa_id;
            for &NumaDistance {
                destination,
                distance,
            } in &from.distances
            {
                let mut nodes = self.numa.iter();
                if !nodes.any(|other| other.guest_numa_id == destination) {
                    return Err(InvalidNuma::NoDestination { node, destination });
                }
                if destination == node {
                    match distance {
                        LOCAL_DISTANCE => continue,
                        _ => return Err(InvalidNuma::Itself { node, distance }),
                    }
                }
                // 255 says that there is no way between two nodes, which all of a guest's have.
                if distance <= LOCAL_DISTANCE || distance == u8::MAX {
                    return Err(InvalidNuma::Distance {
                        node,
                        destination,
                        distance,
                    });
                }
                let said = [
                    self.distance(node, destination),
                    self.distance(destination, node),
                ];
                let mut said = said.into_iter().flatten();
                if let Some(back) = said.find(|said| *said != distance) {
                    return Err(InvalidNuma::Asymmetric {
                        first: node,
                        second: destination,
                        there: distance,
                        back,
                    });
                }
            }
        }
        Ok(())
    }
}

/// The first thing that two nodes have, or one has twice, with them.
fn twice<T: PartialEq>(all: impl Iterator<Item = (T, u32)>) -> Option<(T, u32, u32)> {
    let mut before: Vec<(T, u32)> = Vec::new();
    for (thing, node) in all {
        if let Some((_, first)) = before.iter().find(|(other, _)| *other == thing) {
            return Some((thing, *first, node));
        }
        before.push((thing, node));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryZoneConfig;

    fn node(guest_numa_id: u32, cpus: &[u16], zones: &[&str]) -> NumaConfig {
        NumaConfig {
            guest_numa_id,
            cpus: cpus.to_vec(),
            memory_zones: zones.iter().map(|zone| (*zone).to_owned()).collect(),
            ..NumaConfig::default()
        }
    }

    fn vm(zones: &[&str], numa: Vec<NumaConfig>) -> VmConfig {
        let mut config = VmConfig {
            memory_zone: zones
                .iter()
                .map(|id| MemoryZoneConfig::new(id, 256 << 20))
                .collect(),
            numa,
            ..VmConfig::default()
        };
        config.cpus.boot = 2;
        config
    }

    fn far(mut node: NumaConfig, distances: &[(u32, u8)]) -> NumaConfig {
        let distances = distances.iter();
        node.distances = distances
            .map(|&(destination, distance)| NumaDistance {
                destination,
                distance,
            })
            .collect();
        node
    }

    #[test]
    fn nodes_share_out_processors_memory_and_segments() {
        let mut second = node(1, &[1], &["b"]);
        second.pci_segments = vec![0, 3];
        let mut config = vm(&["a", "b"], vec![node(0, &[0], &["a"]), second]);
        config.platform.num_pci_segments = Some(3);
        let missing = InvalidNuma::NoSegment {
            segment: 3,
            segments: 3,
        };
        assert_eq!(config.validate_numa(), Err(missing));
        config.platform.num_pci_segments = Some(4);
        assert_eq!(config.validate_numa(), Ok(()));
        let segments = [0, 1, 3].map(|segment| config.numa_node_of_segment(segment));
        assert_eq!(segments, [Some(1), None, Some(1)]);
        assert_eq!(config.numa_node_of_cpu(1), Some(1));
        assert_eq!(config.numa_node_of_zone("a"), Some(0));
        // Nodes can be without memory or processors, and all RAM is one zone where none was made.
        let apart = vm(
            &[],
            vec![node(0, &[0, 1], &[]), node(1, &[], &[DEFAULT_ZONE])],
        );
        assert_eq!(apart.validate_numa(), Ok(()));
        assert_eq!(VmConfig::default().numa_node_of_segment(0), None);
        assert_eq!(VmConfig::default().validate_numa(), Ok(()));
    }

    #[test]
    fn a_distance_holds_both_ways_and_what_was_not_said_is_twice_as_far() {
        let first = far(node(0, &[0, 1], &["mem0"]), &[(2, 31), (0, 10)]);
        let second = far(node(2, &[], &[]), &[(0, 31)]);
        let config = vm(&[], vec![first, second]);
        assert_eq!(config.validate_numa(), Ok(()));
        assert_eq!(
            config.numa_distances(),
            [[10, 20, 31], [20, 10, 20], [31, 20, 10]]
        );
        assert!(VmConfig::default().numa_distances().is_empty());
    }

    #[test]
    fn what_is_in_two_nodes_or_in_none_and_what_there_is_not_is_named() {
        let all = || node(0, &[0, 1], &["mem0"]);
        let mut segments = all();
        segments.pci_segments = vec![2, 2];
        for (numa, words) in [
            (vec![node(64, &[0, 1], &["mem0"])], "from 0 to 63"),
            (
                vec![all(), node(0, &[], &[])],
                "guest_numa_id=0 is given twice",
            ),
            (
                vec![node(0, &[0, 1, 2], &["mem0"])],
                "no vCPU 2, only 0 to 1",
            ),
            (
                vec![all(), node(1, &[1], &[])],
                "vCPU 1 is in node 0 and in node 1",
            ),
            (vec![node(0, &[1], &["mem0"])], "vCPU 0 is in no node"),
            (vec![node(0, &[0, 1], &["b"])], "no memory zone `b`"),
            (
                vec![all(), node(3, &[], &["mem0"])],
                "in node 0 and in node 3",
            ),
            (vec![node(0, &[0, 1], &[])], "which is all RAM"),
            (vec![segments], "PCI segment 2 is in node 0 and in node 0"),
            (
                vec![far(all(), &[(1, 20)])],
                "names node 1, which there is not",
            ),
            (vec![far(all(), &[(0, 11)])], "a node is 10 from itself"),
            (
                vec![far(all(), &[(1, 9)]), node(1, &[], &[])],
                "distances=1@9",
            ),
            (
                vec![far(all(), &[(1, 10)]), node(1, &[], &[])],
                "say 11 to 254",
            ),
            (
                vec![far(all(), &[(1, 255)]), node(1, &[], &[])],
                "say 11 to 254",
            ),
            (
                vec![far(all(), &[(1, 21)]), far(node(1, &[], &[]), &[(0, 22)])],
                "node 0 is 21 from node 1, which is 22 from it",
            ),
            (
                vec![far(all(), &[(1, 21), (1, 22)]), node(1, &[], &[])],
                "the same both ways",
            ),
        ] {
            let why = vm(&[], numa).validate_numa().unwrap_err().to_string();
            assert!(why.contains(words), "{why}");
        }
    }
}
