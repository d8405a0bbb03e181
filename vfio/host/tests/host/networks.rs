//! What network interfaces carry.

use super::*;

#[test]
fn the_default_route_is_found_through_bond_and_bridge() {
    let mut host = host_with_three();
    host.native("0000:00:02.0", "e1000e");
    host.interface(Some("0000:00:02.0"), "eth0", &["bond0"]);
    host.interface(None, "bond0", &["br0"]);
    host.interface(None, "br0", &[]);
    host.interface(Some("0000:00:02.1"), "eth1", &[]);
    host.default_route("br0");
    assert_eq!(
        uses(&host, "0000:00:02.0"),
        ["eth0 > bond0 > br0", "default route (eth0 > bond0 > br0)"]
    );
    assert_eq!(uses(&host, "0000:00:02.1"), ["eth1"]);
}

#[test]
fn the_way_back_to_who_came_by_ssh_is_found() {
    let host = FakeHost::named("server");
    assert_eq!(
        uses(&host, "0000:18:00.1"),
        [
            "ens1f1 > bond0 > br0 10.0.0.1 2001:db8::1",
            "default route (ens1f1 > bond0 > br0)",
            "this SSH session, from 192.0.2.77 (ens1f1 > bond0 > br0)",
        ]
    );
}

#[test]
fn an_interface_carries_the_storage_and_the_routes_that_go_by_it() {
    let mut host = FakeHost::named("net");
    assert_eq!(
        uses(&host, "0000:18:00.1"),
        [
            "ens1f1 10.10.10.5",
            "/ by nfs4 from 10.10.10.1 (ens1f1)",
            "/srv/iscsi +1 by iSCSI, from which machine is not seen (ens1f1)",
        ]
    );
    assert_eq!(
        uses(&host, "0000:19:00.3"),
        [
            "ens2f3",
            "/srv/iscsi +1 by iSCSI, from which machine is not seen (ens2f3)",
            "route to 172.16.0.0/12 (ens2f3)",
        ]
    );
    host.add(
        "file sys/class/iscsi_connection/connection1:0/persistent_address 10.20.0.9\n\
         file sys/class/nvme/nvme7/transport tcp\n\
         file sys/class/nvme/nvme7/address traddr=172.16.0.1,trsvcid=4420\n\
         block ../../virtual/nvme-fabrics/ctl/nvme7/nvme7n1 259:9",
    );
    assert_eq!(
        uses(&host, "0000:18:00.2"),
        [
            "ens1f2 > storage 10.20.0.5",
            "/srv/iscsi +1 by iSCSI from 10.20.0.9 (ens1f2 > storage)",
        ]
    );
    let used = uses(&host, "0000:19:00.3");
    assert!(
        used.contains(&"nvme7n1 by NVMe over tcp from 172.16.0.1 (ens2f3)".to_owned()),
        "{used:?}"
    );
    let read = Host::read(&host.root).unwrap();
    let refused = |address, permits: &[busway_host::Permit]| {
        let permits = permits.iter().copied().collect();
        !busway_host::check_bind(&read, &[at(address)].into(), &permits).is_empty()
    };
    assert!(refused("0000:18:00.1", &[busway_host::Permit::Route]));
    assert!(!refused("0000:18:00.1", &[busway_host::Permit::System]));
    assert!(refused("0000:19:00.3", &[]));
    assert!(!refused("0000:19:00.3", &[busway_host::Permit::Route]));
}

