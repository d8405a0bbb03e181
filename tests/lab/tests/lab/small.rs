//! The small devices beside disks and NICs: a balloon with free memory reported, an entropy source with a limit,
//! persistent memory, a watchdog and pvpanic; and the same balloon beside an assigned drive, where nothing goes back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{Host, HostConfig, Kernel, Lab, RunningGuest};
use serde_json::Value;

use crate::assigned::{bound, give_back, guest};
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak(
        "small_devices_give_memory_back_wait_for_entropy_keep_what_was_flushed_bite_and_tell_of_a_panic",
        |lab, _tier| alone(lab),
    ),
    Proof::new(
        "small_devices_a_balloon_beside_a_drive_gives_nothing_back_and_says_so",
        beside_a_drive,
    ),
    Proof::soak("balloon_remaps_beside_an_assigned_drive", |lab, _tier| {
        remapped(lab)
    }),
];

const MIB: u64 = 1 << 20;

/// What the guest does in its three lives, which it tells apart by what is in its persistent memory.
///
/// In the first one its memory is in pieces that no report tells of, for those are of 2 MiB, and goes into the balloon;
/// then it is in large pieces, which are reported. A watchdog is fed all the while, until nobody feeds it. In the second
/// life the kernel panics.
const SCRIPT: &str = "
modprobe nd_pmem
for each in $(seq 100); do [ -b /dev/pmem0 ] && break; sleep 0.1; done
case \"$(head -c 6 /dev/pmem0 | tr -d '\\0')\" in
second)
    value kept yes
    printf third: | dd of=/dev/pmem0 conv=notrunc,fsync 2>/dev/null
    value panics yes
    echo c >/proc/sysrq-trigger ;;
third:)
    value third yes
    { dmesg | grep -iE 'pmem|balloon|virtio' | grep -iE 'fail|error|warn|bug' || true; } | block complaints ;;
*)
    modprobe -r i6300esb; modprobe i6300esb heartbeat=8
    ( exec 3>/dev/watchdog; while sleep 1; do echo >&3; done ) & feeder=$!
    begun=$(cut -d . -f 1 /proc/uptime)
    value entropy \"$(head -c 20480 /dev/hwrng | wc -c)\"
    value seconds \"$(($(cut -d . -f 1 /proc/uptime) - begun))\"
    block=$(head -c 16384 /dev/zero | tr '\\0' x)
    mkdir /tmp/pieces
    for each in $(seq 4000); do echo \"$block\" >/tmp/pieces/$each; done
    for each in $(seq 1 2 4000); do echo /tmp/pieces/$each; done | xargs rm
    until_pressed pieces
    rm -r /tmp/pieces
    head -c 100663296 /dev/zero >/tmp/large
    until_pressed large
    rm /tmp/large
    until_pressed reported
    printf second | dd of=/dev/pmem0 conv=notrunc,fsync 2>/dev/null
    kill -9 $feeder
    value unfed yes
    sleep 60
    value unbitten yes ;;
esac
";

/// A balloon's figure, in bytes.
fn metric(host: &Host, name: &str) -> Result<u64> {
    let said = host.run(&format!(
        "{CTL} metrics | sed -n 's/^busway_balloon_{name}{{[^}}]*}} //p'"
    ))?;
    said.trim()
        .parse()
        .with_context(|| format!("busway_balloon_{name}: {said:?}"))
}

/// The host's memory that the VMM has to itself, in bytes.
fn resident(host: &Host, pid: u32) -> Result<u64> {
    let said = host.run(&format!(
        "awk '/^RssAnon/ {{ print $2 }}' /proc/{pid}/status"
    ))?;
    Ok(said.trim().parse::<u64>()? << 10)
}

/// Waits until a balloon's figure compares so with `bytes`: `-ge`, or `-eq`.
fn wait_for(host: &Host, name: &str, compares: &str, bytes: u64) -> Result<()> {
    host.run(&format!(
        "for each in $(seq 300); do now=$({CTL} metrics | sed -n 's/^busway_balloon_{name}{{[^}}]*}} //p')\n\
         [ \"$now\" {compares} {bytes} ] && exit 0; sleep 0.1; done; echo \"{name} is $now\"; exit 1"
    ))
    .map(drop)
}

fn press(host: &Host) -> Result<()> {
    host.run(&format!("{CTL} power-button")).map(drop)
}

