//! The machines that the host has storage from: network file systems, iSCSI, and NVMe over fabrics.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::root::{self, SysRoot};
use crate::usage::{StorageServer, Usage, block, mounts};

/// File systems that are another machine's, and the TCP ports that its side listens on.
const FILE_SYSTEMS: [(&str, &[u16]); 12] = [
    ("nfs", &[2049]),
    ("nfs4", &[2049]),
    ("cifs", &[445, 139]),
    ("smb3", &[445]),
    ("ceph", &CEPH),
    ("9p", &[564]),
    ("lustre", &[988]),
    ("glusterfs", &[24007]),
    ("fuse.glusterfs", &[24007]),
    ("fuse.ceph", &CEPH),
    ("fuse.ceph-fuse", &CEPH),
    ("fuse.sshfs", &[]),
];

/// iSCSI's port (RFC 7143).
const ISCSI: u16 = 3260;
/// Those of Ceph's monitors.
const CEPH: [u16; 2] = [3300, 6789];
/// NBD's port, as it is registered.
const NBD: u16 = 10809;

/// What the host has from another machine by one protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) server: StorageServer,
    pub(super) protocol: String,
    /// Where it is mounted, the shortest path first.
    pub(super) at: Vec<PathBuf>,
    pub(super) disks: Vec<String>,
}

type All = BTreeMap<(StorageServer, String), (BTreeSet<PathBuf>, BTreeSet<String>)>;

/// What the host has from other machines.
pub(super) fn read(root: &SysRoot) -> Vec<Served> {
    let mut all = All::new();
    let names = Names::read(root);
    file_systems(root, &names, &mut all);
    disks(root, &mut all);
    let one = |((server, protocol), (at, disks)): (_, (BTreeSet<PathBuf>, BTreeSet<_>))| {
        let mut at: Vec<_> = at.into_iter().collect();
        at.sort_by_key(|path| path.as_os_str().len());
        Served {
            server,
            protocol,
            at,
            disks: disks.into_iter().collect(),
        }
    };
    let elsewhere = |served: &Served| match served.server {
        StorageServer::Address(server) => !server.is_loopback() && !server.is_unspecified(),
        StorageServer::OnLink(_) | StorageServer::Unseen => true,
    };
    all.into_iter().map(one).filter(elsewhere).collect()
}

fn file_systems(root: &SysRoot, names: &Names, all: &mut All) {
    for mount in mounts::all(root) {
        let known = FILE_SYSTEMS.iter().find(|(kind, _)| *kind == mount.kind);
        let Some((kind, ports)) = known else {
            continue;
        };
        // A machine's own host serves by virtio, and a program of this one by a socket.
        let option = |key: &str| {
            let mut options = mount.options.split(',');
            options.find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
        };
        if *kind == "9p" && !matches!(option("trans"), Some("tcp" | "rdma")) {
            continue;
        }
        let mut servers = servers(&mount.source.to_string_lossy(), &mount.options, names);
        if servers.is_empty() {
            // The name of a server says nothing here; whom the host is connected with does.
            servers = connected(root, ports);
        }
        for server in or_unseen(servers) {
            let protocol = kind.trim_start_matches("fuse.").to_owned();
            let (at, _) = all.entry((server, protocol)).or_default();
            at.insert(mount.at.clone());
        }
    }
}

fn or_unseen(servers: BTreeSet<IpAddr>) -> BTreeSet<StorageServer> {
    match servers.is_empty() {
        true => BTreeSet::from([StorageServer::Unseen]),
        false => servers.into_iter().map(StorageServer::Address).collect(),
    }
}

/// The addresses of a network file system's servers: those of its options (`addr=` of nfs(5) and
/// mount.cifs(8), `mon_addr=` of mount.ceph(8)), or else those of its source.
fn servers(source: &str, options: &str, names: &Names) -> BTreeSet<IpAddr> {
    let values = options.split(',').filter_map(|option| {
        let (key, value) = option.split_once('=')?;
        ["addr", "mon_addr"].contains(&key).then_some(value)
    });
    // Monitors have slashes between them.
    let found: BTreeSet<_> = values
        .flat_map(|value| value.split('/'))
        .filter_map(|word| names.address(word))
        .collect();
    if !found.is_empty() {
        return found;
    }
    // `host:/path`, `//host/share`, `user@host:path`, `host:6789,host:6789:/path`, `host@tcp:/path`.
    let hosts = source.trim_start_matches('/');
    let hosts = hosts.split('/').next().unwrap_or_default();
    let hosts = hosts.split(',').map(|host| host.trim_end_matches(':'));
    hosts.filter_map(|host| names.address(host)).collect()
}

/// The names that the host itself knows addresses of, in hosts(5). No other machine is asked.
struct Names(BTreeMap<String, IpAddr>);

