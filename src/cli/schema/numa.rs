//! The words of `--memory-zone` and `--numa`.

use super::super::value::{Reason, Value};
use super::{Key, Section};
use crate::config::{MemoryZoneConfig, NumaConfig, NumaDistance};

/// `--memory-zone`
pub(in crate::cli) static MEMORY_ZONE: Section<MemoryZoneConfig> = Section {
    name: "memory-zone",
    summary: "A part of RAM: id=NAME,size=SIZE[,host_numa_node=N][,hugepages=on|off]…",
    words: &[],
    notes: "\
Zones are all of RAM, in the order of the guest's addresses. --memory size= is their sum
where it is said. What it says of shared=, prefault= and thp= holds for all of them.",
    blank: || MemoryZoneConfig::new("", 0),
    keys: keys! {
        "id" { "NAME": "name, unique among zones, for memory_zones= of --numa" }
            |zone, value| zone.id = value.text()?.to_owned();
        "size" { "SIZE": "bytes, or with K, M, G or T after it; a multiple of 1M" }
            |zone, value| zone.size = value.size()?;
        "host_numa_node" { "N": "the host's NUMA node that has its memory [any]" }
            |zone, value| zone.host_numa_node = Some(value.number()?);
        "shared" { "on|off": "mapped so that another process can map it too [off]" }
            |zone, value| zone.shared = value.switch()?;
        "hugepages" { "on|off": "taken from hugetlbfs [off]" }
            |zone, value| zone.hugepages = value.switch()?;
        "hugepage_size" { "SIZE": "size of a huge page [the host's default]" }
            |zone, value| zone.hugepage_size = Some(value.size()?);
        "prefault" { "on|off": "touched before the guest starts [as --memory prefault=]" }
            |zone, value| zone.prefault = Some(value.switch()?);
        "hotplug_size" { "SIZE": "more RAM that can come while the guest runs, a multiple of 128M [0]\n\
                 (`busway ctl resize-zone`), by --memory hotplug_method=virtio-mem" }
            |zone, value| zone.hotplug_size = Some(value.size()?);
        "hotplugged_size" { "SIZE": "what of it the guest is to have from its start on [0]" }
            |zone, value| zone.hotplugged_size = Some(value.size()?);
    },
    required: &["id"],
    bare: None,
    single: false,
    details: &[],
};

/// `--numa`
pub(in crate::cli) static NUMA: Section<NumaConfig> = Section {
    name: "numa",
    summary: "A NUMA node of the guest: guest_numa_id=N[,cpus=[0-3]][,memory_zones=[NAME]]…",
    words: &[],
    notes: "\
Where there are nodes, each vCPU that there can be and each memory zone is in one. Without
--memory-zone all RAM is the zone mem0.",
    blank: NumaConfig::default,
    keys: keys! {
        "guest_numa_id" { "N": "its number, 0 to 63" }
            |node, value| node.guest_numa_id = value.number()?;
        "cpus" { "[0-3,8]": "its vCPUs, by their numbers [none]" }
            |node, value| node.cpus = numbers(value)?;
        "memory_zones" { "[NAME,…]": "its memory, by the names of zones [none]" }
            |node, value| node.memory_zones = value.texts()?;
        "distances" { "[1@20,2@30]": "how far other nodes are: 11 to 254, where 10 is a node's distance from\n\
                 itself; the same both ways [20]" }
            |node, value| node.distances = distances(value)?;
        "pci_segments" { "[0]": "PCI segments whose root bridges are near it [none]" }
            |node, value| node.pci_segments = numbers(value)?;
    },
    required: &["guest_numa_id"],
    bare: None,
    single: false,
    details: &[],
};

/// The parts of a list, or of what is only one.
fn parts(value: &Value) -> &[Value] {
    match value {
        Value::List(parts) => parts,
        one => std::slice::from_ref(one),
    }
}

/// `[0-3,8]`, and the same without brackets where it is one part: a number, or a range of them.
fn numbers(value: &Value) -> Result<Vec<u16>, Reason> {
    let wrong = || Reason::Numbers(value.to_string());
    let mut all = Vec::new();
    for part in parts(value) {
        let (first, last) = match part {
            Value::Text(text) => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let number = |text: &str| Value::Text(text.to_owned()).number::<u16>();
                (number(first), number(last))
            }
            other => (other.number(), other.number()),
        };
        match (first, last) {
            (Ok(first), Ok(last)) if first <= last => all.extend(first..=last),
            _ => return Err(wrong()),
        }
    }
    Ok(all)
}

/// `[1@20,2@30]`
fn distances(value: &Value) -> Result<Vec<NumaDistance>, Reason> {
    let distance = |part: &Value| {
        let text = part.text().ok()?;
        let (destination, distance) = text.split_once('@')?;
        let value = |text: &str| Value::Text(text.to_owned());
        Some(NumaDistance {
            destination: value(destination).number().ok()?,
            distance: value(distance).number().ok()?,
        })
    };
    let all: Option<Vec<_>> = parts(value).iter().map(distance).collect();
    all.ok_or_else(|| Reason::Distances(value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Value {
        let texts = texts.iter().map(|text| Value::Text((*text).to_owned()));
        Value::List(texts.collect())
    }

    #[test]
    fn numbers_are_a_list_with_ranges_as_cloud_hypervisor_has_them() {
        assert_eq!(numbers(&list(&["0-2", "9"])), Ok(vec![0, 1, 2, 9]));
        assert_eq!(numbers(&Value::Text("3-4".into())), Ok(vec![3, 4]));
        let of_file = Value::List(vec![Value::Integer(7), Value::Text("1".into())]);
        assert_eq!(numbers(&of_file), Ok(vec![7, 1]));
        assert_eq!(numbers(&list(&[])), Ok(vec![]));
        for wrong in ["", "a", "2-1", "-1", "1-", "+1", "65536", "0-1-2"] {
            let why = numbers(&list(&[wrong])).unwrap_err().to_string();
            assert!(why.contains(&format!("`[{wrong}]`")), "{why}");
        }
        assert!(numbers(&Value::Switch(true)).is_err());
    }

    #[test]
    fn distances_are_nodes_with_numbers() {
        let of = |destination, distance| NumaDistance {
            destination,
            distance,
        };
        let read = distances(&list(&["1@15", "2@254"]));
        assert_eq!(read, Ok(vec![of(1, 15), of(2, 254)]));
        for wrong in ["", "1", "1@", "@1", "1@256", "1@2@3", "a@1"] {
            let why = distances(&list(&[wrong])).unwrap_err().to_string();
            assert!(why.contains(&format!("`[{wrong}]`")), "{why}");
        }
    }
}