fn alone(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd))?;
    host.run("truncate -s 4M /run/pmem.raw")?;
    let run = guest()?
        .args(&["--balloon", "size=0,free_page_reporting=on"])
        .args(&["--rng", "bw_size=4096,bw_refill_time=1000"])
        .args(&["--pmem", "file=/run/pmem.raw", "--watchdog", "--pvpanic"])
        .args(&SOCKET)
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    gives_back(host, &running)?;
    press(host)?;
    running.wait_line("@@value unfed")?;
    running.wait_said("has not fed its watchdog")?;
    running.wait_line("@@value panics")?;
    running.wait_said("has panicked (pvpanic)")?;
    let result = running.finish()?.success()?;
    let (bytes, seconds) = (result.value("entropy")?, result.value("seconds")?);
    tell!("{bytes} bytes of entropy in {seconds} s");
    // Five times what comes in a second, of which the first is there at once.
    ensure!(
        bytes.trim() == "20480" && seconds.trim().parse::<u64>()? >= 3,
        "{bytes} bytes in {seconds} s"
    );
    for key in ["kept", "third"] {
        ensure!(result.value(key)?.trim() == "yes", "{key}");
    }
    ensure!(
        result.value("unbitten").is_err(),
        "the watchdog did not bite"
    );
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    let marker = host.run("head -c 6 /run/pmem.raw; rm /run/pmem.raw")?;
    ensure!(marker.trim() == "third:", "the file begins with {marker}");
    Ok(())
}

/// The host has back what goes into the balloon, and what is reported as free.
fn gives_back(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    running.wait_line("@@value pieces")?;
    let pid = running.pid()?;
    let before = resident(host, pid)?;
    host.run(&format!("{CTL} resize --balloon 96M"))?;
    wait_for(host, "given_bytes", "-ge", 90 * MIB)?;
    let inflated = resident(host, pid)?;
    tell!(
        "inflated: {} MiB, and {} before",
        inflated / MIB,
        before / MIB
    );
    ensure!(
        before.saturating_sub(inflated) >= 16 * MIB,
        "the host has {before} bytes less, and {inflated} with the balloon"
    );
    press(host)?;
    running.wait_line("@@value large")?;
    let (full, told) = (resident(host, pid)?, metric(host, "reported_bytes_total")?);
    press(host)?;
    // A third of it: what is freed lies in smaller pieces than are reported, too, and some stays with its processor.
    wait_for(host, "reported_bytes_total", "-ge", told + 32 * MIB)?;
    let reported = resident(host, pid)?;
    tell!(
        "reported: {} MiB, and {} before",
        reported / MIB,
        full / MIB
    );
    ensure!(
        full.saturating_sub(reported) >= 24 * MIB,
        "the host has {full} bytes less, and {reported} after they were reported"
    );
    Ok(())
}

/// Beside a drive by VFIO the balloon is inflated and deflated under checked I/O, and the host has none of it. A file on
/// tmpfs is pinned as RAM is, and is memory of the guest's as well.
fn beside_a_drive(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    host.run("truncate -s 4M /run/pinned.raw")?;
    let run = guest()?
        .device(&address)
        .args(&["--pmem", "file=/run/pinned.raw"])
        .args(&["--balloon", "size=0,free_page_reporting=on"])
        .args(&SOCKET)
        .script(
            "modprobe nd_pmem\n\
             for each in $(seq 100); do [ -b /dev/pmem0 ] && break; sleep 0.1; done\n\
             lab-io write /dev/pmem0 9 && value pinned \"$(lab-io verify /dev/pmem0 9)\"\n\
             value begun yes\n\
             value write_under \"$(lab-io write /dev/nvme0n1 7)\"\n\
             value verify_under \"$(lab-io verify /dev/nvme0n1 7)\"\n\
             until_pressed deflated\n\
             value write_after \"$(lab-io write /dev/nvme0n1 8)\"\n\
             value verify_after \"$(lab-io verify /dev/nvme0n1 8)\"\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value begun")?;
    let pid = running.pid()?;
    let before = resident(host, pid)?;
    for size in ["128M", "0", "192M"] {
        host.run(&format!("{CTL} resize --balloon {size}"))?;
    }
    wait_for(host, "actual_bytes", "-ge", 180 * MIB)?;
    let inflated = resident(host, pid)?;
    tell!(
        "inflated: {} MiB, and {} before",
        inflated / MIB,
        before / MIB
    );
    ensure!(
        before.abs_diff(inflated) < 8 * MIB,
        "the host has {before} bytes less, and {inflated} with the balloon"
    );
    for (name, expected) in [
        ("given_bytes", 0),
        ("reported_bytes_total", 0),
        ("inhibited", 1),
    ] {
        let value = metric(host, name)?;
        ensure!(value == expected, "{name} is {value}");
    }
    host.run(&format!("{CTL} resize --balloon 0"))?;
    wait_for(host, "actual_bytes", "-eq", 0)?;
    running.wait_line("@@value deflated")?;
    press(host)?;
    // `lab-io` ends with an error where what it reads is not what was written.
    let result = running.finish()?.success()?;
    for key in [
        "pinned",
        "write_under",
        "verify_under",
        "write_after",
        "verify_after",
    ] {
        result.value(key)?;
    }
    host.run("rm /run/pinned.raw")?;
    ensure!(
        result.stderr.contains("stays with the VM"),
        "nothing was said of it:\n{}",
        result.stderr
    );
    Ok(())
}

