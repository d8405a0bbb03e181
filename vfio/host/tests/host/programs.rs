//! Programs that have a device open.

use busway_host::Level;

use super::*;

#[test]
fn a_process_is_found_by_group_by_node_and_by_device() {
    let mut host = FakeHost::new();
    let with = |address, group| Spec {
        address,
        group: Some(group),
        driver: Some("vfio-pci"),
        ..NVME
    };
    for (address, group) in [
        ("0000:01:00.0", 1),
        ("0000:02:00.0", 2),
        ("0000:03:00.0", 3),
    ] {
        host.device(&with(address, group));
    }
    host.file(
        "sys/bus/pci/devices/0000:02:00.0/vfio-dev/vfio4/dev",
        "511:4\n",
    );
    host.process(41, "qemu", "dev/vfio/1");
    host.process(42, "busway", "dev/vfio/devices/vfio4");
    host.process(43, "dpdk", "anon_inode:[vfio-device]");
    let path = "vfio-device-syspath:\t/sys/devices/pci0000:00/0000:00:01.0/0000:03:00.0\n";
    host.file("proc/43/fdinfo/7", &format!("pos:\t0\n{path}"));
    assert_eq!(uses(&host, "0000:01:00.0"), ["qemu (pid 41)"]);
    assert_eq!(uses(&host, "0000:02:00.0"), ["busway (pid 42)"]);
    assert_eq!(uses(&host, "0000:03:00.0"), ["dpdk (pid 43)"]);
}

#[test]
fn a_program_is_found_by_the_nodes_of_graphics_and_sound_cards() {
    let host = FakeHost::described(
        "device 01:00.0 1002:73bf class=030000 driver=amdgpu
           class drm/card0 dri/card0
           class drm/renderD128 dri/renderD128
         device 01:00.1 1002:ab28 class=040300 driver=snd_hda_intel
           class sound/card0/controlC0 snd/controlC0
         device 02:00.0 10de:2204 class=030000 driver=nvidia
         device 03:00.0 8086:51c8 class=040100 driver=sof-audio-pci-intel-tgl
           class sound/card1/pcmC1D0p snd/pcmC1D0p
         process 900 Xorg dev/dri/card0 dev/dri/renderD128 dev/dri/card0
         process 901 firefox dev/dri/renderD128 dev/snd/timer
         process 902 wireplumber dev/snd/controlC0
         process 903 python3 dev/nvidiactl dev/nvidia3",
    );
    let cards = "proc/driver/nvidia/gpus";
    let text = "Model: \t\t NVIDIA\nBus Location: \t 0000:02:00.0\nDevice Minor: \t 3\n";
    host.file(&format!("{cards}/0000:02:00.0/information"), text);
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        [
            "Xorg (pid 900) by dri/card0 +1",
            "firefox (pid 901) by dri/renderD128"
        ]
    );
    assert_eq!(
        uses(&host, "0000:01:00.1"),
        ["wireplumber (pid 902) by snd/controlC0"]
    );
    assert_eq!(
        uses(&host, "0000:02:00.0"),
        ["python3 (pid 903) by nvidia3"]
    );
    assert_eq!(uses(&host, "0000:03:00.0"), [""; 0]);
}

#[test]
fn a_program_is_found_by_any_node_of_a_device_s_children() {
    let host = FakeHost::described(
        "device 01:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme0/nvme0n1 259
             partition nvme0n1p1
           class nvme/nvme0 nvme0
         device 02:00.0 8086:1572 class=020000 driver=igb_uio
           class uio/uio1 uio1
         device 03:00.0 15b3:101d class=020000 driver=mlx5_core
           class infiniband_verbs/uverbs0 infiniband/uverbs0
         device 04:00.0 8086:a36d class=0c0330 driver=xhci_hcd
         process 900 qemu dev/nvme0n1
         process 901 ceph-osd dev/nvme0n1p1 dev/null
         process 902 smartd dev/nvme0
         process 903 testpmd dev/uio1
         process 904 python3 dev/infiniband/uverbs0
         process 905 adb dev/bus/usb/001/002",
    );
    // What is of a bus and of no class is among the numbers only.
    let device = host.path("sys/bus/pci/devices/0000:04:00.0");
    let device = device.canonicalize().unwrap();
    let below = device.strip_prefix(host.path("").canonicalize().unwrap());
    let below = below.unwrap().to_str().unwrap().to_owned();
    host.file(
        &format!("{below}/usb1/1-1/uevent"),
        "MAJOR=189\nMINOR=1\nDEVNAME=bus/usb/001/002\n",
    );
    host.link("sys/dev/char/189:1", &format!("{below}/usb1/1-1"));
    assert_eq!(
        uses(&host, "0000:01:00.0"),
        [
            "qemu (pid 900) by nvme0n1",
            "ceph-osd (pid 901) by nvme0n1p1",
            "smartd (pid 902) by nvme0"
        ]
    );
    assert_eq!(uses(&host, "0000:02:00.0"), ["testpmd (pid 903) by uio1"]);
    assert_eq!(
        uses(&host, "0000:03:00.0"),
        ["python3 (pid 904) by infiniband/uverbs0"]
    );
    assert_eq!(
        uses(&host, "0000:04:00.0"),
        ["adb (pid 905) by bus/usb/001/002"]
    );
}

