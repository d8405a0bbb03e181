//! Interfaces, whose they are, and what they are part of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use busway_pci::Bdf;

use crate::device::HostDevice;
use crate::root::{self, SysRoot};

/// How deep one interface may stand on another (a VLAN on a bond in a bridge is three).
const DEEPEST: usize = 16;

/// A link of the point-to-point protocol (linux/if_arp.h).
const ARPHRD_PPP: u32 = 512;

/// Which interfaces each is part of.
pub(super) type Above = BTreeMap<String, Vec<String>>;

/// Every network interface of this namespace.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    /// Which interfaces each is part of.
    pub(super) above: Above,
    /// Those of PCI devices.
    pub(super) owned: Vec<Owned>,
}

/// An interface of a PCI device.
#[derive(Debug)]
pub(super) struct Owned {
    pub(super) owner: Bdf,
    pub(super) name: String,
    /// Its folder in sysfs.
    pub(super) path: PathBuf,
    /// Whether it stands for a function behind the device's switch.
    pub(super) represents: bool,
}

impl Interfaces {
    pub(super) fn read(root: &SysRoot) -> Self {
        let class = root.sys.join("class/net");
        let mut all = Self::default();
        for name in root::raw_names(&class) {
            let path = root::target(root, &class.join(&name));
            let name = name.to_string_lossy();
            let uppers = path.as_deref().map(root::names).unwrap_or_default();
            let uppers = uppers
                .iter()
                .filter_map(|entry| entry.strip_prefix("upper_").map(root::one_line))
                .collect();
            all.above.insert(root::one_line(&name), uppers);
            if let Some(path) = path
                && let Some(owner) = root::innermost_pci(&path)
            {
                all.owned.push(Owned {
                    owner,
                    represents: represents(root, &name),
                    name: root::one_line(&name),
                    path,
                });
            }
        }
        all.add_pppoe(root);
        all
    }

    /// PPP over Ethernet says in a list of its own which interfaces it goes by (net/pppoe.c,
    /// `Id Address Device`), and not which link of PPP is over which.
    fn add_pppoe(&mut self, root: &SysRoot) {
        let text = root::text(&root.proc.join("net/pppoe")).unwrap_or_default();
        let class = root.sys.join("class/net");
        let names = self.above.keys();
        let links: Vec<_> = names
            .filter(|name| root::number(&class.join(name).join("type")) == Some(ARPHRD_PPP))
            .cloned()
            .collect();
        for line in text.lines().skip(1) {
            let lower = line.split_whitespace().nth(2).map(root::one_line);
            if let Some(above) = lower.and_then(|lower| self.above.get_mut(&lower)) {
                above.extend(links.iter().cloned());
            }
        }
    }
}

/// Whether the interface is a representor: one that stands for a virtual function or a subfunction
/// behind its device's switch, `pf0vf3` or `c1pf0sf88` (Documentation/networking/switchdev.rst,
/// net/devlink/port.c).
pub(crate) fn represents(root: &SysRoot, name: &str) -> bool {
    let port = root.sys.join("class/net").join(name).join("phys_port_name");
    root::attribute(&port).is_some_and(|port| is_representor(&port))
}

fn is_representor(port: &str) -> bool {
    /// What follows `word` and a number.
    fn numbered<'a>(text: &'a str, word: &str) -> Option<&'a str> {
        let digits = text.strip_prefix(word)?;
        let rest = digits.trim_start_matches(|c: char| c.is_ascii_digit());
        (rest.len() < digits.len()).then_some(rest)
    }
    let port = numbered(port, "c").unwrap_or(port);
    let function = numbered(port, "pf");
    let kinds = ["vf", "sf"];
    function.is_some_and(|function| kinds.iter().any(|k| numbered(function, k) == Some("")))
}

/// Whether the device's interface is in another network namespace: sysfs shows the folder that the
/// driver's interfaces are in, and none in it (a namespace sees only its own).
///
/// The kernel removes the folder with the last interface (drivers/base/core.c, cleanup_glue_dir).
pub(in crate::usage) fn is_elsewhere(root: &SysRoot, device: &HostDevice) -> bool {
    if device.driver.is_none() || device.is_with_vfio() {
        return false;
    }
    let folder = root.device(device.address);
    let is_empty = |folder: &std::path::Path| root::try_names(folder).is_ok_and(|n| n.is_empty());
    if is_empty(&folder.join("net")) {
        return true;
    }
    // virtio's bus is between.
    let names = root::names(&folder).into_iter();
    let mut below = names.filter(|name| name.starts_with("virtio"));
    below.any(|name| is_empty(&folder.join(name).join("net")))
}

/// An interface and what it is part of, one above the other; where it is part of several, the first.
pub(super) fn stack(name: &str, above: &Above) -> Vec<String> {
    let mut chain = vec![name.to_owned()];
    while let Some(upper) = chain.last().and_then(|last| above.get(last)?.first()) {
        if chain.len() > DEEPEST || chain.contains(upper) {
            break;
        }
        chain.push(upper.clone());
    }
    chain
}

/// An interface with each of those that it is part of, one above the other; itself where it is part of
/// nothing.
pub(super) fn stacks(name: &str, above: &Above) -> Vec<Vec<String>> {
    let uppers = above.get(name).map(Vec::as_slice).unwrap_or_default();
    if uppers.is_empty() {
        return vec![vec![name.to_owned()]];
    }
    let stacked = |upper: &String| {
        let mut chain = vec![name.to_owned()];
        let rest = stack(upper, above).into_iter();
        chain.extend(rest.take_while(|above| above != name));
        chain
    };
    uppers.iter().map(stacked).collect()
}

/// The way from an interface up to one of those wanted.
pub(super) fn way(name: &str, above: &Above, wanted: &BTreeSet<String>) -> Option<Vec<String>> {
    fn climb<'a>(
        name: &'a str,
        above: &'a Above,
        wanted: &BTreeSet<String>,
        seen: &mut BTreeSet<&'a str>,
        chain: &mut Vec<String>,
    ) -> bool {
        if !seen.insert(name) || chain.len() >= DEEPEST {
            return false;
        }
        chain.push(name.to_owned());
        let mut uppers = above.get(name).into_iter().flatten();
        let found =
            wanted.contains(name) || uppers.any(|upper| climb(upper, above, wanted, seen, chain));
        if !found {
            chain.pop();
        }
        found
    }
    let mut chain = Vec::new();
    climb(name, above, wanted, &mut BTreeSet::new(), &mut chain).then_some(chain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_stand_on_each_other_in_a_ring_end_the_search() {
        let ring = |a: &str, b: &str| (a.to_owned(), vec![b.to_owned()]);
        let above = BTreeMap::from([ring("a", "b"), ring("b", "a")]);
        assert_eq!(way("a", &above, &BTreeSet::new()), None);
        assert_eq!(stack("a", &above), ["a", "b"]);
    }

    #[test]
    fn a_representor_is_named_by_the_function_that_it_stands_for() {
        for port in ["pf0vf0", "c1pf0vf3", "pf1sf88"] {
            assert!(is_representor(port), "{port}");
        }
        for port in ["p0", "pf0", "c1pf0", "pf0vf", "pfvf1", "pf0vf1x", "vf3", ""] {
            assert!(!is_representor(port), "{port}");
        }
    }
}
