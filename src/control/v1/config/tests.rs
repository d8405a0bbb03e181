//! What is shown of a VM's configuration, and in which words.

use serde_json::{Value, json};

use super::*;
use crate::config::{DeviceConfig, DiskConfig, NetConfig, QueueAffinity};

fn shown(config: &VmConfig) -> Value {
    serde_json::to_value(Config::from(config)).unwrap()
}

#[test]
fn defaults_are_filled_in_and_what_is_unset_is_left_out() {
    let mut config = shown(&VmConfig::default());
    let bits = config["cpus"]["max_phys_bits"].take();
    assert!((32..=64).contains(&bits.as_u64().unwrap()), "{bits}");
    let expected = json!({
        "cpus": {
            "boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": false, "max_phys_bits": null,
            "core_scheduling": "Vm", "nested": true,
        },
        "memory": {
            "size": 512 << 20, "mergeable": false, "hotplug_method": "Acpi", "shared": false,
            "hugepages": false, "prefault": false, "thp": true,
        },
        "payload": { "cmdline": "" },
        "rng": { "src": "/dev/urandom", "iommu": false },
        "serial": { "mode": "Off", "iommu": false },
        "console": { "mode": "Off", "iommu": false },
        "platform": { "num_pci_segments": 1, "removal_timeout_s": 30, "power_off_timeout_s": 20 },
        "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
    });
    assert_eq!(config, expected);
}

#[test]
fn what_was_given_is_shown_in_cloud_hypervisors_words() {
    let mut device = DeviceConfig::new("01:00.0").unwrap();
    device.id = Some("drive".into());
    let config = VmConfig {
        kernel: Some("/boot/vmlinuz".into()),
        cmdline: Some("quiet".into()),
        cpus: CpusConfig {
            boot: 2,
            ..CpusConfig::default()
        },
        disk: vec![DiskConfig {
            readonly: true,
            id: Some("root/1".into()),
            serial: Some("S1".into()),
            bw_size: Some(1 << 20),
            bw_refill_time: Some(100),
            queue_affinity: vec![QueueAffinity {
                queue_index: 0,
                host_cpus: vec![1, 2],
            }],
            ..DiskConfig::new("a.raw")
        }],
        net: vec![NetConfig {
            tap: Some("vmtap0".into()),
            mac: Some("52:54:00:12:34:56".parse().unwrap()),
            ..NetConfig::default()
        }],
        tpm: Some(crate::config::TpmConfig {
            socket: "/run/swtpm".into(),
        }),
        serial: ConsoleConfig::file("/tmp/log"),
        console: ConsoleConfig::Socket("/tmp/socket".into()),
        device: vec![device],
        platform: PlatformConfig {
            iommufd: Choice::On,
            p2p: Choice::Off,
            // A secret that devices' users share is shown to nobody.
            vf_token: Some("2ab74924-c335-45f4-9b16-8569e5b08258".into()),
            ..PlatformConfig::default()
        },
        ..VmConfig::default()
    };
    let shown = shown(&config);
    for (pointer, value) in [
        ("/cpus/boot_vcpus", json!(2)),
        ("/cpus/max_vcpus", json!(2)),
        // A device's DMA needs it.
        ("/memory/prefault", json!(true)),
        ("/payload/kernel", json!("/boot/vmlinuz")),
        ("/payload/cmdline", json!("quiet")),
        ("/disks/0/path", json!("a.raw")),
        ("/disks/0/readonly", json!(true)),
        ("/disks/0/id", json!("root/1")),
        ("/disks/0/num_queues", json!(1)),
        ("/disks/0/queue_size", json!(128)),
        ("/disks/0/serial", json!("S1")),
        ("/disks/0/image_type", json!("Raw")),
        (
            "/disks/0/rate_limiter_config",
            json!({"bandwidth": {"size": 1 << 20, "one_time_burst": 0, "refill_time": 100}}),
        ),
        (
            "/disks/0/queue_affinity",
            json!([{"queue_index": 0, "host_cpus": [1, 2]}]),
        ),
        ("/net/0/tap", json!("vmtap0")),
        ("/net/0/mac", json!("52:54:00:12:34:56")),
        ("/net/0/num_queues", json!(2)),
        ("/tpm", json!({"socket": "/run/swtpm"})),
        ("/serial/mode", json!("File")),
        ("/serial/file", json!("/tmp/log")),
        ("/console/mode", json!("Socket")),
        ("/console/socket", json!("/tmp/socket")),
        (
            "/devices/0/path",
            json!("/sys/bus/pci/devices/0000:01:00.0"),
        ),
        ("/devices/0/id", json!("drive")),
        ("/platform/iommufd", json!(true)),
        ("/platform/vfio_p2p_dma", json!(false)),
    ] {
        assert_eq!(shown.pointer(pointer), Some(&value), "{pointer}");
    }
    assert!(!shown.to_string().contains("2ab74924"));
}
