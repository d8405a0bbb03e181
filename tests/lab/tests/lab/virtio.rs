//! Busway's own virtio devices, beside an assigned one.

use anyhow::{Result, ensure};
use busway_lab::{GuestKernel, Lab};

use crate::assigned::{bound, guest};
use crate::{Proof, vhost};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "virtio_devices_work_beside_a_drive_on_the_stock_kernel",
        |lab| all(lab, GuestKernel::Stock),
    ),
    Proof::new(
        "virtio_devices_work_beside_a_drive_by_the_pvh_entry",
        |lab| all(lab, GuestKernel::StockElf),
    ),
    Proof::new(
        "vhost_moves_packets_and_sockets_past_busway",
        vhost::past_busway,
    ),
];

/// A disk, a second that is read-only, a NIC on a tap, a console and an entropy source.
fn all(lab: &mut Lab, kernel: GuestKernel) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    host.run(
        "set -e; truncate -s 48M /run/disk.raw; head -c 16M /dev/urandom >/run/ro.raw\n\
         ip tuntap add dev lab-tap mode tap; ip addr add 192.168.77.1/24 dev lab-tap\n\
         ip link set lab-tap up; mkdir -p /run/www; head -c 50M /dev/urandom >/run/www/data\n",
    )?;
    let sums = host.run("sha256sum </run/www/data; sha256sum </run/ro.raw")?;
    let sums: Vec<&str> = sums
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let server = host.spawn("exec busybox httpd -f -p 192.168.77.1:8077 -h /run/www")?;
    let run = guest()?
        .kernel(kernel)
        .cpus(2)
        .device(&address)
        .args(&["--disk", "path=/run/disk.raw,num_queues=2", "path=/run/ro.raw,readonly=on"])
        .args(&["--net", "tap=lab-tap,mac=02:00:00:00:00:01", "--console", "file=/run/console.log"])
        .script(
            "value written \"$(lab-io write /dev/vda 5)\"\nvalue verified \"$(lab-io verify /dev/vda 5)\"\n\
             value sectors \"$(cat /sys/class/block/vda/size)\"\n\
             value readonly \"$(cat /sys/class/block/vdb/ro)\"\n\
             value disk_sum \"$(sha256sum </dev/vdb | cut -d ' ' -f 1)\"\n\
             ! dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null\n\
             blkdiscard /dev/vda && value discarded yes\n\
             ip addr add 192.168.77.2/24 dev eth0; ip link set eth0 up\n\
             value mac \"$(cat /sys/class/net/eth0/address)\"\n\
             value net_sum \"$(wget -q -O - http://192.168.77.1:8077/data | sha256sum | cut -d ' ' -f 1)\"\n\
             echo words on the console >/dev/hvc0\n\
             value rng \"$(cat /sys/class/misc/hw_random/rng_current)\"\n\
             value entropy \"$(head -c 64 /dev/hwrng | wc -c)\"\n",
        );
    let result = host.guest(&run)?.success()?;
    drop(server);
    host.run("ip link del lab-tap")?;
    ensure!(
        result.value("sectors")? == "98304",
        "{} sectors",
        result.value("sectors")?
    );
    ensure!(result.value("readonly")? == "1");
    ensure!(
        result.value("disk_sum")? == sums[1],
        "the read-only disk's data is wrong"
    );
    ensure!(
        result.value("net_sum")? == sums[0],
        "the network's data is wrong"
    );
    ensure!(result.value("mac")? == "02:00:00:00:00:01");
    ensure!(result.value("rng")?.starts_with("virtio_rng"));
    ensure!(result.value("entropy")? == "64");
    ensure!(
        host.run("cat /run/console.log")?
            .contains("words on the console")
    );
    Ok(())
}
