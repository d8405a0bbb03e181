//! What is asked of a VM, and what a person reads of its answers.

use super::info::state;
use super::*;
use crate::control::description::description;

fn info() -> Value {
    json!({
        "state": "Running",
        "memory_actual_size": 8_u64 << 30,
        "config": {
            "cpus": { "boot_vcpus": 4 },
            "payload": { "kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0 root=/dev/vda1" },
            "serial": { "mode": "Tty" },
            "console": { "mode": "File", "file": "/run/console" },
            "disks": [{ "path": "debian.raw", "id": "root", "readonly": true }],
            "net": [{ "tap": "vmtap0" }, {}],
            "devices": [
                { "path": "/sys/bus/pci/devices/0000:01:00.0", "id": "drive" },
                { "path": "/sys/bus/pci/devices/0000:02:00.0/" },
            ],
        },
        "device_tree": {
            "drive": { "host_bdf": "0000:01:00.0", "pci_bdf": "0000:01:00.0" },
            "0000:02:00.0": { "host_bdf": "0000:02:00.0", "pci_bdf": "0000:02:00.0" },
            "root": { "pci_bdf": "0000:00:01.0" },
        },
    })
}

#[test]
fn info_is_a_table() {
    let expected = "\
state       running
memory      8192 MiB
processors  4
kernel      /boot/vmlinuz
cmdline     console=ttyS0 root=/dev/vda1
serial      tty
console     file, /run/console
disk        debian.raw, id root, read-only, in the guest 0000:00:01.0
nic         vmtap0
nic         a new tap
device      0000:02:00.0, in the guest 0000:02:00.0
device      0000:01:00.0, id drive, in the guest 0000:01:00.0
";
    let shown = show(&Verb::Info, &info(), Screen::default());
    assert_eq!(shown, expected);
}

#[test]
fn a_device_whose_slot_no_driver_attends_to_is_said_to_wait_for_one() {
    let said = |answer| {
        let verb = Verb::AddDevice {
            devices: vec!["01:00.0".into()],
            id: None,
            root_port: None,
            place: PlaceArgs::default(),
        };
        show(&verb, &answer, Screen::default())
    };
    let plain = json!({ "id": "drive", "bdf": "0000:03:00.0" });
    assert_eq!(said(plain), "drive: in the guest at 0000:03:00.0\n");
    let waits = json!({ "id": "drive", "bdf": "0000:03:00.0", "attended": false });
    assert_eq!(
        said(waits),
        "drive: in the guest at 0000:03:00.0; the guest has no driver for the slot, or none yet, and finds \
         the device when it has one\n"
    );
}

#[test]
fn each_memory_zone_is_shown_with_what_the_guest_has_of_it_and_what_it_is_to_have() {
    let mut info = info();
    info["config"]["memory"] = json!({ "zones": [
        { "id": "a", "size": 256 << 20, "host_numa_node": 1, "hotplug_size": 512 << 20,
          "hotplugged_size": 512 << 20, "actual_size": 300 << 20 },
        { "id": "b", "size": 256 << 20, "hotplug_size": 512 << 20, "actual_size": 256 << 20 },
        { "id": "c", "size": 128 << 20 },
    ] });
    let text = info::show(&info, Screen::default());
    let zones = text.lines().filter_map(|line| line.strip_prefix("zone"));
    let zones: Vec<_> = zones.map(str::trim).collect();
    let expected = [
        "a, 300 MiB, to be 768 MiB, of the host's NUMA node 1",
        "b, 256 MiB",
        "c, 128 MiB",
    ];
    assert_eq!(zones, expected);
}

#[test]
fn empty_slots_are_counted_where_there_are_some() {
    let mut info = info();
    for (slots, ends) in [(0, "0000:01:00.0\n"), (3, "\nslots       3 empty\n")] {
        info["empty_slots"] = slots.into();
        let shown = show(&Verb::Info, &info, Screen::default());
        assert!(shown.ends_with(ends), "{shown}");
    }
}

#[test]
fn a_narrow_screen_has_long_lines_folded() {
    let shown = show(&Verb::Info, &info(), Some(32).into());
    assert!(
        shown.contains("cmdline     console=ttyS0\n            root=/dev/vda1\n"),
        "{shown}"
    );
}

