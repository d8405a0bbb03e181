//! Disks, and all that stands on them.

use super::*;

#[test]
fn a_mount_is_found_through_partition_encryption_and_volume() {
    let mut host = FakeHost::new();
    host.device(&NVME);
    host.disk(
        NVME.address,
        "nvme/nvme0/nvme0n1",
        259,
        &["nvme0n1p1", "nvme0n1p2", "nvme0n1p3"],
    );
    host.mapped(0, "luks", "CRYPT-LUKS2-1", &["nvme0n1p2"]);
    host.mapped(1, "vg-root", "LVM-1", &["dm-0"]);
    host.mapped(2, "vg-swap", "LVM-2", &["dm-0"]);
    host.mapped(3, "vg-spare", "LVM-3", &["dm-0"]);
    host.mount("253:1", "/", "/dev/mapper/vg-root");
    host.mount("253:1", "/var/lib/docker", "/dev/mapper/vg-root");
    host.mount("259:1", "/boot/efi", "/dev/nvme0n1p1");
    host.append("proc/swaps", "/dev/dm-2 partition 8388604 0 -2");
    assert_eq!(
        uses(&host, NVME.address),
        [
            "/boot/efi (nvme0n1p1)",
            "/ +1 (nvme0n1p2 > luks > vg-root)",
            "swap (nvme0n1p2 > luks > vg-swap)",
            "nvme0n1p2 > luks > vg-spare",
        ]
    );
}

#[test]
fn an_nvme_namespace_with_several_paths_uses_each_of_its_controllers() {
    let mut host = FakeHost::new();
    host.device(&NVME);
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
    host.block(&format!("{subsystem}/nvme0n1"), "259:0");
    let controller = "sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/nvme/nvme0";
    host.file(&format!("{controller}/serial"), "S1\n");
    host.link(&format!("{subsystem}/nvme0"), controller);
    host.mount("259:0", "/data", "/dev/nvme0n1");
    assert_eq!(uses(&host, NVME.address), ["/data (nvme0n1)"]);
}

#[test]
fn every_member_of_a_btrfs_is_in_use_though_only_one_is_named_in_the_mount() {
    let mut host = FakeHost::new();
    host.device(&NVME);
    host.device(&Spec {
        address: "0000:02:00.0",
        ..NVME
    });
    host.disk("0000:01:00.0", "nvme/nvme0/nvme0n1", 259, &[]);
    host.disk("0000:02:00.0", "nvme/nvme1/nvme1n1", 260, &[]);
    for name in ["nvme0n1", "nvme1n1"] {
        let link = format!("sys/fs/btrfs/b6e6/devices/{name}");
        host.link(&link, &format!("sys/class/block/{name}"));
    }
    host.mount("0:45", "/pool", "/dev/nvme0n1");
    assert_eq!(uses(&host, "0000:01:00.0"), ["/pool (nvme0n1)"]);
    assert_eq!(uses(&host, "0000:02:00.0"), ["/pool (nvme1n1)"]);
}

#[test]
fn a_use_is_followed_through_files_overlays_and_what_a_device_says_it_stands_on() {
    let host = FakeHost::described(
        "device 01:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme0/nvme0n1 259
             partition nvme0n1p1 mount=/run/live
             partition nvme0n1p2
             partition nvme0n1p3 mount=/data
         device 02:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme1/nvme1n1 260
         block loop0 7:0 mount=/run/rootfs
         block loop1 7:1
         block zram0 252:0
         block dm-3 253:3",
    );
    let of = "sys/devices/virtual/block";
    host.file(
        &format!("{of}/loop0/loop/backing_file"),
        "/run/live/root.img\n",
    );
    host.file(&format!("{of}/loop1/loop/backing_file"), "/data/image\n");
    host.file(&format!("{of}/zram0/backing_dev"), "/dev/nvme0n1p2\n");
    host.file(&format!("{of}/dm-3/slaves/nvme0n1p2/dev"), "");
    host.append("proc/swaps", "/data/swap\\040file file 8 0 -2");
    let overlay = "50 1 0:40 / / rw - overlay overlay rw,lowerdir=/run/rootfs,upperdir=/tmp/u";
    host.append("proc/self/mountinfo", overlay);
    let xfs = "51 1 8:99 / /srv rw - xfs /dev/elsewhere rw,logdev=/dev/nvme1n1,noquota";
    host.append("proc/self/mountinfo", xfs);
    let found = uses(&host, "0000:01:00.0");
    for expected in [
        "/ +1 (nvme0n1p1 > loop0)",
        "nvme0n1p2 > dm-3",
        "nvme0n1p2 > zram0",
        "nvme0n1p3 > loop1",
        "swap (nvme0n1p3)",
    ] {
        assert!(
            found.iter().any(|use_| use_ == expected),
            "{expected}: {found:?}"
        );
    }
    assert_eq!(uses(&host, "0000:02:00.0"), ["/srv (nvme1n1)"]);
}

