//! What a VM with everything opens while its guest runs, by a trace of the calls: docs/security.md has the list.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, Job, Lab};

use crate::assigned::{give_back, guest, zoo};
use crate::opened::{STRACE, Table, since_the_guest_began};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::soak(
        "traced_a_vm_with_everything_opens_nothing_but_what_is_listed_by_group",
        |lab, _| opened(lab, "iommufd=off"),
    ),
    Proof::soak(
        "traced_a_vm_with_everything_opens_nothing_but_what_is_listed_by_cdev",
        |lab, _| opened(lab, "iommufd=on,p2p=off"),
    ),
];

const CTL: &str = "busway ctl --api-socket /run/traced/vm/api";

/// What is this VM's own: images beside each other, its sockets and files, and those of its back ends.
const OWN: &[&str] = &[
    "/run/traced/images/*",
    "/run/traced/vm/*",
    "/run/traced/fs.sock",
    "/run/traced/tpm.sock",
    "/lab/jobs/*/report.json*",
];

/// Each device that there is at the beginning is used in both lives, and what comes is used once.
const SCRIPT: &str = r#"
modprobe -aq virtio_blk virtio_net nvme e1000e vmw_vsock_virtio_transport
nics() { ls -d /sys/class/net/eth* | wc -l; }
mkdir -p /mnt && mount -t virtiofs share /mnt
life=$(cat /mnt/life)
for each in /sys/class/net/eth*; do ip link set ${each##*/} up; done
value "wrote_$life" "$(lab-io write /dev/vda 1) $(lab-io verify /dev/vda 1)"
for each in $(seq 100); do [ ! -e /sys/class/tpm/tpm0/tpm_version_major ] || break; sleep 0.1; done
value "tpm_$life" "$(cat /sys/class/tpm/tpm0/tpm_version_major)"
socat -t 60 VSOCK-LISTEN:5,fork,reuseaddr SYSTEM:sha256sum &
value "asked_$life" "$(echo hello | socat -t 60 - VSOCK-CONNECT:2:6 | cut -c 1-8)"
echo "in the $life life" >/dev/hvc0
before=$(nics)
value "ready_$life" yes
if [ "$life" = first ]; then
    until [ -b /dev/vdb ] && [ -b /dev/nvme0n1 ] && [ $(nics) -gt $before ]; do sleep 0.1; done
    value hot "$(lab-io write /dev/vdb 2) $(lab-io write /dev/nvme0n1 3)"
    while [ -b /dev/vdb ] || [ -b /dev/nvme0n1 ]; do sleep 0.1; done
    value gone yes
    echo second >/mnt/life
    until_pressed restarting
    reboot -f
fi
until_pressed ending
"#;

/// Starts what serves the VM's folder and its TPM, and what its guest talks to.
fn servers(host: &Host) -> Result<Vec<Job>> {
    let jobs = [
        "exec /usr/libexec/virtiofsd --socket-path=/run/traced/fs.sock --shared-dir=/run/traced/shared",
        "exec swtpm socket --tpm2 --tpmstate dir=/run/traced/tpm --ctrl type=unixio,path=/run/traced/tpm.sock",
        "exec socat -t 60 UNIX-LISTEN:/run/traced/vm/vsock_6,fork SYSTEM:sha256sum",
    ];
    let jobs = jobs.into_iter().map(|script| host.spawn(script));
    let jobs = jobs.collect::<Result<_>>()?;
    host.run(
        "for each in fs.sock tpm.sock vm/vsock_6; do\n\
         for time in $(seq 500); do [ ! -S /run/traced/$each ] || continue 2; sleep 0.02; done; exit 1\n\
         done",
    )?;
    Ok(jobs)
}

fn opened(lab: &mut Lab, iommu: &str) -> Result<()> {
    let host = lab.host(&zoo())?;
    let (drive, nic) = (host.address("nv0")?, host.address("nic0")?);
    host.run(&format!(
        "busway device bind {drive} {nic}\n\
         rm -rf /run/traced; mkdir -p /run/traced/vm /run/traced/images /run/traced/shared /run/traced/tpm\n\
         echo first >/run/traced/shared/life\n\
         truncate -s 4M /run/traced/images/base.raw /run/traced/images/hot.raw\n\
         ip tuntap add dev traced mode tap; ip tuntap add dev traced-hot mode tap"
    ))?;
    let servers = servers(host)?;
    let opener = format!("exec {} /run/traced/trace \"$@\"", STRACE.join(" "));
    let run = guest()?
        .cpus(2)
        .programs()
        .device(&nic)
        .opened_by(&opener)
        .args(&["--landlock", "true", "--memory", "shared=on"])
        .args(&["--disk", "path=/run/traced/images/base.raw"])
        .args(&["--net", "tap=traced"])
        .args(&["--fs", "tag=share,socket=/run/traced/fs.sock"])
        .args(&["--tpm", "socket=/run/traced/tpm.sock"])
        .args(&["--vsock", "cid=7,socket=/run/traced/vm/vsock"])
        .args(&["--console", "file=/run/traced/vm/console"])
        .args(&[
            "--platform",
            &format!("hotplug_slots=2,hotplug_mmio64=64M,{iommu}"),
        ])
        .args(&["--api-socket", "/run/traced/vm/api"])
        .limit(Duration::from_secs(400))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready_first")?;
    into_the_guest(host)?;
    host.run(&format!(
        "{CTL} add-disk /run/traced/images/hot.raw --id hot && {CTL} add-net traced-hot && {CTL} add-device {drive}"
    ))?;
    running.wait_line("@@value hot")?;
    // All that clients ask for by reading: what devices have counted, what threads have used, what the host has.
    host.run(&format!(
        "{CTL} pause && {CTL} resume && {CTL} info && {CTL} devices && {CTL} top --once && {CTL} --json devices"
    ))?;
    host.run(&format!(
        "{CTL} remove-device hot && {CTL} remove-device {drive}"
    ))?;
    running.wait_line("@@value restarting")?;
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value ready_second")?;
    into_the_guest(host)?;
    running.wait_line("@@value ending")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    for life in ["first", "second"] {
        let tpm = result.value(&format!("tpm_{life}"))?;
        ensure!(tpm == "2", "{life}: TPM {tpm:?}: {}", result.stderr);
        let asked = result.value(&format!("asked_{life}"))?;
        // The sum of "hello\n".
        ensure!(asked == "5891b5b5", "{life}: {asked}");
    }
    let console = host.run("cat /run/traced/vm/console")?;
    ensure!(console.contains("in the second life"), "{console}");
    judge(&host.run("cat /run/traced/trace")?)?;
    drop(servers);
    host.run("ip link del traced; ip link del traced-hot; rm -r /run/traced")?;
    give_back(host, &drive, "nvme")?;
    give_back(host, &nic, "e1000e")
}

/// A connection from the host to the guest's port 5.
fn into_the_guest(host: &Host) -> Result<()> {
    let said = host.run(
        "{ printf 'CONNECT 5\\n'; sleep 0.2; printf 'hello\\n'; } | socat -t 60 - UNIX-CONNECT:/run/traced/vm/vsock",
    )?;
    ensure!(said.contains("5891b5b5"), "{said}");
    Ok(())
}

/// Nothing was asked for that is not listed.
fn judge(trace: &str) -> Result<()> {
    let asked =
        since_the_guest_began(trace).context("the trace does not say when the guest began")?;
    let table = Table::read();
    for one in &asked {
        tell!("{} {} {}", one.thread, one.call, one.path);
    }
    // It was traced, and what was plugged was opened.
    for path in ["/run/traced/images/hot.raw", "/dev/net/tun"] {
        let there = asked.iter().any(|one| one.path == path);
        ensure!(there, "{path} was not opened");
    }
    let other: Vec<_> = asked
        .iter()
        .filter(|one| !table.has(&one.path, OWN))
        .collect();
    ensure!(
        other.is_empty(),
        "docs/security.md does not list {other:#?}"
    );
    Ok(())
}
