//! `busway device` on made-up hosts: every table, every refusal, and what each command says.
//!
//! The texts are in `tests/cli/device/`; `SNAPSHOTS=overwrite` writes them anew, to be looked at.

#[path = "device/binding.rs"]
mod binding;
#[path = "../../vfio/host/tests/fake_host/mod.rs"]
mod fake_host;

use busway::cli::device::{DeviceArgs, DeviceCommandError, run_on};
use busway_host::LinuxKernel;
use clap::{Args as _, FromArgMatches as _};
use fake_host::{FakeHost, FakeKernel, Spec};
use snapbox::{assert_data_eq, file, str};

fn parse(words: &str) -> Result<DeviceArgs, clap::Error> {
    let command = DeviceArgs::augment_args(clap::Command::new("busway device").term_width(80));
    let words = std::iter::once("busway device").chain(words.split_whitespace());
    DeviceArgs::from_arg_matches(&command.try_get_matches_from(words)?)
}

fn run_with(
    host: &FakeHost,
    kernel: &mut FakeKernel,
    words: &str,
    width: Option<usize>,
) -> Result<String, DeviceCommandError> {
    let mut out = Vec::new();
    let args = parse(words).unwrap();
    run_on(&args, &host.root, kernel, &mut out, width)?;
    Ok(String::from_utf8(out).unwrap())
}

fn run(host: &FakeHost, words: &str) -> Result<String, DeviceCommandError> {
    run_with(host, &mut host.kernel(), words, None)
}

/// A refusal's exit status and text; nothing may have been changed for it.
fn refused(host: &FakeHost, words: &str) -> String {
    let mut kernel = host.kernel();
    let error = run_with(host, &mut kernel, words, None).unwrap_err();
    assert!(kernel.log.is_empty(), "{:?}", kernel.log);
    format!("exit status {}\n{error}\n", error.exit_status())
}

/// A laptop: a graphics card and its audio function in one group with the port above them, the
/// chipset's functions in another, an NVMe drive with the system on it behind encryption and LVM.
fn laptop() -> FakeHost {
    let mut host = FakeHost::new();
    let chipset = |address, device, class, driver| Spec {
        address,
        device,
        class,
        driver,
        group: Some(9),
        ..Spec::default()
    };
    host.device(&Spec {
        device: 0x3e1f,
        class: 0x060000,
        address: "0000:00:00.0",
        driver: Some("skl_uncore"),
        group: Some(0),
        ..Spec::default()
    });
    host.device(&Spec {
        address: "0000:00:01.0",
        device: 0x1901,
        class: 0x060400,
        driver: Some("pcieport"),
        group: Some(1),
        ..Spec::default()
    });
    let card = |address, device, class, driver| Spec {
        address,
        behind: "pci0000:00/0000:00:01.0",
        vendor: 0x10de,
        device,
        class,
        driver,
        group: Some(1),
        ..Spec::default()
    };
    host.device(&card("0000:01:00.0", 0x1b81, 0x030000, Some("nouveau")));
    host.device(&card(
        "0000:01:00.1",
        0x10f0,
        0x040300,
        Some("snd_hda_intel"),
    ));
    host.device(&chipset("0000:00:1f.0", 0xa305, 0x060100, None));
    host.device(&chipset(
        "0000:00:1f.3",
        0xa348,
        0x040300,
        Some("snd_hda_intel"),
    ));
    host.device(&chipset(
        "0000:00:1f.4",
        0xa323,
        0x0c0500,
        Some("i801_smbus"),
    ));
    host.device(&chipset("0000:00:1f.6", 0x15bc, 0x020000, Some("e1000e")));
    host.interface(Some("0000:00:1f.6"), "enp0s31f6", &[]);
    host.device(&Spec {
        address: "0000:02:00.0",
        behind: "pci0000:00/0000:00:1b.0",
        vendor: 0x144d,
        device: 0xa808,
        class: 0x010802,
        driver: Some("nvme"),
        group: Some(11),
        ..Spec::default()
    });
    host.disk(
        "0000:02:00.0",
        "nvme/nvme0/nvme0n1",
        259,
        &["nvme0n1p1", "nvme0n1p2"],
    );
    host.mapped(0, "luks", "CRYPT-LUKS2-1", &["nvme0n1p2"]);
    host.mapped(1, "vg-root", "LVM-1", &["dm-0"]);
    host.mapped(2, "vg-swap", "LVM-2", &["dm-0"]);
    host.mount("253:1", "/", "/dev/mapper/vg-root");
    host.mount("259:1", "/boot/efi", "/dev/nvme0n1p1");
    host.append("proc/swaps", "/dev/dm-2 partition 8388604 0 -2");
    host.device(&Spec {
        address: "0000:03:00.0",
        behind: "pci0000:00/0000:00:1c.0",
        device: 0x2725,
        class: 0x028000,
        driver: Some("iwlwifi"),
        group: Some(12),
        ..Spec::default()
    });
    host.interface(Some("0000:03:00.0"), "wlp3s0", &[]);
    host.default_route("wlp3s0");
    host
}

