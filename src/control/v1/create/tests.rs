use super::*;
use crate::config::{BalloonConfig, BesideDevices, PlatformConfig, TpmConfig};
use crate::control::json::parse;

fn config(body: &str) -> Result<VmConfig, Fault> {
    with_files(body, &Files::default()).map(|(config, _)| config)
}

fn with_files(body: &str, files: &Files) -> Result<(VmConfig, Handed), Fault> {
    parse::<CreateVm>(body.as_bytes())?.into_config(files)
}

/// What Cloud Hypervisor has where nothing is said.
fn defaults() -> VmConfig {
    VmConfig {
        serial: ConsoleConfig::Null,
        console: ConsoleConfig::Tty,
        landlock: Choice::Off,
        platform: PlatformConfig {
            root_ports: Some(false),
            ..PlatformConfig::default()
        },
        ..VmConfig::default()
    }
}

#[test]
fn devices_are_on_bus_0_unless_the_body_says_otherwise() {
    let on_bus_0 = |body: &str| {
        let config = config(body).unwrap();
        let devices = config.device.iter();
        let on = devices.map(|device| config.platform.has_on_root_bus(device));
        on.collect::<Vec<_>>()
    };
    let devices = r#""devices":[{"path":"01:00.0"},{"path":"02:00.0","root_port":true},{"path":"03:00.0","root_port":false}]"#;
    for (platform, expected) in [
        ("null", [true, false, true]),
        (r#"{"num_pci_segments":2}"#, [true, false, true]),
        (r#"{"root_ports":true}"#, [false, false, true]),
    ] {
        let body = format!(r#"{{{devices},"platform":{platform}}}"#);
        assert_eq!(on_bus_0(&body), expected, "{platform}");
    }
}

#[test]
fn what_is_absent_null_or_unknown_is_as_cloud_hypervisor_has_it() {
    for body in [
        "{}",
        r#"{"cpus":null,"memory":null,"payload":null,"disks":null,"net":null,"rng":null,"serial":null,
            "console":null,"devices":null,"platform":null,"fs":null,"vsock":null,"balloon":null,"numa":null,"tpm":null,
            "watchdog":false,"iommu":false,"pvpanic":false,"landlock_enable":false,"sgx_epc":null}"#,
        r#"{"cpus":{"boot_vcpus":null,"features":{"amx":false},"kvm_hyperv":false,"affinity":null},
            "memory":{"mergeable":false,"prefault":false,"zones":[],"hotplugged_size":null},
            "payload":{"firmware":null,"kernel":"","initramfs":null,"mrconfigid":null,"host_data":null},
            "disks":[],"fs":[],"rng":{"src":null,"iommu":false},"debug_console":{"mode":"Off"},
            "platform":{"tdx":false,"sev_snp":false,"nonsense":[1,2]},"nonsense":{"a":{}}}"#,
    ] {
        assert_eq!(config(body), Ok(defaults()), "{body}");
    }
}

#[test]
fn a_balloon_a_watchdog_pvpanic_and_a_tpm_are_there_where_they_are_asked_for() {
    let body = r#"{"balloon":{"size":4096,"free_page_reporting":true,"vfio":"remap","block":4194304,"nonsense":1},
        "watchdog":true,"pvpanic":true,"tpm":{"socket":"/run/swtpm"}}"#;
    let expected = VmConfig {
        balloon: Some(BalloonConfig {
            size: 4096,
            deflate_on_oom: false,
            free_page_reporting: true,
            vfio: BesideDevices::Remap,
            block: Some(4 << 20),
        }),
        watchdog: true,
        pvpanic: true,
        tpm: Some(TpmConfig {
            socket: "/run/swtpm".into(),
        }),
        ..defaults()
    };
    assert_eq!(config(body), Ok(expected));
    assert!(config(r#"{"balloon":{}}"#).is_err(), "its size is missing");
    let nowhere = config(r#"{"tpm":{"socket":""}}"#);
    assert!(nowhere.is_err_and(|why| why.to_string().contains("socket is missing")));
}

#[test]
fn a_vm_in_cloud_hypervisors_words_is_the_same_as_in_flags() {
    let body = r#"{"cpus":{"boot_vcpus":2,"max_vcpus":4,"nested":false,"max_phys_bits":46,
        "topology":{"threads_per_core":1,"cores_per_die":4,"dies_per_package":1,"packages":1}},
        "memory":{"size":1073741824,"shared":true,"hugepages":true,"hugepage_size":2097152,"prefault":true,
        "thp":false,"hotplug_size":1073741824,"hotplug_method":"VirtioMem"},
        "payload":{"kernel":"/k","initramfs":"/i","cmdline":"quiet"},"disks":[{"path":"/a","id":"root"}],
        "net":[{"tap":"t","mac":"52:54:00:12:34:56"}],"rng":{"src":"/dev/random"},
        "serial":{"mode":"Socket","socket":"/s"},"console":{"mode":"File","file":"/f"},
        "devices":[{"path":"/sys/bus/pci/devices/0000:01:00.0/","id":"drive"}],
        "platform":{"num_pci_segments":2,"iommufd":true,"vfio_p2p_dma":false,
        "uuid":"3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611","serial_number":"s",
        "oem_strings":["o"]}}"#;
    let mut expected = defaults();
    expected.cpus.boot = 2;
    expected.cpus.max = Some(4);
    expected.cpus.nested = false;
    expected.cpus.topology = Some(Topology::cores(4));
    expected.memory = MemoryConfig {
        size: 1 << 30,
        shared: true,
        hugepages: true,
        hugepage_size: Some(2 << 20),
        prefault: Some(true),
        thp: false,
        ..MemoryConfig::default()
    };
    expected.kernel = Some("/k".into());
    expected.initramfs = Some("/i".into());
    expected.cmdline = Some("quiet".into());
    let mut disk = crate::config::DiskConfig::new("/a");
    disk.id = Some("root".into());
    expected.disk = vec![disk];
    expected.net = vec![crate::config::NetConfig {
        tap: Some("t".into()),
        mac: Some("52:54:00:12:34:56".parse().unwrap()),
        ..crate::config::NetConfig::default()
    }];
    expected.rng.src = "/dev/random".into();
    expected.serial = ConsoleConfig::Socket("/s".into());
    expected.console = ConsoleConfig::file("/f");
    let mut device = crate::config::DeviceConfig::new("01:00.0").unwrap();
    device.id = Some("drive".into());
    expected.device = vec![device];
    expected.platform.iommufd = Choice::On;
    expected.platform.p2p = Choice::Off;
    expected.platform.uuid = Some("3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611".into());
    expected.platform.serial_number = Some("s".into());
    expected.platform.oem_strings = vec!["o".into()];
    expected.memory.hotplug_size = Some(1 << 30);
    expected.memory.hotplug_method = HotplugMethod::VirtioMem;
    expected.accepted = Some(Box::new(Accepted {
        max_phys_bits: Some(46),
    }));
    expected.platform.num_pci_segments = Some(2);
    assert_eq!(config(body), Ok(expected));
    // As older clients have it.
    let old = r#"{"kernel":{"path":"/k"},"initramfs":{"path":"/i"},"cmdline":{"args":"quiet"}}"#;
    let new = r#"{"payload":{"kernel":"/k","initramfs":"/i","cmdline":"quiet"}}"#;
    assert_eq!(config(old), config(new));
    assert_eq!(config(old).unwrap().kernel, Some("/k".into()));
}

#[test]
fn each_descriptor_that_comes_is_for_what_the_body_says_and_none_is_for_nothing() {
    let pipe = || std::io::pipe().unwrap().0.into();
    let files = Files::from(vec![pipe(), pipe(), pipe()]);
    let body = r#"{"disks":[{"id":"d","fd_index":1},{"path":"/a"}],
        "net":[{"id":"n","fd_indexes":[2,0],"num_queues":4,"fds":[27,28]}]}"#;
    let (config, handed) = with_files(body, &files).unwrap();
    let counts: Vec<_> = handed
        .virtio
        .iter()
        .map(|(id, files)| (&**id, files.all().len()))
        .collect();
    assert_eq!(counts, [("d", 1), ("n", 2)]);
    assert!(config.disk[0].path.to_str().unwrap().starts_with("pipe:["));
    for (body, word) in [
        ("{}", "descriptor 0 that came"),
        (
            r#"{"disks":[{"id":"d","fd_index":0}],"net":[{"id":"n","fd_indexes":[1]}]}"#,
            "descriptor 2 that came",
        ),
        (
            r#"{"disks":[{"id":"d","fd_index":3}]}"#,
            "3 descriptors came",
        ),
        (r#"{"disks":[{"id":"d","fd_index":-1}]}"#, "-1"),
        (
            r#"{"disks":[{"id":"d","fd_index":0},{"id":"e","fd_index":0}]}"#,
            "something else already",
        ),
        (
            r#"{"net":[{"id":"d","fd_indexes":[0,0],"num_queues":4}]}"#,
            "something else already",
        ),
        (r#"{"disks":[{"fd_index":0}]}"#, "needs an id"),
        (
            r#"{"disks":[{"id":"d","path":"/a","fd_index":0}]}"#,
            "leave one out",
        ),
        (r#"{"net":[{"fd_indexes":[0]}]}"#, "needs an id"),
        (
            r#"{"devices":[{"id":"v","fd_index":0}]}"#,
            "not a VFIO device's",
        ),
        (
            r#"{"devices":[{"fd_index":0,"functions":[{"path":"01:00.1"}]}]}"#,
            "one function",
        ),
        (r#"{"platform":{"iommufd_fd_index":0}}"#, "not an iommufd"),
        (r#"{"devices":[{"fd":7}]}"#, "SCM_RIGHTS"),
    ] {
        let Err(Fault::Wrong(why)) = with_files(body, &files) else {
            panic!("{body}: {:?}", with_files(body, &files));
        };
        assert!(why.contains(word), "{body}: {why}");
    }
}

#[test]
fn what_busway_cannot_do_is_named_and_what_contradicts_itself_is_wrong() {
    for (body, lack) in [
        (r#"{"iommu":true}"#, Lack::VirtualIommu),
        (r#"{"memory":{"mergeable":true}}"#, Lack::MergedPages),
        (r#"{"cpus":{"kvm_hyperv":true}}"#, Lack::HyperV),
        (r#"{"platform":{"tdx":true}}"#, Lack::ConfidentialGuests),
        (r#"{"payload":{"igvm":"/i"}}"#, Lack::ConfidentialGuests),
        (r#"{"debug_console":{"mode":"Tty"}}"#, Lack::DebugConsole),
        (
            r#"{"serial":{"mode":"Off","iommu":true}}"#,
            Lack::VirtualIommu,
        ),
        (
            r#"{"net":[{"host_mac":"52:54:00:12:34:56"}]}"#,
            Lack::TapAddress,
        ),
    ] {
        assert_eq!(config(body), Err(Fault::Lacks(lack)), "{body}");
    }
    for (body, word) in [
        ("", "body"),
        ("[]", "body"),
        (r#"{"cpus":{"boot_vcpus":256}}"#, "256"),
        (r#"{"cpus":{"boot_vcpus":2,"max_vcpus":1}}"#, "max_vcpus=1"),
        (
            r#"{"cpus":{"boot_vcpus":4,"topology":{"threads_per_core":65535,"cores_per_die":65535,
                "dies_per_package":65535,"packages":65535}}}"#,
            "topology",
        ),
        (r#"{"memory":{"size":-1}}"#, "-1"),
        (r#"{"serial":{"mode":"Nonsense"}}"#, "Nonsense"),
        (r#"{"serial":{"mode":"File"}}"#, "file is missing"),
        (r#"{"console":{"mode":"Socket"}}"#, "socket is missing"),
        (r#"{"platform":{"num_pci_segments":65536}}"#, "65536"),
        (r#"{"devices":[{"path":"nonsense"}]}"#, "nonsense"),
        (r#"{"disks":[{}]}"#, "path is missing"),
        (r#"{"fs":[{"tag":"t"}]}"#, "socket is missing"),
        (r#"{"pmem":[{}]}"#, "file is missing"),
        (
            r#"{"generic_vhost_user":[{"socket":"/s"}]}"#,
            "device_type is missing",
        ),
    ] {
        let Err(Fault::Wrong(why)) = config(body) else {
            panic!("{body}: {:?}", config(body));
        };
        assert!(why.contains(word), "{body}: {why}");
    }
}