impl Names {
    fn read(root: &SysRoot) -> Self {
        let text = root::text(&root.etc.join("hosts")).unwrap_or_default();
        let mut names = BTreeMap::new();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            if let Some(address) = words.next().and_then(plain) {
                for name in words {
                    names.entry(name.to_ascii_lowercase()).or_insert(address);
                }
            }
        }
        Self(names)
    }

    /// The address that a word means: itself, in brackets, with a port, a user or a network's kind.
    fn address(&self, word: &str) -> Option<IpAddr> {
        if let Some((inner, _)) = word.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            return plain(inner);
        }
        let before_port = word.rsplit_once(':').map_or(word, |(host, _)| host);
        let after_user = before_port.rsplit_once('@').map_or(before_port, |(_, h)| h);
        let before_kind = word.split_once('@').map_or(word, |(host, _)| host);
        let mut forms = [word, before_port, after_user, before_kind].into_iter();
        let known =
            |name: &str| plain(name).or_else(|| self.0.get(&name.to_ascii_lowercase()).copied());
        forms.find_map(known)
    }
}

/// An address as it is written, which may have a scope.
fn plain(word: &str) -> Option<IpAddr> {
    let word = word.split('%').next()?;
    word.parse()
        .ok()
        .map(|address: IpAddr| address.to_canonical())
}

/// Those whom the host has a TCP connection with that was made to one of these ports.
fn connected(root: &SysRoot, ports: &[u16]) -> BTreeSet<IpAddr> {
    let text = |name: &str| root::text(&root.proc.join("net").join(name)).unwrap_or_default();
    let [v4, v6] = ["tcp", "tcp6"].map(text);
    let all = v4.lines().chain(v6.lines()).filter_map(connection);
    let wanted = all.filter(|(_, port)| ports.contains(port));
    wanted.map(|(address, _)| address).collect()
}

/// The other end of an established connection: `sl local remote state …` (net/ipv4/tcp_ipv4.c,
/// get_tcp4_sock; net/ipv6/tcp_ipv6.c), where an address is 32-bit words as they stand in memory.
fn connection(line: &str) -> Option<(IpAddr, u16)> {
    let mut words = line.split_whitespace().skip(2);
    let (address, port) = words.next()?.split_once(':')?;
    // TCP_ESTABLISHED (include/net/tcp_states.h).
    if words.next()? != "01" {
        return None;
    }
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |index: usize| {
        let digits = address.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(index)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some((address, port))
}

/// What a disk comes by, and from whom.
type Way = (String, BTreeSet<StorageServer>);

/// Disks that are other machines'.
fn disks(root: &SysRoot, all: &mut All) {
    // By the name of what connects them: `session1`, `nvme3`.
    let mut ways = sessions(root);
    ways.extend(controllers(root));
    let connected_by = |path: &Path| -> Vec<Way> {
        let parts = path
            .components()
            .filter_map(|part| part.as_os_str().to_str());
        let direct: Vec<_> = parts.filter_map(|part| ways.get(part).cloned()).collect();
        if !direct.is_empty() {
            return direct;
        }
        // With NVMe multipath a namespace is a child of the subsystem, which links to its controllers.
        let is_subsystem = |folder: &&Path| {
            let name = folder.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("nvme-subsys"))
        };
        let subsystem = path.ancestors().find(is_subsystem);
        let links = subsystem.map(root::names).unwrap_or_default();
        links
            .iter()
            .filter_map(|name| ways.get(name).cloned())
            .collect()
    };
    let server = |path: &Path| {
        let mut found = connected_by(path);
        if found.is_empty() {
            found.extend(by_itself(root, path));
        }
        (!found.is_empty()).then_some(found)
    };
    for (ways, disk, uses) in block::served(root, server) {
        let mounted: BTreeSet<_> = uses
            .into_iter()
            .filter_map(|usage| match usage {
                Usage::Mounted { at, .. } => Some(at),
                _ => None,
            })
            .flatten()
            .collect();
        for (protocol, servers) in ways {
            for server in servers {
                let (at, disks) = all.entry((server, protocol.clone())).or_default();
                at.extend(mounted.iter().cloned());
                disks.insert(disk.clone());
            }
        }
    }
}

/// What a disk says itself of where it comes from, by its folder in sysfs.
fn by_itself(root: &SysRoot, path: &Path) -> Option<Way> {
    let name = path.file_name()?.to_str()?;
    let is_numbered = |name: &str, kind: &str| {
        let number = name.strip_prefix(kind);
        number.is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
    };
    let numbered = |kind| is_numbered(name, kind);
    let mut parts = path.iter().filter_map(|part| part.to_str());
    if parts.any(|part| is_numbered(part, "session")) {
        // A session that its class does not know of, as in a container.
        return Some(("iSCSI".into(), or_unseen(connected(root, &[ISCSI]))));
    }
    if numbered("rbd") {
        // Its monitors are Ceph's, and so are the ports.
        return Some(("RBD".into(), or_unseen(connected(root, &CEPH))));
    }
    if numbered("nbd") {
        // There is an nbd0 though nothing is connected, and it may be a process of this host.
        let servers = root::attribute(&path.join("pid")).map(|_| connected(root, &[NBD]))?;
        return (!servers.is_empty()).then(|| ("NBD".into(), or_unseen(servers)));
    }
    let on_link = |name: &str| StorageServer::OnLink(root::one_line(name));
    if name.starts_with("etherd!") {
        // drivers/block/aoe/aoeblk.c, aoedisk_show_netif
        let interfaces = root::attribute(&path.join("netif"))?;
        let names = interfaces.split([',', ' ', '\n']);
        let servers = names.filter(|n| !n.is_empty() && *n != "none").map(on_link);
        return Some(("AoE".into(), servers.collect()));
    }
    // FCoE's host adapter is a child of the interface (drivers/scsi/fcoe/fcoe_sysfs.c): net/eth0.7/ctlr_0.
    let mut above = path.ancestors();
    let interface = above.find(|folder| folder.parent().is_some_and(|p| p.ends_with("net")))?;
    let name = interface.file_name()?.to_str()?;
    Some(("FCoE".into(), BTreeSet::from([on_link(name)])))
}

