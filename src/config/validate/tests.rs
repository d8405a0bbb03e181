use super::*;
use crate::config::{
    DeviceConfig, DiskConfig, FirmwareConfig, FsConfig, NetConfig, Topology, VsockConfig,
};

/// A VM that is in order, changed by `change`.
fn validate(change: impl FnOnce(&mut VmConfig)) -> Result<(), String> {
    let mut config = VmConfig {
        kernel: Some("vmlinuz".into()),
        ..VmConfig::default()
    };
    change(&mut config);
    config.validate().map_err(|error| error.to_string())
}

fn complaint(change: impl FnOnce(&mut VmConfig)) -> String {
    validate(change).unwrap_err()
}

fn device(address: &str, id: Option<&str>) -> DeviceConfig {
    DeviceConfig {
        id: id.map(str::to_owned),
        ..DeviceConfig::new(address).unwrap()
    }
}

#[test]
fn a_vf_token_is_a_uuid_wherever_it_is_said() {
    const GOOD: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    let with = |of_device: &str, of_platform: &str| {
        validate(|vm| {
            vm.device = vec![DeviceConfig {
                vf_token: Some(of_device.to_owned()),
                ..device("01:00.0", None)
            }];
            vm.platform.vf_token = Some(of_platform.to_owned());
        })
    };
    assert_eq!(with(GOOD, GOOD), Ok(()));
    let error = with("secret", GOOD).unwrap_err();
    assert!(
        error.starts_with("--device no. 1: vf_token=`secret` is no UUID"),
        "{error}"
    );
    let error = with(GOOD, "secret").unwrap_err();
    assert!(
        error.starts_with("--platform: vf_token=`secret` is no UUID"),
        "{error}"
    );
}

