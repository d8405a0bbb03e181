//! Network interfaces, and which of them the default route goes through.

use std::collections::{BTreeMap, BTreeSet};

use busway_pci::Bdf;

use super::Usage;
use crate::host::root::{self, SysRoot};

/// linux/route.h: a route that refuses.
const RTF_REJECT: u32 = 0x0200;

/// How deep one interface may stand on another (a VLAN on a bond in a bridge is three).
const DEEPEST: usize = 16;

/// The uses of the interfaces of every PCI device.
pub(super) fn read(root: &SysRoot) -> Vec<(Bdf, Usage)> {
    let class = root.sys.join("class/net");
    let mut owners = Vec::new();
    let mut above: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in root::names(&class) {
        let folder = class.join(&name);
        let uppers = root::names(&folder)
            .iter()
            .filter_map(|entry| entry.strip_prefix("upper_").map(str::to_owned))
            .collect();
        above.insert(name.clone(), uppers);
        let path = folder.canonicalize().ok();
        if let Some(owner) = path.and_then(|path| root::innermost_pci(&path)) {
            owners.push((owner, name));
        }
    }
    let routed = default_routes(root);
    owners
        .into_iter()
        .map(|(owner, name)| match route(&name, &above, &routed, 0) {
            Some(mut chain) => {
                chain.reverse();
                (owner, Usage::DefaultRoute { chain })
            }
            None => (owner, Usage::Interface { name }),
        })
        .collect()
}

/// The way from an interface up to one that has a default route, last first.
fn route(
    name: &str,
    above: &BTreeMap<String, Vec<String>>,
    routed: &BTreeSet<String>,
    depth: usize,
) -> Option<Vec<String>> {
    if routed.contains(name) {
        return Some(vec![name.to_owned()]);
    }
    if depth >= DEEPEST {
        return None;
    }
    let mut chain = above
        .get(name)?
        .iter()
        .find_map(|upper| route(upper, above, routed, depth + 1))?;
    chain.push(name.to_owned());
    Some(chain)
}

/// The interfaces that a default route leaves by, IPv4's or IPv6's.
fn default_routes(root: &SysRoot) -> BTreeSet<String> {
    let text = |name: &str| root::text(&root.proc.join("net").join(name)).unwrap_or_default();
    let mut interfaces: BTreeSet<_> = text("route").lines().filter_map(ipv4).collect();
    interfaces.extend(text("ipv6_route").lines().filter_map(ipv6));
    interfaces
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …` (net/ipv4/fib_trie.c).
fn ipv4(line: &str) -> Option<String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let (name, flags) = (words.first()?, u32::from_str_radix(words.get(3)?, 16).ok()?);
    let all = words.get(1)? == &"00000000" && words.get(7)? == &"00000000";
    (all && flags & RTF_REJECT == 0).then(|| (*name).to_owned())
}

/// `destination length source length next-hop metric refcnt use flags interface` (net/ipv6/route.c).
fn ipv6(line: &str) -> Option<String> {
    let words: Vec<_> = line.split_whitespace().collect();
    let (name, flags) = (words.get(9)?, u32::from_str_radix(words.get(8)?, 16).ok()?);
    let all = words.first()?.bytes().all(|digit| digit == b'0') && words.get(1)? == &"00";
    (all && flags & RTF_REJECT == 0 && *name != "lo").then(|| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_route_to_everywhere_is_a_default_route() {
        let line = "eth0\t00000000\t0102000A\t0003\t0\t0\t100\t00000000\t0\t0\t0";
        assert_eq!(ipv4(line).as_deref(), Some("eth0"));
        // Half of all addresses, as VPNs have it; and the local network.
        assert_eq!(
            ipv4("tun0\t00000000\t0\t0001\t0\t0\t0\t00000080\t0\t0\t0"),
            None
        );
        assert_eq!(
            ipv4("eth0\t0002000A\t0\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0"),
            None
        );
        assert_eq!(ipv4("Iface\tDestination\tGateway \tFlags\tRefCnt"), None);
    }

    #[test]
    fn a_route_that_refuses_is_none() {
        let zero = "0".repeat(32);
        let line = |flags, name| format!("{zero} 00 {zero} 00 {zero} 00000400 1 0 {flags} {name}");
        assert_eq!(ipv6(&line("00000003", "eth0")).as_deref(), Some("eth0"));
        assert_eq!(ipv6(&line("00000203", "eth0")), None);
        assert_eq!(ipv6(&line("00200200", "lo")), None);
    }

    #[test]
    fn interfaces_that_stand_on_each_other_in_a_ring_end_the_search() {
        let ring = |a: &str, b: &str| (a.to_owned(), vec![b.to_owned()]);
        let above = BTreeMap::from([ring("a", "b"), ring("b", "a")]);
        assert_eq!(route("a", &above, &BTreeSet::new(), 0), None);
    }
}