#[test]
fn zfs_bcache_and_multipath_are_found_below_what_is_mounted() {
    let host = FakeHost::named("storage");
    assert_eq!(uses(&host, "0000:43:00.0"), ["/cache (nvme2n1 > bcache0)"]);
    assert_eq!(
        uses(&host, "0000:44:00.0"),
        ["/srv/backup (nvme3n1p1 > ZFS tank)"]
    );
    assert_eq!(
        uses(&host, "0000:45:00.0"),
        [
            "/vault (sda > mpatha > mpatha-part1)",
            "/vault (sdb > mpatha > mpatha-part1)",
            "/cache (sdc > bcache0)",
        ]
    );
}

#[test]
fn what_is_handed_on_to_other_machines_or_keeps_a_journal_is_used() {
    let host = FakeHost::described(
        "device 01:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme0/nvme0n1 259
             partition nvme0n1p1
             partition nvme0n1p2
             partition nvme0n1p3 mount=/data
             partition nvme0n1p4
             partition nvme0n1p5
         device 02:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme1/nvme1n1 260",
    );
    let config = "sys/kernel/config";
    let target = format!("{config}/target/core");
    host.file(
        &format!("{target}/iblock_0/my disk/udev_path"),
        "/dev/nvme0n1p1\n",
    );
    host.file(&format!("{target}/fileio_1/image/udev_path"), "/data/lun\n");
    // One that has no path yet, and a group of ports.
    host.file(&format!("{target}/iblock_2/new/udev_path"), "");
    host.file(&format!("{target}/alua/lu_gps/default/members"), "");
    let namespace = |number: u32| {
        format!("{config}/nvmet/subsystems/nqn.2026-11.org.example/namespaces/{number}")
    };
    for (number, enable) in [(1, "1\n"), (2, "0\n")] {
        let path = format!("/dev/nvme0n1p{}\n", number + 1);
        host.file(&format!("{}/device_path", namespace(number)), &path);
        host.file(&format!("{}/enable", namespace(number)), enable);
    }
    let lun = "usb_gadget/g1/functions/mass_storage.usb0/lun.0/file";
    host.file(&format!("{config}/{lun}"), "/dev/nvme0n1p4\n");
    let filename = "sys/kernel/scst_tgt/devices/disk1/filename";
    host.file(filename, "/dev/nvme0n1p5\n[key]\n");
    host.file("proc/fs/jbd2/nvme1n1/info", "");
    host.file("proc/fs/jbd2/nvme0n1p3-8/info", "");
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        [
            "nvme0n1p1 > LIO my disk",
            "nvme0n1p2 > NVMe target nqn.2026-11.org.example",
            "/data (nvme0n1p3)",
            "nvme0n1p3 > LIO image",
            "nvme0n1p4 > USB gadget g1",
            "nvme0n1p5 > SCST disk1",
        ]
    );
    let journal = "nvme1n1 > the journal of another file system";
    assert_eq!(uses(&host, "0000:02:00.0"), [journal]);
    let read = Host::read(&host.root).unwrap();
    let refused = busway_host::check_bind(&read, &[at("0000:01:00.0")].into(), &Permits::new());
    let text = refused
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n");
    for command in [
        "targetcli /backstores/block delete 'my disk'",
        "echo 0 > /sys/kernel/config/nvmet/subsystems/nqn.2026-11.org.example/namespaces/1/enable",
    ] {
        assert!(text.contains(command), "{text}");
    }
}

