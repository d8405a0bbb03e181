//! A NIC that passt serves: a guest reaches what the host does, by nothing that takes a right.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, HostConfig, Job, Kernel, Lab};

use crate::assigned::guest;
use crate::hotplug::{CTL, SOCKET};
use crate::proof::Tier;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::soak(
    "passt_serves_a_nic_over_pauses_its_own_death_in_the_middle_of_a_download_and_a_restart",
    served,
)];

const BACK: &str = "net passt: its back end is back after ";

/// What the guest does in its first life and in its second, which it tells apart by what the host serves. A download of 1 MiB
/// a second is under way when passt dies, and does not end well, for passt's connections are its own.
const SCRIPT: &str = r#"
fetched() { value "fetched_$1" "$(wget -q -O - http://169.254.2.2:8079/data | sha256sum | cut -d ' ' -f 1)"; }
dhcp eth0
value address "$(ip -4 -o addr show eth0 | sed 's/.*inet //; s/ .*//')"
life=$(wget -q -O - http://169.254.2.2:8079/life)
fetched "$life"
if [ "$life" = first ]; then
    (while :; do wget -q -T 5 -O /dev/null http://169.254.2.2:8079/data; done) &
    busy=$!
    until_pressed paused
    fetched paused
    before=$(cat /sys/class/net/eth0/carrier_down_count)
    until_pressed killed
    kill $busy
    value carrier "$(($(cat /sys/class/net/eth0/carrier_down_count) - before)) $(cat /sys/class/net/eth0/carrier)"
    dhcp eth0
    fetched anew
    until_pressed ending
    reboot -f
fi
"#;

/// It listens once it has been started for as long as a process takes.
fn start_passt(host: &Host) -> Result<Job> {
    let job = host.spawn(
        "exec passt --foreground --vhost-user --socket /run/passt.sock --tcp-ports none --udp-ports none",
    )?;
    host.run(
        "for each in $(seq 100); do ! ss -Hlx | grep -q '/run/passt[.]sock ' || exit 0; sleep 0.1; done; ss -lx; exit 1",
    )?;
    Ok(job)
}

fn served(lab: &mut Lab, _tier: Tier) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd))?;
    host.run(
        "set -e; rm -rf /run/web; mkdir /run/web; cd /run/web; head -c 4M /dev/urandom >data; echo first >life\n\
         ip link set lo up",
    )?;
    let sum = host.run("sha256sum </run/web/data | cut -d ' ' -f 1")?;
    let sum = sum.trim();
    let web = host.spawn("exec busybox httpd -f -p 127.0.0.1:8079 -h /run/web")?;
    let passt = start_passt(host)?;
    let run = guest()?
        .args(&["--net", "vhost_user=on,socket=/run/passt.sock,id=passt"])
        .args(&SOCKET)
        .limit(Duration::from_secs(300))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value paused")?;
    for _ in 0..4 {
        host.run(&format!("{CTL} pause; sleep 0.3; {CTL} resume; sleep 0.3"))?;
    }
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value killed")?;
    passt.signal("KILL")?;
    let _killed = passt.wait(Duration::from_secs(10))?;
    host.run("rm -f /run/passt.sock /run/passt.sock.repair; sleep 0.5")?;
    let passt = start_passt(host)?;
    running.wait_said(BACK)?;
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value ending")?;
    host.run(&format!("echo second >/run/web/life; {CTL} power-button"))?;
    let result = running.finish()?.success()?;
    drop((passt, web));
    host.run("rm -rf /run/web /run/passt.sock*")?;
    for life in ["first", "paused", "anew", "second"] {
        let value = result.value(&format!("fetched_{life}"))?;
        ensure!(value == sum, "{life}: {value}");
    }
    for (key, expected) in [("address", "169.254.2.1/16"), ("carrier", "1 1")] {
        let value = result.value(key)?.trim();
        ensure!(value == expected, "{key}: {value}");
    }
    let away = result.stderr.split_once(BACK);
    let away = away
        .and_then(|(_, after)| after.split(' ').next())
        .unwrap_or("?");
    tell!("the back end was away for {away} ms");
    Ok(())
}
