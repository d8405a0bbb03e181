//! RAM that comes to each of a guest's NUMA nodes by itself, on a host with two of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{Host, Lab};
use serde_json::Value;

use crate::assigned::{Interface, give_back, guest};
use crate::hotplug::{CTL, SOCKET};
use crate::nodes::{host, is_on};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "zones_grow_and_shrink_each_by_itself_on_its_own_node_under_a_drives_io",
        under_io,
    ),
    Proof::soak(
        "zones_of_huge_pages_take_them_of_their_own_node_and_of_no_other",
        |lab, _| of_huge_pages(lab),
    ),
];

const MIB: u64 = 1 << 20;
/// MiB that each zone starts with: `a` is the host's node 0 and the guest's, `b` is node 1.
const FIRST: u64 = 256;
/// MiB that can come to each.
const MORE: u64 = 512;
/// MiB of it that come to `a`.
const SOME: u64 = 128;
/// MiB of a block.
const BLOCK: u64 = 2;
/// MiB of what comes to a node that its kernel does not count as its own at most.
const KEPT: u64 = 16;

/// What a drive's devices reach, and what each zone has plugged, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reach {
    mappings: u64,
    bytes: u64,
    plugged: [u64; 2],
}

fn asked(host: &Host, verb: &str) -> Result<Value> {
    let said = host.run(&format!("{CTL} {verb} --json"))?;
    Ok(serde_json::from_str(&said)?)
}

fn reach(host: &Host) -> Result<Reach> {
    let devices = asked(host, "devices")?;
    let all = devices["devices"].as_array().context("devices")?;
    let number = |value: &Value| value.as_u64().context("a number");
    let plugged = |id: &str| {
        let device = all.iter().find(|one| one["id"] == id).context("a device")?;
        number(&device["counters"]["plugged_bytes"])
    };
    let drive = all.iter().find(|one| one["kind"] == "assigned");
    let of_drive = |key: &str| drive.map_or(Ok(0), |drive| number(&drive["dma"][key]));
    Ok(Reach {
        mappings: of_drive("mappings")?,
        bytes: of_drive("bytes")?,
        plugged: [plugged("__memory-a")?, plugged("__memory-b")?],
    })
}

