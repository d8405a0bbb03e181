//! Reading, binding and giving back devices on made-up hosts.

mod fake_host;

use std::collections::BTreeSet;

use busway_pci::Bdf;
use busway_vfio::host::{
    self, BindOptions, Bound, Called, CalledError, ChangeError, Check, Host, Kernel, Level,
    Permits, Refusal, Session, Unbound, Usage,
};
use fake_host::library::{HOSTS, REPORTED};
use fake_host::{FakeHost, Spec};
use proptest::prelude::*;

fn at(address: &str) -> Bdf {
    address.parse().unwrap()
}

fn bind(
    host: &FakeHost,
    kernel: &mut dyn Kernel,
    addresses: &[Bdf],
) -> Result<Vec<Bound>, ChangeError> {
    let mut tell = |_: &_| ();
    let mut session = Session::new(&host.root, kernel, &mut tell);
    host::bind(&mut session, addresses, &BindOptions::default())
}

fn unbind(
    host: &FakeHost,
    kernel: &mut dyn Kernel,
    addresses: &[Bdf],
) -> Result<Vec<Unbound>, ChangeError> {
    let mut tell = |_: &_| ();
    let mut session = Session::new(&host.root, kernel, &mut tell);
    host::unbind(&mut session, addresses, &Permits::new())
}

fn uses(host: &FakeHost, address: &str) -> Vec<String> {
    let host = Host::read(&host.root).unwrap();
    host.usage(at(address))
        .iter()
        .map(Usage::to_string)
        .collect()
}

const NVME: Spec<'_> = Spec {
    address: "0000:01:00.0",
    behind: "pci0000:00/0000:00:01.0",
    vendor: 0x144d,
    device: 0xa808,
    class: 0x010802,
    group: Some(12),
    node: 0,
    driver: Some("nvme"),
    driver_override: None,
};

/// Two NICs in one group behind a port, and an NVMe drive that has no driver.
fn host_with_three() -> FakeHost {
    let mut host = FakeHost::new();
    host.device(&Spec {
        address: "0000:00:01.0",
        class: 0x060400,
        driver: Some("pcieport"),
        group: Some(2),
        ..Spec::default()
    });
    host.device(&Spec::default());
    host.device(&Spec {
        address: "0000:00:02.1",
        driver: Some("igb"),
        driver_override: Some("igb"),
        ..Spec::default()
    });
    host.device(&Spec {
        driver: None,
        ..NVME
    });
    host
}

const THREE: [&str; 3] = ["0000:00:02.0", "0000:00:02.1", "0000:01:00.0"];

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
fn the_default_route_is_found_through_bond_and_bridge() {
    let mut host = host_with_three();
    host.native("0000:00:02.0", "e1000e");
    host.interface(Some("0000:00:02.0"), "eth0", &["bond0"]);
    host.interface(None, "bond0", &["br0"]);
    host.interface(None, "br0", &[]);
    host.interface(Some("0000:00:02.1"), "eth1", &[]);
    host.default_route("br0");
    assert_eq!(
        uses(&host, "0000:00:02.0"),
        ["eth0 > bond0 > br0", "default route (eth0 > bond0 > br0)"]
    );
    assert_eq!(uses(&host, "0000:00:02.1"), ["eth1"]);
}

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
fn binding_and_giving_back_ends_where_it_began() {
    let mut host = host_with_three();
    host.native("0000:01:00.0", "nvme");
    let mut kernel = host.kernel();
    let addresses = THREE.map(at);
    let bound = bind(&host, &mut kernel, &addresses).unwrap();
    assert_eq!(bound.len(), 3);
    assert_eq!(kernel.log.first().unwrap(), "modprobe vfio-pci");
    for address in THREE {
        assert_eq!(host.driver_of(address).as_deref(), Some("vfio-pci"));
    }

    // A second time changes nothing.
    kernel.log.clear();
    let again = bind(&host, &mut kernel, &addresses).unwrap();
    assert!(again.iter().all(|device| device.already));
    assert!(kernel.log.is_empty());

    let back = unbind(&host, &mut kernel, &addresses).unwrap();
    let drivers: Vec<_> = back.iter().map(|device| device.driver.as_deref()).collect();
    assert_eq!(drivers, [Some("e1000e"), Some("igb"), Some("nvme")]);
    // What was reserved before is reserved again.
    let reserved = |address: &str| host.state()[address].1.clone();
    assert_eq!(THREE.map(reserved), ["(null)", "igb", "(null)"]);
}

