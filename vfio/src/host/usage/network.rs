//! Network interfaces: what they are part of, their addresses, and the routes that leave by them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use busway_pci::Bdf;

use super::{InterfaceAddress, Usage, interface};
use crate::host::netlink;
use crate::host::root::{self, SysRoot};

/// linux/route.h: a route that refuses.
const RTF_REJECT: u32 = 0x0200;
/// linux/route.h: by a gateway.
const RTF_GATEWAY: u32 = 0x0002;

/// How deep one interface may stand on another (a VLAN on a bond in a bridge is three).
const DEEPEST: usize = 16;

/// How many processes may stand between this one and the SSH server's.
const FARTHEST: usize = 64;

/// Which interfaces each is part of.
type Above = BTreeMap<String, Vec<String>>;

/// The uses of the interfaces of every PCI device.
pub(super) fn read(root: &SysRoot) -> Vec<(Bdf, Usage)> {
    let class = root.sys.join("class/net");
    let mut owners = Vec::new();
    let mut above = Above::new();
    for name in root::raw_names(&class) {
        let path = root.target(&class.join(&name));
        let name = root::one_line(&name.to_string_lossy());
        let uppers = path.as_deref().map(root::names).unwrap_or_default();
        let uppers = uppers
            .iter()
            .filter_map(|entry| entry.strip_prefix("upper_").map(root::one_line))
            .collect();
        above.insert(name.clone(), uppers);
        if let Some(path) = path
            && let Some(owner) = root::innermost_pci(&path)
        {
            owners.push((owner, name, path));
        }
    }
    if owners.is_empty() {
        return Vec::new();
    }
    let routes = Routes::read(root);
    let addresses = routes.addresses(root);
    let connection = ssh_connection(root);
    let asked = Asked::ask(root, connection);
    let mut defaults = routes.defaults();
    defaults.extend(asked.defaults);
    let client = connection.map(|connection| connection.client);
    let by_table = || {
        client
            .and_then(|client| routes.to(client))
            .map(str::to_owned)
    };
    let to_client = BTreeSet::from_iter(asked.to_client.or_else(by_table));

    let mut uses = Vec::new();
    for (owner, name, path) in owners {
        let chain = stack(&name, &above);
        let its = addresses
            .iter()
            .filter(|address| chain.contains(&address.interface));
        let addresses = its.cloned().collect();
        let leave = interface::leave(root, &path);
        let usage = Usage::Interface {
            chain,
            addresses,
            leave,
        };
        uses.push((owner, usage));
        if let Some(chain) = way(&name, &above, &defaults) {
            uses.push((owner, Usage::DefaultRoute { chain }));
        }
        if let (Some(client), Some(chain)) = (client, way(&name, &above, &to_client)) {
            uses.push((owner, Usage::SshRoute { chain, client }));
        }
    }
    uses
}

/// An interface and what it is part of, one above the other; where it is part of several, the first.
fn stack(name: &str, above: &Above) -> Vec<String> {
    let mut chain = vec![name.to_owned()];
    while let Some(upper) = chain.last().and_then(|last| above.get(last)?.first()) {
        if chain.len() > DEEPEST || chain.contains(upper) {
            break;
        }
        chain.push(upper.clone());
    }
    chain
}

