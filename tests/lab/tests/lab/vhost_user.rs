//! Devices that other processes of the host serve: a shared folder by Debian's virtiofsd, and a disk by
//! qemu-storage-daemon.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, HostConfig, Job, Kernel, Lab, RunningGuest};

use crate::assigned::{guest, word};
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "vhost_user_a_folder_and_a_disk_survive_pauses_a_restart_and_the_disks_back_end_that_is_killed",
    served,
)];

/// What the guest does in its first life and in its second, which it tells apart by what it finds in the folder. In the
/// folder files are written, read back with checksums, renamed, linked and removed meanwhile. On the disk requests
/// are on their way when its back end is killed.
const SCRIPT: &str = "\
mkdir -p /mnt && mount -t virtiofs share /mnt && cd /mnt
fs=\"--directory=/mnt/fio --nrfiles=8 --rw=randrw --bs=4k --size=1M --verify=crc32c --verify_fatal=1\"
disk=\"--filename=/dev/vda --rw=randwrite --bs=4k --size=4M --direct=1 --ioengine=libaio --iodepth=8 \
--verify=crc32c --verify_fatal=1 --randseed=7\"
if [ -e second ]; then
    value kept \"$(md5sum -c -s sums && fio --name=disk $disk --verify_only --output=/tmp/fio >/dev/null && echo yes)\"
    until_pressed again
    mkdir -p /more && mount -t virtiofs more /more && echo hot >/more/said && umount /more
    value hot yes
    until_pressed removed
    value tags \"$(cat /sys/fs/virtiofs/*/tag | sort | tr '\\n' ' ')\"
else
    mkdir -p fio
    value begun yes
    fio --name=files $fs --output=/tmp/fio && value files done
    for n in $(seq 60); do
        mkdir -p churn/$n; echo $n >churn/$n/a; mv churn/$n/a churn/$n/b; ln churn/$n/b churn/$n/c
        ln -s b churn/$n/s; cat churn/$n/s >>churn/all; rm churn/$n/c
        [ $((n % 3)) != 0 ] || rm -r churn/$n
    done
    find . -type f ! -name sums | sort | xargs md5sum >sums
    value churned \"$(ls churn | wc -l) $(wc -l <churn/all)\"
    value writing yes
    fio --name=disk $disk --do_verify=1 --rate_iops=2000,150 --output=/tmp/fio && value disk done || value disk failed
    cat /tmp/fio | block fio
    touch second; sync; cd /; umount /mnt
    reboot -f
fi
";

fn start_folder(host: &Host, name: &str) -> Result<Job> {
    host.spawn(&format!(
        "mkdir -p /run/{name}; exec /usr/libexec/virtiofsd --socket-path=/run/{name}.sock --shared-dir=/run/{name}"
    ))
}

fn start_disk(host: &Host) -> Result<Job> {
    host.spawn(
        "exec qemu-storage-daemon --blockdev driver=file,filename=/run/back.raw,node-name=file \
         --blockdev driver=raw,file=file,node-name=disk --export type=vhost-user-blk,id=disk,node-name=disk,\
         addr.type=unix,addr.path=/run/blk.sock,writable=on,num-queues=2",
    )
}

fn served(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd))?;
    host.run("rm -rf /run/share /run/more; truncate -s 8M /run/back.raw")?;
    let folder = start_folder(host, "share")?;
    let disk = start_disk(host)?;
    let run = guest()?
        .cpus(2)
        .programs()
        .args(&["--fs", "tag=share,socket=/run/share.sock"])
        .args(&["--disk", "vhost_user=on,socket=/run/blk.sock,num_queues=2"])
        .args(&SOCKET)
        .limit(Duration::from_secs(300))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value begun")?;
    for _ in 0..4 {
        host.run(&format!("{CTL} pause; sleep 0.3; {CTL} resume; sleep 0.3"))?;
    }
    running.wait_line("@@value writing")?;
    let disk = killed(host, disk)?;
    running.wait_line("@@value disk")?;
    plugged(host, &running)?;
    let result = running.finish()?.success()?;
    ensure!(result.value("disk")? == "done", "{}", result.block("fio")?);
    ensure!(
        result.value("churned")? == "41 60",
        "{}",
        result.value("churned")?
    );
    ensure!(
        result.value("kept")? == "yes",
        "the second life finds another content"
    );
    ensure!(
        result.value("tags")?.trim() == "share",
        "{}",
        result.value("tags")?
    );
    let back = result
        .stderr
        .lines()
        .find(|line| line.contains("is back after"));
    tell!("{}", back.context("nobody says that the back end is back")?);
    ensure!(
        !result.stderr.contains("stops until its driver resets it"),
        "{}",
        result.stderr
    );
    drop((folder, disk));
    host.run("grep -q hot /run/more/said; rm -rf /run/share /run/more /run/back.raw")
        .map(drop)
}

/// The disk's back end is killed while it has requests in hand; another goes on with them within a second.
fn killed(host: &Host, disk: Job) -> Result<Job> {
    // The file's times tell whether it is written to.
    const WRITTEN: &str = "old=$(touch -d '1 hour ago' /run/back.raw; stat -c %Y /run/back.raw)\n\
        until [ $(stat -c %Y /run/back.raw) != $old ]; do sleep 0.02; done\n";
    host.run(WRITTEN)?;
    disk.signal("KILL")?;
    let _killed = disk.wait(Duration::from_secs(10))?;
    host.run("rm -f /run/blk.sock; sleep 1")?;
    let disk = start_disk(host)?;
    let said = host.run(&format!(
        "until [ -S /run/blk.sock ]; do sleep 0.01; done; begun=${{EPOCHREALTIME/./}}\n{WRITTEN}\
         echo took=$((${{EPOCHREALTIME/./}} - begun))"
    ))?;
    let took: u64 = word(said.trim(), "took")?.parse()?;
    tell!(
        "the disk's back end was written to again {} ms after it listened",
        took / 1000
    );
    ensure!(
        took < 1_000_000,
        "it took {took} µs until requests were served again"
    );
    Ok(disk)
}

/// A second folder comes and leaves in the second life.
fn plugged(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    running.wait_line("@@value again")?;
    let _folder = start_folder(host, "more")?;
    host.run(&format!(
        "{CTL} add-fs more /run/more.sock --id more; {CTL} power-button"
    ))?;
    running.wait_line("@@value removed")?;
    host.run(&format!("{CTL} remove-device more; {CTL} power-button"))
        .map(drop)
}