#[test]
fn a_controller_that_is_handed_on_crash_logs_and_flash_are_uses_of_the_disk() {
    let host = FakeHost::described(
        "device 01:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme0/nvme0n1 259
           class nvme/nvme0 nvme0
         device 02:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme1/nvme1n1 260
             partition nvme1n1p1
             partition nvme1n1p2",
    );
    let passthru = "sys/kernel/config/nvmet/subsystems/nqn.test/passthru";
    host.file(&format!("{passthru}/device_path"), "/dev/nvme0\n");
    host.file(&format!("{passthru}/enable"), "0\n");
    assert_eq!(uses(&host, "0000:01:00.0"), [""; 0]);
    host.file(&format!("{passthru}/enable"), "1\n");
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        ["nvme0n1 > NVMe target nqn.test"]
    );
    let parameter = "sys/module/pstore_blk/parameters/blkdev";
    host.file(parameter, "/dev/nvme1n1p1\n");
    host.file("sys/class/mtd/mtd0/name", "block2mtd: /dev/nvme1n1p2\n");
    assert_eq!(
        uses(&host, "0000:02:00.0"),
        [
            "nvme1n1p1 > the kernel's log of crashes (pstore)",
            "nvme1n1p2 > mtd0",
        ]
    );
}

#[test]
fn a_drive_over_fibre_channel_is_its_adapter_s() {
    let host = FakeHost::described(
        "         device 05:00.0 10df:f400 class=0c0400 driver=lpfc group=5
         block ../nvme-fabrics/ctl/nvme4/nvme4n1 259:4 mount=/srv/fc",
    );
    let adapter = host.path("sys/bus/pci/devices/0000:05:00.0").canonicalize();
    let adapter = adapter.unwrap();
    let below = adapter.strip_prefix(host.path("").canonicalize().unwrap());
    let adapter = format!("{}/host7/fc_host/host7", below.unwrap().display());
    host.file(&format!("{adapter}/port_name"), "0x10000090fae06325\n");
    host.link("sys/class/fc_host/host7", &adapter);
    let controller = "sys/devices/virtual/nvme-fabrics/ctl/nvme4";
    host.file(&format!("{controller}/transport"), "fc\n");
    let port = |last: u32| {
        let port = format!("nn-0x20000090fae06325:pn-0x10000090fae0632{last}");
        format!("traddr=nn-0x1:pn-0x2,host_traddr={port}\n")
    };
    host.file(&format!("{controller}/address"), &port(6));
    assert_eq!(uses(&host, "0000:05:00.0"), [""; 0]);
    host.file(&format!("{controller}/address"), &port(5));
    assert_eq!(uses(&host, "0000:05:00.0"), ["/srv/fc (nvme4n1)"]);
    // With several paths.
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys4";
    host.block(&format!("{subsystem}/nvme5n1"), "259:5");
    host.link(&format!("{subsystem}/nvme4"), controller);
    host.mount("259:5", "/data", "/dev/nvme5n1");
    assert!(uses(&host, "0000:05:00.0").contains(&"/data (nvme5n1)".to_owned()));
}

#[test]
fn every_member_of_a_bcachefs_is_in_use() {
    let host = FakeHost::described(
        "device 01:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme0/nvme0n1 259
         device 02:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme1/nvme1n1 260",
    );
    for (number, name) in ["nvme0n1", "nvme1n1"].iter().enumerate() {
        let link = format!("sys/fs/bcachefs/d2a1/dev-{number}/block");
        host.link(&link, &format!("sys/class/block/{name}"));
    }
    let mount = "51 1 0:99 / /srv rw - bcachefs /dev/nvme0n1 rw";
    host.append("proc/self/mountinfo", mount);
    assert_eq!(uses(&host, "0000:02:00.0"), ["/srv (nvme1n1)"]);
}
