//! Guests that are paused and go on: at any moment of their boot, in the midst of I/O, and for long.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestResult, Host, HostConfig, Kernel, Lab, RunningGuest};
use serde_json::json;

use crate::assigned::{guest, word};
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "paused_at_any_moment_a_guest_loses_neither_requests_nor_packets_nor_time",
    paused,
)];

/// How long a pause and its end may take together in the emulated host, the two processes that ask for them included, which
/// takes a tenth of a second there. A second on a machine.
const WORST: u64 = 5_000_000;

/// A guest of two processors, whose disk and NIC have eight queues of which it enables two, is paused again and again from
/// before its first instruction until it is up. Then its disk gets slow, and it is paused while requests and packets
/// are on their way; what it writes is read and right, packets move again, and nothing is busy. Then it is paused for
/// longer than its watchdogs bear, and none of them barks; its clock says what the host's does.
fn paused(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Iommufd).device(Device::nvme("nv0", 64));
    let host = lab.host(&config)?;
    let disk = host.run("udevadm wait --timeout=120 /dev/nvme0n1 && echo /dev/nvme0n1")?;
    let disk = format!("path={},direct=on,num_queues=8", disk.trim());
    let run = guest()?
        .cpus(2)
        .programs()
        .args(&["--disk", &disk])
        .args(&["--net", "tap=lab-pause,num_queues=16"])
        .args(&SOCKET)
        .limit(Duration::from_secs(300))
        .script(
            "value up yes\n\
             ip addr add 192.168.78.2/24 dev eth0; ip link set eth0 up\n\
             until_pressed moving\n\
             value io begun\n\
             fio --name=verified --filename=/dev/vda --rw=randwrite --bs=4k --size=1M --direct=1 --ioengine=libaio \
             --iodepth=8 --verify=crc32c --verify_fatal=1 --output=/tmp/fio && value fio done || value fio failed\n\
             cat /tmp/fio | block fio\n\
             until_pressed idle\n\
             echo 1 >/proc/sys/kernel/watchdog_thresh\n\
             echo 3 >/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout\n\
             value clock_before \"$(date +%s)\"\n\
             until_pressed watched\n\
             value clock_after \"$(date +%s)\"\n\
             sleep 5\n\
             { dmesg | grep -iE 'lockup|stall|hung|unstable|Switched to clocksource' || true; } | block alarms\n",
        );
    host.run("rm -f /run/is-up")?;
    let pauses = host.spawn(&format!(
        "until {CTL} ping >/dev/null 2>&1; do sleep 0.02; done\n\
         count=0; worst=0\n\
         while [ ! -e /run/is-up ]; do\n\
         begun=${{EPOCHREALTIME/./}}\n\
         {CTL} pause >/dev/null && {CTL} resume >/dev/null || exit\n\
         took=$((${{EPOCHREALTIME/./}} - begun)); worst=$((took > worst ? took : worst)); count=$((count + 1))\n\
         sleep 0.02\n\
         done\n\
         echo pauses=$count worst=$worst\n"
    ))?;
    let running = host.start_guest(&run)?;
    running.wait_line("@@value up")?;
    host.run("touch /run/is-up")?;
    let said = pauses.wait(Duration::from_secs(60))?.success()?;
    tell!("while it booted: {said}");
    let number = |key| -> Result<u64> { Ok(word(said.trim(), key)?.parse()?) };
    ensure!(number("pauses")? > 20 && number("worst")? < WORST, "{said}");
    in_flight(host, &running)?;
    let result = for_long(host, running)?;
    ensure!(result.value("fio")? == "done", "{}", result.block("fio")?);
    host.run("! ip link show lab-pause 2>/dev/null")?;
    Ok(())
}

/// The drive behind the disk does so many requests a second, or as many as it can.
fn throttle(host: &Host, requests: u32) -> Result<()> {
    let words = json!({
        "device": "nv0-drive", "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": requests, "iops_rd": 0, "iops_wr": 0,
    });
    host.qmp().execute("block_set_io_throttle", words)?;
    Ok(())
}

fn in_flight(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    running.wait_line("@@value moving")?;
    host.run("ip addr add 192.168.78.1/24 dev lab-pause; ip link set lab-pause up")?;
    host.run("busybox ping -q -c 3 -W 10 192.168.78.2")?;
    let flood = host.spawn("exec busybox ping -q -A -w 60 192.168.78.2")?;
    throttle(host, 16)?;
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value io begun")?;
    // Until some of them are on their way.
    host.run("until grep -qvE '^ *0 +0$' /sys/block/nvme0n1/inflight; do sleep 0.05; done")?;
    let said = host.run(&format!(
        "begun=${{EPOCHREALTIME/./}}; {CTL} pause; echo took=$((${{EPOCHREALTIME/./}} - begun))\n\
         cat /sys/block/nvme0n1/inflight; sleep 2"
    ))?;
    tell!("paused while requests are on their way: {said}");
    let mut inflight = said.lines().last().unwrap_or_default().split_whitespace();
    ensure!(inflight.all(|count| count == "0"), "requests go on: {said}");
    throttle(host, 0)?;
    host.run(&format!("{CTL} resume"))?;
    running.wait_line("@@value fio")?;
    flood.signal("INT")?;
    let flooded = flood.wait(Duration::from_secs(60))?;
    tell!("packets meanwhile: {}", flooded.stdout);
    host.run("busybox ping -q -c 3 -W 10 192.168.78.2")?;
    running.wait_line("@@value idle")?;
    // A worker that spins takes a hundred ticks a second.
    let stat = format!(
        "cat /proc/{}/task/*/stat | sed 's/.*) //' | awk '{{ sum += $12 }} END {{ print sum }}'",
        running.pid()?
    );
    let ticks = host.run(&format!("sleep 1; {stat}; sleep 2; {stat}"))?;
    let ticks: Vec<u64> = ticks
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(
        matches!(*ticks, [before, after] if after - before < 50),
        "somebody is busy: {ticks:?}"
    );
    Ok(())
}

fn for_long(host: &Host, running: RunningGuest<'_>) -> Result<GuestResult> {
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value watched")?;
    host.run(&format!(
        "{CTL} pause; sleep 8; {CTL} resume; {CTL} power-button"
    ))?;
    let result = running.finish()?.success()?;
    let alarms = result.block("alarms")?;
    tell!("the guest's log:\n{alarms}");
    let barked = ["lockup", "stall", "hung", "unstable"];
    ensure!(!barked.iter().any(|word| alarms.contains(word)), "{alarms}");
    for key in ["clock_before", "clock_after"] {
        let said: f64 = result.value(key)?.parse()?;
        let line = result.transcript.time_of(&format!("@@value {key}"));
        let off = line.context("no such line")? - said;
        tell!("{key}: {off:.1} s behind the host's");
        // It counts whole seconds, and began with the whole second of the host's.
        ensure!((-1.0..2.5).contains(&off), "{key} is {off} s off");
    }
    Ok(result)
}