/// MiB that the guest has, and that its balloon is to have.
const RAM: u64 = 512;
const BALLOON: u64 = 256;

/// Bytes that the drive reaches.
fn reached(host: &Host) -> Result<u64> {
    let devices: Value = serde_json::from_str(&host.run(&format!("{CTL} devices --json"))?)?;
    let mut all = devices["devices"].as_array().into_iter().flatten();
    let drive = all.find(|one| one["kind"] == "assigned");
    let bytes = drive.and_then(|drive| drive["dma"]["bytes"].as_u64());
    bytes.with_context(|| format!("no drive in {devices}"))
}

/// Waits until what the drive reaches is RAM without what is unmapped, which is between `least` and `most` MiB; gives that in
/// bytes.
fn settled(host: &Host, least: u64, most: u64) -> Result<u64> {
    let began = Instant::now();
    loop {
        let (unmapped, bytes) = (metric(host, "unmapped_bytes")?, reached(host)?);
        let fits = unmapped + bytes == RAM * MIB;
        if fits && (least * MIB..=most * MIB).contains(&unmapped) {
            return Ok(unmapped);
        }
        if began.elapsed() > Duration::from_secs(90) {
            bail!("{unmapped} bytes are unmapped, and the drive reaches {bytes}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// With `vfio=remap` the host has back the blocks that the balloon has whole, while the drive is written to and read back all
/// the time; what the drive reaches is all but those, and all again when the balloon is empty.
fn remapped(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let run = guest()?
        .memory_mib(RAM)
        .device(&address)
        .args(&["--balloon", "size=0,vfio=remap", "--platform", "p2p=off"])
        .args(&SOCKET)
        .limit(Duration::from_secs(300))
        .script(
            "(seed=0; while [ ! -e /tmp/still ]; do seed=$((seed + 1))\n\
             lab-io write /dev/nvme0n1 $seed && lab-io verify /dev/nvme0n1 $seed || echo $seed >>/tmp/bad\n\
             echo $seed >/tmp/passes; done) >/dev/null 2>>/tmp/said & io=$!\n\
             until [ -e /tmp/passes ]; do sleep 0.1; done\n\
             value begun yes\n\
             until_pressed inflating\n\
             until_pressed deflated\n\
             : >/tmp/still; wait $io\n\
             value passes \"$(cat /tmp/passes)\"\n\
             value bad \"$(cat /tmp/bad /tmp/said 2>/dev/null | head -n 5)\"\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value begun")?;
    running.wait_line("@@value inflating")?;
    let pid = running.pid()?;
    settled(host, 0, 0)?;
    let before = resident(host, pid)?;
    for round in 1..=3 {
        host.run(&format!("{CTL} resize --balloon {BALLOON}M"))?;
        wait_for(host, "actual_bytes", "-ge", BALLOON * MIB)?;
        // Some of its pages lie in blocks that the guest has pages of as well.
        let unmapped = settled(host, BALLOON / 2, BALLOON)?;
        let inflated = resident(host, pid)?;
        tell!(
            "round {round}: {} MiB unmapped, resident {} MiB, and {} before",
            unmapped / MIB,
            inflated / MIB,
            before / MIB
        );
        ensure!(
            before.saturating_sub(inflated) >= unmapped * 3 / 4,
            "the host has {before} bytes less, and {inflated} with {unmapped} unmapped"
        );
        ensure!(metric(host, "inhibited")? == 0);
        host.run(&format!("{CTL} resize --balloon 0"))?;
        wait_for(host, "actual_bytes", "-eq", 0)?;
        settled(host, 0, 0)?;
    }
    ensure!(metric(host, "remap_failures_total")? == 0);
    press(host)?;
    running.wait_line("@@value deflated")?;
    press(host)?;
    let result = running.finish()?.success()?;
    tell!("{} passes", result.value("passes")?);
    let bad = result.value("bad")?.trim();
    ensure!(bad.is_empty(), "data was lost: {bad}");
    give_back(host, &address, "nvme")
}