#[test]
fn a_vm_that_is_being_put_together_shows_what_it_is_to_have() {
    let mut info = info();
    info["state"] = "Created".into();
    info["device_tree"] = json!({});
    let shown = show(&Verb::Info, &info, Screen::default());
    assert!(shown.starts_with("state       not booted, or being put together\n"));
    assert!(shown.ends_with("device      0000:01:00.0, id drive\ndevice      0000:02:00.0\n"));
}

#[test]
fn a_guest_that_is_held_is_told_from_one_that_was_paused() {
    let state = |info: Value| state(&info);
    assert_eq!(state(json!({ "state": "Paused" })), "paused");
    let held = state(json!({ "state": "Paused", "held": true }));
    assert!(held.starts_with("held: "), "{held}");
}

#[test]
fn an_answer_of_another_form_is_no_harm_and_steers_no_terminal() {
    for answer in [
        Value::Null,
        json!([]),
        json!({ "config": 1, "device_tree": [] }),
    ] {
        for verb in [Verb::Info, Verb::Ping] {
            assert!(show(&verb, &answer, Screen::default()).ends_with('\n'));
        }
    }
    let shown = show(
        &Verb::Info,
        &json!({ "state": "\u{1b}[2J" }),
        Screen::default(),
    );
    assert!(!shown.contains('\u{1b}'), "{shown:?}");
}

#[test]
fn functions_come_by_one_request_and_leave_together() {
    let verb = Verb::AddDevice {
        devices: vec!["01:00.0".into(), "01:00.1".into()],
        id: Some("card".into()),
        root_port: None,
        place: PlaceArgs::default(),
    };
    let body = json!({
        "path": "01:00.0", "id": "card", "functions": [{ "path": "01:00.1" }],
    });
    assert_eq!(verb.body(), Some(body));
    let on_bus_0 = Verb::AddDevice {
        devices: vec!["02:00.0".into()],
        id: None,
        root_port: Some(false),
        place: PlaceArgs::default(),
    };
    let body = json!({ "path": "02:00.0", "id": null, "functions": [], "root_port": false });
    assert_eq!(on_bus_0.body(), Some(body));
    let placed = Verb::AddDevice {
        devices: vec!["02:00.0".into()],
        id: None,
        root_port: None,
        place: PlaceArgs {
            pci_segment: Some(1),
            pci_device_id: Some(17),
        },
    };
    let body = json!({
        "path": "02:00.0", "id": null, "functions": [], "pci_segment": 1, "pci_device_id": 17,
    });
    assert_eq!(placed.body(), Some(body));
    let answer = json!({
        "id": "card", "bdf": "0000:03:00.0",
        "functions": [{ "id": "0000:01:00.1", "bdf": "0000:03:00.1" }],
    });
    assert_eq!(
        show(&verb, &answer, Screen::default()),
        "card: in the guest at 0000:03:00.0\n0000:01:00.1: in the guest at 0000:03:00.1\n"
    );
    let verb = Verb::RemoveDevice {
        id: "card".into(),
        force: false,
        timeout: Some(90),
    };
    let body = json!({ "id": "card", "force": false, "wait": true, "timeout_s": 90 });
    assert_eq!(verb.body(), Some(body));
    assert_eq!(
        verb.limit_of(Path::new("")).unwrap(),
        END_LIMIT + Duration::from_secs(90)
    );
    let answer = json!({ "ids": ["card", "0000:01:00.1"] });
    assert_eq!(
        show(&verb, &answer, Screen::default()),
        "card and 0000:01:00.1: the host has them back\n"
    );
    let alone = show(&verb, &Value::Null, Screen::default());
    assert_eq!(alone, "card: the host has it back\n");
}

#[test]
fn json_is_an_object_for_what_says_nothing_too() {
    assert_eq!(pretty(Value::Null), "{}\n");
    assert_eq!(pretty(json!({ "a": 1 })), "{\n  \"a\": 1\n}\n");
}

