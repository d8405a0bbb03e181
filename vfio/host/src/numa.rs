//! The host's NUMA nodes: which processors and how much memory each has.

use super::hugepages::nodes;
use super::root::{self, SysRoot};

/// One more than the highest number of a processor that is believed. Linux, arch/x86/Kconfig, `NR_CPUS_RANGE_END`: 8192.
const MOST_CPUS: usize = 1 << 16;

/// A NUMA node of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// Its number.
    pub number: u32,
    /// Its processors that are there now, ascending.
    pub cpus: Vec<usize>,
    /// Bytes of its memory; none where it has processors alone.
    pub memory: u64,
    /// Bytes of it that a process could have now: what is free, and what the kernel keeps of files and can drop.
    pub available: u64,
    /// How far it is from each of the host's nodes, by number: 10 from itself.
    pub distances: Vec<u8>,
}

/// The nodes, by number; none on a kernel without NUMA.
#[must_use]
pub fn numa_nodes(root: &SysRoot) -> Vec<NumaNode> {
    nodes(root)
        .into_iter()
        .map(|number| {
            let folder = root.sys.join(format!("devices/system/node/node{number}"));
            let cpus = root::attribute(&folder.join("cpulist"));
            let meminfo = root::page(&folder.join("meminfo")).unwrap_or_default();
            let distances = root::attribute(&folder.join("distance")).unwrap_or_default();
            let distances = distances.split_whitespace();
            let (memory, available) = memory_of(&String::from_utf8_lossy(&meminfo));
            NumaNode {
                number,
                cpus: cpus.map(|list| cpu_list(&list)).unwrap_or_default(),
                memory,
                available,
                distances: distances.map_while(|text| text.parse().ok()).collect(),
            }
        })
        .collect()
}

/// Bytes that a node has, and that could be had, of its `meminfo`: `Node 0 MemTotal:  8000 kB`. Linux,
/// drivers/base/node.c, `node_read_meminfo`
fn memory_of(meminfo: &str) -> (u64, u64) {
    let bytes = |name: &str| {
        let found = meminfo.lines().find_map(|line| {
            let (_, rest) = line.split_once(name)?;
            let kib = rest.strip_prefix(':')?.trim().strip_suffix("kB")?;
            kib.trim().parse::<u64>().ok()?.checked_mul(1024)
        });
        found.unwrap_or(0)
    };
    let kept = [" Active(file)", " Inactive(file)", " SReclaimable"].map(bytes);
    let available = kept
        .into_iter()
        .fold(bytes(" MemFree"), u64::saturating_add);
    let total = bytes(" MemTotal");
    (total, available.min(total))
}

/// The numbers that a list of the kernel's has: `0-3,8`. Linux, Documentation/core-api/printk-formats.rst, `%*pbl`
#[must_use]
pub fn cpu_list(list: &str) -> Vec<usize> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>())
            && last < MOST_CPUS
        {
            cpus.extend(first..=last);
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn lists_of_processors_are_read_and_nonsense_is_nothing() {
        assert_eq!(cpu_list("0-2,8,10-11\n"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(cpu_list("3,1,1-2"), [1, 2, 3]);
        for nothing in ["", "\n", "a", "2-1", "-", "0-99999999999", "0-65536"] {
            assert!(cpu_list(nothing).is_empty(), "{nothing}");
        }
    }

    #[test]
    fn each_node_has_its_processors_and_its_memory() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot {
            sys: folder.path().to_owned(),
            ..SysRoot::default()
        };
        assert!(numa_nodes(&root).is_empty());
        let node = |number: u32, cpus: &str, meminfo: &str| {
            let node = folder
                .path()
                .join(format!("devices/system/node/node{number}"));
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("cpulist"), cpus).unwrap();
            fs::write(node.join("meminfo"), meminfo).unwrap();
            fs::write(node.join("distance"), "21 10\n").unwrap();
        };
        node(
            10,
            "4-7\n",
            "Node 10 MemTotal:       8000 kB\nNode 10 MemFree:        1000 kB\nNode 10 Active:  5000 kB\n\
             Node 10 Active(file):     30 kB\nNode 10 Inactive(file):   200 kB\nNode 10 SReclaimable:     4 kB\n",
        );
        node(2, "\n", "");
        let nodes = numa_nodes(&root);
        let expected = NumaNode {
            number: 10,
            cpus: vec![4, 5, 6, 7],
            memory: 8000 << 10,
            available: 1234 << 10,
            distances: vec![21, 10],
        };
        assert_eq!(nodes[1], expected);
        assert_eq!((nodes[0].number, nodes[0].memory, nodes.len()), (2, 0, 2));
    }
}