#[test]
fn a_driver_that_was_never_loaded_is_loaded_when_its_device_comes_back() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        driver: Some("vfio-pci"),
        driver_override: Some("vfio-pci"),
        ..NVME
    });
    host.native(NVME.address, "nvme");
    std::fs::remove_dir(host.path("sys/bus/pci/drivers/nvme")).unwrap();
    host.file("modules/pci:v0000144Dd0000A808", "nvme");
    let back = unbind(&host, &mut host.kernel(), &[at(NVME.address)]).unwrap();
    assert_eq!(back[0].driver.as_deref(), Some("nvme"));
}

#[test]
fn a_device_that_the_host_has_no_driver_for_comes_back_without_one() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        driver: Some("vfio-pci"),
        driver_override: Some("vfio-pci"),
        ..NVME
    });
    let back = unbind(&host, &mut host.kernel(), &[at(NVME.address)]).unwrap();
    assert_eq!(back[0].former.as_deref(), Some("vfio-pci"));
    assert_eq!(back[0].driver, None);
}

#[test]
fn a_device_in_another_drivers_hands_is_not_touched_by_unbind() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        driver: Some("pci-stub"),
        driver_override: Some("pci-stub"),
        ..NVME
    });
    let mut kernel = host.kernel();
    let back = unbind(&host, &mut kernel, &[at(NVME.address)]).unwrap();
    assert_eq!(
        (&back[0].former, back[0].driver.as_deref()),
        (&None, Some("pci-stub"))
    );
    assert!(kernel.log.is_empty());
}

#[test]
fn a_process_that_holds_another_member_of_the_group_keeps_both_from_coming_back() {
    let mut host = FakeHost::new();
    for address in ["0000:01:00.0", "0000:01:00.1"] {
        host.device(&Spec {
            address,
            driver: Some("vfio-pci"),
            ..NVME
        });
    }
    host.file(
        "sys/bus/pci/devices/0000:01:00.1/vfio-dev/vfio0/dev",
        "511:0\n",
    );
    host.process(4242, "busway", "dev/vfio/devices/vfio0");
    let mut kernel = host.kernel();
    let result = unbind(&host, &mut kernel, &[at("0000:01:00.0")]);
    let Err(ChangeError::Refused(refused)) = result else {
        panic!("{result:?}");
    };
    assert!(
        matches!(&refused.0[..], [Refusal::HeldOpen { .. }]),
        "{refused}"
    );
    assert!(kernel.log.is_empty());
}

