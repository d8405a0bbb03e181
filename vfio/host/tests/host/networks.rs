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
        ["ens1f1 10.10.10.5", "/ by nfs4 from 10.10.10.1 (ens1f1)"]
    );
    assert_eq!(
        uses(&host, "0000:19:00.3"),
        ["ens2f3", "route to 172.16.0.0/12 (ens2f3)"]
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
