//! The kernel's routes and addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use crate::netlink;
use crate::root::{self, SysRoot};
use crate::usage::InterfaceAddress;

/// linux/route.h: a route that refuses.
const RTF_REJECT: u32 = 0x0200;
/// linux/route.h: by a gateway.
const RTF_GATEWAY: u32 = 0x0002;

/// The kernel's routes, as far as its main table says.
pub(super) struct Routes {
    v4: Vec<Route<Ipv4Addr>>,
    v6: Vec<Route<Ipv6Addr>>,
}

/// Routes that somebody set, of one interface. There may be a million; one is named.
#[derive(Debug)]
pub(super) struct Static {
    /// The network that the first leads to: `172.16.0.0/12`.
    pub(super) first: String,
    /// How many there are.
    pub(super) count: usize,
}

#[derive(Debug, PartialEq, Eq)]
struct Route<A> {
    interface: String,
    to: A,
    length: u32,
    metric: u32,
    flags: u32,
}

impl Routes {
    pub(super) fn read(root: &SysRoot) -> Self {
        let text = |name: &str| root::text(&root.proc.join("net").join(name)).unwrap_or_default();
        Self {
            v4: text("route").lines().filter_map(ipv4).collect(),
            v6: text("ipv6_route").lines().filter_map(ipv6).collect(),
        }
    }

    /// The interfaces that a default route leaves by, IPv4's or IPv6's.
    pub(super) fn defaults(&self) -> BTreeSet<String> {
        let v4 = self
            .v4
            .iter()
            .filter(|r| r.length == 0)
            .map(|r| &r.interface);
        let v6 = self
            .v6
            .iter()
            .filter(|r| r.length == 0)
            .map(|r| &r.interface);
        v4.chain(v6).cloned().collect()
    }

    /// The routes, by interface, that neither lead everywhere nor come with one of its addresses.
    pub(super) fn statics(&self, addresses: &[InterfaceAddress]) -> BTreeMap<String, Static> {
        let mut own: BTreeMap<&str, Vec<IpAddr>> = BTreeMap::new();
        for InterfaceAddress { interface, address } in addresses {
            own.entry(interface).or_default().push(*address);
        }
        let own = |interface: &str| own.get(interface).map(Vec::as_slice).unwrap_or_default();
        let mut statics: BTreeMap<String, Static> = BTreeMap::new();
        let mut add = |interface: &String, to: IpAddr, length: u32| {
            let first = || Static {
                first: format!("{to}/{length}"),
                count: 0,
            };
            let known = statics.entry(interface.clone()).or_insert_with(first);
            known.count += 1;
        };
        for route in self.v4.iter().filter(|route| route.length > 0) {
            let comes_with = |address: &IpAddr| matches!(address, IpAddr::V4(v4) if route.has(*v4));
            let comes = route.flags & RTF_GATEWAY == 0
                && (route.to.is_link_local() || own(&route.interface).iter().any(comes_with));
            if !comes {
                add(&route.interface, route.to.into(), route.length);
            }
        }
        for route in self.v6.iter().filter(|route| route.length > 0) {
            let comes_with = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if route.has(*v6));
            let is_every_links = route.to.is_multicast() || route.to.is_unicast_link_local();
            let comes = route.flags & RTF_GATEWAY == 0
                && (is_every_links || own(&route.interface).iter().any(comes_with));
            if !comes {
                add(&route.interface, route.to.into(), route.length);
            }
        }
        statics
    }

    /// The interface that packets to `address` leave by.
    pub(super) fn to(&self, address: IpAddr) -> Option<&str> {
        // The longest prefix, and of those the smallest metric.
        match address {
            IpAddr::V4(address) => {
                let fits = self.v4.iter().filter(|route| route.has(address));
                let best = fits.max_by_key(|r| (r.length, u32::MAX - r.metric));
                best.map(|route| route.interface.as_str())
            }
            IpAddr::V6(address) => {
                let fits = self.v6.iter().filter(|route| route.has(address));
                let best = fits.max_by_key(|r| (r.length, u32::MAX - r.metric));
                best.map(|route| route.interface.as_str())
            }
        }
    }

    /// The host's addresses, each with its interface.
    ///
    /// IPv4's stand in a list of all the host's own; whose each is, the route to its network says.
    pub(super) fn addresses(&self, root: &SysRoot) -> Vec<InterfaceAddress> {
        let text = |name: &str| root::text(&root.proc.join("net").join(name)).unwrap_or_default();
        let mut addresses = Vec::new();
        for address in local_ipv4(&text("fib_trie")) {
            let near = self
                .v4
                .iter()
                .filter(|route| route.flags & RTF_GATEWAY == 0);
            let near = near.filter(|route| route.has(address));
            if let Some(route) = near.max_by_key(|route| route.length) {
                addresses.push(InterfaceAddress {
                    interface: route.interface.clone(),
                    address: address.into(),
                });
            }
        }
        // address, interface's index, prefix length, scope, flags, interface (net/ipv6/addrconf.c)
        for line in text("if_inet6").lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            if let [digits, _, _, _, _, interface] = words[..]
                && let Ok(address) = u128::from_str_radix(digits, 16)
            {
                addresses.push(InterfaceAddress {
                    interface: interface.to_owned(),
                    address: Ipv6Addr::from(address).into(),
                });
            }
        }
        addresses
    }
}