/// Waits until the guest has so many MiB plugged of each zone.
fn wait_plugged(host: &Host, mib: [u64; 2]) -> Result<Reach> {
    let began = Instant::now();
    loop {
        let reach = reach(host)?;
        if reach.plugged == mib.map(|mib| mib * MIB) {
            return Ok(reach);
        }
        if began.elapsed() > Duration::from_secs(120) {
            bail!("{mib:?} MiB are wanted, and there is {reach:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The same of a guest with a drive, whose devices reach what it started with and what is plugged, block by block.
fn wait_reached(host: &Host, before: Reach, mib: [u64; 2]) -> Result<()> {
    let more: u64 = mib.iter().sum();
    let expected = Reach {
        mappings: before.mappings + more / BLOCK,
        bytes: before.bytes + more * MIB,
        plugged: mib.map(|mib| mib * MIB),
    };
    let now = wait_plugged(host, mib)?;
    ensure!(now == expected, "{now:?} and not {expected:?}");
    // All of it is pinned, so that all of it is there.
    is_on(host, mib.map(|mib| FIRST + mib))?;
    let info = asked(host, "info")?;
    ensure!(
        info["memory_actual_size"] == (2 * FIRST + more) * MIB,
        "{info}"
    );
    let memory = &info["config"]["memory"];
    ensure!(memory["size"] == 2 * FIRST * MIB, "{memory}");
    for (at, mib) in mib.iter().enumerate() {
        let zone = &memory["zones"][at];
        ensure!(zone["actual_size"] == (FIRST + mib) * MIB, "{zone}");
    }
    Ok(())
}

fn resize(host: &Host, zone: &str, mib: u64) -> Result<String> {
    host.run(&format!("{CTL} resize-zone {zone} {mib}M"))
}

/// KiB of the guest's nodes that a line of its script says.
fn nodes(line: &str) -> Result<[u64; 2]> {
    let mut words = line.split_ascii_whitespace().rev();
    let mut next = || -> Result<u64> { Ok(words.next().context("a node")?.parse()?) };
    let second = next()?;
    Ok([next()?, second])
}

/// That what the guest counts as its nodes' has grown by so many MiB.
fn grown(first: [u64; 2], now: [u64; 2], mib: [u64; 2]) -> Result<()> {
    for node in 0..2 {
        let grown = now[node].saturating_sub(first[node]);
        let range = mib[node].saturating_sub(KEPT) << 10..=mib[node] << 10;
        ensure!(
            range.contains(&grown),
            "node {node} has {now:?} KiB, had {first:?}, and was given {mib:?} MiB"
        );
    }
    Ok(())
}

/// The zones and nodes of both trials; `b` is `made` as is said besides.
fn arguments(made: &str) -> Vec<String> {
    let zone = |id: &str, node: u64, made: &str| {
        format!("id={id},size={FIRST}M,host_numa_node={node},hotplug_size={MORE}M{made}")
    };
    let all = [
        "--memory",
        "hotplug_method=virtio-mem",
        "--memory-zone",
        &zone("a", 0, ""),
        &zone("b", 1, made),
        "--numa",
        "guest_numa_id=0,cpus=0,memory_zones=a",
        "guest_numa_id=1,cpus=1,memory_zones=b",
    ];
    all.map(str::to_owned).to_vec()
}

/// A guest of two nodes is given memory of the second, and of the first, and gives both back, while its drive is written to
/// and read back all the time, by buffers in what was plugged as well. Each node's memory grows by what its zone does, on its
/// own node of the host's, and what the drive reaches is what is plugged. After a restart the guest has what it was to have.
fn under_io(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host())?;
    let address = host.address("nv1")?;
    host.run(&format!("busway device bind {address}"))?;
    let [_, way] = Interface::Group.arguments();
    let arguments = arguments("");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // KiB of what has come when all of it has, for a kernel that keeps a little of it.
    let (all, some) = ((MORE - KEPT) << 10, (SOME - KEPT) << 10);
    let again = (FIRST + MORE / 2) << 10;
    let run = guest()?
        .cpus(2)
        .memory_mib(2 * FIRST)
        .cmdline("memhp_default_state=online_movable")
        .args(&arguments)
        .args(&["--platform", &format!("{way},p2p=off")])
        .args(&SOCKET)
        .device(&address)
        .limit(Duration::from_secs(500))
        .script(&format!(
            "total() {{ awk '/MemTotal/ {{ print $4 }}' /sys/devices/system/node/node$1/meminfo; }}\n\
             both() {{ echo \"$(total 0) $(total 1)\"; }}\n\
             io() {{ taskset 2 lab-io \"$@\"; }}\n\
             until [ -b /dev/nvme0n1 ]; do sleep 0.1; done\n\
             if io verify /dev/nvme0n1 77 >/dev/null 2>&1; then\n\
             until [ \"$(total 1)\" -gt {again} ]; do sleep 0.1; done\n\
             io verify /dev/nvme0n1 77 high && value again \"$(both)\"\n\
             else\n\
             (seed=100; while [ ! -e /tmp/still ]; do seed=$((seed + 1)); place=$(cat /tmp/place 2>/dev/null || true)\n\
             io write /dev/nvme0n1 $seed $place && io verify /dev/nvme0n1 $seed $place ||\n\
             echo \"$seed $place\" >>/tmp/bad\n\
             echo \"$seed $place\" >/tmp/passes; done) >/dev/null 2>>/tmp/said & io=$!\n\
             passed() {{ seen=$(cut -d ' ' -f 1 /tmp/passes); until [ \"$(cut -d ' ' -f 1 /tmp/passes)\" -gt $((seen + 1)) ]; do sleep 0.1; done; }}\n\
             until [ -e /tmp/passes ]; do sleep 0.1; done\n\
             zero=$(total 0); one=$(total 1)\n\
             value ready \"$zero $one\"\n\
             until [ \"$(total 1)\" -ge $((one + {all})) ]; do sleep 0.1; done\n\
             value plugged \"$(both)\"\n\
             echo high >/tmp/place; passed\n\
             value used \"$(both)\"\n\
             until [ \"$(total 0)\" -ge $((zero + {some})) ]; do sleep 0.1; done\n\
             value more \"$(both)\"\n\
             echo >/tmp/place; passed\n\
             value rests \"$(both)\"\n\
             until [ \"$(total 0)\" -le \"$zero\" ] && [ \"$(total 1)\" -le \"$one\" ]; do sleep 0.1; done\n\
             value left \"$(both)\"\n\
             : >/tmp/still; wait $io\n\
             value bad \"$(cat /tmp/bad /tmp/said 2>/dev/null | head -n 5)\"\n\
             io write /dev/nvme0n1 77\n\
             value restarts yes\n\
             until [ \"$(total 1)\" -ge $((one + {all})) ]; do sleep 0.1; done\n\
             dmesg | grep -iE 'virtio_mem|nvme|error' | tail -n 40 | block log\n\
             reboot -f\n\
             fi\n\
             until_pressed waiting\n",
        ));
    let running = host.start_guest(&run)?;
    let first = nodes(&running.wait_line("@@value ready ")?)?;
    let before = reach(host)?;
    ensure!(
        before.bytes == 2 * FIRST * MIB && before.plugged == [0, 0],
        "{before:?}"
    );
    is_on(host, [FIRST, FIRST])?;
    for (order, words) in [
        (format!("resize-zone c {FIRST}M"), "only `a`, `b`"),
        (
            format!("resize-zone b {}M", FIRST + MORE + BLOCK),
            "268435456 to 805306368",
        ),
        (
            format!("resize --memory {}M", 2 * FIRST + MORE),
            "resize-zone",
        ),
    ] {
        let refused = host.run(&format!("{CTL} {order} 2>&1 || true"))?;
        ensure!(refused.contains(words), "{order}: {refused}");
    }
    let began = Instant::now();
    resize(host, "b", FIRST + MORE)?;
    let now = nodes(&running.wait_line("@@value plugged ")?)?;
    grown(first, now, [0, MORE])?;
    wait_reached(host, before, [0, MORE])?;
    tell!(
        "{MORE} MiB came to node 1 in {:.1?}: {first:?} {now:?}",
        began.elapsed()
    );
    running.wait_line("@@value used ")?;
    resize(host, "a", FIRST + SOME)?;
    let now = nodes(&running.wait_line("@@value more ")?)?;
    grown(first, now, [SOME, MORE])?;
    wait_reached(host, before, [SOME, MORE])?;
    running.wait_line("@@value rests ")?;
    resize(host, "b", FIRST)?;
    resize(host, "a", FIRST)?;
    let now = nodes(&running.wait_line("@@value left ")?)?;
    ensure!(now == first, "{now:?} and not {first:?}");
    wait_reached(host, before, [0, 0])?;
    running.wait_line("@@value restarts ")?;
    resize(host, "b", FIRST + MORE)?;
    running.wait_line("@@value again ")?;
    let after = wait_plugged(host, [0, MORE])?;
    ensure!(
        after.bytes == before.bytes + MORE * MIB,
        "after the restart: {after:?}"
    );
    is_on(host, [FIRST, FIRST + MORE])?;
    running.wait_line("@@value waiting")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("{}", result.block("log")?);
    let bad = result.value("bad")?.trim();
    ensure!(bad.is_empty(), "data was lost: {bad}");
    give_back(host, &address, "nvme")
}

/// Where a node of the host's says how many huge pages of 2 MiB it has.
fn pool(node: u32) -> String {
    format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB")
}

/// Has a node of the host's have so many MiB of huge pages.
fn set_pool(host: &Host, node: u32, mib: u64) -> Result<()> {
    let (pages, pool) = (mib / BLOCK, pool(node));
    let has = host.run(&format!(
        "echo {pages} >{pool}/nr_hugepages; cat {pool}/nr_hugepages"
    ))?;
    ensure!(has.trim() == pages.to_string(), "{pages} pages: {has}");
    Ok(())
}

/// MiB of huge pages of each node that nobody has taken.
fn free(host: &Host) -> Result<[u64; 2]> {
    let free = |node| -> Result<u64> {
        let free = host.run(&format!("cat {}/free_hugepages", pool(node)))?;
        Ok(free.trim().parse::<u64>()? * BLOCK)
    };
    Ok([free(0)?, free(1)?])
}

/// A guest is given huge pages of its second zone, of which the host's node has fewer than it is to have, and the other node
/// has more. It gets what its own node has, and the rest when that has more; what it gives back is that node's again.
fn of_huge_pages(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host())?;
    set_pool(host, 0, MORE)?;
    set_pool(host, 1, FIRST + SOME)?;
    let arguments = arguments(",hugepages=on,hugepage_size=2M");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let run = guest()?
        .cpus(2)
        .memory_mib(2 * FIRST)
        .cmdline("memhp_default_state=online_movable")
        .args(&arguments)
        .args(&SOCKET)
        .limit(Duration::from_secs(400))
        .script(
            "until_pressed waiting\n\
             dmesg | grep -iE 'virtio_mem|error' | tail -n 40 | block log\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value waiting")?;
    ensure!(
        free(host)? == [MORE, SOME],
        "{:?} MiB are free",
        free(host)?
    );
    resize(host, "b", FIRST + 2 * SOME)?;
    wait_plugged(host, [0, SOME])?;
    ensure!(free(host)? == [MORE, 0], "{:?} MiB are free", free(host)?);
    set_pool(host, 1, FIRST + 2 * SOME)?;
    // A guest that was told to try again later does so when it hears of another size.
    resize(host, "b", FIRST + SOME)?;
    resize(host, "b", FIRST + 2 * SOME)?;
    wait_plugged(host, [0, 2 * SOME])?;
    ensure!(free(host)? == [MORE, 0], "{:?} MiB are free", free(host)?);
    resize(host, "b", FIRST)?;
    wait_plugged(host, [0, 0])?;
    ensure!(
        free(host)? == [MORE, 2 * SOME],
        "{:?} MiB are free",
        free(host)?
    );
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("{}", result.block("log")?);
    set_pool(host, 0, 0)?;
    set_pool(host, 1, 0)
}
