//! Network interfaces: what they are part of, their addresses, the routes that leave by them, and what
//! the host has from other machines over them.

mod interfaces;
mod peers;
mod routes;
mod ssh;

use std::collections::{BTreeMap, BTreeSet};

use busway_iommu::Command;
use busway_pci::Bdf;

use super::{InterfaceAddress, StorageServer, Usage};
use crate::root::{self, SysRoot};
pub(super) use interfaces::is_elsewhere;
pub(crate) use interfaces::represents;
use interfaces::{Above, Interfaces, stack, stacks, way};
use peers::Served;
use routes::{Asked, Routes, Static};

/// What is wanted of interfaces, for each by its name.
struct Wanted {
    addresses: Vec<InterfaceAddress>,
    defaults: BTreeSet<String>,
    ssh: Option<(std::net::IpAddr, BTreeSet<String>)>,
    statics: BTreeMap<String, Static>,
    served: Vec<(Served, BTreeSet<String>)>,
    /// The kernel's messages that go to another machine: by what name, and by which interface.
    consoles: Vec<(String, BTreeSet<String>)>,
}

/// The uses of the interfaces of every PCI device.
pub(super) fn read(root: &SysRoot) -> Vec<(Bdf, Usage)> {
    let interfaces = Interfaces::read(root);
    if interfaces.owned.is_empty() {
        return Vec::new();
    }
    let wanted = Wanted::read(root);
    let above = &interfaces.above;
    let mut uses = Vec::new();
    // A switch has thousands of representors, and all those in one bridge have the same said of them.
    let mut represented: BTreeMap<(Bdf, Vec<String>), Vec<String>> = BTreeMap::new();
    for interface in &interfaces.owned {
        if !interface.represents {
            let chains = stacks(&interface.name, above).into_iter().enumerate();
            uses.extend(chains.map(|(index, chain)| {
                let usage = Usage::Interface {
                    addresses: wanted.addresses(&chain),
                    chain,
                    leave: super::interface::leave(root, &interface.path, index),
                };
                (interface.owner, usage)
            }));
            let more = wanted.uses(&interface.name, above).into_iter();
            uses.extend(more.map(|usage| (interface.owner, usage)));
            continue;
        }
        let name = interface.name.clone();
        let chain = stack(&name, above);
        let tail = chain.into_iter().skip(1).collect();
        let same = represented.entry((interface.owner, tail)).or_default();
        same.push(name);
    }
    for ((owner, above_them), names) in represented {
        let addresses = wanted.addresses(&names);
        // Those in one bridge lead where one of them does; those in none may have routes each.
        let leads = if above_them.is_empty() {
            names.len()
        } else {
            1
        };
        let more = names.iter().take(leads);
        let more: Vec<_> = more.flat_map(|name| wanted.uses(name, above)).collect();
        let usage = Usage::Representors {
            names,
            part_of: above_them,
            addresses,
        };
        uses.push((owner, usage));
        uses.extend(more.into_iter().map(|usage| (owner, usage)));
    }
    uses
}

/// Those that are on (Documentation/networking/netconsole.rst).
fn consoles(root: &SysRoot) -> Vec<(String, BTreeSet<String>)> {
    let folder = root.sys.join("kernel/config/netconsole");
    let one = |name: String| {
        let attribute = |file: &str| root::attribute(&folder.join(&name).join(file));
        let interface =
            attribute("dev_name").filter(|_| attribute("enabled").as_deref() == Some("1"));
        Some((root::one_line(&name), BTreeSet::from([interface?])))
    };
    root::names(&folder).into_iter().filter_map(one).collect()
}

impl Wanted {
    fn read(root: &SysRoot) -> Self {
        let routes = Routes::read(root);
        let addresses = routes.addresses(root);
        let connection = ssh::connection(root);
        let asked = Asked::ask(root);
        let mut defaults = routes.defaults();
        defaults.extend(asked.defaults.iter().cloned());
        let way_to = |there, here| {
            let by_table = || routes.to(there).map(str::to_owned);
            BTreeSet::from_iter(asked.way(there, here).or_else(by_table))
        };
        let ssh = connection.map(|c| (c.client, way_to(c.client, c.here)));
        let is_own = |address| addresses.iter().any(|own| own.address == address);
        let statics = routes.statics(&addresses);
        let lead_out = || {
            let real = addresses.iter().filter(|own| !own.is_link_local());
            let of_addresses = real.map(|own| own.interface.clone());
            let of_routes = defaults.iter().chain(statics.keys()).cloned();
            of_addresses.chain(of_routes).collect()
        };
        let served = peers::read(root).into_iter();
        let served = served.filter_map(|served| {
            let by = match &served.server {
                StorageServer::Address(address) if is_own(*address) => return None,
                StorageServer::Address(address) => way_to(*address, None),
                StorageServer::OnLink(interface) => BTreeSet::from([interface.clone()]),
                StorageServer::Unseen => lead_out(),
            };
            Some((served, by))
        });
        Self {
            ssh,
            served: served.collect(),
            statics,
            consoles: consoles(root),
            defaults,
            addresses,
        }
    }

    /// The addresses of these interfaces.
    fn addresses(&self, names: &[String]) -> Vec<InterfaceAddress> {
        let its = self.addresses.iter();
        let its = its.filter(|address| names.contains(&address.interface));
        its.cloned().collect()
    }

    /// What leads by the interface, or by what it is part of.
    fn uses(&self, name: &str, above: &Above) -> Vec<Usage> {
        let mut uses = Vec::new();
        if let Some(chain) = way(name, above, &self.defaults) {
            uses.push(Usage::DefaultRoute { chain });
        }
        if let Some((client, by)) = &self.ssh
            && let Some(chain) = way(name, above, by)
        {
            let client = *client;
            uses.push(Usage::SshRoute { chain, client });
        }
        for (served, by) in &self.served {
            if let Some(chain) = way(name, above, by) {
                uses.push(Usage::NetworkStorage {
                    chain,
                    server: served.server.clone(),
                    protocol: served.protocol.clone(),
                    at: served.at.clone(),
                    disks: served.disks.clone(),
                });
            }
        }
        for (console, by) in &self.consoles {
            if let Some(mut chain) = way(name, above, by) {
                chain.push(format!("netconsole {console}"));
                let enabled = format!("/sys/kernel/config/netconsole/{console}/enabled");
                let release = Some(Command::write("0", enabled));
                uses.push(Usage::Held { chain, release });
            }
        }
        for (interface, routes) in &self.statics {
            if let Some(chain) = way(name, above, &BTreeSet::from([interface.clone()])) {
                uses.push(Usage::StaticRoutes {
                    chain,
                    first: routes.first.clone(),
                    count: routes.count,
                });
            }
        }
        uses
    }
}