/// iSCSI's sessions by name, with the addresses that their connections go to. A session whose
/// connections say none has all that the host is connected with by iSCSI's port.
fn sessions(root: &SysRoot) -> BTreeMap<String, Way> {
    let mut sessions: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    let class = root.sys.join("class/iscsi_session");
    for name in root::names(&class) {
        sessions.entry(name).or_default();
    }
    let class = root.sys.join("class/iscsi_connection");
    for name in root::names(&class) {
        // connection1:0 is one of session1 (drivers/scsi/scsi_transport_iscsi.c).
        let number = name
            .strip_prefix("connection")
            .and_then(|n| n.split(':').next());
        let Some(number) = number else {
            continue;
        };
        let folder = class.join(&name);
        let mut files = ["persistent_address", "address"].into_iter();
        let address = files.find_map(|file| plain(&root::attribute(&folder.join(file))?));
        let session = sessions.entry(format!("session{number}")).or_default();
        session.extend(address);
    }
    if sessions.values().any(BTreeSet::is_empty) {
        let connected = connected(root, &[ISCSI]);
        for servers in sessions.values_mut().filter(|servers| servers.is_empty()) {
            servers.clone_from(&connected);
        }
    }
    let named = |(name, servers)| (name, ("iSCSI".to_owned(), or_unseen(servers)));
    sessions.into_iter().map(named).collect()
}

/// NVMe controllers that are reached over IP, by name (drivers/nvme/host/sysfs.c):
/// `traddr=10.0.0.1,trsvcid=4420,host_traddr=…`.
fn controllers(root: &SysRoot) -> BTreeMap<String, Way> {
    let class = root.sys.join("class/nvme");
    let one = |name: String| {
        let transport = root::attribute(&class.join(&name).join("transport"))?;
        if !["tcp", "rdma"].contains(&transport.as_str()) {
            return None;
        }
        let address = root::attribute(&class.join(&name).join("address"))?;
        let mut words = address.split(',');
        let server = words.find_map(|word| plain(word.strip_prefix("traddr=")?))?;
        let servers = BTreeSet::from([StorageServer::Address(server)]);
        Some((name, (format!("NVMe over {transport}"), servers)))
    };
    root::names(&class).into_iter().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(source: &str, options: &str) -> Vec<String> {
        let names = Names(BTreeMap::from([(
            "filer".to_owned(),
            IpAddr::from([10, 0, 0, 9]),
        )]));
        let found = servers(source, options, &names).into_iter();
        found.map(|address| address.to_string()).collect()
    }

    #[test]
    fn the_servers_of_every_file_system_are_read_from_its_own_words() {
        for (source, options, servers) in [
            ("10.1.0.1:/export", "rw", &["10.1.0.1"][..]),
            (
                "other:/export",
                "rw,addr=10.1.0.2,clientaddr=10.1.0.3",
                &["10.1.0.2"],
            ),
            ("[fd00::1]:/export", "rw", &["fd00::1"]),
            ("filer:/export", "rw", &["10.0.0.9"]),
            ("//10.1.0.4/share", "rw", &["10.1.0.4"]),
            (
                "10.1.0.5:6789,10.1.0.6:6789:/",
                "rw",
                &["10.1.0.5", "10.1.0.6"],
            ),
            (
                "admin@1-2.fs=/",
                "mon_addr=10.1.0.7:3300/[fd00::2]:3300",
                &["10.1.0.7", "fd00::2"],
            ),
            ("me@10.1.0.8:/home", "rw", &["10.1.0.8"]),
            ("10.1.0.9@tcp:/lustre", "rw", &["10.1.0.9"]),
            ("unknown:/x", "rw", &[]),
        ] {
            assert_eq!(found(source, options), servers, "{source}");
        }
    }

    #[test]
    fn the_other_end_of_a_connection_is_read_where_one_is_established() {
        let remote = u32::from_ne_bytes([10, 1, 0, 1]);
        let line =
            |state| format!("  0: 00000000:03E1 {remote:08X}:0801 {state} 00000000:00000000");
        let other = (IpAddr::from([10, 1, 0, 1]), 2049);
        assert_eq!(connection(&line("01")), Some(other));
        assert_eq!(connection(&line("0A")), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail(source in ".*", options in ".*") {
            found(&source, &options);
            connection(&source);
        }
    }
}
