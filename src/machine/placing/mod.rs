//! Placing a guest on the host's NUMA nodes by where its devices are (`--place auto`): what the host says of both, and what
//! follows for the configuration. [`plan`] decides.

mod plan;

use std::fs;
use std::path::Path;

use busway_host::{HugePages, NumaNode, huge_pages, numa_nodes};
use busway_iommu::SysRoot;

use super::RunError;
use crate::config::{
    DeviceConfig, LOCAL_DISTANCE, MAX_SEGMENTS, MEMORY_STEP, MemoryZoneConfig, NumaConfig,
    NumaDistance, PciPlace, Placing, VmConfig,
};
use crate::kvm::given_processors;
use crate::memory::{Amount, default_huge_page};
use crate::report::{PlacedNode, Report};
use plan::{HostNode, Plan, Wish};

/// What the RAM of a node is a multiple of, where all RAM is: a piece in which Linux has memory on x86_64. Linux,
/// arch/x86/include/asm/sparsemem.h, `SECTION_SIZE_BITS`.
const SECTION: u64 = 128 << 20;

/// The part of a node's memory that is left to the host.
const HOSTS_PART: u64 = 32;

/// PCI segments that a placed VM has at most: one where its firmware sees no more, or where it is said what is where.
fn segments(config: &VmConfig) -> u16 {
    let mut devices = config.device.iter();
    let said = config.platform.num_pci_segments.is_some()
        || devices.any(|device| device.place() != PciPlace::default());
    match said || config.firmware.is_some() {
        true => 1,
        false => MAX_SEGMENTS,
    }
}

/// A guest cannot be where its devices are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacingError {
    /// --place auto: the host's nodes {nodes}, where the devices are, have room for {room} of guest RAM, and {asked} are asked for
    #[error(
        "--place auto: the host's NUMA nodes with the devices ({nodes}) have room for {} of guest RAM, and {} are asked \
         for: ask for less with --memory size=, or leave --place out",
        Amount(*room), Amount(*asked)
    )]
    Room {
        /// Numbers of the nodes.
        nodes: String,
        /// Bytes asked for.
        asked: u64,
        /// Bytes that they could give now.
        room: u64,
    },
    /// --place auto: the host's nodes {nodes}, where the devices are, have no processor that this process may use
    #[error(
        "--place auto: the host's NUMA nodes with the devices ({nodes}) have no processor that this process may use: \
         start it with some (taskset(1), AllowedCPUs= of systemd), or leave --place out"
    )]
    NoProcessor {
        /// Numbers of the nodes.
        nodes: String,
    },
    /// --place auto: --cpus dedicated=on wants more processors of the host's node {node} than the {cpus} that this process may use there
    #[error(
        "--place auto: --cpus dedicated=on wants more of the host's NUMA node {node} than the {cpus} processors that \
         this process may use there: give the VM fewer, or leave dedicated= out"
    )]
    TooFew {
        /// The node.
        node: u32,
        /// Its processors.
        cpus: usize,
    },
}

/// The configuration of a VM as it is where its devices are, where it is to be there; what was chosen is said in the
/// `report`. `None` where nothing was to be chosen.
///
/// # Errors
/// [`PlacingError`]
pub(super) fn placed(config: &VmConfig, report: &Report) -> Result<Option<VmConfig>, RunError> {
    if config.place == Placing::Off {
        return Ok(None);
    }
    let root = SysRoot::default();
    let folders = config.device.iter().map(|device| &*device.path);
    let devices: Vec<_> = folders.map(node_of_device).collect();
    let nodes = numa_nodes(&root);
    let page = match config.memory.hugepages {
        true => config.memory.hugepage_size.or_else(default_huge_page),
        false => None,
    };
    let given = given_processors();
    let host = host_nodes(&nodes, &huge_pages(&root), given.as_deref(), page);
    let ram = config.memory.size;
    let step = page.unwrap_or(match ram.is_multiple_of(SECTION) {
        true => SECTION,
        false => MEMORY_STEP,
    });
    let wish = Wish {
        ram,
        step,
        vcpus: config.cpus.most().into(),
        dedicated: config.cpus.dedicated,
        segments: segments(config),
    };
    let Some(plan) = plan::plan(&devices, &host, wish)? else {
        log::info!(
            "--place auto: nothing is placed, for {}",
            match host.len() {
                0 | 1 => "the host has one NUMA node",
                _ => "no device says that it is on a NUMA node of the host's that has memory",
            }
        );
        return Ok(None);
    };
    report.set_placement(told(config, &devices, &plan));
    Ok(Some(applied(config, &plan, &nodes)))
}

