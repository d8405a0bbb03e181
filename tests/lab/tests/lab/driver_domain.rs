//! A driver domain: one guest has the host's NIC to itself and bridges it to another guest, which has a virtio NIC only.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{DataServer, GATEWAY, Host, Lab, RunningGuest};

use crate::assigned::{bound, give_back, guest};
use crate::hotplug::{CTL, SOCKET};
use crate::proof::Tier;
use crate::{Proof, count};

pub(crate) const PROOFS: &[Proof] = &[Proof::soak(
    "driver_domain_serves_a_second_guest_over_its_nic",
    serves,
)];

/// The guest that has the NIC. What it says at its end are the bytes that each of its NICs received and sent, by driver.
const DOMAIN: &str = r#"
for each in /lib/bridge/*; do insmod $each; done
brctl addbr br0
for each in eth0 eth1; do brctl addif br0 $each; ip link set $each up; done
ip link set br0 up
until [ "$(cat /sys/class/net/eth*/carrier | tr -d '\n')" = 11 ]; do sleep 0.1; done
value ports "$(brctl show br0 | grep -c -o 'eth[01]')"
until_pressed bridging
for each in eth0 eth1; do
    folder=/sys/class/net/$each
    value "$(basename "$(readlink $folder/device/driver)")" "$(cat $folder/statistics/rx_bytes $folder/statistics/tx_bytes | tr '\n' ' ')"
done
"#;

/// What the other guest does, twice: it takes an address from the router behind the NIC, pings it, and moves data both ways.
const SECOND: &str = r#"
value drivers "$(for each in /sys/class/net/eth*; do basename "$(readlink $each/device/driver)"; done | tr '\n' ' ')"
head -c 2097152 /dev/urandom >/tmp/up
value sent "$(sha256sum </tmp/up | cut -d ' ' -f 1)"
round() {
    dhcp eth0
    value "pings_$1" "$(ping -c 3 -s 1472 -W 5 ROUTER | grep -c 'bytes from')"
    value "fetched_$1" "$(wget -q -O - URL | sha256sum | cut -d ' ' -f 1)"
    value "answer_$1" "$(upload ROUTER PORT /tmp/up)"
}
round first
until_pressed waiting
round second
"#;

const SECOND_SOCKET: &str = "/run/second.sock";
const BYTES: u64 = 8_000_000;

/// The NIC's guest is killed in between, and begins anew. The host has no address on either side: it moves frames from tap to
/// tap, and its own driver never has the NIC.
fn serves(lab: &mut Lab, _tier: Tier) -> Result<()> {
    let server = DataServer::start()?;
    let (host, address) = bound(lab, "nic0")?;
    // A router behind the NIC that gives IPv6 addresses gives the host one as well, unless it has no IPv6 there.
    host.run(
        "set -e; ip link add inside type bridge; sysctl -q net.ipv6.conf.inside.disable_ipv6=1; ip link set inside up\n\
         for each in domain second; do ip tuntap add $each mode tap\n\
         sysctl -q net.ipv6.conf.$each.disable_ipv6=1; ip link set $each master inside up; done",
    )?;
    let domain = start_domain(host, &address)?;
    let script = SECOND
        .replace("URL", &server.url(BYTES, 5))
        .replace("ROUTER", GATEWAY)
        .replace("PORT", &server.port().to_string());
    let run = guest()?
        .args(&["--net", "tap=second", "--api-socket", SECOND_SOCKET])
        .limit(Duration::from_secs(240))
        .script(&script);
    let second = host.start_guest(&run)?;
    second.wait_line("@@value waiting")?;
    domain.signal("KILL")?;
    let killed = domain.finish()?;
    ensure!(killed.status == 128 + 9, "status {}", killed.status);
    let domain = start_domain(host, &address)?;
    host.run(&format!(
        "busway ctl --api-socket {SECOND_SOCKET} power-button"
    ))?;
    let second = second.finish()?.success()?;
    let addresses =
        host.run("for each in inside domain second; do ip -o addr show dev $each; done")?;
    ensure!(addresses.is_empty(), "the host has {addresses}");
    host.run(&format!("{CTL} power-button"))?;
    let domain = domain.finish()?.success()?;
    host.run("ip link del domain; ip link del second; ip link del inside")?;
    give_back(host, &address, "e1000e")?;

    ensure!(
        domain.value("ports")? == "2",
        "{} ports",
        domain.value("ports")?
    );
    let drivers = second.value("drivers")?;
    ensure!(drivers == "virtio_net ", "the second guest has {drivers}");
    let sent = second.value("sent")?;
    for round in ["first", "second"] {
        let of = |what: &str| second.value(&format!("{what}_{round}"));
        ensure!(of("pings")? == "3", "{round}: {} of 3 pings", of("pings")?);
        ensure!(
            of("fetched")? == DataServer::sha256(BYTES, 5),
            "{round}: wrong data"
        );
        ensure!(
            of("answer")? == sent,
            "{round}: {} and not {sent}",
            of("answer")?
        );
    }
    // What came by the one NIC went by the other.
    let moved = |driver: &str| {
        let words = domain.value(driver)?.split_ascii_whitespace();
        let bytes: Result<Vec<u64>, _> = words.map(str::parse).collect();
        anyhow::Ok(bytes?)
    };
    for (driver, bytes) in [
        ("e1000e", moved("e1000e")?),
        ("virtio_net", moved("virtio_net")?),
    ] {
        let least = bytes.iter().min().context("no count")?;
        ensure!(
            *least > 2 << 20,
            "{driver} received and sent {bytes:?} bytes"
        );
        count("bytes", bytes.iter().sum());
    }
    Ok(())
}

/// The guest that bridges the NIC at this address to the tap `domain`, when it does.
fn start_domain<'host>(host: &'host Host, address: &str) -> Result<RunningGuest<'host>> {
    let run = guest()?
        .device(address)
        .net_programs()
        .args(&["--net", "tap=domain"])
        .args(&SOCKET)
        .limit(Duration::from_secs(240))
        .script(DOMAIN);
    let domain = host.start_guest(&run)?;
    domain.wait_line("@@value bridging")?;
    Ok(domain)
}