impl Route<Ipv4Addr> {
    fn has(&self, address: Ipv4Addr) -> bool {
        let mask = u32::MAX.checked_shl(32 - self.length).unwrap_or(0);
        u32::from(address) & mask == u32::from(self.to)
    }
}

impl Route<Ipv6Addr> {
    fn has(&self, address: Ipv6Addr) -> bool {
        let mask = u128::MAX.checked_shl(128 - self.length).unwrap_or(0);
        u128::from(address) & mask == u128::from(self.to)
    }
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …` (net/ipv4/fib_trie.c): numbers as their
/// bytes stand in memory.
fn ipv4(line: &str) -> Option<Route<Ipv4Addr>> {
    let words: Vec<_> = line.split_whitespace().collect();
    let number = |index: usize| u32::from_str_radix(words.get(index)?, 16).ok();
    let route = Route {
        interface: (*words.first()?).to_owned(),
        to: Ipv4Addr::from(number(1)?.to_ne_bytes()),
        length: number(7)?.count_ones(),
        metric: words.get(6)?.parse().ok()?,
        flags: number(3)?,
    };
    (route.flags & RTF_REJECT == 0).then_some(route)
}

/// `destination length source length next-hop metric refcnt use flags interface` (net/ipv6/route.c).
fn ipv6(line: &str) -> Option<Route<Ipv6Addr>> {
    let words: Vec<_> = line.split_whitespace().collect();
    let number = |index: usize| u32::from_str_radix(words.get(index)?, 16).ok();
    let route = Route {
        interface: (*words.get(9)?).to_owned(),
        to: u128::from_str_radix(words.first()?, 16).ok()?.into(),
        length: number(1).filter(|length| *length <= 128)?,
        metric: number(5)?,
        flags: number(8)?,
    };
    (route.flags & RTF_REJECT == 0 && route.interface != "lo").then_some(route)
}

/// The host's own addresses in fib_trie: `|-- 10.0.2.15` with `/32 host LOCAL` below it.
fn local_ipv4(text: &str) -> BTreeSet<Ipv4Addr> {
    let mut found = BTreeSet::new();
    let mut last = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line == "/32 host LOCAL" {
            found.extend(last.filter(|address| !address.is_loopback()));
        }
    }
    found
}

/// What procfs does not tell: routes of other tables than the main one, and the rules that choose
/// between them. A made-up host has no kernel to be asked.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// The interfaces that a default route leaves by.
    pub(super) defaults: BTreeSet<String>,
    /// The interfaces by the kernel's numbers; none where there is no kernel to be asked.
    names: BTreeMap<u32, String>,
}

impl Asked {
    pub(super) fn ask(root: &SysRoot) -> Self {
        if root.proc != Path::new("/proc") {
            return Self::default();
        }
        let class = root.sys.join("class/net");
        let index = |name: String| {
            let index: u32 = root::number(&class.join(&name).join("ifindex"))?;
            Some((index, root::one_line(&name)))
        };
        let names = root::names(&class).into_iter().filter_map(index);
        let names: BTreeMap<_, _> = names.filter(|(_, name)| name != "lo").collect();
        let defaults = netlink::default_routes();
        let defaults = defaults.inspect_err(|error| log::debug!("no other tables: {error}"));
        let defaults = defaults.unwrap_or_default();
        Self {
            defaults: defaults
                .iter()
                .filter_map(|i| names.get(i))
                .cloned()
                .collect(),
            names,
        }
    }

    /// The interface that packets to `there` leave by, from the host's address `here` where that is known.
    pub(super) fn way(&self, there: IpAddr, here: Option<IpAddr>) -> Option<String> {
        if self.names.is_empty() {
            return None;
        }
        let index = netlink::way_to(there, here).ok().flatten()?;
        self.names.get(&index).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_route_to_everywhere_is_a_default_route() {
        let length = |line| ipv4(line).map(|route| route.length);
        let line = "eth0\t00000000\t0102000A\t0003\t0\t0\t100\t00000000\t0\t0\t0";
        assert_eq!(length(line), Some(0));
        // Half of all addresses, as VPNs have it; and the local network.
        let half = "tun0\t00000000\t0\t0001\t0\t0\t0\t00000080\t0\t0\t0";
        assert_eq!(length(half), Some(1));
        let local = "eth0\t0002000A\t0\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0";
        assert_eq!(length(local), Some(24));
        assert_eq!(length("Iface\tDestination\tGateway \tFlags\tRefCnt"), None);
    }

    #[test]
    fn a_route_that_refuses_is_none() {
        let zero = "0".repeat(32);
        let line = |flags, name| format!("{zero} 00 {zero} 00 {zero} 00000400 1 0 {flags} {name}");
        assert!(ipv6(&line("00000003", "eth0")).is_some());
        assert_eq!(ipv6(&line("00000203", "eth0")), None);
        assert_eq!(ipv6(&line("00200200", "lo")), None);
    }

    #[test]
    fn the_longest_prefix_says_the_way_and_the_metric_decides_between_equals() {
        let routes = Routes {
            v4: [
                "eth0\t00000000\t0102000A\t0003\t0\t0\t100\t00000000\t0\t0\t0",
                "eth1\t00000000\t0102000A\t0003\t0\t0\t50\t00000000\t0\t0\t0",
                "eth2\t0002000A\t0\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0",
            ]
            .into_iter()
            .filter_map(ipv4)
            .collect(),
            v6: Vec::new(),
        };
        assert_eq!(routes.to("10.0.2.77".parse().unwrap()), Some("eth2"));
        assert_eq!(routes.to("192.0.2.1".parse().unwrap()), Some("eth1"));
        assert_eq!(routes.to("2001:db8::1".parse().unwrap()), None);
    }

    #[test]
    fn the_hosts_own_addresses_are_told_from_networks_and_broadcasts() {
        let text = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.2.0\n        /24 link UNICAST\n\
                    |-- 10.0.2.15\n  /32 host LOCAL\n  |-- 10.0.2.255\n  /32 link BROADCAST\n\
                    |-- 127.0.0.1\n  /32 host LOCAL\n";
        let found: Vec<_> = local_ipv4(text).into_iter().collect();
        assert_eq!(found, [Ipv4Addr::new(10, 0, 2, 15)]);
    }
}