#[test]
fn storage_from_a_machine_that_is_not_seen_is_told_of_at_each_way_out() {
    let mut host = FakeHost::named("net");
    let says =
        |name: &str| format!("/srv/iscsi +1 by iSCSI, from which machine is not seen ({name})");
    assert!(uses(&host, "0000:18:00.0").contains(&says("eno1")));
    assert!(uses(&host, "0000:18:00.2").contains(&says("ens1f2 > storage")));
    assert!(uses(&host, "0000:19:00.3").contains(&says("ens2f3")));
    // It leads nowhere.
    assert_eq!(uses(&host, "0000:19:00.0"), ["ens2f0 > ovs-system"]);
    let read = Host::read(&host.root).unwrap();
    let refused = |host: &Host| {
        let asked = [at("0000:19:00.3")].into();
        !busway_host::check_bind(host, &asked, &Permits::new()).is_empty()
    };
    assert!(!refused(&read), "it is a guess");
    host.add("block ../../platform/host9/session1/target9:0:0/9:0:0:1/block/sdy 8:32 mount=/usr");
    assert!(refused(&Host::read(&host.root).unwrap()));
    // A connection says which it is.
    let mut host = FakeHost::named("net");
    let server = u32::from_ne_bytes([10, 10, 10, 9]);
    let line = format!("   0: 050A0A0A:C350 {server:08X}:0CBC 01 00000000:00000000");
    host.append("proc/net/tcp", &line);
    let says = "/srv/iscsi +1 by iSCSI from 10.10.10.9 (ens1f1)".to_owned();
    assert!(uses(&host, "0000:18:00.1").contains(&says));
    assert_eq!(
        uses(&host, "0000:19:00.3"),
        ["ens2f3", "route to 172.16.0.0/12 (ens2f3)"]
    );
    let line = |at: &str, transport: &str| {
        format!("60 1 0:60 / {at} rw - 9p share rw,access=client,trans={transport}")
    };
    host.append("proc/self/mountinfo", &line("/", "virtio"));
    assert_eq!(
        uses(&host, "0000:19:00.3"),
        ["ens2f3", "route to 172.16.0.0/12 (ens2f3)"]
    );
    host.append("proc/self/mountinfo", &line("/srv/plan9", "tcp"));
    let says = "/srv/plan9 by 9p, from which machine is not seen (ens2f3)";
    assert!(uses(&host, "0000:19:00.3").iter().any(|used| used == says));
    host.add("mount fuse.glusterfs store:/vol /srv/gluster");
    let used = uses(&host, "0000:19:00.3");
    let says = "/srv/gluster by glusterfs, from which machine is not seen (ens2f3)";
    assert!(used.iter().any(|used| used == says), "{used:?}");
}

#[test]
fn disks_of_ceph_and_nbd_and_over_ethernet_are_the_interfaces() {
    let mut host = FakeHost::described(
        "         device 01:00.0 8086:1572 class=020000 driver=i40e
           interface eth0 ip=10.0.0.2/24
         device 02:00.0 8086:1572 class=020000 driver=i40e
           interface eth1 in=eth1.7
         device 03:00.0 8086:1572 class=020000 driver=i40e group=3
           interface eth2
         interface eth1.7 kind=vlan
         block ../../rbd/0/block/rbd0 250:0 mount=/srv/ceph
         block nbd0 43:0
         block nbd1 43:32
         block etherd!e0.0 152:0 mount=/srv/aoe
         block ../net/eth1.7/ctlr_0/host7/rport-7:0-0/target7:0:0/7:0:0:0/block/sdc 8:32",
    );
    let server = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
    for (address, port) in [([10, 0, 0, 8], 6789), ([10, 0, 0, 9], 10809)] {
        let line = format!("   0: 0200000A:C350 {}:{port:04X} 01 0:0", server(address));
        host.append("proc/net/tcp", &line);
    }
    let of = "sys/devices/virtual/block";
    host.file(&format!("{of}/nbd0/pid"), "77\n");
    host.file(&format!("{of}/etherd!e0.0/netif"), "eth2\n");
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        [
            "eth0 10.0.0.2",
            "/srv/ceph +1 by RBD from 10.0.0.8 (eth0)",
            "nbd0 by NBD from 10.0.0.9 (eth0)",
        ]
    );
    assert_eq!(
        uses(&host, "0000:02:00.0"),
        ["eth1 > eth1.7", "sdc by FCoE (eth1 > eth1.7)"]
    );
    assert_eq!(
        uses(&host, "0000:03:00.0"),
        ["eth2", "/srv/aoe +1 by AoE (eth2)"]
    );
    host.add("route 192.0.2.0/24 dev=eth2");
    let read = Host::read(&host.root).unwrap();
    let refused = busway_host::check_bind(&read, &[at("0000:03:00.0")].into(), &Permits::new());
    let text = refused[0].to_string();
    assert!(
        text.contains("the host has storage by it: unmount that"),
        "{text}"
    );
}

