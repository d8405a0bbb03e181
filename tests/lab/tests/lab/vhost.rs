//! A NIC and sockets that the host's kernel serves: vhost_net and vhost_vsock.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, Lab, Parts, RunningGuest};
use serde_json::Value;

use crate::assigned::{guest, zoo};
use crate::hotplug::{CTL, SOCKET};
use crate::tell;

/// What the guest does: in its first life and its second, by what the host says of that.
const SCRIPT: &str = r#"
up() { ip addr add 192.168.79.2/24 dev eth0; ip link set eth0 up; }
get() { wget -q -O - "http://192.168.79.1:8079/$1"; }
first() { cut -d ' ' -f 1; }
sum() { sha256sum | first; }
# Both ways, each with its checksum as it is at either end.
data() {
    value "fetched_$1" "$(get data | sum)"
    head -c 2097152 /dev/urandom >/tmp/up
    value "sent_$1" "$(sum </tmp/up)"
    value "answer_$1" "$(socat -t 60 - TCP:192.168.79.1:8080 </tmp/up | first)"
}
sockets() {
    value "vsock_sent_$1" "$(sum </tmp/up)"
    value "vsock_answer_$1" "$(socat -t 60 - VSOCK-CONNECT:2:6 </tmp/up | first)"
}
socat -t 60 VSOCK-LISTEN:5,fork,reuseaddr SYSTEM:sha256sum &
up
case $(get phase) in
first)
    data first
    sockets first
    until_pressed moving
    value busy begun
    for each in 1 2 3 4; do value "paused_$each" "$(get data | sum)"; done
    until_pressed restarting
    reboot -f
    ;;
second)
    data second
    sockets second
    until_pressed leaving
    while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
    value gone yes
    until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
    up
    data third
    until_pressed ending
    ;;
esac
{ dmesg | grep -iE 'virtio|vsock' | grep -iE 'fail|error|warn|bug' || true; } | block complaints
"#;

/// A guest's NIC behind a bridge and its vsock device move data both ways, with checksums: at first, in a
/// pause, after a restart, and the NIC after it was removed and has come again. No thread of Busway's is
/// there for the packets, what looks after the NIC has nothing to do, and its counters are the tap's.
pub(crate) fn past_busway(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    refusals(host)?;
    host.run(
        "set -e; modprobe -a vhost_net vhost_vsock; mkdir -p /run/vhost; cd /run/vhost\n\
         ip link add lab-br type bridge; ip addr add 192.168.79.1/24 dev lab-br; ip link set lab-br up\n\
         ip tuntap add dev lab-vhost mode tap multi_queue; ip link set lab-vhost master lab-br up\n\
         head -c 2M /dev/urandom >data; echo first >phase",
    )?;
    let servers = [
        "exec busybox httpd -f -p 192.168.79.1:8079 -h /run/vhost",
        "exec socat -t 60 TCP-LISTEN:8080,fork,reuseaddr SYSTEM:sha256sum",
        "exec socat -t 60 VSOCK-LISTEN:6,fork,reuseaddr SYSTEM:sha256sum",
    ];
    let servers: Vec<_> = servers
        .into_iter()
        .map(|script| host.spawn(script))
        .collect::<Result<_>>()?;
    let run = guest()?
        .cpus(2)
        .programs()
        .args(&["--net", "tap=lab-vhost,vhost=on,num_queues=4,id=cable"])
        .args(&["--vsock", "cid=7"])
        .args(&SOCKET)
        .limit(Duration::from_secs(240))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value moving")?;
    into_the_guest(host)?;
    past(host, &running)?;
    // In the midst of packets.
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value busy")?;
    host.run(&format!(
        "for each in 1 2 3 4 5; do {CTL} pause && {CTL} resume || exit; done"
    ))?;
    running.wait_line("@@value restarting")?;
    host.run(&format!(
        "echo second >/run/vhost/phase; {CTL} power-button"
    ))?;
    running.wait_line("@@value leaving")?;
    into_the_guest(host)?;
    host.run(&format!("{CTL} power-button; {CTL} remove-device cable"))?;
    running.wait_line("@@value gone")?;
    host.run(&format!("{CTL} add-net lab-vhost --id cable"))?;
    running.wait_line("@@value ending")?;
    past(host, &running)?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    drop(servers);
    host.run("ip link del lab-vhost; ip link del lab-br")?;

    let data = sum_of(host, "/run/vhost/data")?;
    let fetched = ["first", "second", "third"].map(|life| format!("fetched_{life}"));
    let paused = [1, 2, 3, 4].map(|each| format!("paused_{each}"));
    for key in fetched.iter().chain(&paused) {
        ensure!(result.value(key)? == data, "{key}: {}", result.value(key)?);
    }
    for life in ["first", "second", "third"] {
        let (sent, answer) = (format!("sent_{life}"), format!("answer_{life}"));
        ensure!(result.value(&sent)? == result.value(&answer)?, "{life}");
    }
    for life in ["first", "second"] {
        let (sent, answer) = (format!("vsock_sent_{life}"), format!("vsock_answer_{life}"));
        ensure!(result.value(&sent)? == result.value(&answer)?, "{life}");
    }
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    Ok(())
}

