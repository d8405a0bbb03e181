//! Memory that comes and goes while a drive works.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{Host, Lab};
use serde_json::Value;

use crate::assigned::{Interface, bound, give_back, guest};
use crate::hotplug::{CTL, SOCKET};
use crate::proof::Tier;
use crate::{Proof, count, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak(
        "memory_plugged_under_a_drives_io_is_mapped_block_by_block_by_group",
        |lab, tier| plugged(lab, Interface::Group, tier),
    ),
    Proof::rounds(
        "memory_plugged_under_a_drives_io_is_mapped_block_by_block_by_cdev",
        |lab, tier| plugged(lab, Interface::Cdev, tier),
    ),
    Proof::soak(
        "memory_that_comes_by_acpi_under_a_drives_io_stays_over_a_restart_by_group",
        |lab, _| by_acpi(lab, Interface::Group),
    ),
    Proof::new(
        "memory_that_comes_by_acpi_under_a_drives_io_stays_over_a_restart_by_cdev",
        |lab| by_acpi(lab, Interface::Cdev),
    ),
    Proof::soak(
        "memory_of_huge_pages_is_taken_block_by_block_and_no_guest_dies_of_an_empty_pool",
        |lab, _| of_huge_pages(lab),
    ),
];

const MIB: u64 = 1 << 20;
/// MiB that the guest starts with, all of them below 4 GiB.
const FIRST: u64 = 512;
/// MiB that come and go, above 4 GiB.
const MORE: u64 = 1024;
/// MiB of a block.
const BLOCK: u64 = 2;

/// MiB of a block that comes by ACPI.
const ACPI_BLOCK: u64 = 128;
/// MiB that the guest is given by ACPI at a time.
const STEPS: [u64; 2] = [ACPI_BLOCK, MORE - ACPI_BLOCK];

/// What a drive's devices reach, and what the guest has plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reach {
    mappings: u64,
    bytes: u64,
    plugged: u64,
}

fn reach(host: &Host) -> Result<Reach> {
    let devices = host.run(&format!("{CTL} devices --json"))?;
    let devices: Value = serde_json::from_str(&devices)?;
    let all = devices["devices"].as_array().context("devices")?;
    let find = |id: &str, kind: &str| {
        let mut all = all.iter();
        let found = all.find(|one| one["kind"] == kind);
        found.with_context(|| format!("{id} in {devices}"))
    };
    let (drive, memory) = (
        find("the drive", "assigned")?,
        find("the memory", "memory")?,
    );
    let number = |value: &Value| value.as_u64().context("a number");
    Ok(Reach {
        mappings: number(&drive["dma"]["mappings"])?,
        bytes: number(&drive["dma"]["bytes"])?,
        plugged: number(&memory["counters"]["plugged_bytes"])?,
    })
}