/// What was asked for of where a VM is, in the place of what came of it.
pub(super) fn forget(config: &mut VmConfig, asked: &VmConfig) {
    if asked.place == Placing::Off {
        return;
    }
    config.memory_zone.clone_from(&asked.memory_zone);
    config.numa.clone_from(&asked.numa);
    config.cpus.affinity.clone_from(&asked.cpus.affinity);
    config.memory.hugepages = asked.memory.hugepages;
    config.memory.hugepage_size = asked.memory.hugepage_size;
    config.platform.num_pci_segments = asked.platform.num_pci_segments;
    for device in &mut config.device {
        // One that is said by an inherited descriptor has no path.
        let same = |one: &&DeviceConfig| (&one.path, one.fd) == (&device.path, device.fd);
        let said = asked.device.iter().find(same);
        if let Some(said) = said {
            device.pci_segment = said.pci_segment;
        }
    }
    config.place = asked.place;
}

/// The host's node that a device is on, which sysfs says of it or, of a mediated device, of the one that it is a part of.
/// Linux, Documentation/ABI/testing/sysfs-bus-pci, `numa_node`: -1 where it is not known.
fn node_of_device(folder: &Path) -> Option<u32> {
    let folder = fs::canonicalize(folder).ok()?;
    let mut said = folder
        .ancestors()
        .filter_map(|folder| fs::read_to_string(folder.join("numa_node")).ok());
    said.next()?.trim().parse().ok()
}

/// The nodes of the host that have memory: with those of their processors that are among `given`, and the room for ordinary
/// pages, or for huge ones of `page` bytes.
fn host_nodes(
    nodes: &[NumaNode],
    pools: &[HugePages],
    given: Option<&[usize]>,
    page: Option<u64>,
) -> Vec<HostNode> {
    let may_use = |cpu: &usize| given.is_none_or(|given| given.contains(cpu));
    let of_pool = |node: u32, page: u64| {
        let mut pools = pools.iter();
        let pool = pools.find(|pool| pool.node == Some(node) && pool.size == page);
        pool.map_or(0, |pool| pool.free.saturating_mul(page))
    };
    nodes
        .iter()
        .filter(|node| node.memory > 0)
        .map(|node| HostNode {
            number: node.number,
            cpus: node.cpus.iter().copied().filter(may_use).collect(),
            room: match page {
                Some(page) => of_pool(node.number, page),
                None => node.available - node.available / HOSTS_PART,
            },
        })
        .collect()
}

/// The configuration that says what the plan does.
fn applied(config: &VmConfig, plan: &Plan, host: &[NumaNode]) -> VmConfig {
    let mut config = config.clone();
    let numbers: Vec<u32> = plan.nodes.iter().map(|node| node.host).collect();
    for (id, node) in (0_u32..).zip(&plan.nodes) {
        let zone = format!("mem{id}");
        let mut numa = NumaConfig {
            guest_numa_id: id,
            cpus: node.vcpus.iter().map(|place| place.vcpu).collect(),
            distances: distances(node.host, id, &numbers, host),
            memory_zones: Vec::new(),
            pci_segments: node.segment.into_iter().collect(),
        };
        if node.ram > 0 {
            config.memory_zone.push(MemoryZoneConfig {
                host_numa_node: Some(node.host),
                hugepages: config.memory.hugepages,
                hugepage_size: config.memory.hugepage_size,
                ..MemoryZoneConfig::new(&zone, node.ram)
            });
            numa.memory_zones.push(zone);
        }
        config.numa.push(numa);
        config.cpus.affinity.extend(node.vcpus.iter().cloned());
    }
    // Each node's devices are behind the root bridge of its own segment.
    let last = plan.nodes.iter().filter_map(|node| node.segment).max();
    if let Some(last) = last.filter(|last| *last > 0) {
        config.platform.num_pci_segments = Some(last.saturating_add(1));
        for (device, segment) in config.device.iter_mut().zip(&plan.segments) {
            device.pci_segment = *segment;
        }
    }
    (config.memory.hugepages, config.memory.hugepage_size) = (false, None);
    config.place = Placing::Off;
    config
}

/// How far a node is from those of a higher number in the guest, as it is on the host; what the host says of it and no guest
/// can be told is left out.
fn distances(from: u32, id: u32, numbers: &[u32], host: &[NumaNode]) -> Vec<NumaDistance> {
    let between = |from: u32, to: u32| {
        let node = host.iter().find(|node| node.number == from)?;
        // The kernel lists the nodes that there are, by number.
        let at = host.iter().position(|node| node.number == to)?;
        node.distances.get(at).copied()
    };
    let others = (0_u32..).zip(numbers).filter(|(other, _)| *other > id);
    others
        .filter_map(|(destination, number)| {
            let distance = between(from, *number)?;
            let both_ways = between(*number, from) == Some(distance);
            let can_be = distance > LOCAL_DISTANCE && distance < u8::MAX && both_ways;
            can_be.then_some(NumaDistance {
                destination,
                distance,
            })
        })
        .collect()
}