/// Without the modules a NIC that is to be the kernel's and a vsock device are refused, with the remedy.
fn refusals(host: &Host) -> Result<()> {
    let kernel = Parts::inside("bzImage");
    host.run("modprobe -qr vhost_net vhost_vsock; rm -f /dev/vhost-net /dev/vhost-vsock")?;
    for (flags, says) in [
        ("--net vhost=on", "`modprobe vhost_net`"),
        ("--vsock cid=7", "`modprobe vhost_vsock`"),
    ] {
        let script = format!("busway run --kernel {kernel} --serial off {flags}");
        let output = host.output(&script, Duration::from_secs(60))?;
        tell!("{}", output.stderr);
        ensure!(output.status == 3 && output.stderr.contains(says));
    }
    Ok(())
}

fn sum_of(host: &Host, file: &str) -> Result<String> {
    let sum = host.run(&format!("sha256sum <{file} | cut -d ' ' -f 1"))?;
    Ok(sum.trim().to_owned())
}

/// A program on the host is heard by one in the guest, and hears it when it has ended its own half.
fn into_the_guest(host: &Host) -> Result<()> {
    let answer = host.run("socat -t 60 - VSOCK-CONNECT:7:5 </run/vhost/data | cut -d ' ' -f 1")?;
    ensure!(
        answer.trim() == sum_of(host, "/run/vhost/data")?,
        "{answer}"
    );
    Ok(())
}

/// Nothing of the packets came by Busway.
fn past(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    let devices: Value = serde_json::from_str(&host.run(&format!("{CTL} --json devices"))?)?;
    let devices = devices["devices"].as_array().into_iter().flatten();
    let kernel: Vec<_> = devices
        .filter(|device| device["served_by"] == "kernel")
        .filter_map(|device| device["id"].as_str())
        .collect();
    tell!("served by the kernel: {kernel:?}");
    ensure!(kernel.contains(&"cable") && kernel.contains(&"vsock0"));
    // The tap's own.
    let counters: Value = serde_json::from_str(&host.run(&format!("{CTL} --json counters"))?)?;
    tell!("counters: {counters}");
    for key in ["rx_bytes", "tx_bytes"] {
        let bytes = counters["cable"][key].as_u64();
        ensure!(bytes > Some(2 << 20), "{counters}");
    }
    // Each thread's name, and the ticks of 10 ms that it has had.
    let threads = host.run(&format!(
        "cat /proc/{}/task/*/stat | sed 's/^[^(]*(\\(.*\\)) /\\1 /' | awk '{{ print $1, $13 + $14 }}'",
        running.pid()?
    ))?;
    tell!("threads:\n{threads}");
    ensure!(
        !threads.contains("_net"),
        "a thread for packets:\n{threads}"
    );
    for name in ["_vhost-cable", "_vsock0"] {
        let line = threads.lines().find_map(|line| line.strip_prefix(name));
        let ticks: Option<u64> = line.and_then(|ticks| ticks.trim().parse().ok());
        ensure!(ticks.is_some_and(|ticks| ticks < 10), "{name}: {threads}");
    }
    Ok(())
}
