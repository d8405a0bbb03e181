//! Guests of a host with two NUMA nodes, a drive on each.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestResult, GuestRun, Host, HostConfig, Kernel, Lab, Parts};

use crate::assigned::{Interface, give_back, guest};
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new("placement_follows_the_devices_nodes", placement)];

/// MiB of a guest, half of them on each node where it is on both.
const RAM: u64 = 512;
/// What a node's kernel keeps of its memory for itself at most, in MiB: the guest's own node says less than it was given.
const KEPT: u64 = 200;
/// How far the host's nodes are from each other.
const DISTANCE: &str = "24";

pub(crate) fn host() -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .cpus(4)
        .numa_nodes(2)
        .device(Device::nvme("nv0", 64).on_node(0))
        .device(Device::nvme("nv1", 64).on_node(1))
}

/// What a guest says of its nodes: which there are, what each has, and where its drives are. It uses its first drive.
const LOOK: &str = "\
value nodes \"$(cat /sys/devices/system/node/online)\"
for node in 0 1; do
folder=/sys/devices/system/node/node$node; [ -d $folder ] || continue
value memory$node \"$(awk '/MemTotal/ { print $4 }' $folder/meminfo)\"
value cpus$node \"$(cat $folder/cpulist)\"
value distance$node \"$(cat $folder/distance)\"
done
value drives \"$(cat /sys/class/nvme/nvme*/device/numa_node | sort | tr '\\n' ' ')\"
lab-io write /dev/nvme0n1 7 && lab-io verify /dev/nvme0n1 7
value ready yes
until_pressed waiting
dmesg | grep -iE 'numa|srat|slit|node' | tail -n 40 | block log
";

/// Pages of 4 KiB of a VMM's that are bound to each of the host's nodes, and on which they are, as numa_maps has it: bound
/// to node, on node, pages.
fn bound(host: &Host) -> Result<Vec<(u32, u32, u64)>> {
    let maps = host.run("cat /proc/$(pidof busway)/numa_maps")?;
    let mut all = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(node) = words.nth(1).and_then(|word| word.strip_prefix("bind:")) else {
            continue;
        };
        let node: u32 = node.parse().with_context(|| format!("bound to {node}"))?;
        for word in words {
            let Some((on, pages)) = word.strip_prefix('N').and_then(|word| word.split_once('='))
            else {
                continue;
            };
            all.push((node, on.parse()?, pages.parse()?));
        }
    }
    Ok(all)
}

/// Runs a guest until it has looked; `here` is done while it runs.
fn look(host: &Host, run: GuestRun, here: impl FnOnce(&Host) -> Result<()>) -> Result<GuestResult> {
    let [_, way] = Interface::Group.arguments();
    let run = run
        .cpus(2)
        .memory_mib(RAM)
        .args(&["--platform", way])
        .args(&SOCKET)
        .limit(Duration::from_secs(400))
        .script(LOOK);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    here(host)?;
    running.wait_line("@@value waiting")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("{}", result.block("log")?);
    Ok(result)
}

/// That RAM is on the host's nodes as it is bound, so many MiB on each.
pub(crate) fn is_on(host: &Host, mib: [u64; 2]) -> Result<()> {
    let all = bound(host)?;
    tell!("bound to node, on node, pages: {all:?}");
    for (bound, on, _) in &all {
        ensure!(bound == on, "bound to {bound} and on {on}: {all:?}");
    }
    for (node, mib) in (0..).zip(mib) {
        let pages = all.iter().filter(|(_, on, _)| *on == node);
        let pages: u64 = pages.map(|(.., pages)| pages).sum();
        ensure!(
            pages == mib << 8,
            "node {node} has {pages} pages and not {mib} MiB: {all:?}"
        );
    }
    Ok(())
}

/// The host's processors that each vCPU's thread may use.
fn processors(host: &Host) -> Result<Vec<String>> {
    let said = host.run(
        "for one in 0 1; do for task in /proc/$(pidof busway)/task/*; do\n\
         [ \"$(cat $task/comm)\" != vcpu$one ] || awk '/^Cpus_allowed_list/ { print $2 }' $task/status\n\
         done; done",
    )?;
    Ok(said.lines().map(str::to_owned).collect())
}