/// Waits until the guest has so many MiB plugged.
fn wait_plugged(host: &Host, mib: u64) -> Result<Reach> {
    let began = Instant::now();
    loop {
        let reach = reach(host)?;
        if reach.plugged == mib * MIB {
            return Ok(reach);
        }
        if began.elapsed() > Duration::from_secs(120) {
            bail!("{mib} MiB are wanted, and there is {reach:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A guest is given 1 GiB and gives it back, again and again, while its drive is written to and read back all the time, by
/// buffers in what was plugged as well. What devices reach is what is plugged, in as many mappings as there are blocks, and
/// at the end what it was at the start.
fn plugged(lab: &mut Lab, interface: Interface, tier: Tier) -> Result<()> {
    let rounds = tier.of(2, 100);
    let (host, address) = bound(lab, "nv0")?;
    let [_, way] = interface.arguments();
    let memory = format!("hotplug_size={MORE}M,hotplug_method=virtio-mem");
    let half = (FIRST + MORE / 2) * 1024;
    let run = guest()?
        .memory_mib(FIRST)
        .cmdline("memhp_default_state=online_movable")
        .args(&["--memory", &memory, "--platform", &format!("{way},p2p=off")])
        .args(&SOCKET)
        .device(&address)
        .limit(Duration::from_secs(240 + 120 * rounds))
        .script(&format!(
            "(seed=0; while [ ! -e /tmp/still ]; do seed=$((seed + 1)); place=$(cat /tmp/place 2>/dev/null || true)\n\
             lab-io write /dev/nvme0n1 $seed $place && lab-io verify /dev/nvme0n1 $seed $place ||\n\
             echo \"$seed $place\" >>/tmp/bad\n\
             echo \"$seed $place\" >/tmp/passes; done) >/dev/null 2>>/tmp/said & io=$!\n\
             total() {{ awk '/^MemTotal/ {{ print $2 }}' /proc/meminfo; }}\n\
             passed() {{ seen=$(cut -d ' ' -f 1 /tmp/passes); until [ \"$(cut -d ' ' -f 1 /tmp/passes)\" -gt $((seen + 1)) ]; do sleep 0.1; done; }}\n\
             until [ -e /tmp/passes ]; do sleep 0.1; done\n\
             value ready yes\n\
             for round in $(seq {rounds}); do\n\
             until [ \"$(total)\" -gt {half} ]; do sleep 0.1; done\n\
             value plugged $round\n\
             echo high >/tmp/place; passed\n\
             value used \"$round $(cat /tmp/passes)\"\n\
             echo >/tmp/place; passed\n\
             value rests $round\n\
             until [ \"$(total)\" -lt {half} ]; do sleep 0.1; done\n\
             value left $round\n\
             done\n\
             : >/tmp/still; wait $io\n\
             value passes \"$(cat /tmp/passes)\"\nvalue bad \"$(cat /tmp/bad /tmp/said 2>/dev/null | head -n 5)\"\n\
             until_pressed waiting\n\
             dmesg | grep -iE 'virtio_mem|nvme|error' | tail -n 40 | block log\n",
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let before = reach(host)?;
    ensure!(
        before.bytes == FIRST * MIB && before.plugged == 0,
        "{before:?}"
    );
    let resize = |mib: u64| host.run(&format!("{CTL} resize --memory {mib}M"));
    let refused = host.run(&format!(
        "{CTL} resize --memory {}M 2>&1 || true",
        FIRST + MORE + BLOCK
    ))?;
    ensure!(refused.contains("hotplug_size"), "{refused}");
    let mut longest = Duration::ZERO;
    for round in 1..=rounds {
        let began = Instant::now();
        resize(FIRST + MORE)?;
        running.wait_line(&format!("@@value plugged {round}"))?;
        let all = wait_plugged(host, MORE)?;
        longest = longest.max(began.elapsed());
        let expected = Reach {
            mappings: before.mappings + MORE / BLOCK,
            bytes: before.bytes + MORE * MIB,
            plugged: MORE * MIB,
        };
        ensure!(
            all == expected,
            "round {round}: {all:?} and not {expected:?}"
        );
        let info = host.run(&format!("{CTL} info --json"))?;
        let info: Value = serde_json::from_str(&info)?;
        ensure!(
            info["memory_actual_size"] == (FIRST + MORE) * MIB,
            "round {round}: {}",
            info["memory_actual_size"]
        );
        running.wait_line(&format!("@@value used {round} "))?;
        running.wait_line(&format!("@@value rests {round}"))?;
        resize(FIRST)?;
        running.wait_line(&format!("@@value left {round}"))?;
        let after = wait_plugged(host, 0)?;
        ensure!(
            after == before,
            "round {round}: {after:?} and not {before:?}"
        );
    }
    count("times 1 GiB came and went", rounds);
    tell!("the longest plug of 1 GiB took {longest:.1?}");
    running.wait_line("@@value waiting")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("{}", result.block("log")?);
    let bad = result.value("bad")?.trim();
    ensure!(bad.is_empty(), "data was lost: {bad}");
    give_back(host, &address, "nvme")
}

/// How many mappings a drive has, and of how many bytes.
fn mapped(host: &Host) -> Result<(u64, u64)> {
    let devices = host.run(&format!("{CTL} devices --json"))?;
    let devices: Value = serde_json::from_str(&devices)?;
    let mut all = devices["devices"].as_array().context("devices")?.iter();
    let drive = all.find(|one| one["kind"] == "assigned");
    let dma = &drive.context("the drive")?["dma"];
    let number = |key: &str| dma[key].as_u64().with_context(|| format!("{key} in {dma}"));
    Ok((number("mappings")?, number("bytes")?))
}

/// What is said of the guest's memory, and what it has, in MiB.
fn shown(host: &Host) -> Result<(u64, u64)> {
    let info = host.run(&format!("{CTL} info --json"))?;
    let info: Value = serde_json::from_str(&info)?;
    let size = info["config"]["memory"]["size"].as_u64().context("size")?;
    let actual = info["memory_actual_size"].as_u64().context("actual")?;
    Ok((size / MIB, actual / MIB))
}

/// A guest of a stock kernel is given memory by ACPI, twice, while its drive is written to and read back all the time, by
/// buffers in what came as well. The drive reaches it when the request is answered, in as many mappings as there are blocks.
/// After a restart the guest has all of it, and its drive reaches that.
fn by_acpi(lab: &mut Lab, interface: Interface) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let [_, way] = interface.arguments();
    let memory = format!("hotplug_size={MORE}M,hotplug_method=acpi");
    // KiB more than at the start: the kernel keeps less than half of a block for the memory's administration.
    let least = |mib: u64| (mib - FIRST - ACPI_BLOCK / 2) * 1024;
    let mut sum = FIRST;
    let steps = STEPS.map(|step| {
        sum += step;
        sum
    });
    let waits: Vec<_> = steps.iter().map(|mib| least(*mib).to_string()).collect();
    // More than the first RAM can be, and less than all: which life it is.
    let whole = (FIRST + MORE / 2) * 1024;
    let run = guest()?
        .memory_mib(FIRST)
        .cmdline("memhp_default_state=online_movable")
        .args(&["--memory", &memory, "--platform", &format!("{way},p2p=off")])
        .args(&SOCKET)
        .device(&address)
        .limit(Duration::from_secs(400))
        .script(&format!(
            "total() {{ awk '/^MemTotal/ {{ print $2 }}' /proc/meminfo; }}\n\
             first=$(total)\n\
             if [ \"$first\" -gt {whole} ]; then\n\
             lab-io write /dev/nvme0n1 77 high && lab-io verify /dev/nvme0n1 77 high && value again \"$first\"\n\
             until_pressed waiting\n\
             dmesg | grep -iE 'memory|acpi.*error|nvme' | tail -n 40 | block log\n\
             else\n\
             (seed=0; while [ ! -e /tmp/still ]; do seed=$((seed + 1)); place=$(cat /tmp/place 2>/dev/null || true)\n\
             lab-io write /dev/nvme0n1 $seed $place && lab-io verify /dev/nvme0n1 $seed $place ||\n\
             echo \"$seed $place\" >>/tmp/bad\n\
             echo \"$seed $place\" >/tmp/passes; done) >/dev/null 2>>/tmp/said & io=$!\n\
             passed() {{ seen=$(cut -d ' ' -f 1 /tmp/passes); until [ \"$(cut -d ' ' -f 1 /tmp/passes)\" -gt $((seen + 1)) ]; do sleep 0.1; done; }}\n\
             until [ -e /tmp/passes ]; do sleep 0.1; done\n\
             value ready yes\n\
             step=0\n\
             for least in {waits}; do\n\
             step=$((step + 1))\n\
             until [ \"$(total)\" -gt $((first + least)) ]; do sleep 0.1; done\n\
             value plugged $step\n\
             echo high >/tmp/place; passed\n\
             value used \"$step $(cat /tmp/passes)\"\n\
             done\n\
             : >/tmp/still; wait $io\n\
             value bad \"$(cat /tmp/bad /tmp/said 2>/dev/null | head -n 5)\"\n\
             reboot -f\n\
             fi\n",
            waits = waits.join(" "),
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let before = mapped(host)?;
    ensure!(before.1 == FIRST * MIB, "{before:?}");
    for (mib, words) in [
        (FIRST + ACPI_BLOCK / 2, "whole blocks"),
        (FIRST - ACPI_BLOCK, "stays"),
        (FIRST + MORE + ACPI_BLOCK, "hotplug_size"),
    ] {
        let refused = host.run(&format!("{CTL} resize --memory {mib}M 2>&1 || true"))?;
        ensure!(refused.contains(words), "{mib}: {refused}");
    }
    let mut longest = Duration::ZERO;
    for (step, mib) in (1..).zip(steps) {
        let began = Instant::now();
        host.run(&format!("{CTL} resize --memory {mib}M"))?;
        longest = longest.max(began.elapsed());
        let more = mib - FIRST;
        let expected = (before.0 + more / ACPI_BLOCK, before.1 + more * MIB);
        let now = mapped(host)?;
        ensure!(now == expected, "step {step}: {now:?} and not {expected:?}");
        ensure!(
            shown(host)? == (mib, mib),
            "step {step}: {:?}",
            shown(host)?
        );
        running.wait_line(&format!("@@value plugged {step}"))?;
        running.wait_line(&format!("@@value used {step} "))?;
    }
    tell!("the longest resize took {longest:.1?}");
    running.wait_line("@@value waiting")?;
    let after = mapped(host)?;
    ensure!(
        after.1 == before.1 + MORE * MIB,
        "after the restart: {after:?}"
    );
    ensure!(
        shown(host)?.1 == FIRST + MORE,
        "after the restart: {:?}",
        shown(host)?
    );
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("{}", result.block("log")?);
    let bad = result.value("bad")?.trim();
    ensure!(bad.is_empty(), "data was lost: {bad}");
    let again: u64 = result.value("again")?.trim().parse()?;
    ensure!(again > whole, "after the restart: {again} KiB");
    give_back(host, &address, "nvme")
}

/// Where the host says how many huge pages of 2 MiB it has.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Has the host have so many MiB of huge pages.
fn pool(host: &Host, mib: u64) -> Result<()> {
    let pages = mib / BLOCK;
    let has = host.run(&format!(
        "echo {pages} >{POOL}/nr_hugepages; cat {POOL}/nr_hugepages"
    ))?;
    ensure!(has.trim() == pages.to_string(), "{pages} pages: {has}");
    Ok(())
}

/// MiB of huge pages that nobody has taken.
fn free(host: &Host) -> Result<u64> {
    let free = host.run(&format!("cat {POOL}/free_hugepages"))?;
    Ok(free.trim().parse::<u64>()? * BLOCK)
}

/// A guest of huge pages is given more by virtio-mem than the host's pool has. It gets what there is, its drive's data is right
/// in all of it, and it goes on; when the pool is larger it gets the rest. What it gives back is the pool's again.
fn of_huge_pages(lab: &mut Lab) -> Result<()> {
    const STEP: u64 = 128;
    let (host, address) = bound(lab, "nv0")?;
    pool(host, FIRST + STEP)?;
    let memory = format!(
        "hugepages=on,hugepage_size=2M,hotplug_size={}M,hotplug_method=virtio-mem",
        2 * STEP
    );
    let [_, way] = Interface::Group.arguments();
    let run = guest()?
        .memory_mib(FIRST)
        .cmdline("memhp_default_state=online_movable")
        .args(&["--memory", &memory, "--platform", &format!("{way},p2p=off")])
        .args(&SOCKET)
        .device(&address)
        .limit(Duration::from_secs(400))
        .script(
            "seed=0\n\
             for name in less all none; do\n\
             until_pressed $name\n\
             seed=$((seed + 1)); place=high; [ $name != none ] || place=\n\
             lab-io write /dev/nvme0n1 $seed $place && lab-io verify /dev/nvme0n1 $seed $place && value verified $name\n\
             done\n\
             until_pressed waiting\n\
             dmesg | grep -iE 'virtio_mem|nvme|error' | tail -n 40 | block log\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value less")?;
    ensure!(free(host)? == STEP, "{} MiB are free", free(host)?);
    let resize = |mib: u64| host.run(&format!("{CTL} resize --memory {mib}M"));
    let press = || host.run(&format!("{CTL} power-button"));
    resize(FIRST + 2 * STEP)?;
    let there = wait_plugged(host, STEP)?;
    ensure!(there.bytes == (FIRST + STEP) * MIB, "{there:?}");
    ensure!(free(host)? == 0, "{} MiB are free", free(host)?);
    press()?;
    running.wait_line("@@value verified less")?;
    running.wait_line("@@value all")?;
    pool(host, FIRST + 2 * STEP)?;
    // A guest that was told to try again later does so when it hears of another size.
    resize(FIRST + STEP)?;
    resize(FIRST + 2 * STEP)?;
    let all = wait_plugged(host, 2 * STEP)?;
    ensure!(all.bytes == (FIRST + 2 * STEP) * MIB, "{all:?}");
    press()?;
    running.wait_line("@@value verified all")?;
    running.wait_line("@@value none")?;
    resize(FIRST)?;
    wait_plugged(host, 0)?;
    ensure!(free(host)? == 2 * STEP, "{} MiB are free", free(host)?);
    press()?;
    running.wait_line("@@value verified none")?;
    running.wait_line("@@value waiting")?;
    press()?;
    let result = running.finish()?.success()?;
    tell!("{}", result.block("log")?);
    pool(host, 0)?;
    give_back(host, &address, "nvme")
}