#[test]
fn a_default_route_by_ppp_over_ethernet_is_the_interface_s() {
    let host = FakeHost::described(
        "         device 01:00.0 8086:1572 class=020000 driver=i40e
           interface wan0
         interface ppp0 ip=192.0.2.9/32
         route default dev=ppp0",
    );
    host.file("sys/class/net/ppp0/type", "512\n");
    assert_eq!(uses(&host, "0000:01:00.0"), ["wan0"]);
    let list = "Id       Address              Device\n0000AB01 02:00:00:00:00:01   wan0\n";
    host.file("proc/net/pppoe", list);
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        ["wan0 > ppp0 192.0.2.9", "default route (wan0 > ppp0)"]
    );
}

#[test]
fn an_interface_leaves_each_of_those_that_it_is_part_of() {
    let host = FakeHost::described(
        "         device 01:00.0 8086:1572 class=020000 driver=i40e group=1
           interface eth0 in=bond0 in=eth0.7
         interface bond0 kind=bond in=br0
         interface br0 kind=bridge ip=192.0.2.5/24
         interface eth0.7 kind=vlan ip=10.0.7.5/24
         route default dev=br0",
    );
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        [
            "eth0 > bond0 > br0 192.0.2.5",
            "eth0 > eth0.7 10.0.7.5",
            "default route (eth0 > bond0 > br0)",
        ]
    );
    let read = Host::read(&host.root).unwrap();
    let asked = [at("0000:01:00.0")].into();
    let refused = busway_host::check_bind(&read, &asked, &Permits::new());
    let text = refused[0].to_string();
    assert!(text.contains("ip link delete dev eth0.7"), "{text}");
    assert!(
        !text.contains("eth0 > bond0 > br0 192.0.2.5"),
        "the route says it: {text}"
    );
}

#[test]
fn the_kernel_s_messages_to_another_machine_go_by_an_interface() {
    let host = FakeHost::described(
        "         device 01:00.0 8086:1572 class=020000 driver=i40e group=1
           interface eth0",
    );
    let console = "sys/kernel/config/netconsole/rack log";
    host.file(&format!("{console}/dev_name"), "eth0\n");
    host.file(&format!("{console}/enabled"), "0\n");
    assert_eq!(uses(&host, "0000:01:00.0"), ["eth0"]);
    host.file(&format!("{console}/enabled"), "1\n");
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        ["eth0", "eth0 > netconsole rack log"]
    );
    let read = Host::read(&host.root).unwrap();
    let asked = [at("0000:01:00.0")].into();
    let text = busway_host::check_bind(&read, &asked, &Permits::new())[0].to_string();
    let command = "echo 0 > '/sys/kernel/config/netconsole/rack log/enabled'";
    assert!(text.contains(command), "{text}");
}

#[test]
fn an_interface_in_another_namespace_keeps_its_device_and_its_function() {
    let host = FakeHost::named("pod-vf");
    let says = ["an interface in another network namespace (a container?)"];
    assert_eq!(uses(&host, "0000:18:01.1"), says);
    assert_eq!(uses(&host, "0000:18:01.0"), ["ens1f0v0"]);
    let read = Host::read(&host.root).unwrap();
    let asked = [at("0000:18:01.1")].into();
    assert!(!busway_host::check_bind(&read, &asked, &Permits::new()).is_empty());
    let permits = [busway_host::Permit::Route].into();
    assert!(busway_host::check_bind(&read, &asked, &permits).is_empty());
}

#[test]
fn a_thousand_representors_are_one_use_a_bridge() {
    let mut host = FakeHost::named("switchdev");
    let text: String = (8..1000)
        .map(|n| format!("  interface rep{n} port=pf0vf{n} in=ovs-system\n"))
        .collect();
    host.add(&format!(
        "device 0000:82:00.0 15b3:1015 class=020000 driver=mlx5_core group=70\n{text}"
    ));
    assert_eq!(
        uses(&host, "0000:82:00.0"),
        ["992 representors > ovs-system"]
    );
    let used = uses(&host, "0000:81:00.0");
    let says = ["pf0 > ovs-system", "8 representors > ovs-system", "8 VFs"];
    assert_eq!(used, says);
}