/// That a guest's nodes are as it was told: MiB, processors and distances of each, and the node of each drive.
fn has(result: &GuestResult, nodes: &[(u64, &str, &str)], drives: &str) -> Result<()> {
    let online = if nodes.len() == 1 { "0" } else { "0-1" };
    ensure!(
        result.value("nodes")?.trim() == online,
        "{}",
        result.value("nodes")?
    );
    for (node, (mib, cpus, distance)) in nodes.iter().enumerate() {
        let said = |what: &str| result.value(&format!("{what}{node}")).map(str::trim);
        let kib: u64 = said("memory")?.parse()?;
        let range = (mib - KEPT.min(*mib)) << 10..=mib << 10;
        ensure!(
            range.contains(&kib),
            "node {node} has {kib} KiB of {mib} MiB"
        );
        ensure!(said("cpus")? == *cpus, "node {node}: {}", said("cpus")?);
        ensure!(
            said("distance")? == *distance,
            "node {node}: {}",
            said("distance")?
        );
    }
    ensure!(
        result.value("drives")?.trim() == drives,
        "{}",
        result.value("drives")?
    );
    Ok(())
}

/// What was said of zones and nodes is so in the guest and on the host; and what the devices say is, where they are to.
fn placement(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host())?;
    let [first, second] = ["nv0", "nv1"].map(|id| host.address(id));
    let (first, second) = (first?, second?);
    for (address, node) in [(&first, "0"), (&second, "1")] {
        let said = host.run(&format!("cat /sys/bus/pci/devices/{address}/numa_node"))?;
        ensure!(said.trim() == node, "{address} is on {said}");
        host.run(&format!("busway device bind {address}"))?;
    }
    let half = RAM / 2;
    let distances = [format!("10 {DISTANCE}"), format!("{DISTANCE} 10")];
    let [near, far] = [&*distances[0], &*distances[1]];

    // By flags, with the guest's nodes the other way round than the host's.
    let zones = [
        format!("id=a,size={half}M,host_numa_node=1"),
        format!("id=b,size={half}M,host_numa_node=0"),
    ];
    let there =
        format!("guest_numa_id=0,cpus=0,memory_zones=a,pci_segments=0,distances=1@{DISTANCE}");
    let run = guest()?
        .args(&["--cpus", "affinity=[0@[2-3],1@[0-1]]"])
        .args(&["--memory-zone", &zones[0], &zones[1]])
        .args(&["--numa", &there, "guest_numa_id=1,cpus=1,memory_zones=b"])
        .device(&second);
    let said = look(host, run, |host| {
        is_on(host, [half, half])?;
        let processors = processors(host)?;
        ensure!(processors == ["2-3", "0-1"], "{processors:?}");
        Ok(())
    })?;
    has(&said, &[(half, "0", near), (half, "1", far)], "0")?;

    // By the devices: those of one node, and those of both.
    let run = guest()?.args(&["--place", "auto"]).device(&second);
    let said = look(host, run, |host| {
        is_on(host, [0, RAM])?;
        let processors = processors(host)?;
        ensure!(processors == ["2-3", "2-3"], "{processors:?}");
        Ok(())
    })?;
    has(&said, &[(RAM, "0-1", "10")], "0")?;
    let placement = &said.report.as_ref().context("a report")?["placement"];
    ensure!(
        placement[0]["host"] == 1 && placement[0]["devices"][0] == second.as_str(),
        "{placement}"
    );
    let run = guest()?
        .args(&["--place", "auto"])
        .device(&first)
        .device(&second);
    let said = look(host, run, |host| {
        is_on(host, [half, half])?;
        let processors = processors(host)?;
        ensure!(processors == ["0-1", "2-3"], "{processors:?}");
        Ok(())
    })?;
    // Each node has a segment, with its drive.
    has(&said, &[(half, "0", near), (half, "1", far)], "0 1")?;

    // What is on the other node is warned of, and a node that is not there refused.
    let file = format!(
        "kernel = \"k\"\ndevice = \"{second}\"\n[[memory-zone]]\nid = \"a\"\nsize = \"{RAM}M\"\nhost_numa_node = 0\n"
    );
    host.run(&format!("cat >/run/far.toml <<'END'\n{file}END"))?;
    let said = host.run("busway device check --config /run/far.toml || true")?;
    ensure!(
        said.contains("NUMA node 1") && said.contains("its RAM on node 0"),
        "{said}"
    );
    let kernel = Parts::inside("vmlinux");
    let said = host.run(&format!(
        "busway run --kernel {kernel} --memory-zone id=a,size={RAM}M,host_numa_node=7 2>&1 || echo status $?"
    ))?;
    ensure!(
        said.contains("no NUMA node 7 with memory, only 0, 1") && said.contains("status 3"),
        "{said}"
    );
    give_back(host, &first, "nvme")?;
    give_back(host, &second, "nvme")
}
