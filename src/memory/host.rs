//! Whether the host has the memory that the guest's RAM is to be made of, found out before any is taken.

use std::collections::BTreeMap;
use std::fs;

use busway_host::{NumaNode, numa_nodes};
use busway_iommu::SysRoot;

use super::error::RamError;
use super::huge_pages::Pool;
use crate::config::MemoryZoneConfig;

const KIB: u64 = 1 << 10;

/// Refuses what the host has not got: more than is free, where the whole is needed at once, and
/// otherwise more than there is, for a guest may never touch it all.
pub(super) fn check_host_memory(asked: u64, whole: bool) -> Result<(), RamError> {
    let Ok(text) = fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    check_against_meminfo(asked, whole, &text)
}

fn check_against_meminfo(asked: u64, whole: bool, meminfo: &str) -> Result<(), RamError> {
    let kib = |name: &str| {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    let (Some(total), Some(available)) = (kib("MemTotal"), kib("MemAvailable")) else {
        return Ok(());
    };
    let limit = if whole { available } else { total };
    if asked > limit.saturating_mul(KIB) {
        return Err(RamError::TooLarge {
            asked,
            total: total.saturating_mul(KIB),
            available: available.saturating_mul(KIB),
        });
    }
    Ok(())
}

/// Refuses zones whose nodes the host has not got, or that ask for more of a node than it has, with what can come to them
/// while the guest runs. Each zone comes with the size of the huge pages that it is made of.
pub(super) fn check_host_nodes(
    zones: &[(&MemoryZoneConfig, Option<u64>)],
    whole: bool,
) -> Result<(), RamError> {
    if zones.iter().all(|(zone, _)| zone.host_numa_node.is_none()) {
        return Ok(());
    }
    let nodes = numa_nodes(&SysRoot::default());
    let asked = check_against_nodes(zones, whole, &nodes)?;
    for ((node, page), bytes) in asked {
        let (pool, needed) = (Pool::of_node(page, node), bytes / page);
        match pool.room() {
            room if room < needed => return Err(pool.too_few(needed, room)),
            _ => {}
        }
    }
    Ok(())
}

/// The same against what is known of the nodes. Gives the bytes in huge pages, by node and size of a page.
fn check_against_nodes(
    zones: &[(&MemoryZoneConfig, Option<u64>)],
    whole: bool,
    nodes: &[NumaNode],
) -> Result<BTreeMap<(u32, u64), u64>, RamError> {
    let (mut ordinary, mut huge) = (BTreeMap::<u32, u64>::new(), BTreeMap::new());
    // With what can come, which is never of another node.
    let mut most = BTreeMap::<u32, u64>::new();
    for (zone, page) in zones {
        let Some(number) = zone.host_numa_node else {
            continue;
        };
        let with_memory = nodes.iter().filter(|node| node.memory > 0);
        if !with_memory.clone().any(|node| node.number == number) {
            let have: Vec<_> = with_memory.map(|node| node.number.to_string()).collect();
            return Err(RamError::NoNode {
                zone: zone.id.clone(),
                node: number,
                have: match have.is_empty() {
                    true => "none".to_owned(),
                    false => have.join(", "),
                },
            });
        }
        let asked = match page {
            Some(page) => huge.entry((number, *page)).or_insert(0),
            None => {
                let most = most.entry(number).or_default();
                *most = most.saturating_add(zone.most());
                ordinary.entry(number).or_default()
            }
        };
        *asked = asked.saturating_add(zone.size);
    }
    for node in nodes {
        let asked = ordinary.get(&node.number).copied().unwrap_or(0);
        let most = most.get(&node.number).copied().unwrap_or(0);
        let limit = if whole { node.available } else { node.memory };
        let too_large = [(asked, limit), (most, node.memory)];
        let too_large = too_large.into_iter().find(|(asked, limit)| asked > limit);
        if let Some((asked, _)) = too_large {
            return Err(RamError::NodeTooSmall {
                node: node.number,
                asked,
                total: node.memory,
                available: node.available,
            });
        }
    }
    Ok(huge)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn more_than_the_host_can_give_is_refused_with_the_figures() {
        let meminfo = "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    4096000 kB\n";
        check_against_meminfo(4000 * MIB, true, meminfo).unwrap();
        let error = check_against_meminfo(4001 * MIB, true, meminfo).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--memory size= asks for 4001 MiB, and this host has 7812 MiB, of which 4000 MiB are \
             free: ask for less"
        );
        let error = check_against_meminfo(512 << 30, false, meminfo).unwrap_err();
        assert!(error.to_string().contains("asks for 512 GiB, "), "{error}");
        check_against_meminfo(7812 * MIB, false, meminfo).unwrap();
        check_against_meminfo(7813 * MIB, false, meminfo).unwrap_err();
        check_against_meminfo(u64::MAX, true, "nonsense").unwrap();
    }

    #[test]
    fn a_node_that_is_not_there_or_has_too_little_is_named_with_those_that_are() {
        let host = |number, memory, available| NumaNode {
            number,
            cpus: vec![],
            memory: memory * MIB,
            available: available * MIB,
            distances: vec![],
        };
        let host = [host(0, 4096, 2048), host(1, 0, 0), host(2, 4096, 1024)];
        let zone = |id: &str, size, node| MemoryZoneConfig {
            host_numa_node: node,
            ..MemoryZoneConfig::new(id, size * MIB)
        };
        let check = |zones: &[MemoryZoneConfig], page, whole| {
            let zones: Vec<_> = zones.iter().map(|zone| (zone, page)).collect();
            check_against_nodes(&zones, whole, &host)
        };
        let both = [zone("a", 600, Some(2)), zone("b", 600, Some(2))];
        assert!(check(&both, None, false).unwrap().is_empty());
        let why = check(&both, None, true).unwrap_err().to_string();
        assert!(why.contains("host_numa_node=2 ask for 1200 MiB"), "{why}");
        for absent in [1, 3] {
            let why = check(&[zone("c", 16, Some(absent))], None, false);
            let why = why.unwrap_err().to_string();
            assert!(why.contains("zone `c`") && why.contains("0, 2"), "{why}");
        }
        // What can come is of that node as well, whatever else has taken of it.
        let grows = |more| MemoryZoneConfig {
            hotplug_size: Some(more * MIB),
            ..zone("d", 512, Some(2))
        };
        check(&[grows(3584)], None, true).unwrap();
        let why = check(&[grows(3585)], None, true).unwrap_err().to_string();
        assert!(why.contains("host_numa_node=2 ask for 4097 MiB"), "{why}");
        let pages = check(&both, Some(2 * MIB), true).unwrap();
        assert_eq!(
            pages.into_iter().collect::<Vec<_>>(),
            [((2, 2 * MIB), 1200 * MIB)]
        );
        assert!(
            check(&[zone("any", 9000, None)], None, true)
                .unwrap()
                .is_empty()
        );
    }
}