/// A server of two sockets: a NIC with virtual functions, one of them a guest's, its other port in
/// a bond with the default route; data disks under RAID; a drive that ZFS might have.
fn server() -> FakeHost {
    let mut host = FakeHost::new();
    let nic = |address, device, group, driver| Spec {
        address,
        behind: "pci0000:17/0000:17:00.0",
        device,
        group: Some(group),
        node: 0,
        driver: Some(driver),
        ..Spec::default()
    };
    host.device(&nic("0000:18:00.0", 0x1572, 40, "i40e"));
    host.device(&nic("0000:18:00.1", 0x1572, 41, "i40e"));
    host.device(&nic("0000:18:02.0", 0x154c, 50, "vfio-pci"));
    host.device(&nic("0000:18:02.1", 0x154c, 51, "iavf"));
    host.interface(Some("0000:18:00.0"), "ens1f0", &[]);
    host.interface(Some("0000:18:00.1"), "ens1f1", &["bond0"]);
    host.interface(None, "bond0", &["br0"]);
    host.interface(None, "br0", &[]);
    host.default_route("br0");
    host.interface(Some("0000:18:02.1"), "ens1f0v1", &[]);
    let port = "sys/bus/pci/devices/0000:18:00.0";
    host.file(&format!("{port}/sriov_totalvfs"), "64\n");
    for (index, function) in ["0000:18:02.0", "0000:18:02.1"].iter().enumerate() {
        let function = format!("sys/bus/pci/devices/{function}");
        host.link(&format!("{port}/virtfn{index}"), &function);
        host.link(&format!("{function}/physfn"), port);
    }
    host.process(4242, "busway", "dev/vfio/50");
    for (address, disk, number) in [
        ("0000:af:00.0", "nvme0/nvme0n1", 259),
        ("0000:b0:00.0", "nvme1/nvme1n1", 260),
        ("0000:b1:00.0", "nvme2/nvme2n1", 261),
    ] {
        host.device(&Spec {
            address,
            behind: "pci0000:ae/0000:ae:00.0",
            vendor: 0x8086,
            device: 0x0a54,
            class: 0x010802,
            group: Some(number - 139),
            node: 1,
            driver: Some("nvme"),
            driver_override: None,
        });
        host.disk(address, &format!("nvme/{disk}"), number, &[]);
    }
    let raid = "sys/devices/virtual/block/md127";
    host.block(raid, "9:127");
    host.holds(raid, &["nvme0n1", "nvme1n1"]);
    host
}

fn host_without_iommu() -> FakeHost {
    let mut host = FakeHost::new();
    host.device(&Spec {
        group: None,
        ..Spec::default()
    });
    host.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\n");
    host.file("sys/firmware/acpi/tables/DMAR", "");
    host
}

#[test]
fn list_fits_a_terminal_of_80_columns() {
    let host = laptop();
    let table = run_with(&host, &mut host.kernel(), "list", Some(80)).unwrap();
    assert_data_eq!(table, file!["device/laptop-80.txt"].raw());
    let host = server();
    let table = run_with(&host, &mut host.kernel(), "list", Some(80)).unwrap();
    assert_data_eq!(table, file!["device/server-80.txt"].raw());
}

#[test]
fn list_uses_the_room_that_there_is() {
    let host = laptop();
    let table = run_with(&host, &mut host.kernel(), "list", Some(140)).unwrap();
    assert_data_eq!(table, file!["device/laptop-140.txt"].raw());
}

