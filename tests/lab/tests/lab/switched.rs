//! Guests that reach each other over the host's switch, and not by the host.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{HostConfig, Kernel, Lab};

use crate::Proof;
use crate::assigned::guest;

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak(
        "switched_by_a_linux_bridge_two_guests_reach_each_other_and_not_the_host",
        |lab, _| switched(lab, LINUX, "ip link del lab-sw"),
    ),
    Proof::soak(
        "switched_by_open_vswitch_two_guests_reach_each_other_and_not_the_host",
        |lab, _| switched(lab, OPEN_VSWITCH, "ovs-vsctl del-br lab-sw"),
    ),
];

/// A switch that has the taps sw0 and sw1.
const LINUX: &str = "ip link add lab-sw type bridge; ip link set lab-sw up\n\
    for each in sw0 sw1; do ip link set $each master lab-sw; done";

/// The same by Open vSwitch, whose kernel module switches, in a VLAN.
const OPEN_VSWITCH: &str = "\
    for each in /usr/local/lib/openvswitch/*; do\n\
    name=$(basename $each .ko | tr - _); [ -d /sys/module/${name#*_} ] || insmod $each; done\n\
    mkdir -p /run/openvswitch /etc/openvswitch /var/log/openvswitch\n\
    ovsdb-tool create /etc/openvswitch/conf.db /usr/share/openvswitch/vswitch.ovsschema\n\
    ovsdb-server --remote=punix:/run/openvswitch/db.sock --pidfile --detach /etc/openvswitch/conf.db\n\
    ovs-vsctl --no-wait init\n\
    $(ls /usr/sbin/ovs-vswitchd /usr/lib/openvswitch-switch/ovs-vswitchd 2>/dev/null | head -n 1) --pidfile --detach\n\
    ovs-vsctl add-br lab-sw; for each in sw0 sw1; do ovs-vsctl add-port lab-sw $each tag=7; done";

/// The one that has the data, until the other has it.
const SERVER: &str = r#"
ip addr add 10.7.0.1/24 dev eth0; ip link set eth0 up
mkdir /web; head -c 8388608 /dev/urandom >/web/data
value sum "$(sha256sum </web/data | cut -d ' ' -f 1)"
httpd -p 10.7.0.1:80 -h /web
value serving yes
nc -l -p 81 >/tmp/back
value back "$(sha256sum </tmp/back | cut -d ' ' -f 1)"
"#;

const CLIENT: &str = r#"
ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up
wget -q -O /tmp/data http://10.7.0.1/data
value sum "$(sha256sum </tmp/data | cut -d ' ' -f 1)"
value longest "$(ping -c 3 -s 1472 -W 5 10.7.0.1 | grep -c 'bytes from')"
nc 10.7.0.1 81 </tmp/data
"#;

/// Data passes both ways, also where the host's kernel serves one of the NICs and Busway the other: what the one leaves
/// unfinished (checksums, segments) the other's guest takes.
fn switched(lab: &mut Lab, switch: &str, remove: &str) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd))?;
    host.run(&format!(
        "set -e; modprobe vhost_net\n\
         for each in sw0 sw1; do ip tuntap add dev $each mode tap; ip link set $each up; done\n{switch}"
    ))?;
    let start = |net: &str, script: &str| {
        let run = guest()?
            .args(&["--net", net])
            .limit(Duration::from_secs(120))
            .script(script);
        host.start_guest(&run)
    };
    let server = start("tap=sw0,vhost=on", SERVER)?;
    server.wait_line("@@value serving")?;
    let client = start("tap=sw1,vhost=off", CLIENT)?.finish()?.success()?;
    let server = server.finish()?.success()?;
    host.run(&format!("{remove}; ip link del sw0; ip link del sw1"))?;
    let sum = server.value("sum")?;
    for (what, found) in [
        ("fetched", client.value("sum")?),
        ("sent", server.value("back")?),
    ] {
        ensure!(found == sum, "{what}: {found}, not {sum}");
    }
    let longest = client.value("longest")?;
    ensure!(longest == "3", "{longest} of 3 packets of 1500 bytes");
    Ok(())
}
