//! Devices that other processes of the host serve: a shared folder by Debian's virtiofsd, and a disk by
//! qemu-storage-daemon, which keeps no note of requests in hand for the next one; and one more of each as a device of any
//! kind, of which Busway knows the number alone.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, HostConfig, Job, Kernel, Lab, RunningGuest};

use crate::assigned::guest;
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::new(
    "vhost_user_a_folder_and_a_disk_go_on_after_pauses_a_killed_back_end_and_a_restart",
    served,
)];

/// What the guest does in its first life and in its second, which it tells apart by what it finds in the folder. In the
/// folder files are written, read back with checksums, renamed, linked and removed meanwhile. The disk's back end is killed
/// once while nothing is asked of it, and once with requests in hand.
const SCRIPT: &str = "\
mkdir -p /mnt && mount -t virtiofs share /mnt && cd /mnt
fs=\"--directory=/mnt/fio --nrfiles=8 --rw=randrw --bs=4k --size=1M --verify=crc32c --verify_fatal=1\"
disk=\"--filename=/dev/vda --rw=randwrite --bs=4k --size=1M --direct=1 --ioengine=libaio --iodepth=8\"
verify=\"--verify=crc32c --verify_fatal=1 --output=/tmp/fio\"
any=\"--filename=/dev/vdb --rw=randwrite --bs=4k --size=1M --direct=1 --ioengine=libaio --iodepth=8\"
if [ -e second ]; then
    value kept \"$(md5sum -c -s sums && echo yes)\"
    fio --name=disk $disk $verify && value anew done
    until_pressed again
    mkdir -p /more && mount -t virtiofs more /more && echo hot >/more/said && umount /more
    value hot yes
    fio --name=any $any $verify && value any_again done
    mount -t virtiofs any /more && echo any >/more/said && umount /more
    value hot_any yes
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
    fio --name=disk $disk $verify && value disk done
    fio --name=any $any $verify && value any done
    until_pressed idle
    fio --name=disk $disk $verify && value disk_again done
    fio --name=endless $disk --time_based --runtime=600 --output=/tmp/fio &
    until_pressed broken
    touch second
    reboot -f
fi
";

/// With `more` of its words: its tag, where nobody else says it.
fn start_folder(host: &Host, name: &str, more: &str) -> Result<Job> {
    host.spawn(&format!(
        "mkdir -p /run/{name}; exec /usr/libexec/virtiofsd --socket-path=/run/{name}.sock --shared-dir=/run/{name} \
         {more}"
    ))
}

fn start_disk(host: &Host, name: &str) -> Result<Job> {
    host.spawn(&format!(
        "exec qemu-storage-daemon --blockdev driver=file,filename=/run/{name}.raw,node-name=file \
         --blockdev driver=raw,file=file,node-name=disk --export type=vhost-user-blk,id=disk,node-name=disk,\
         addr.type=unix,addr.path=/run/{name}.sock,writable=on,num-queues=2"
    ))
}

fn served(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd))?;
    host.run("rm -rf /run/share /run/more; truncate -s 8M /run/blk.raw /run/gen.raw")?;
    let folder = start_folder(host, "share", "")?;
    let disk = start_disk(host, "blk")?;
    let any = start_disk(host, "gen")?;
    let run = guest()?
        .cpus(2)
        .programs()
        .args(&["--fs", "tag=share,socket=/run/share.sock"])
        .args(&["--disk", "vhost_user=on,socket=/run/blk.sock,num_queues=2"])
        .args(&[
            "--generic-vhost-user",
            "virtio_id=2,socket=/run/gen.sock,queue_sizes=[128,128]",
        ])
        .args(&SOCKET)
        .limit(Duration::from_secs(360))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value begun")?;
    for _ in 0..4 {
        host.run(&format!("{CTL} pause; sleep 0.3; {CTL} resume; sleep 0.3"))?;
    }
    running.wait_line("@@value idle")?;
    let disk = killed(host, disk)?;
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value broken")?;
    host.run(WRITTEN)?;
    let disk = killed(host, disk)?;
    running.wait_said("stops until its driver resets it")?;
    host.run(&format!("{CTL} power-button"))?;
    plugged(host, &running)?;
    let result = running.finish()?.success()?;
    for key in ["files", "disk", "any", "disk_again", "anew", "any_again"] {
        let value = result.value(key)?;
        ensure!(value == "done", "{key}: {value}");
    }
    for (key, expected) in [("churned", "41 60"), ("kept", "yes"), ("tags", "share")] {
        let value = result.value(key)?.trim();
        ensure!(value == expected, "{key}: {value}");
    }
    let said = &result.stderr;
    let back = said.lines().filter(|line| line.contains("is back after"));
    let back: Vec<_> = back.collect();
    tell!("{}", back.join("; "));
    ensure!(
        back.len() == 2 && said.contains("restart the guest"),
        "{said}"
    );
    drop((folder, disk, any));
    host.run("grep -q hot /run/more/said; grep -q any /run/any/said; rm -rf /run/share /run/more /run/any /run/*.raw")
        .map(drop)
}

/// Waits until the disk's file is written to, as its times tell.
const WRITTEN: &str = "old=$(touch -d '1 hour ago' /run/blk.raw; stat -c %Y /run/blk.raw)\n\
    for each in $(seq 1500); do [ $(stat -c %Y /run/blk.raw) = $old ] || exit 0; sleep 0.02; done; exit 1\n";

/// The disk's back end is killed, and another listens a second later.
fn killed(host: &Host, disk: Job) -> Result<Job> {
    disk.signal("KILL")?;
    let _killed = disk.wait(Duration::from_secs(10))?;
    host.run("rm -f /run/blk.sock; sleep 1")?;
    start_disk(host, "blk")
}

/// A second folder comes and leaves in the second life.
fn plugged(host: &Host, running: &RunningGuest<'_>) -> Result<()> {
    running.wait_line("@@value again")?;
    let _folders = [
        start_folder(host, "more", "")?,
        start_folder(host, "any", "--tag=any")?,
    ];
    host.run(&format!(
        "{CTL} add-fs more /run/more.sock --id more; \
         {CTL} add-vhost-user fs /run/any.sock 1024,1024 --id any; {CTL} power-button"
    ))?;
    running.wait_line("@@value removed")?;
    host.run(&format!(
        "{CTL} remove-device more; {CTL} remove-device any; {CTL} power-button"
    ))
    .map(drop)
}