/// What the report says of it.
fn told(config: &VmConfig, devices: &[Option<u32>], plan: &Plan) -> Vec<PlacedNode> {
    let named = |host: u32| {
        let devices = config.device.iter().zip(devices);
        let there = devices.filter(|(_, node)| **node == Some(host));
        there.map(|(device, _)| device.name()).collect()
    };
    (0_u32..)
        .zip(&plan.nodes)
        .map(|(guest, node)| PlacedNode {
            guest,
            host: node.host,
            ram_bytes: node.ram,
            vcpus: node.vcpus.iter().map(|place| place.vcpu).collect(),
            devices: named(node.host),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host() -> Vec<NumaNode> {
        let node = |number, cpus: &[usize], distances: &[u8]| NumaNode {
            number,
            cpus: cpus.to_vec(),
            memory: 16 * GIB,
            available: 8 * GIB,
            distances: distances.to_vec(),
        };
        vec![node(0, &[0, 1], &[10, 21]), node(2, &[2, 3], &[21, 10])]
    }

    fn vm() -> VmConfig {
        let mut config = VmConfig {
            kernel: Some("k".into()),
            device: vec![
                DeviceConfig::new("01:00.0").unwrap(),
                DeviceConfig::new("81:00.0").unwrap(),
            ],
            place: Placing::Auto,
            ..VmConfig::default()
        };
        config.cpus.boot = 2;
        config.memory.size = 4 * GIB;
        config
    }

    fn planned(config: &VmConfig, devices: &[Option<u32>], page: Option<u64>) -> Option<Plan> {
        let pool = |node| HugePages {
            node: Some(node),
            size: 2 << 20,
            total: 2048,
            free: 1024,
            surplus: 0,
        };
        let nodes = host_nodes(&host(), &[pool(0), pool(2)], Some(&[0, 1, 2]), page);
        let wish = Wish {
            ram: config.memory.size,
            step: page.unwrap_or(SECTION),
            vcpus: config.cpus.most().into(),
            dedicated: false,
            segments: segments(config),
        };
        plan::plan(devices, &nodes, wish).unwrap()
    }

    #[test]
    fn a_placed_vm_is_one_that_could_have_been_said_and_its_distances_are_the_hosts() {
        let config = vm();
        config.validate().unwrap();
        let devices = [Some(0), Some(2)];
        let plan = planned(&config, &devices, None).unwrap();
        let placed = applied(&config, &plan, &host());
        placed.validate().unwrap();
        let zones: Vec<_> = placed.memory_zone.iter().collect();
        let zones: Vec<_> = zones
            .iter()
            .map(|zone| (zone.size, zone.host_numa_node))
            .collect();
        assert_eq!(zones, [(2 * GIB, Some(0)), (2 * GIB, Some(2))]);
        assert_eq!(placed.numa_distances(), [[10, 21], [21, 10]]);
        // Those of the second node's that this process may use.
        assert_eq!(placed.cpus.affinity[1].host_cpus, [2]);
        assert_eq!(placed.place, Placing::Off);
        // A segment for each node, with its device.
        assert_eq!(placed.platform.segments(), 2);
        let segments: Vec<_> = placed.device.iter().map(|one| one.pci_segment).collect();
        assert_eq!(segments, [0, 1]);
        let nodes = [0, 1].map(|segment| placed.numa_node_of_segment(segment));
        assert_eq!(nodes, [Some(0), Some(1)]);
        let said = told(&config, &devices, &plan);
        assert_eq!(said[1].devices, ["0000:81:00.0"]);
        assert_eq!(
            (said[1].guest, said[1].host, &said[1].vcpus[..]),
            (1, 2, &[1][..])
        );
        let mut again = placed;
        forget(&mut again, &config);
        assert_eq!(again, config);
    }

    #[test]
    fn devices_by_descriptors_keep_the_segments_that_were_said() {
        let mut config = vm();
        for (fd, (device, segment)) in (3..).zip(config.device.iter_mut().zip([0, 1])) {
            device.path = "".into();
            (device.fd, device.pci_segment) = (Some(fd), segment);
        }
        let mut again = config.clone();
        forget(&mut again, &config);
        assert_eq!(again, config);
    }

    #[test]
    fn huge_pages_are_those_of_the_nodes() {
        let mut config = vm();
        (config.memory.hugepages, config.memory.hugepage_size) = (true, Some(2 << 20));
        let plan = planned(&config, &[Some(0), Some(2)], Some(2 << 20)).unwrap();
        let placed = applied(&config, &plan, &host());
        placed.validate().unwrap();
        assert!(placed.memory_zone.iter().all(|zone| zone.hugepages));
        assert!(!placed.memory.hugepages && placed.has_huge_pages());
        let mut again = placed;
        forget(&mut again, &config);
        assert_eq!(again, config);
    }

    #[test]
    fn a_device_is_on_the_node_that_sysfs_says_and_a_part_of_one_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("0000:01:00.0");
        let part = device.join("2ab74924-c335-45f4-9b16-8569e5b08258");
        fs::create_dir_all(&part).unwrap();
        for (text, node) in [("1\n", Some(1)), ("-1\n", None), ("x", None)] {
            fs::write(device.join("numa_node"), text).unwrap();
            assert_eq!(
                [&device, &part].map(|path| node_of_device(path)),
                [node, node]
            );
        }
        assert_eq!(node_of_device(&folder.path().join("absent")), None);
    }
}