#[test]
fn list_in_a_pipe_cuts_nothing() {
    assert_data_eq!(
        run(&laptop(), "list").unwrap(),
        file!["device/laptop-pipe.txt"].raw()
    );
    assert_data_eq!(
        run(&server(), "list").unwrap(),
        file!["device/server-pipe.txt"].raw()
    );
}

#[test]
fn list_shows_only_what_is_asked_for() {
    let table = run(&laptop(), "list 01:00.1").unwrap();
    assert_eq!(table.lines().count(), 2);
    assert!(table.contains("0000:01:00.1"));
    assert_data_eq!(
        refused(&laptop(), "list 77:00.0"),
        str![[r#"
exit status 2
0000:77:00.0: there is no such PCI device
  see those there are: busway device list

"#]]
    );
}

#[test]
fn what_each_command_says_when_it_is_done() {
    let host = laptop();
    let mut kernel = host.kernel();
    let mut said = String::new();
    for words in [
        "bind 0000:01:00.0 /sys/bus/pci/devices/0000:01:00.1/",
        "bind 01:00.0",
        "unbind 01:00.0 01:00.1",
        "unbind 01:00.0",
    ] {
        let text = run_with(&host, &mut kernel, words, None).unwrap();
        said += &format!("$ busway device {words}\n{text}\n");
    }
    assert_data_eq!(said, file!["device/bind-unbind.txt"].raw());
}

#[test]
fn the_disk_that_the_system_runs_from_is_refused() {
    assert_data_eq!(
        refused(&laptop(), "bind 02:00.0"),
        file!["device/refused-system.txt"].raw()
    );
}

#[test]
fn the_way_to_the_network_is_refused() {
    assert_data_eq!(
        refused(&laptop(), "bind 03:00.0"),
        file!["device/refused-route.txt"].raw()
    );
    assert_data_eq!(
        refused(&server(), "bind 18:00.1"),
        file!["device/refused-bond.txt"].raw()
    );
}

#[test]
fn a_raid_member_is_refused_though_the_raid_is_not_mounted() {
    assert_data_eq!(
        refused(&server(), "bind af:00.0"),
        file!["device/refused-raid.txt"].raw()
    );
}

#[test]
fn a_function_with_virtual_functions_is_refused() {
    assert_data_eq!(
        refused(&server(), "bind 18:00.0"),
        file!["device/refused-vfs.txt"].raw()
    );
}

#[test]
fn a_group_that_others_stay_in_is_refused_with_the_command_that_takes_them_along() {
    assert_data_eq!(
        refused(&laptop(), "bind 01:00.0"),
        file!["device/refused-group.txt"].raw()
    );
}

#[test]
fn a_group_with_a_member_in_use_says_so() {
    let host = laptop();
    host.default_route("enp0s31f6");
    assert_data_eq!(
        refused(&host, "bind 00:1f.3"),
        file!["device/refused-group-in-use.txt"].raw()
    );
}

#[test]
fn a_bridge_with_a_hot_plug_driver_is_named_with_the_way_to_free_it() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        class: 0x060400,
        driver: Some("shpchp"),
        ..Spec::default()
    });
    host.device(&Spec {
        address: "0000:00:02.1",
        ..Spec::default()
    });
    assert_data_eq!(
        refused(&host, "bind 00:02.1"),
        str![[r#"
exit status 3
0000:00:02.1 cannot go alone: IOMMU group 2 goes to a guest as a whole, and of it
  0000:00:02.0 is with shpchp, a bridge
  take the bridge from its driver: echo 0000:00:02.0 > /sys/bus/pci/drivers/shpchp/unbind
  or bind without them, though no guest can have it before they go too: --allow-group

"#]]
    );
}

#[test]
fn without_an_iommu_the_kernel_parameter_is_named() {
    assert_data_eq!(
        refused(&host_without_iommu(), "bind 00:02.0"),
        str![[r#"
exit status 3
0000:00:02.0 is in no IOMMU group
  boot the kernel with the parameter intel_iommu=on

"#]]
    );
}

#[test]
fn every_reason_is_given_at_once() {
    assert_data_eq!(
        refused(&laptop(), "bind 77:00.0 00:01.0 01:00.0 03:00.0"),
        file!["device/refused-several.txt"].raw()
    );
}

#[test]
fn a_device_that_a_guest_has_is_not_taken_back() {
    assert_data_eq!(
        refused(&server(), "unbind 18:02.0"),
        str![[r#"
exit status 3
0000:18:02.0 is held by busway (pid 4242)
  end it first: the kernel would wait for it
  or have the kernel ask it to release the device, and wait: --allow-open

"#]]
    );
}

#[test]
fn a_failed_step_names_the_attribute_the_reason_and_the_way_on() {
    let host = laptop();
    let said = |errno, step: &'static str| {
        let mut kernel = host.kernel();
        kernel.fails = Box::new(move |_, request| request.starts_with(step).then_some(errno));
        let error = run_with(&host, &mut kernel, "bind 01:00.0 01:00.1", None).unwrap_err();
        assert_eq!(error.exit_status(), 1);
        // The tree's folder has another name each time.
        let root = host.root.sys.parent().unwrap().display().to_string();
        format!("{error}\n").replace(&root, "")
    };
    let text = [
        said(libc::EPERM, "modprobe"),
        said(libc::EACCES, "devices/"),
        said(libc::EROFS, "devices/"),
        said(libc::EINVAL, "drivers/vfio-pci/bind 0000:01:00.1"),
    ]
    .join("\n");
    assert_data_eq!(text, file!["device/failed-steps.txt"].raw());
}

#[test]
fn what_is_no_address_is_bad_usage() {
    let error = parse("bind 01:00").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_data_eq!(error.to_string(), file!["device/no-address.txt"].raw());
    assert_eq!(parse("bind").unwrap_err().exit_code(), 2);
}

#[test]
fn the_help_is_for_people() {
    let help = |words| parse(words).unwrap_err().to_string();
    let text = [
        help("--help"),
        help("list --help"),
        help("bind --help"),
        help("unbind --help"),
        help("restore --help"),
        help("vfs --help"),
    ];
    assert_data_eq!(text.join("\n----\n\n"), file!["device/help.txt"].raw());
}

#[test]
fn five_hundred_devices_are_listed_at_once() {
    let mut host = FakeHost::new();
    for index in 0..500u32 {
        let address = format!("0000:{:02x}:{:02x}.0", index / 32, index % 32);
        host.device(&Spec {
            address: &address,
            group: Some(index),
            ..Spec::default()
        });
        host.interface(Some(&address), &format!("eth{index}"), &[]);
    }
    let table = run(&host, "list").unwrap();
    assert_eq!(table.lines().count(), 501);
}

#[test]
fn this_host_can_be_listed() {
    let root = busway_host::SysRoot::default();
    if root.sys.join("bus/pci/devices").exists() {
        let mut out = Vec::new();
        run_on(
            &parse("list").unwrap(),
            &root,
            &mut LinuxKernel,
            &mut out,
            Some(100),
        )
        .unwrap();
        assert!(out.starts_with(b"ADDRESS"));
    }
}

/// Runs `scripts/vfio-bind` with a stand-in for the binary. Returns its exit status and output.
fn vfio_bind(words: &[&str]) -> (i32, String) {
    use std::os::unix::fs::PermissionsExt as _;

    let folder = tempfile::tempdir().unwrap();
    let busway = folder.path().join("busway");
    std::fs::write(&busway, "#!/bin/sh\necho \"$@\"\n").unwrap();
    std::fs::set_permissions(&busway, std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/vfio-bind");
    let output = std::process::Command::new(script)
        .args(words)
        .env("BUSWAY", &busway)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code().unwrap(), text.trim().to_owned())
}

#[test]
fn vfio_bind_is_a_door_to_the_same() {
    let ok = |text: &str| (0, text.to_owned());
    assert_eq!(vfio_bind(&["list"]), ok("device list"));
    assert_eq!(
        vfio_bind(&["01:00.0", "02:00.0"]),
        ok("device bind 01:00.0 02:00.0")
    );
    assert_eq!(vfio_bind(&["bind", "f1:00.0"]), ok("device bind f1:00.0"));
    assert_eq!(
        vfio_bind(&["unbind", "01:00.0"]),
        ok("device unbind 01:00.0")
    );
    let (status, text) = vfio_bind(&[]);
    assert_eq!(status, 2);
    assert!(text.contains("vfio-bind unbind ADDRESS"), "{text}");
}