/// The way from an interface up to one of those wanted.
fn way(name: &str, above: &Above, wanted: &BTreeSet<String>) -> Option<Vec<String>> {
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

/// The kernel's routes, as far as its main table says.
struct Routes {
    v4: Vec<Route<Ipv4Addr>>,
    v6: Vec<Route<Ipv6Addr>>,
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
    fn read(root: &SysRoot) -> Self {
        let text = |name: &str| root::text(&root.proc.join("net").join(name)).unwrap_or_default();
        Self {
            v4: text("route").lines().filter_map(ipv4).collect(),
            v6: text("ipv6_route").lines().filter_map(ipv6).collect(),
        }
    }

    /// The interfaces that a default route leaves by, IPv4's or IPv6's.
    fn defaults(&self) -> BTreeSet<String> {
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

    /// The interface that packets to `address` leave by.
    fn to(&self, address: IpAddr) -> Option<&str> {
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
    fn addresses(&self, root: &SysRoot) -> Vec<InterfaceAddress> {
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

/// What procfs does not tell: routes of other tables than the main one, and the rules that choose
/// between them. A made-up host has no kernel to be asked.
#[derive(Debug, Default)]
struct Asked {
    defaults: BTreeSet<String>,
    to_client: Option<String>,
}

impl Asked {
    fn ask(root: &SysRoot, connection: Option<Connection>) -> Self {
        if root.proc != Path::new("/proc") {
            return Self::default();
        }
        let class = root.sys.join("class/net");
        let index = |name: String| {
            let index: u32 = root::number(&class.join(&name).join("ifindex"))?;
            Some((index, root::one_line(&name)))
        };
        let names = root::names(&class).into_iter().filter_map(index);
        let names: BTreeMap<_, _> = names.collect();
        let defaults = netlink::default_routes();
        let defaults = defaults.inspect_err(|error| log::debug!("no other tables: {error}"));
        let defaults = defaults.unwrap_or_default();
        let to_client = connection.and_then(|connection| {
            let way = netlink::way_to(connection.client, connection.here);
            way.ok().flatten()
        });
        let name = |index: &u32| names.get(index).filter(|name| *name != "lo").cloned();
        Self {
            defaults: defaults.iter().filter_map(name).collect(),
            to_client: to_client.as_ref().and_then(name),
        }
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

/// An SSH connection: who sits at the other end, and which of the host's addresses they came to.
#[derive(Clone, Copy, Debug)]
struct Connection {
    client: IpAddr,
    here: Option<IpAddr>,
}

impl Connection {
    /// CLIENT PORT SERVER PORT (sshd(8)); an IPv6 address may have a scope.
    fn parse(text: &str) -> Option<Self> {
        let address = |word: &str| {
            let word = word.split('%').next()?;
            word.parse()
                .ok()
                .map(|address: IpAddr| address.to_canonical())
        };
        let mut words = text.split(' ');
        Some(Self {
            client: address(words.next()?)?,
            here: words.nth(1).and_then(address),
        })
    }
}

/// The SSH connection that this process was started from, if one.
///
/// `sudo` drops the variable that says so, so the processes above are asked too.
fn ssh_connection(root: &SysRoot) -> Option<Connection> {
    let mut process = root.proc.join("self");
    for _ in 0..FARTHEST {
        if let Ok(environment) = std::fs::read(process.join("environ")) {
            let environment = String::from_utf8_lossy(&environment);
            let value = environment
                .split('\0')
                .find_map(|variable| variable.strip_prefix("SSH_CONNECTION="));
            if let Some(connection) = value.and_then(Connection::parse) {
                return Some(connection);
            }
        }
        let status = root::text(&process.join("status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        let parent: u32 = parent.trim().parse().ok().filter(|pid| *pid > 1)?;
        process = root.proc.join(parent.to_string());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ssh_connection_is_two_addresses() {
        let parse = |text| Connection::parse(text).map(|c| (c.client.to_string(), c.here));
        let here = "10.0.0.2".parse().ok();
        assert_eq!(
            parse("::ffff:192.0.2.1 50000 10.0.0.2 22"),
            Some(("192.0.2.1".to_owned(), here))
        );
        assert_eq!(
            parse("fe80::1%eth0 50000"),
            Some(("fe80::1".to_owned(), None))
        );
        assert_eq!(parse("somewhere 1 2 3"), None);
    }

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

    #[test]
    fn interfaces_that_stand_on_each_other_in_a_ring_end_the_search() {
        let ring = |a: &str, b: &str| (a.to_owned(), vec![b.to_owned()]);
        let above = BTreeMap::from([ring("a", "b"), ring("b", "a")]);
        assert_eq!(way("a", &above, &BTreeSet::new()), None);
        assert_eq!(stack("a", &above), ["a", "b"]);
    }
}
