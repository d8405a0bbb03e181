//! Where a guest was placed on the host's NUMA nodes (`--place auto`).

use std::fmt;

use serde::Serialize;

use super::snapshot::Bytes;

/// A NUMA node of the guest's, and where it is on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlacedNode {
    /// Its number in the guest.
    pub guest: u32,
    /// The host's node that its RAM and its vCPUs are on.
    pub host: u32,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// The numbers of its vCPUs.
    pub vcpus: Vec<u16>,
    /// The assigned devices that are on that node of the host's.
    pub devices: Vec<String>,
}

/// A line of the table.
impl fmt::Display for PlacedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("guest node {}", self.guest);
        let host = format!("on {}", self.host);
        let vcpus: Vec<_> = self.vcpus.iter().map(u16::to_string).collect();
        let of = |list: &[String]| match list.is_empty() {
            true => "none".to_owned(),
            false => list.join(" "),
        };
        write!(
            f,
            "{name:<18} {host:>10} of the host's: {}, vCPUs {}, devices {}",
            Bytes(self.ram_bytes),
            of(&vcpus),
            of(&self.devices)
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::report::{PlacedNode, Report};

    #[test]
    fn a_node_is_a_line_of_the_table_and_an_object_of_the_file() {
        let report = Report::start();
        let nothing = serde_json::to_value(report.snapshot()).unwrap();
        assert_eq!(nothing.get("placement"), Some(&serde_json::Value::Null));
        report.set_placement(vec![PlacedNode {
            guest: 0,
            host: 1,
            ram_bytes: 2 << 30,
            vcpus: vec![0, 1],
            devices: vec!["0000:81:00.0".to_owned()],
        }]);
        let expected = "\
guest node 0             on 1 of the host's: 2.0 GiB, vCPUs 0 1, devices 0000:81:00.0\n";
        let table = report.snapshot().to_string();
        assert!(table.contains(expected), "{table}");
        let json = serde_json::to_value(report.snapshot()).unwrap();
        assert_eq!(json["placement"][0]["host"], 1);
        assert_eq!(json["placement"][0]["vcpus"], serde_json::json!([0, 1]));
    }
}
