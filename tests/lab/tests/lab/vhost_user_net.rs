//! NICs that other processes of the host serve: Debian's dpdk-testpmd, which answers pings by itself on several pairs of
//! queues, and passt, by which a guest reaches what the host does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, HostConfig, Job, Kernel, Lab, RunningGuest};

use crate::assigned::guest;
use crate::hotplug::{CTL, SOCKET};
use crate::proof::Tier;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::soak(
    "vhost_user_nics_by_testpmd_and_passt_outlive_killed_back_ends_pauses_and_a_restart",
    served,
)];

/// What the guest does in its first life and in its second, which it tells apart by what the host serves. Whoever answers
/// pings answers for every address.
const SCRIPT: &str = r#"
pings() { # KEY [COMMAND…]: whether five pings are answered
    key=$1; shift
    value "$key" "$("$@" ping -c 5 -i 0.2 -W 2 10.9.0.9 | grep -c 'bytes from')"
}
packets() { # pairs whose receive queues have had packets
    ethtool -S eth0 | sed -n 's/^ *rx\([0-9]\)_packets: [1-9].*/\1/p; s/^ *rx_queue_\([0-9]\)_packets: [1-9].*/\1/p' | tr '\n' ' '
}
fetched() { value "fetched_$1" "$(wget -q -O - http://169.254.2.2:8079/data | sha256sum | cut -d ' ' -f 1)"; }
ip addr add 10.9.0.1/16 dev eth0
ip link set eth0 up
dhcp eth1
value address "$(ip -4 -o addr show eth1 | sed 's/.*inet //; s/ .*//')"
# testpmd takes a while to serve a queue for the first time.
for cpu in 0 1; do until taskset -c $cpu ping -c 1 -W 1 10.9.0.9 >/dev/null; do :; done; done
life=$(wget -q -O - http://169.254.2.2:8079/life)
fetched "$life"
pings "pings_$life"
if [ "$life" = first ]; then
    value mtu "$(cat /sys/class/net/eth0/mtu)"
    value pairs "$(ethtool -l eth0 | sed -n 's/^Combined:[[:space:]]*//p' | tr '\n' ' ')"
    ethtool -L eth0 combined 2
    for cpu in 0 1; do pings "cpu_$cpu" taskset -c $cpu; done
    value spread "$(packets)"
    ethtool -L eth0 combined 1
    pings one_pair taskset -c 1
    ethtool -L eth0 combined 2
    ping -i 0.1 -W 1 10.9.0.9 >/tmp/pings &
    until_pressed flowing
    kill $!
    value missing "$(sed -n 's/.* seq=\([0-9]*\) .*/\1/p' /tmp/pings | awk '{ gap = $1 - last - 1; if (gap > most) most = gap; last = $1 } END { print most + 0, NR }')"
    value carrier "$(cat /sys/class/net/eth0/carrier_down_count) $(cat /sys/class/net/eth0/carrier)"
    for cpu in 0 1; do pings "again_$cpu" taskset -c $cpu; done
    until_pressed passt
    dhcp eth1
    fetched anew
    until_pressed hot
    until [ -e /sys/class/net/eth2 ]; do sleep 0.1; done
    ip addr add 10.8.0.1/16 dev eth2
    ip link set eth2 up
    value hot "$(ping -c 5 -i 0.2 -W 2 10.8.0.9 | grep -c 'bytes from')"
    until_pressed removed
    value gone "$(ls /sys/class/net | tr '\n' ' ')"
    until_pressed ending
    reboot -f
fi
"#;

/// testpmd, at the socket `name`: it answers ARP requests and pings on the queue that they come by.
fn start_testpmd(host: &Host, name: &str, end: &str) -> Result<Job> {
    host.spawn(&format!(
        "tail -f /dev/null | exec dpdk-testpmd --no-huge -m 128 --no-pci --file-prefix={name} --lcores '0@0,1@1' \
         --vdev net_vhost0,iface=/run/{name}.sock,queues=2{end} -- --forward-mode=icmpecho --rxq=2 --txq=2 \
         --total-num-mbufs=8192 --auto-start"
    ))
}

fn start_passt(host: &Host) -> Result<Job> {
    host.spawn("exec passt --foreground --vhost-user --socket /run/passt.sock --tcp-ports none --udp-ports none")
}

fn served(lab: &mut Lab, _tier: Tier) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd).cpus(4))?;
    host.run(
        "set -e; rm -rf /run/web; mkdir /run/web; cd /run/web; head -c 4M /dev/urandom >data; echo first >life\n\
         ip link set lo up",
    )?;
    let sum = host.run("sha256sum </run/web/data | cut -d ' ' -f 1")?;
    let sum = sum.trim();
    let web = host.spawn("exec busybox httpd -f -p 127.0.0.1:8079 -h /run/web")?;
    let testpmd = start_testpmd(host, "pmd", "")?;
    let passt = start_passt(host)?;
    host.run(
        "for each in $(seq 300); do [ \"$(ss -Hlx | grep -cE '/run/(pmd|passt)[.]sock ')\" = 2 ] && exit; sleep 0.1; done\n\
         ss -lx; exit 1",
    )?;
    let run = guest()?
        .cpus(2)
        .programs()
        .args(&[
            "--net",
            "vhost_user=on,socket=/run/pmd.sock,num_queues=4,mtu=1400,id=pmd",
        ])
        .args(&["--net", "vhost_user=on,socket=/run/passt.sock"])
        .args(&SOCKET)
        .limit(Duration::from_secs(300))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value flowing")?;
    for _ in 0..4 {
        host.run(&format!("{CTL} pause; sleep 0.3; {CTL} resume; sleep 0.3"))?;
    }
    let testpmd = again(host, testpmd, "pmd", |host| start_testpmd(host, "pmd", ""))?;
    running.wait_said("net pmd: its back end is back after")?;
    host.run(&format!("sleep 2; {CTL} power-button"))?;
    running.wait_line("@@value passt")?;
    let passt = again(host, passt, "passt", start_passt)?;
    running.wait_said("net net1: its back end is back after")?;
    host.run(&format!("{CTL} power-button"))?;
    plugged(host, &running)?;
    running.wait_line("@@value ending")?;
    host.run(&format!("echo second >/run/web/life; {CTL} power-button"))?;
    let result = running.finish()?.success()?;
    drop((testpmd, passt, web));
    host.run("rm -rf /run/web /run/*.sock")?;
    for life in ["first", "anew", "second"] {
        let value = result.value(&format!("fetched_{life}"))?;
        ensure!(value == sum, "{life}: {value}");
    }
    let pings = [
        "pings_first",
        "cpu_0",
        "cpu_1",
        "one_pair",
        "again_0",
        "again_1",
        "hot",
        "pings_second",
    ];
    for key in pings {
        let value = result.value(key)?;
        ensure!(value == "5", "{key}: {value}");
    }
    for (key, expected) in [
        ("address", "169.254.2.1/16"),
        ("mtu", "1400"),
        ("pairs", "2 2"),
        ("spread", "0 1"),
        ("gone", "eth0 eth1 lo"),
        ("carrier", "1 1"),
    ] {
        let value = result.value(key)?.trim();
        ensure!(value == expected, "{key}: {value}");
    }
    let away = away(&result.stderr).context("nothing was said of the back end's return")?;
    let mut words = result.value("missing")?.split(' ').map(str::parse::<u64>);
    let (missing, all) = (
        words.next().context("no gap")??,
        words.next().context("no count")??,
    );
    tell!("{missing} pings of {all} were lost in a row, and the back end was away for {away} ms");
    ensure!(missing * 100 < away + 1000, "{missing} pings in {away} ms");
    Ok(())
}

/// Milliseconds for which the first back end of testpmd's was away.
fn away(said: &str) -> Option<u64> {
    let (_, after) = said.split_once("net pmd: its back end is back after ")?;
    after.split(' ').next()?.parse().ok()
}

/// The back end at the socket `name` is killed, and another begins half a second later.
fn again(host: &Host, job: Job, name: &str, start: impl Fn(&Host) -> Result<Job>) -> Result<Job> {
    job.signal("KILL")?;
    let _killed = job.wait(Duration::from_secs(10))?;
    host.run(&format!("rm -f /run/{name}.sock; sleep 0.5"))?;
    start(host)
}

/// A third NIC comes and leaves, at whose socket it is Busway that listens.
fn plugged(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    running.wait_line("@@value hot")?;
    let _testpmd = start_testpmd(host, "hot", ",client=1")?;
    host.run(&format!(
        "{CTL} add-net /run/hot.sock --vhost-user --server --queues 4 --id hot; {CTL} power-button"
    ))?;
    running.wait_line("@@value removed")?;
    host.run(&format!(
        "{CTL} remove-device hot && [ ! -e /run/hot.sock ] && {CTL} power-button"
    ))
    .map(drop)
}
