//! NICs on taps, served by Busway and by the host's kernel: an MTU, segments of UDP, and whose address frames are from.

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Lab};
use serde_json::Value;

use crate::assigned::{guest, zoo};
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::soak(
    "taps_have_their_mtu_and_segments_of_udp_by_busway_and_by_the_kernel",
    |lab, _tier| limits(lab),
)];

/// `VIRTIO_NET_F_MTU`, `VIRTIO_NET_F_GUEST_USO4`, `_USO6` and `VIRTIO_NET_F_HOST_USO`. Virtio 1.3 §5.1.3
const BITS: [usize; 4] = [3, 54, 55, 56];

/// Of each NIC: its MTU, its features as bits, a packet of nearly its MTU that is answered, data, and what becomes of frames
/// from another address.
const SCRIPT: &str = r#"
each() {
    nic=eth$1 net=192.168.8$1
    value "mac_$1" "$(cat /sys/class/net/$nic/address)"
    value "mtu_$1" "$(cat /sys/class/net/$nic/mtu)"
    value "features_$1" "$(cat /sys/class/net/$nic/device/features)"
    ip addr add $net.2/24 dev $nic; ip link set $nic up
    value "large_$1" "$(ping -c 3 -s 8900 -w 20 $net.1 | grep -c '8908 bytes')"
    value "sum_$1" "$(wget -q -O - http://$net.1:8081/data | sha256sum | cut -d ' ' -f 1)"
    ip link set $nic down; ip link set $nic address 02:00:00:00:00:99
    ip link set $nic up
    value "other_$1" "$(ping -c 4 -w 8 $net.1 | grep -c 'bytes from')"
}
each 0
each 1
until_pressed looked
{ dmesg | grep -iE 'virtio' | grep -iE 'fail|error|warn|bug' || true; } | block complaints
"#;

fn limits(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    host.run(
        "set -e; modprobe vhost_net; mkdir -p /run/www; head -c 8M /dev/urandom >/run/www/data\n\
         for each in 0 1; do ip tuntap add dev lab-mtu$each mode tap\n\
         ip addr add 192.168.8$each.1/24 dev lab-mtu$each; ip link set lab-mtu$each up; done",
    )?;
    let server = host.spawn("exec busybox httpd -f -p 8081 -h /run/www")?;
    let run = guest()?
        .args(&[
            "--net",
            "tap=lab-mtu0,mac=02:00:00:00:00:10,mtu=9000,spoofchk=on,id=ours",
            "tap=lab-mtu1,mac=02:00:00:00:00:11,mtu=9000,vhost=on,id=kernels",
        ])
        .args(&SOCKET)
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value looked")?;
    for tap in ["lab-mtu0", "lab-mtu1"] {
        let mtu = host.run(&format!("cat /sys/class/net/{tap}/mtu"))?;
        ensure!(mtu.trim() == "9000", "{tap}: {mtu}");
    }
    ensure!(spoofed(host)? > 0, "frames from another address passed");
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    drop(server);
    let sum = host.run("sha256sum </run/www/data | cut -d ' ' -f 1")?;
    host.run("ip link del lab-mtu0; ip link del lab-mtu1")?;
    // Frames that are from another address come by the NIC that does not look.
    for (nic, mac, looks) in [
        (0, "02:00:00:00:00:10", true),
        (1, "02:00:00:00:00:11", false),
    ] {
        let value = |key: &str| result.value(&format!("{key}_{nic}")).map(str::trim);
        ensure!(value("mac")? == mac, "{nic}: {}", value("mac")?);
        ensure!(value("mtu")? == "9000", "{nic}: {}", value("mtu")?);
        let features = value("features")?;
        tell!("{nic}: {features}");
        for bit in BITS {
            ensure!(
                features.as_bytes().get(bit) == Some(&b'1'),
                "{nic}: bit {bit} of {features}"
            );
        }
        ensure!(value("large")? == "3", "{nic}: {}", value("large")?);
        ensure!(value("sum")? == sum.trim(), "{nic}: the data is wrong");
        ensure!(
            (value("other")? == "0") == looks,
            "{nic}: {}",
            value("other")?
        );
    }
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    Ok(())
}

/// Frames of the first NIC that were dropped for their address.
fn spoofed(host: &Host) -> Result<u64> {
    let counters: Value = serde_json::from_str(&host.run(&format!("{CTL} --json counters"))?)?;
    let spoofed = counters["ours"]["tx_spoofed"].as_u64();
    spoofed.with_context(|| format!("{counters}"))
}
