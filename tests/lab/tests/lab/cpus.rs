//! Processors that come and leave while a drive works.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Lab};

use crate::assigned::{Interface, bound, give_back, guest};
use crate::hotplug::{CTL, SOCKET};
use crate::proof::Tier;
use crate::{Proof, count, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::rounds(
        "cpus_come_and_go_under_a_drives_io_and_its_queues_follow",
        come_and_go,
    ),
    Proof::new(
        "cpus_that_are_dedicated_leave_no_guest_to_halt_and_take_its_drives_interrupts",
        dedicated,
    ),
];

/// The most processors that the guest has.
const MOST: u32 = 4;

/// Sizes from 1 to [`MOST`], each another than the one before it.
fn sizes(rounds: u64) -> Vec<u32> {
    let (mut state, mut last) = (0x2545_f491_4f6c_dd1d_u64, 1);
    let next = || {
        // Marsaglia, Xorshift RNGs (2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let step = (state % u64::from(MOST - 1)) as u32 + 1;
        last = (last - 1 + step) % MOST + 1;
        last
    };
    std::iter::repeat_with(next)
        .take(usize::try_from(rounds).unwrap_or(usize::MAX))
        .collect()
}

/// A guest of a stock kernel has as many processors as it was last given, while its drive is written to and read back all
/// the time; each processor that is there is interrupted by the drive for what it reads. What cannot be is refused.
fn come_and_go(lab: &mut Lab, tier: Tier) -> Result<()> {
    let rounds = tier.of(20, 200);
    let mut sizes = sizes(rounds);
    // At the end all are there.
    if sizes.last() == Some(&MOST) {
        sizes.push(1);
    }
    sizes.push(MOST);
    let (host, address) = bound(lab, "nv0")?;
    let wanted = sizes.iter().map(u32::to_string).collect::<Vec<_>>();
    let [_, way] = Interface::Group.arguments();
    let run = guest()?
        .cpus(1)
        .args(&["--cpus", &format!("max={MOST}"), "--platform", way])
        .args(&SOCKET)
        .device(&address)
        .limit(Duration::from_secs(240 + 15 * rounds))
        .script(&format!(
            "(while [ ! -e /tmp/still ]; do for one in /sys/devices/system/cpu/cpu[1-9]*/online; do\n\
             [ \"$(cat $one 2>/dev/null)\" != 0 ] || echo 1 >$one || true; done; sleep 0.1; done) 2>/dev/null &\n\
             (seed=0; while [ ! -e /tmp/still ]; do seed=$((seed + 1))\n\
             lab-io write /dev/nvme0n1 $seed && lab-io verify /dev/nvme0n1 $seed || echo $seed >>/tmp/bad\n\
             echo $seed >/tmp/passes; done) >/dev/null 2>>/tmp/said & io=$!\n\
             value ready yes\n\
             round=0\n\
             for wanted in {}; do\n\
             round=$((round + 1))\n\
             until [ \"$(nproc)\" = $wanted ]; do sleep 0.05; done\n\
             value size \"$round $wanted\"\n\
             done\n\
             : >/tmp/still; wait $io\n\
             value passes \"$(cat /tmp/passes)\"\nvalue bad \"$(cat /tmp/bad 2>/dev/null)\"\n\
             taken() {{ awk -v column=$(($1 + 2)) '/nvme0q/ {{ n += $column }} END {{ print n + 0 }}' /proc/interrupts; }}\n\
             for cpu in $(seq 0 {}); do\n\
             before=$(taken $cpu)\n\
             taskset $(printf %x $((1 << cpu))) dd if=/dev/nvme0n1 of=/dev/null bs=4k count=16 iflag=direct 2>/dev/null\n\
             value queue$cpu \"$(($(taken $cpu) - before))\"\n\
             done\n\
             grep nvme /proc/interrupts | block interrupts\n\
             until_pressed waiting\n\
             dmesg | grep -iE 'cpu|nvme|error' | tail -n 40 | block log\n",
            wanted.join(" "),
            MOST - 1,
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let refused = |size: u32, words: &str| -> Result<()> {
        let said = host.run(&format!("{CTL} resize --cpus {size} 2>&1 || true"))?;
        ensure!(said.contains(words), "{size}: {said}");
        Ok(())
    };
    refused(0, "1 to 4")?;
    refused(MOST + 1, "1 to 4")?;
    let mut longest = Duration::ZERO;
    for (round, size) in (1..).zip(&sizes) {
        let began = Instant::now();
        host.run(&format!("{CTL} resize --cpus {size}"))?;
        running.wait_line(&format!("@@value size {round} {size}"))?;
        longest = longest.max(began.elapsed());
        let info = host.run(&format!("{CTL} info --json"))?;
        let info: serde_json::Value = serde_json::from_str(&info)?;
        ensure!(
            info["config"]["cpus"]["boot_vcpus"] == *size,
            "round {round}: {}",
            info["config"]["cpus"]
        );
        let top = host.run(&format!("{CTL} top --once --json"))?;
        let top: serde_json::Value = serde_json::from_str(&top)?;
        let shown = top["per_second"]["vcpus"].as_array().map_or(0, Vec::len);
        ensure!(
            u32::try_from(shown) == Ok(*size),
            "round {round}: {shown} vCPUs are shown of {size}"
        );
    }
    count("sizes", sizes.len() as u64);
    tell!("the longest resize took {longest:.1?}");
    running.wait_line("@@value waiting")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("{}\n{}", result.block("interrupts")?, result.block("log")?);
    ensure!(result.value("bad")?.trim().is_empty(), "data was lost");
    let passes: u64 = result.value("passes")?.trim().parse()?;
    ensure!(passes > 1, "the drive was written {passes} times only");
    for cpu in 0..MOST {
        let taken: u64 = result.value(&format!("queue{cpu}"))?.trim().parse()?;
        ensure!(
            taken > 0,
            "the drive does not interrupt processor {cpu} for what it reads"
        );
    }
    give_back(host, &address, "nvme")
}

/// Reads of each processor in turn, one at a time, of the drive's queue that is its own.
const READS: u64 = 1000;

/// How often each processor of the host has taken interrupts of the drive for the VM.
fn taken(host: &Host, address: &str) -> Result<Vec<u64>> {
    let said = host.run(&format!(
        "awk '/vfio-msi.*\\({address}\\)/ {{ a += $2; b += $3 }} END {{ print a + 0, b + 0 }}' /proc/interrupts"
    ))?;
    let words = said.split_ascii_whitespace();
    Ok(words.map(str::parse).collect::<Result<_, _>>()?)
}

/// A guest reads from its drive, once with processors of its own and once without: with them it is not left when it halts,
/// and the host takes the interrupts of each of the drive's queues where the vCPU runs that has the queue.
fn dedicated(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let exits = |place: &[&str]| -> Result<[f64; 2]> {
        let run = guest()?
            .cpus(2)
            .args(place)
            .args(&SOCKET)
            .device(&address)
            .script(&format!(
                "io() {{ taskset $1 dd if=/dev/nvme0n1 of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null; }}\n\
                 io 1\nio 2\nuntil_pressed ready\n\
                 mark before 1\nio 1\nmark after 1\nuntil_pressed first\nio 2\nuntil_pressed second\n"
            ));
        let running = host.start_guest(&run)?;
        let mut counts = Vec::new();
        for step in ["ready", "first", "second"] {
            running.wait_line(&format!("@@value {step}"))?;
            counts.push(taken(host, &address)?);
            host.run(&format!("{CTL} power-button"))?;
        }
        let result = running.finish()?.success()?;
        let grown = |step: usize, cpu: usize| counts[step + 1][cpu] - counts[step][cpu];
        let table = [0, 1].map(|step| [0, 1].map(|cpu| grown(step, cpu)));
        tell!("{place:?}: interrupts of processors 0 and 1 on the host's 0 and 1: {table:?}");
        if !place.is_empty() {
            let own = table[0][0].min(table[1][1]);
            ensure!(
                own >= READS / 2,
                "{table:?}: too few for {READS} reads each"
            );
            let elsewhere = table[0][1] + table[1][0];
            ensure!(
                elsewhere == 0,
                "{table:?}: {elsewhere} were taken elsewhere"
            );
        }
        let (before, after) = (&result.marks["before"], &result.marks["after"]);
        let grown = |counter| {
            let grown = after
                .since(before, counter)
                .context("KVM does not count it")?;
            anyhow::Ok(grown as f64)
        };
        let [all, host, halts] = [grown("exits")?, grown("irq_exits")?, grown("halt_exits")?];
        tell!("{all} exits, {host} of them for interrupts of the host's");
        Ok([all - host, halts].map(|count| count / READS as f64))
    };
    let [shared, halts] = exits(&[])?;
    let [own, own_halts] = exits(&["--cpus", "dedicated=on,affinity=[0@[0],1@[1]]"])?;
    tell!(
        "exits a read beside the host's interrupts: {shared:.2}, {halts:.2} of them to halt; dedicated: {own:.2}, \
         {own_halts:.2} to halt"
    );
    ensure!(own_halts == 0.0, "{own_halts} exits a read to halt");
    ensure!(halts > 0.3, "{halts} exits a read to halt without the flag");
    give_back(host, &address, "nvme")
}