#[test]
fn every_endpoint_that_busway_serves_has_a_verb() {
    let device = || "01:00.0".to_owned();
    let verbs = [
        Verb::Info,
        Verb::Ping,
        Verb::Devices,
        Verb::Counters,
        Verb::Pause,
        Verb::Resume,
        Verb::PowerButton,
        Verb::Reboot,
        Verb::Nmi,
        Verb::Shutdown,
        Verb::Stop,
        Verb::Create { file: "vm".into() },
        Verb::Boot,
        Verb::Delete,
        Verb::CheckDevice { device: device() },
        Verb::AddDevice {
            devices: vec![device()],
            id: None,
            root_port: None,
            place: PlaceArgs::default(),
        },
        Verb::AddDisk(AddDiskArgs {
            path: "d".into(),
            send: false,
            vhost_user: false,
            qcow2: false,
            backing_files: false,
            readonly: false,
            direct: false,
            serial: None,
            id: None,
            place: PlaceArgs::default(),
        }),
        Verb::AddNet(AddNetArgs {
            tap: None,
            vhost_user: false,
            server: false,
            mtu: None,
            spoofchk: false,
            queues: None,
            mac: None,
            id: None,
            place: PlaceArgs::default(),
        }),
        Verb::AddFs(AddFsArgs {
            tag: "t".into(),
            socket: "s".into(),
            id: None,
            place: PlaceArgs::default(),
        }),
        Verb::AddPmem(AddPmemArgs {
            file: "f".into(),
            size: None,
            discard_writes: false,
            id: None,
            place: PlaceArgs::default(),
        }),
        Verb::AddVhostUser(AddGenericArgs {
            virtio_id: "rng".into(),
            socket: "s".into(),
            queue_sizes: vec![64],
            id: None,
            place: PlaceArgs::default(),
        }),
        Verb::AddVsock {
            cid: 3,
            socket: None,
            id: None,
            place: PlaceArgs::default(),
        },
        Verb::Resize {
            cpus: Some(1),
            memory: None,
            balloon: None,
        },
        Verb::ResizeZone {
            id: "a".into(),
            size: 1 << 30,
        },
        Verb::RemoveDevice {
            id: device(),
            force: false,
            timeout: None,
        },
    ];
    let mut asked: Vec<_> = verbs
        .iter()
        .map(|verb| format!("{} {}", verb.method(), verb.endpoint()))
        // What `top` asks, and `metrics`.
        .chain(["GET vm.activity", "GET metrics"].map(str::to_owned))
        .collect();
    asked.sort();
    let description = description();
    let paths = description["paths"].as_object().unwrap();
    let mut served: Vec<_> = paths
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().iter();
            // What is not done yet is answered with nothing else.
            let served = methods.filter(|(_, operation)| {
                let statuses = &operation["responses"];
                ["200", "204"]
                    .iter()
                    .any(|status| statuses.get(status).is_some())
            });
            served.map(move |(method, _)| format!("{} {}", method.to_uppercase(), &path[1..]))
        })
        .collect();
    served.sort();
    assert_eq!(asked, served);
    for verb in &verbs {
        assert!(show(verb, &Value::Null, Screen::default()).ends_with('\n'));
    }
}

#[test]
fn counters_are_a_table_by_device() {
    let answer =
        json!({ "disk0": { "read_ops": 12, "read_bytes": 4096 }, "net0": { "rx_frames": 1 } });
    let expected = "\
DEVICE  COUNTER     COUNT
disk0   read_bytes   4096
disk0   read_ops       12
net0    rx_frames       1
";
    assert_eq!(show(&Verb::Counters, &answer, Screen::default()), expected);
    let none = show(&Verb::Counters, &json!({}), Screen::default());
    assert_eq!(none, "no device of the VM's counts\n");
}

#[test]
fn a_check_over_the_socket_reads_as_the_commands_does() {
    let verb = Verb::CheckDevice {
        device: "01:00.0".into(),
    };
    assert_eq!(verb.body(), Some(json!({ "path": "01:00.0" })));
    let finding = json!({
        "level": "obstacle", "topic": "driver", "text": "it is bound to nvme",
        "remedies": [{ "what": "bind it", "command": "busway device bind 0000:01:00.0" }],
    });
    let answer = json!({
        "version": 1, "ready": false, "mediated_devices": [], "host": [],
        "devices": [{
            "address": "0000:01:00.0", "ready": false, "needs_only_binding": true, "findings": [finding],
        }],
    });
    let expected = "\
0000:01:00.0: ready to be bound
  FAIL  driver     it is bound to nvme
                   → bind it:
                     busway device bind 0000:01:00.0

This host: can give devices to guests
";
    assert_eq!(show(&verb, &answer, Screen::default()), expected);
}