/// Binds with one request failing. Returns whether that was reached.
fn bind_failing(host: &FakeHost, addresses: &[Bdf], number: usize) -> bool {
    let before = host.state();
    let mut kernel = host.kernel();
    kernel.fails = Box::new(move |n, _| (n == number).then_some(libc::EINVAL));
    match bind(host, &mut kernel, addresses) {
        Ok(_) => false,
        Err(ChangeError::Bind { stranded, .. }) => {
            assert!(stranded.is_empty(), "{stranded:?}");
            assert_eq!(host.state(), before, "after {:#?}", kernel.log);
            true
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_failure_at_any_step_leaves_every_device_as_it_was() {
    let fails_at = |&number: &usize| bind_failing(&host_with_three(), &THREE.map(at), number);
    let reached = (0..).take_while(fails_at).count();
    // Module; journal; override, detach and attach of two; override and attach of the one without a
    // driver.
    assert_eq!(reached, 1 + 1 + 3 + 3 + 2);
}

#[test]
fn what_cannot_be_undone_is_named_and_the_rest_is_undone() {
    let host = host_with_three();
    let before = host.state();
    let mut kernel = host.kernel();
    kernel.fails = Box::new(|_, request| {
        (request == "drivers/vfio-pci/bind 0000:01:00.0"
            || request == "drivers/igb/bind 0000:00:02.1")
            .then_some(libc::EIO)
    });
    let result = bind(&host, &mut kernel, &THREE.map(at));
    let Err(ChangeError::Bind { stranded, .. }) = result else {
        panic!("{result:?}");
    };
    assert_eq!(stranded.len(), 1);
    assert_eq!(stranded[0].address, at("0000:00:02.1"));
    let after = host.state();
    for address in ["0000:00:02.0", "0000:01:00.0"] {
        assert_eq!(after[address], before[address]);
    }
}

#[test]
fn a_device_that_vanishes_is_an_error_and_the_rest_is_undone() {
    for number in 0..10 {
        let host = host_with_three();
        let mut before = host.state();
        let mut kernel = host.kernel();
        kernel.unplug_at = Some((number, "0000:01:00.0".to_owned()));
        let result = bind(&host, &mut kernel, &THREE.map(at));
        assert!(
            matches!(result, Err(ChangeError::Bind { .. })),
            "{number}: {result:?}"
        );
        before.remove("0000:01:00.0");
        assert_eq!(host.state(), before, "{number}");
    }
}

#[test]
fn a_driver_that_turns_the_device_away_is_noticed_though_the_write_succeeded() {
    let host = host_with_three();
    let before = host.state();
    let mut kernel = host.kernel();
    kernel.deaf_to = Some("drivers/vfio-pci/bind");
    let result = bind(&host, &mut kernel, &THREE.map(at));
    assert!(
        result
            .unwrap_err()
            .to_string()
            .contains("the device is with no driver")
    );
    assert_eq!(host.state(), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_devices_survive_any_failure(
        devices in prop::collection::vec((0..4usize, any::<bool>(), any::<bool>()), 1..6),
        number in 0..24usize,
    ) {
        let mut host = FakeHost::new();
        let mut asked = Vec::new();
        for (index, &(driver, reserved, chosen)) in devices.iter().enumerate() {
            let address = format!("0000:0{}:00.0", index + 1);
            let driver = [None, Some("nvme"), Some("pci-stub"), Some("vfio-pci")][driver];
            // A reserved device is with the driver that it is reserved for, or with none yet.
            let driver_override = driver.filter(|_| reserved);
            let group = Some(index as u32);
            host.device(&Spec { address: &address, driver, driver_override, group, ..NVME });
            if chosen {
                asked.push(at(&address));
            }
        }
        bind_failing(&host, &asked, number);
    }
}

#[test]
fn no_host_of_the_library_gets_a_control_character_past_the_model() {
    let reported = fake_host::library::REPORTED;
    for (name, _) in fake_host::library::HOSTS.into_iter().chain(reported) {
        let fake = FakeHost::named(name);
        let host = Host::read(&fake.root).unwrap();
        assert!(host.devices().count() > 0, "{name}");
        for device in host.devices() {
            let uses = host.usage(device.address).iter().map(Usage::to_string);
            let texts = uses.chain(device.driver.clone());
            let texts = texts.chain(device.reset_methods.clone());
            for text in texts.chain(device.modalias.clone()) {
                assert!(!text.chars().any(char::is_control), "{name}: {text:?}");
            }
        }
    }
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
fn the_way_back_to_who_came_by_ssh_is_found() {
    let host = FakeHost::named("server");
    assert_eq!(
        uses(&host, "0000:18:00.1"),
        [
            "ens1f1 > bond0 > br0 10.0.0.1 2001:db8::1",
            "default route (ens1f1 > bond0 > br0)",
            "this SSH session, from 192.0.2.77 (ens1f1 > bond0 > br0)",
        ]
    );
}

#[test]
fn an_interface_carries_the_storage_and_the_routes_that_go_by_it() {
    let mut host = FakeHost::named("net");
    assert_eq!(
        uses(&host, "0000:18:00.1"),
        ["ens1f1 10.10.10.5", "/ by nfs4 from 10.10.10.1 (ens1f1)"]
    );
    assert_eq!(
        uses(&host, "0000:19:00.3"),
        ["ens2f3", "route to 172.16.0.0/12 (ens2f3)"]
    );
    host.add(
        "file sys/class/iscsi_connection/connection1:0/persistent_address 10.20.0.9\n\
         file sys/class/nvme/nvme7/transport tcp\n\
         file sys/class/nvme/nvme7/address traddr=172.16.0.1,trsvcid=4420\n\
         block ../../virtual/nvme-fabrics/ctl/nvme7/nvme7n1 259:9",
    );
    assert_eq!(
        uses(&host, "0000:18:00.2"),
        [
            "ens1f2 > storage 10.20.0.5",
            "/srv/iscsi +1 by iSCSI from 10.20.0.9 (ens1f2 > storage)",
        ]
    );
    let used = uses(&host, "0000:19:00.3");
    assert!(
        used.contains(&"nvme7n1 by NVMe over tcp from 172.16.0.1 (ens2f3)".to_owned()),
        "{used:?}"
    );
    let read = Host::read(&host.root).unwrap();
    let refused = |address, permits: &[host::Permit]| {
        let permits = permits.iter().copied().collect();
        !host::check_bind(&read, &[at(address)].into(), &permits).is_empty()
    };
    assert!(refused("0000:18:00.1", &[host::Permit::Route]));
    assert!(!refused("0000:18:00.1", &[host::Permit::System]));
    assert!(refused("0000:19:00.3", &[]));
    assert!(!refused("0000:19:00.3", &[host::Permit::Route]));
}

#[test]
fn an_interface_in_another_namespace_keeps_its_device_and_its_function() {
    let host = FakeHost::named("pod-vf");
    let says = ["its interface is in another network namespace (a container?)"];
    assert_eq!(uses(&host, "0000:18:01.1"), says);
    assert_eq!(uses(&host, "0000:18:01.0"), ["ens1f0v0"]);
    let read = Host::read(&host.root).unwrap();
    let asked = [at("0000:18:01.1")].into();
    assert!(!host::check_bind(&read, &asked, &Permits::new()).is_empty());
    let permits = [host::Permit::Route].into();
    assert!(host::check_bind(&read, &asked, &permits).is_empty());
}

#[test]
fn a_thousand_representors_are_one_use_a_bridge() {
    let mut host = FakeHost::named("switchdev");
    let text: String = (8..1000)
        .map(|n| format!("  interface rep{n} port=pf0vf{n} in=ovs-system\n"))
        .collect();
    host.add(&format!(
        "device 0000:82:00.0 15b3:1015 class=020000 driver=mlx5_core group=70\n{text}"
    ));
    assert_eq!(
        uses(&host, "0000:82:00.0"),
        ["992 representors > ovs-system"]
    );
    let used = uses(&host, "0000:81:00.0");
    let says = ["pf0 > ovs-system", "8 representors > ovs-system", "8 VFs"];
    assert_eq!(used, says);
}

fn checked(host: &FakeHost, addresses: &[Bdf]) -> Check {
    let addresses = addresses.iter().copied().collect();
    let host = Host::read(&host.root).unwrap();
    Check::of(&host, &addresses, 0, &|_| Ok(()))
}

/// The topics of what stands against giving a device away.
fn obstacles(check: &Check) -> Vec<&'static str> {
    let findings = check.devices.iter().flat_map(|device| &device.findings);
    let obstacles = findings.filter(|finding| finding.level == Level::Obstacle);
    obstacles.map(|finding| finding.topic).collect()
}

/// The devices that the advice says to bind.
fn advised(check: &Check) -> Vec<Vec<Bdf>> {
    let findings = check.devices.iter().flat_map(|device| &device.findings);
    let commands = findings.flat_map(|finding| &finding.remedies);
    let commands = commands.filter_map(|remedy| remedy.command.as_ref().map(ToString::to_string));
    commands
        .filter_map(|command| {
            let words = command.strip_prefix("busway device bind ")?;
            Some(words.split(' ').map(at).collect())
        })
        .collect()
}

/// The devices that the advice says to take from drivers by hand, and these.
fn unbound(check: &Check) -> BTreeSet<(String, String)> {
    let findings = check.devices.iter().flat_map(|device| &device.findings);
    let commands = findings.flat_map(|finding| &finding.remedies);
    let commands = commands.filter_map(|remedy| remedy.command.as_ref().map(ToString::to_string));
    commands
        .filter_map(|command| {
            let words = command.strip_prefix("echo ")?;
            let (address, attribute) = words.split_once(" > /sys/bus/pci/drivers/")?;
            let driver = attribute.strip_suffix("/unbind")?;
            Some((address.to_owned(), driver.to_owned()))
        })
        .collect()
}

#[test]
fn whoever_follows_the_advice_to_bind_has_devices_that_are_bound_and_whole_groups() {
    // What else stands against a device has remedies of its own.
    let only_binding = |topics: Vec<&str>| topics.iter().all(|t| matches!(*t, "group" | "driver"));
    let mut followed = 0;
    // The hostile one contradicts itself.
    let hosts = HOSTS.iter().filter(|(name, _)| *name != "hostile");
    for (name, _) in hosts.chain(&REPORTED) {
        let host = FakeHost::named(name);
        let read = Host::read(&host.root).unwrap();
        let check = |asked: &[Bdf]| {
            let asked = asked.iter().copied().collect();
            Check::of(&read, &asked, 0, &|_| Ok(()))
        };
        let mut advices = BTreeSet::new();
        for device in read
            .devices()
            .filter(|d| d.group.is_some() && !d.is_bridge())
        {
            let check = check(&[device.address]);
            if only_binding(obstacles(&check)) {
                advices.extend(advised(&check));
            }
        }
        for addresses in advices {
            if !only_binding(obstacles(&check(&addresses))) {
                continue;
            }
            let host = FakeHost::named(name);
            let mut kernel = host.kernel();
            // A bridge is taken from its driver first.
            for (address, driver) in unbound(&check(&addresses)) {
                let attribute = format!("sys/bus/pci/drivers/{driver}/unbind");
                kernel.write(&host.path(&attribute), &address).unwrap();
            }
            bind(&host, &mut kernel, &addresses)
                .unwrap_or_else(|error| panic!("{name}, {addresses:?}: {error}"));
            // A user who may not open the nodes is told so then.
            let mut left = obstacles(&checked(&host, &addresses));
            left.retain(|topic| *topic != "nodes");
            assert!(left.is_empty(), "{name}, {addresses:?}: {left:?}");
            followed += 1;
        }
    }
    assert!(followed > 20, "{followed}");
}

const VMD: [&str; 2] = ["0000:00:0e.0", "10000:e1:00.0"];

#[test]
fn what_is_behind_a_volume_management_device_is_used_with_it_and_goes_with_it() {
    for name in ["vmd", "vmd-own-groups"] {
        let host = FakeHost::named(name);
        assert_eq!(uses(&host, VMD[0]), uses(&host, VMD[1]));
        assert_eq!(uses(&host, VMD[0])[1], "/ (nvme0n1p2)");
        // The switch for the group passes over nothing that is in use.
        let permits = Permits::from([host::Permit::Group]);
        let read = Host::read(&host.root).unwrap();
        let refusals = host::check_bind(&read, &[at(VMD[0])].into(), &permits);
        assert!(
            matches!(&refusals[..], [Refusal::InUse { uses, .. }] if uses.len() == 2),
            "{refusals:?}"
        );
    }
    // Its child is gone when it is taken: by either's name the advice is the same, and works.
    for asked in VMD {
        let host = FakeHost::named("vmd-kernel");
        let check = checked(&host, &[at(asked)]);
        let advised = advised(&check);
        assert!(!advised.is_empty() && advised.iter().all(|a| *a == [at(VMD[0])]));
        bind(&host, &mut host.kernel(), &[at(VMD[0])]).unwrap();
        assert!(obstacles(&checked(&host, &[at(VMD[0])])).is_empty());
        assert_eq!(obstacles(&checked(&host, &[at(VMD[1])])), ["device"]);
    }
    let host = FakeHost::named("vmd-kernel");
    let both = bind(&host, &mut host.kernel(), &VMD.map(at));
    let Err(ChangeError::Refused(refused)) = both else {
        panic!("{both:?}");
    };
    let (address, maker) = (at(VMD[1]), at(VMD[0]));
    assert_eq!(refused.0, [Refusal::EndsWith { address, maker }]);
}

#[test]
fn functions_that_the_chipset_works_by_are_never_advised_to_be_given_away() {
    let host = FakeHost::named("chipset");
    let check = checked(&host, &[at("0000:00:1f.3")]);
    assert!(advised(&check).is_empty());
    let text = format!("{check:?}");
    assert!(
        text.contains("0000:00:1f.0, 0000:00:1f.4, 0000:00:1f.5"),
        "{text}"
    );
    let refused = bind(&host, &mut host.kernel(), &[at("0000:00:1f.3")]);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("functions of its chipset") && !text.contains("device bind"));
}

#[test]
fn bind_foresees_what_vfio_pci_turns_away() {
    let host = FakeHost::named("dsa");
    let bound = |host: &FakeHost| bind(host, &mut host.kernel(), &[at("0000:0a:00.0")]);
    let Err(ChangeError::Refused(refused)) = bound(&host) else {
        panic!("not refused");
    };
    let address = at("0000:0a:00.0");
    assert_eq!(refused.0, [Refusal::Denied { address }]);
    // Told to take it, as it runs or as it would be loaded.
    host.file("sys/module/vfio_pci/parameters/disable_denylist", "Y");
    assert!(matches!(bound(&host), Err(ChangeError::Bind { .. })));
    std::fs::remove_dir_all(host.path("sys/module/vfio_pci")).unwrap();
    assert!(matches!(bound(&host), Err(ChangeError::Refused(_))));
    let line = "options vfio-pci ids=1:2 disable_denylist=1";
    host.file("etc/modprobe.d/vfio.conf", line);
    assert!(matches!(bound(&host), Err(ChangeError::Bind { .. })));
}

#[test]
fn a_frame_buffer_of_the_console_and_a_want_of_an_iommu_stand_against_it() {
    let host = FakeHost::named("bootfb");
    let check = checked(&host, &[at("0000:c3:00.0")]);
    assert_eq!(obstacles(&check), ["display"]);
    assert!(format!("{check:?}").contains("BOOTFB, simpledrm"));
    let host = FakeHost::named("noiommu");
    for address in ["0000:00:05.0", "0000:00:06.0"] {
        let check = checked(&host, &[at(address)]);
        assert!(obstacles(&check).contains(&"group"));
        assert!(!format!("{check:?}").contains("allow_unsafe_interrupts"));
        let refused = bind(&host, &mut host.kernel(), &[at(address)]);
        assert!(matches!(refused, Err(ChangeError::Refused(_))));
    }
}

#[test]
fn a_token_is_told_of_where_vfio_has_the_physical_function() {
    let host = FakeHost::named("pfvfio");
    for address in ["0000:18:00.0", "0000:18:02.0", "0000:18:02.1"] {
        let text = format!("{:?}", checked(&host, &[at(address)]));
        assert!(text.contains(&format!("--device {address},vf_token=UUID")));
    }
}

#[test]
fn devices_are_found_by_what_people_call_them() {
    let find = |host: &FakeHost, text: &str| text.parse::<Called>().unwrap().find(&host.root);
    let host = FakeHost::named("chipset");
    for (text, address) in [
        ("eno1", "0000:00:1f.6"),
        ("/sys/class/net/eno1", "0000:00:1f.6"),
        ("/sys/class/block/nvme0n1p3", "0000:01:00.0"),
        ("nvme0n1", "0000:01:00.0"),
        ("pci_0000_01_00_0", "0000:01:00.0"),
        ("144D:a80c", "0000:01:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("77:00.0", "0000:77:00.0"),
    ] {
        assert_eq!(find(&host, text), Ok(at(address)), "{text}");
    }
    for text in [
        "vmbr0",
        "eno7",
        "1234:5678",
        "/sys/class/net",
        "/etc/passwd",
        "/sys/../etc",
    ] {
        let found = find(&host, text);
        assert_eq!(found, Err(CalledError::Nothing(text.to_owned())));
    }
    assert_eq!(find(&FakeHost::named("vmd"), "e1:00.0"), Ok(at(VMD[1])));
    let found = find(&FakeHost::named("pfvfio"), "8086:154c");
    let devices = vec![at("0000:18:02.0"), at("0000:18:02.1")];
    let called = "8086:154c".to_owned();
    assert_eq!(found, Err(CalledError::Several { called, devices }));
}

#[test]
fn a_node_without_memory_is_told_from_one_that_is_not_there() {
    let host = FakeHost::named("huge");
    let reserve = |node| {
        let (mut kernel, mut tell) = (host.kernel(), |_: &_| ());
        let mut session = Session::new(&host.root, &mut kernel, &mut tell);
        host::reserve_huge_pages(&mut session, Some(node), 2 << 20, 2 << 20)
    };
    let says = |node| reserve(node).unwrap_err().to_string();
    assert!(says(4).starts_with("NUMA node 4 has processors and no memory"));
    assert!(says(77).starts_with("this host has no NUMA node 77"));
    let found = host::examine(&host.root, 0, &|_| Ok(()));
    let low = found
        .iter()
        .find(|f| f.text.starts_with("hardly any"))
        .unwrap();
    assert!(
        low.text.ends_with("0, 1, 2, 3, 8, 9, 10, 11"),
        "{}",
        low.text
    );
}

#[test]
fn vfio_pci_makes_virtual_functions_where_it_was_told_to() {
    let host = FakeHost::named("pfvfio");
    let make = || {
        let (mut kernel, mut tell) = (host.kernel(), |_: &_| ());
        let mut session = Session::new(&host.root, &mut kernel, &mut tell).dry_run(true);
        let options = host::VfsOptions {
            count: Some(1),
            ..host::VfsOptions::default()
        };
        host::vfs(&mut session, at("0000:18:00.0"), &options)
    };
    make().unwrap();
    host.file("sys/module/vfio_pci/parameters/enable_sriov", "N");
    let error = make().unwrap_err().to_string();
    assert!(error.contains("its own driver is what makes"), "{error}");
}