#[test]
fn a_program_is_found_by_vfio_whoever_lends_the_device() {
    let host = FakeHost::described(
        "device 01:00.0 8086:154c class=020000 driver=vfio-pci group=0
         device 02:00.0 10de:2235 class=030200 driver=nvidia group=4
         device 00:02.0 8086:591b class=030000 driver=i915
         process 900 testpmd dev/vfio/noiommu-0
         process 901 qemu dev/vfio/devices/vfio3
         process 902 qemu dev/vfio/4
         process 903 qemu dev/vfio/7",
    );
    let below = |address: &str| {
        let device = host.path("sys/bus/pci/devices").join(address);
        let device = device.canonicalize().unwrap();
        let below = device.strip_prefix(host.path("").canonicalize().unwrap());
        below.unwrap().to_str().unwrap().to_owned()
    };
    host.file(
        &format!("{}/vfio-dev/vfio3/dev", below("0000:02:00.0")),
        "511:3\n",
    );
    // A mediated device.
    let mediated = format!(
        "{}/c0ffee00-0000-4000-8000-000000000001",
        below("0000:00:02.0")
    );
    host.file(&format!("{mediated}/uevent"), "");
    host.file("sys/kernel/iommu_groups/7/type", "DMA\n");
    host.link(
        &format!("{mediated}/iommu_group"),
        "sys/kernel/iommu_groups/7",
    );
    host.link(
        "sys/bus/mdev/devices/c0ffee00-0000-4000-8000-000000000001",
        &mediated,
    );
    assert_eq!(uses(&host, "0000:01:00.0"), ["testpmd (pid 900)"]);
    assert_eq!(
        uses(&host, "0000:02:00.0"),
        [
            "qemu (pid 901) by vfio/devices/vfio3",
            "qemu (pid 902) by vfio/4"
        ]
    );
    assert_eq!(uses(&host, "0000:00:02.0"), ["qemu (pid 903) by vfio/7"]);
}

#[test]
fn of_hundreds_of_processes_each_is_looked_at() {
    let mut text = "device 01:00.0 144d:a80a class=010802 driver=nvme
           disk nvme/nvme0/nvme0n1 259\n"
        .to_owned();
    for pid in 1000..1300 {
        text += &format!("         process {pid} fio dev/null dev/zero dev/nvme0n1\n");
    }
    let host = FakeHost::described(&text);
    let expected: Vec<_> = (1000..1300)
        .map(|pid| format!("fio (pid {pid}) by nvme0n1"))
        .collect();
    assert_eq!(uses(&host, "0000:01:00.0"), expected);
}

#[test]
fn a_node_of_another_name_is_known_by_its_number() {
    let host = FakeHost::described("device 01:00.0 1af4:1044 class=ff0000 driver=made-up");
    let device = host.path("sys/bus/pci/devices/0000:01:00.0");
    let device = device.canonicalize().unwrap();
    let below = device.strip_prefix(host.path("").canonicalize().unwrap());
    let folder = format!("{}/mem/null", below.unwrap().display());
    // Of this machine: the one node that every test finds.
    host.file(
        &format!("{folder}/uevent"),
        "MAJOR=1\nMINOR=3\nDEVNAME=null\n",
    );
    host.link("sys/class/mem/null", &folder);
    host.file("proc/900/comm", "jailed\n");
    let open = |fd: u32, target: &str| {
        let fd = host.path(&format!("proc/900/fd/{fd}"));
        std::fs::create_dir_all(fd.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, fd).unwrap();
    };
    open(3, "/dev/zero");
    assert_eq!(uses(&host, "0000:01:00.0"), [""; 0]);
    open(4, "/dev/null");
    assert_eq!(uses(&host, "0000:01:00.0"), ["jailed (pid 900) by null"]);
}

#[test]
fn what_other_users_processes_have_open_is_said_to_be_unseen() {
    let root = FakeHost::described("user 0");
    assert_eq!(Host::read(&root.root).unwrap().unseen(), None);
    let user = FakeHost::described("user 1000");
    let unseen = Host::read(&user.root).unwrap().unseen().unwrap();
    assert_eq!((unseen.level, unseen.topic), (Level::Note, "processes"));
    let capable = FakeHost::described("user 1000 caps=0000000000080004");
    assert_eq!(Host::read(&capable.root).unwrap().unseen(), None);
}