#[test]
fn what_tells_a_machine_from_another_can_be_told_in_smbios() {
    let with = |serial: &str, uuid: &str, strings: &[&str]| {
        validate(|vm| {
            vm.platform.serial_number = Some(serial.to_owned());
            vm.platform.uuid = Some(uuid.to_owned());
            vm.platform.oem_strings = strings.iter().map(|&text| text.to_owned()).collect();
        })
    };
    const GOOD: &str = "3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611";
    let long = "x".repeat(32 << 10);
    assert_eq!(
        with("s", GOOD, &["é", "io.systemd.credential:a=b\n"]),
        Ok(())
    );
    assert_eq!(with("s", GOOD, &["x"; 255]), Ok(()));
    assert_eq!(with("s", GOOD, &[&long[..(32 << 10) - 3]]), Ok(()));
    for (case, words) in [
        (with("s", "u", &[]), "--platform: uuid=`u` is no UUID"),
        (
            with("", GOOD, &[]),
            "serial_number= has a text that is empty",
        ),
        (
            with("s", GOOD, &["a", ""]),
            "oem_strings= has a text that is empty",
        ),
        (with("s", GOOD, &["a\0b"]), "or has a zero byte"),
        (
            with("s", GOOD, &["x"; 256]),
            "256 strings, and a guest can be told 255",
        ),
        (
            with("s", GOOD, &[&long]),
            "32771 bytes together, and there is room for 32768",
        ),
    ] {
        let error = case.unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn the_defaults_with_a_kernel_are_a_vm() {
    assert_eq!(validate(|_| ()), Ok(()));
    assert!(complaint(|vm| vm.kernel = None).contains("--kernel FILE"));
}

#[test]
fn processors_are_counted() {
    assert_eq!(validate(|vm| vm.cpus.boot = 255), Ok(()));
    assert!(complaint(|vm| vm.cpus.boot = 0).starts_with("--cpus boot=0"));
    assert!(complaint(|vm| vm.cpus.boot = 0).contains("1 to 255"));
    assert!(complaint(|vm| vm.cpus.max = Some(0)).contains("from boot=1 to 255"));
    assert!(complaint(|vm| vm.cpus.topology = Some(Topology::cores(2))).contains("are not 1"));
    let grouped = |vm: &mut VmConfig| {
        vm.cpus.boot = 2;
        vm.cpus.topology = Some(Topology::cores(2));
    };
    assert_eq!(validate(grouped), Ok(()));
    assert_eq!(validate(|vm| vm.cpus.max = Some(2)), Ok(()));
}

#[test]
fn memory_has_a_least_size_and_a_step() {
    let sized = |size| complaint(move |vm: &mut VmConfig| vm.memory.size = size);
    assert!(sized(512).contains("16M at least"));
    assert!(sized((512 << 20) + 1).contains("multiple of 1048576"));
    let huge = |size, on: bool| {
        move |vm: &mut VmConfig| {
            vm.memory.hugepages = on;
            vm.memory.hugepage_size = Some(size);
        }
    };
    assert_eq!(validate(huge(2 << 20, true)), Ok(()));
    assert!(complaint(huge(2 << 20, false)).contains("hugepages=on"));
    assert!(complaint(huge(3 << 20, true)).contains("power of two"));
    assert!(complaint(huge(1 << 30, true)).contains("hugepage_size"));
}

#[test]
fn queues_are_counted_and_sized() {
    let disk = |count, size| {
        complaint(move |vm: &mut VmConfig| {
            vm.disk.push(DiskConfig::new("a"));
            vm.disk.push(DiskConfig {
                num_queues: count,
                queue_size: size,
                ..DiskConfig::new("b")
            });
        })
    };
    assert!(disk(0, 128).starts_with("--disk no. 2: num_queues=0 must be from 1 to 64"));
    assert!(disk(65, 128).contains("num_queues=65"));
    // What the device cannot be is found here, and not when the VM is put together.
    for size in [0, 2, 100, 2048, 32768] {
        let expected =
            format!("--disk no. 2: queue_size={size} must be a power of two from 4 to 1024");
        assert_eq!(disk(1, size), expected);
    }
    for size in [0, 2, 16, 100, 8192, 32768] {
        let error = complaint(|vm| {
            vm.net.push(NetConfig {
                queue_size: size,
                ..NetConfig::default()
            });
        });
        assert!(error.contains("a power of two from 32 to 4096"), "{error}");
    }
    let odd = complaint(|vm| {
        vm.net.push(NetConfig {
            num_queues: 3,
            id: Some("lan".into()),
            ..NetConfig::default()
        });
    });
    assert!(
        odd.starts_with("--net id=lan: num_queues=3 must be even"),
        "{odd}"
    );
}

#[test]
fn a_guests_address_for_sockets_is_none_of_the_hosts() {
    let vsock = |cid, id: &str| VsockConfig {
        cid,
        socket: None,
        id: Some(id.into()),
        pci_segment: 0,
        pci_device_id: None,
    };
    for cid in [0, 1, 2, u32::MAX] {
        let error = complaint(|vm| vm.vsock = Some(vsock(cid, "s")));
        let expected = format!("--vsock: cid={cid} must be from 3 to 4294967294");
        assert!(error.starts_with(&expected), "{error}");
    }
    let twice = complaint(|vm| {
        vm.vsock = Some(vsock(3, "lan"));
        vm.net.push(NetConfig {
            id: Some("lan".into()),
            ..NetConfig::default()
        });
    });
    assert!(twice.contains("the same id"), "{twice}");
}

#[test]
fn a_device_given_twice_is_refused_by_both_names() {
    let twice = complaint(|vm| {
        vm.device.push(device("01:00.0", None));
        vm.device.push(device("02:00.0", None));
        vm.device
            .push(device("/sys/bus/pci/devices/0000:01:00.0/", Some("nvme")));
    });
    assert_eq!(
        twice,
        "--device no. 1 and --device id=nvme have the same host device, `0000:01:00.0`: \
         a device can be given once"
    );
}

#[test]
fn a_device_given_by_address_and_by_descriptor_is_refused_once_the_descriptor_is_known() {
    let by_address = device("01:00.0", None);
    let mut by_descriptor = device("02:00.0", Some("inherited"));
    (by_descriptor.path, by_descriptor.fd) = ("".into(), Some(5));
    let mut devices = [by_address, by_descriptor];
    assert_eq!(validate_functions(&devices), Ok(()));
    devices[1].path = "/sys/devices/pci0000:00/0000:01:00.0".into();
    let error = validate_functions(&devices).unwrap_err().to_string();
    assert!(
        error.starts_with("--device no. 1 and --device id=inherited have the same host device"),
        "{error}"
    );
}

#[test]
fn a_disk_image_is_shared_only_for_reading() {
    let pair = |readonly| {
        move |vm: &mut VmConfig| {
            for path in ["/img/a.raw", "/img/./a.raw"] {
                vm.disk.push(DiskConfig {
                    readonly,
                    ..DiskConfig::new(path)
                });
            }
        }
    };
    assert_eq!(validate(pair(true)), Ok(()));
    assert!(complaint(pair(false)).contains("`/img/a.raw`"));
}

#[test]
fn names_are_unique_among_all_devices() {
    let same = complaint(|vm| {
        vm.disk.push(DiskConfig {
            id: Some("x".into()),
            ..DiskConfig::new("a")
        });
        vm.device.push(device("01:00.0", Some("x")));
    });
    assert!(same.starts_with("--disk no. 1 and --device no. 1 have the same id, `x`"));
    assert!(complaint(|vm| vm.device.push(device("01:00.0", Some("a b")))).contains("a b"));
    assert!(complaint(|vm| vm.device.push(device("01:00.0", Some("")))).contains("id=``"));
}

#[test]
fn one_terminal_is_not_two() {
    let both = complaint(|vm| {
        vm.serial = ConsoleConfig::Tty;
        vm.console = ConsoleConfig::Tty;
    });
    assert!(both.contains("one terminal"));
}

#[test]
fn taps_and_macs_are_what_linux_takes() {
    let net = |tap: &str, mac: &str| NetConfig {
        tap: Some(tap.to_owned()),
        mac: Some(mac.parse().unwrap()),
        ..NetConfig::default()
    };
    let one = |tap: &'static str, mac: &'static str| validate(move |vm| vm.net.push(net(tap, mac)));
    assert_eq!(one("vmtap0", "52:54:00:12:34:56"), Ok(()));
    for tap in ["", "..", "a/b", "a b", "sixteencharacter"] {
        assert!(one(tap, "52:54:00:12:34:56").is_err(), "{tap}");
    }
    let same = complaint(|vm| {
        vm.net.push(net("a", "52:54:00:AA:00:01"));
        vm.net.push(net("b", "52:54:00:aa:00:01"));
    });
    assert!(same.contains("same mac"), "{same}");
}

#[test]
fn a_rom_is_given_or_not_and_cliques_count_to_15() {
    let changed = |change: fn(&mut DeviceConfig)| {
        validate(move |vm| {
            let mut device = device("01:00.0", Some("gpu"));
            change(&mut device);
            vm.device.push(device);
        })
    };
    assert_eq!(
        changed(|device| device.romfile = Some("a.rom".into())),
        Ok(())
    );
    assert_eq!(
        changed(|device| device.x_nv_gpudirect_clique = Some(15)),
        Ok(())
    );
    let both = changed(|device| {
        device.rom = Some(false);
        device.romfile = Some("a.rom".into());
    });
    assert!(both.unwrap_err().contains("leave one out"));
    let clique = changed(|device| device.x_nv_gpudirect_clique = Some(16)).unwrap_err();
    assert!(clique.contains("from 0 to 15"), "{clique}");
}

#[test]
fn a_descriptor_in_the_place_of_a_device_is_no_standard_one_and_given_once() {
    let inherited = |fd| DeviceConfig {
        path: "".into(),
        fd: Some(fd),
        ..device("0000:01:00.0", None)
    };
    assert_eq!(
        validate(|vm| vm.device = vec![inherited(3), inherited(4)]),
        Ok(())
    );
    let standard = complaint(|vm| vm.device.push(inherited(2)));
    assert!(standard.contains("fd=2 is standard"), "{standard}");
    let twice = complaint(|vm| vm.device = vec![inherited(3), inherited(3)]);
    assert!(twice.contains("the same fd, `3`"), "{twice}");
    let shared = complaint(|vm| {
        vm.device.push(inherited(5));
        vm.platform.iommufd_fd = Some(5);
    });
    assert!(shared.contains("--platform have the same fd"), "{shared}");
    let taps = |fd: &[u32]| NetConfig {
        fd: fd.to_vec(),
        num_queues: 4,
        ..NetConfig::default()
    };
    let twice = complaint(|vm| vm.net = vec![taps(&[3, 4]), taps(&[5, 3])]);
    assert!(twice.contains("the same fd, `3`"), "{twice}");
    let standard = complaint(|vm| vm.net = vec![taps(&[3, 1])]);
    assert!(standard.contains("fd=1 is standard"), "{standard}");
    let off = complaint(|vm| {
        vm.platform.iommufd_fd = Some(5);
        vm.platform.iommufd = Choice::Off;
    });
    assert!(off.contains("contradicts iommufd=off"), "{off}");
}

#[test]
fn a_guest_has_from_a_second_to_an_hour_to_let_go_of_a_device() {
    let with = |seconds| validate(|vm| vm.platform.removal_timeout = Some(seconds));
    assert_eq!((with(1), with(3600)), (Ok(()), Ok(())));
    for seconds in [0, 3601] {
        let why = with(seconds).unwrap_err();
        assert!(why.contains("1 to 3600 seconds"), "{why}");
    }
}

#[test]
fn a_guest_has_from_a_second_to_an_hour_to_power_off() {
    let with = |seconds| validate(|vm| vm.platform.power_off_timeout = Some(seconds));
    assert_eq!((with(1), with(3600)), (Ok(()), Ok(())));
    for seconds in [0, 3601] {
        let why = with(seconds).unwrap_err();
        assert!(why.contains("1 to 3600 seconds to power off"), "{why}");
    }
}

#[test]
fn a_console_s_file_has_room_for_a_line_and_is_one_console_s() {
    let with = |serial: (&str, u64), console: (&str, u64)| {
        let file = |(path, size): (&str, u64)| ConsoleConfig::File {
            path: path.into(),
            size,
        };
        validate(|vm| (vm.serial, vm.console) = (file(serial), file(console)))
    };
    assert_eq!(with(("/a", 4096), ("/b", u64::MAX)), Ok(()));
    let error = with(("/a", 4096), ("/b", 4095)).unwrap_err();
    assert!(error.starts_with("--console size=4095: "), "{error}");
    let error = with(("/a", 4096), ("//./a", 4096)).unwrap_err();
    assert!(
        error.starts_with("--serial and --console have the same file, `/a`"),
        "{error}"
    );
}

#[test]
fn a_disk_or_a_device_alone_is_booted_by_the_distributions_firmware() {
    let begun = |change: fn(&mut VmConfig)| {
        let mut config = VmConfig::default();
        change(&mut config);
        config.find_firmware();
        config
    };
    let disk = |vm: &mut VmConfig| vm.disk.push(DiskConfig::new("debian.raw"));
    let found = begun(disk);
    assert_eq!(found.firmware, Some(FirmwareConfig::default()));
    assert_eq!(found.validate(), Ok(()));
    let found = begun(|vm| vm.device.push(device("01:00.0", None)));
    assert!(found.firmware.is_some());
    // A kernel is enough, and nothing is not.
    let with_kernel = begun(|vm| {
        vm.kernel = Some("vmlinuz".into());
        vm.disk.push(DiskConfig::new("debian.raw"));
    });
    assert_eq!(with_kernel.firmware, None);
    assert_eq!(begun(|_| {}).validate(), Err(InvalidConfig::NoKernel));
}

#[test]
fn what_is_a_kernels_needs_a_kernel_also_beside_firmware() {
    let without = |change: fn(&mut VmConfig)| {
        complaint(|vm| {
            vm.kernel = None;
            vm.firmware = Some(FirmwareConfig::default());
            change(vm);
        })
    };
    assert_eq!(
        without(|vm| vm.initramfs = Some("initrd.img".into())),
        "--initramfs is for a kernel: give that with --kernel FILE, or leave --initramfs out"
    );
    let cmdline = without(|vm| vm.cmdline = Some(String::new()));
    assert!(cmdline.starts_with("--cmdline is for a kernel"));
    let both = validate(|vm| {
        vm.firmware = Some(FirmwareConfig::default());
        vm.initramfs = Some("initrd.img".into());
    });
    assert_eq!(both, Ok(()));
}

#[test]
fn a_boot_index_is_one_devices_and_is_for_firmware() {
    let disk = |index| DiskConfig {
        boot_index: Some(index),
        ..DiskConfig::new(format!("{index}.raw"))
    };
    assert_eq!(
        complaint(|vm| vm.disk.push(disk(1))),
        "--disk no. 1: boot_index= is for firmware: give --firmware auto, or leave boot_index= out"
    );
    let order = |of_disk, of_device| {
        validate(|vm| {
            vm.firmware = Some(FirmwareConfig::default());
            vm.disk.push(disk(of_disk));
            vm.device.push(DeviceConfig {
                boot_index: Some(of_device),
                ..device("01:00.0", None)
            });
        })
    };
    assert_eq!(order(2, 1), Ok(()));
    assert_eq!(
        order(1, 1).unwrap_err(),
        "--disk no. 1 and --device no. 1 have the same boot_index, `1`: give each a number of its own"
    );
}

#[test]
fn a_disk_is_another_processs_by_its_socket_and_nothing_else_is_said_of_it() {
    let disk = |change: fn(&mut DiskConfig)| {
        let mut disk = DiskConfig {
            vhost_user: true,
            socket: Some("/run/s".into()),
            ..DiskConfig::new("")
        };
        change(&mut disk);
        validate(|vm| vm.disk = vec![disk])
    };
    assert_eq!(disk(|_| ()), Ok(()));
    assert_eq!(disk(|disk| disk.num_queues = 4), Ok(()));
    type Change = fn(&mut DiskConfig);
    let wrong: [(Change, &str); 7] = [
        (|disk| disk.socket = None, "socket=PATH is missing"),
        (
            |disk| disk.socket = Some("".into()),
            "socket=PATH is missing",
        ),
        (
            |disk| disk.vhost_user = false,
            "socket= is for vhost_user=on",
        ),
        (|disk| disk.path = "a".into(), "path is for the process"),
        (|disk| disk.readonly = true, "readonly is for the process"),
        (|disk| disk.serial = Some("s".into()), "serial is for"),
        (
            |disk| (disk.ops_size, disk.ops_refill_time) = (Some(1), Some(1)),
            "ops_size is for",
        ),
    ];
    for (change, words) in wrong {
        let why = disk(change).unwrap_err();
        assert!(
            why.starts_with("--disk no. 1: ") && why.contains(words),
            "{why}"
        );
    }
}

#[test]
fn a_folder_has_a_tag_and_a_socket_of_its_own() {
    let with = |folders: &[(&str, &str)]| {
        let folders = folders
            .iter()
            .map(|(tag, socket)| FsConfig::new(*tag, socket));
        validate(|vm| vm.fs = folders.collect())
    };
    let long = "t".repeat(36);
    assert_eq!(with(&[(&long, "/a"), ("t", "/b")]), Ok(()));
    for (folders, words) in [
        (&[("", "/a")][..], "1 to 36 bytes"),
        (&[(&*"t".repeat(37), "/a")], "1 to 36 bytes"),
        (&[("t", "")], "socket=PATH is missing"),
        (&[("t", "/a"), ("t", "/b")], "same tag"),
        (&[("t", "/a"), ("u", "//a/.")], "same socket"),
    ] {
        let why = with(folders).unwrap_err();
        assert!(
            why.starts_with("--fs no. 1") && why.contains(words),
            "{why}"
        );
    }
    let queues = complaint(|vm| {
        let many = FsConfig {
            num_queues: 65,
            ..FsConfig::new("t", "/a")
        };
        vm.fs = vec![many];
    });
    assert!(queues.contains("num_queues=65"), "{queues}");
}

#[test]
fn a_balloon_has_room_in_ram_and_none_beside_huge_pages() {
    let with = |size, hugepages| {
        move |vm: &mut VmConfig| {
            vm.memory.size = 64 << 20;
            vm.memory.hugepages = hugepages;
            vm.balloon = Some(BalloonConfig {
                size,
                ..BalloonConfig::default()
            });
        }
    };
    assert_eq!(validate(with(64 << 20, false)), Ok(()));
    for size in [(64 << 20) + 4096, 4095] {
        let said = complaint(with(size, false));
        assert!(said.contains(&format!("size={size}: ")), "{said}");
    }
    let said = complaint(with(0, true));
    assert!(said.contains("leave one of the two out"), "{said}");
}

#[test]
fn blocks_of_a_balloon_have_a_size_that_can_be_mapped_and_are_asked_for() {
    let with = |vfio, block| {
        move |vm: &mut VmConfig| {
            vm.memory.size = 64 << 20;
            vm.balloon = Some(BalloonConfig {
                vfio,
                block,
                ..BalloonConfig::default()
            });
        }
    };
    for block in [None, Some(2 << 20), Some(128 << 20)] {
        assert_eq!(validate(with(BesideDevices::Remap, block)), Ok(()));
    }
    for block in [0, 1 << 20, 3 << 20, 256 << 20] {
        let said = complaint(with(BesideDevices::Remap, Some(block)));
        assert!(said.contains("from 2M to 128M"), "{said}");
    }
    let said = complaint(with(BesideDevices::Keep, Some(2 << 20)));
    assert!(said.contains("needs vfio=remap"), "{said}");
}

#[test]
fn where_a_vm_is_is_said_in_one_way() {
    let auto = |change: fn(&mut VmConfig)| {
        validate(|vm| {
            vm.place = Placing::Auto;
            change(vm);
        })
    };
    assert_eq!(auto(|_| ()), Ok(()));
    // Each vCPU will have a processor.
    assert_eq!(auto(|vm| vm.cpus.dedicated = true), Ok(()));
    let zone = auto(|vm| {
        let size = vm.memory.size;
        vm.memory_zone = vec![crate::config::MemoryZoneConfig::new("a", size)];
    });
    assert!(zone.unwrap_err().contains("so does --memory-zone"));
    let numa = auto(|vm| vm.numa = vec![crate::config::NumaConfig::default()]);
    assert!(numa.unwrap_err().contains("so does --numa"));
}

#[test]
fn zones_and_nodes_are_held_to_their_rules_and_named_by_their_flags() {
    let error = complaint(|vm| vm.memory_zone = vec![crate::config::MemoryZoneConfig::new("a", 1)]);
    assert!(error.starts_with("--memory-zone id=a: size=1 "), "{error}");
    let error = complaint(|vm| vm.numa = vec![crate::config::NumaConfig::default()]);
    assert!(error.starts_with("--numa vCPU 0 is in no node"), "{error}");
    // A balloon gives back single pages.
    let error = complaint(|vm| {
        vm.memory_zone = vec![crate::config::MemoryZoneConfig {
            hugepages: true,
            ..crate::config::MemoryZoneConfig::new("a", vm.memory.size)
        }];
        vm.balloon = Some(BalloonConfig::default());
    });
    assert!(error.starts_with("--balloon beside"), "{error}");
}
