//! Busway's own virtio devices, added to a guest that runs and removed from it, by ACPI.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, Lab, RunningGuest};

use crate::assigned::{guest, zoo};
use crate::hotplug::{CTL, Held, SOCKET};
use crate::life::COMPLAINTS;
use crate::proof::{Tier, count};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::rounds(
    "virtio_disks_and_nics_come_and_go_under_io_on_another_disk",
    in_turn,
)];

/// A disk and a NIC on a tap come and go in turn, and work in each round, while another disk is written to and read
/// without a break. Without them the process has what it had after the first round. Then the guest is paused and goes
/// on with a disk that has come, and restarts with it; from a guest that does not run, it is taken by force.
fn in_turn(lab: &mut Lab, tier: Tier) -> Result<()> {
    let rounds = tier.of(20, 200);
    let limit = Duration::from_secs(180 + 10 * rounds);
    let host = lab.host(&zoo())?;
    host.run(
        "set -e; rm -f /run/*.raw; truncate -s 4M /run/base.raw /run/hot.raw\n\
         ip tuntap add dev hot-tap mode tap; ip addr add 192.168.78.1/24 dev hot-tap\n\
         ip link set hot-tap up; mkdir -p /run/hot; head -c 1M /dev/urandom >/run/hot/data\n",
    )?;
    let sum = host.run("sha256sum </run/hot/data | cut -d ' ' -f 1")?;
    let server = host.spawn("exec busybox httpd -f -p 192.168.78.1:8078 -h /run/hot")?;
    let run = guest()?
        .args(&["--disk", "path=/run/base.raw"])
        .args(&["--platform", "hotplug_slots=1,hotplug_mmio64=2M"])
        .args(&SOCKET)
        .limit(limit)
        .script(&script(rounds));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let mut first = None;
    for round in 1..=rounds {
        one_round(host, &running, round, sum.trim())?;
        let held = Held::by(&running, host)?;
        match &first {
            None => {
                tell!("between the rounds: {held:?}");
                first = Some(held);
            }
            Some(first) => ensure!(
                *first == held,
                "round {round}: {held:?}, after the first {first:?}"
            ),
        }
    }
    count("rounds", rounds);
    restarted(host, &running)?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    drop(server);
    host.run("ip link del hot-tap")?;
    tell!("the guest's log:\n{}", result.block("log")?);
    ensure!(
        result.value("base").is_err(),
        "the other disk was disturbed: {}",
        result.block("base_log")?
    );
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    Ok(())
}

/// What the guest does, before it restarts and after. What writes and reads ends before the restart, which takes its disk
/// away.
fn script(rounds: u64) -> String {
    format!(
        "if [ -b /dev/vdb ]; then\n\
         value again \"$(lab-io verify /dev/vdb 7)\"\n\
         until [ -b /dev/vdc ]; do sleep 0.1; done\n\
         value third \"$(lab-io verify /dev/vdc 7)\"\n\
         while [ -b /dev/vdc ]; do sleep 0.1; done\n\
         {{ dmesg | grep -iE \"{COMPLAINTS}\" || true; }} | block complaints\n\
         {{ dmesg | grep -iE 'acpiphp|pciehp|Slot|virtio' || true; }} | block log\n\
         until_pressed waiting\n\
         exit 0\n\
         fi\n\
         modprobe -aq virtio_blk virtio_net\n\
         (seed=1; while lab-io write /dev/vda $seed && lab-io verify /dev/vda $seed; do\n\
         echo $seed >/run/base; seed=$((seed + 1))\n\
         done >/run/base.log 2>&1; block base_log </run/base.log; value base broken) &\n\
         io=$!\n\
         value ready yes\n\
         for round in $(seq {rounds}); do\n\
         until [ -b /dev/vdb ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done\n\
         value wrote \"$round $(lab-io write /dev/vdb $round)\"\n\
         ip addr add 192.168.78.2/24 dev eth0; ip link set eth0 up\n\
         value fetched \"$round $(wget -q -O - http://192.168.78.1:8078/data | sha256sum)\"\n\
         while [ -b /dev/vdb ] || [ -e /sys/class/net/eth0 ]; do sleep 0.1; done\n\
         value gone \"$round base $(cat /run/base)\"\n\
         done\n\
         until [ -b /dev/vdb ]; do sleep 0.1; done\n\
         value kept \"$(lab-io write /dev/vdb 7)\"\n\
         until_pressed written\n\
         kill $io\n\
         reboot -f\n",
    )
}

/// The guest is paused and goes on with a disk that has come, and restarts with it. While it does not run, it keeps the
/// disk, or loses it to somebody who insists, who then can give it the disk anew.
fn restarted(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    host.run(&format!("{CTL} add-disk /run/hot.raw --id hot"))?;
    running.wait_line("@@value written")?;
    host.run(&format!("{CTL} pause"))?;
    let refused = host.run(&format!(
        "{CTL} remove-device hot 2>&1 && exit 99 || echo \"status $?\""
    ))?;
    tell!("of a guest that is paused: {refused}");
    ensure!(
        refused.contains("does not run") && refused.contains("status 1"),
        "{refused}"
    );
    host.run(&format!("{CTL} resume && {CTL} power-button"))?;
    running.wait_line("@@value again")?;
    let forced = host.run(&format!(
        "{CTL} pause && {CTL} remove-device --force hot && lab-io verify /run/hot.raw 7 && \
         {CTL} add-disk /run/hot.raw --id hot && {CTL} resume"
    ))?;
    tell!("by force: {forced}");
    running.wait_line("@@value third")?;
    host.run(&format!("{CTL} remove-device hot"))?;
    running.wait_line("@@value waiting").map(drop)
}

/// Adds both, has them used, and removes them: the one that came first goes first in each second round.
fn one_round(host: &Host, running: &RunningGuest<'_>, round: u64, sum: &str) -> Result<()> {
    let said = host.run(&format!(
        "{CTL} add-disk /run/hot.raw --id hot && \
         {CTL} add-net hot-tap --mac 02:00:00:00:00:07 --id cable && {CTL} info"
    ))?;
    for words in [
        "hot: in the guest at 0000:00:0",
        "cable: in the guest at 0000:00:0",
        "/run/hot.raw, id hot, in the guest",
        "id cable, in the guest",
    ] {
        ensure!(said.contains(words), "no {words:?} in: {said}");
    }
    running.wait_line(&format!("@@value wrote {round}"))?;
    running.wait_line(&format!("@@value fetched {round} {sum}"))?;
    let mut order = ["hot", "cable"];
    order.rotate_left((round % 2) as usize);
    let [first, second] = order;
    // Nobody else has the image then, so that the host reads what the guest wrote.
    let said = host.run(&format!(
        "{CTL} remove-device {first} && {CTL} remove-device {second} && \
         lab-io verify /run/hot.raw {round}"
    ))?;
    tell!("round {round}: {said}");
    running
        .wait_line(&format!("@@value gone {round}"))
        .map(drop)
}
