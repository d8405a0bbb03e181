//! `docs/api.yaml` describes what is served: all of it, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::*;
use crate::control::description::description;

/// What `$ref` leads to.
fn resolved<'a>(description: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(path) => description
            .pointer(path.strip_prefix('#').unwrap())
            .unwrap(),
        None => value,
    }
}

/// The statuses of each operation, such as `GET vm.info`.
fn described() -> BTreeMap<String, BTreeSet<u16>> {
    let description = description();
    let paths = description["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap();
        // A path's own server is none.
        let operations = methods.iter().filter(|(method, _)| *method != "servers");
        operations.map(move |(method, operation)| {
            let name = path.strip_prefix('/').unwrap();
            let statuses = operation["responses"].as_object().unwrap().keys();
            let statuses = statuses.filter_map(|status| status.parse().ok());
            (
                format!("{} {name}", method.to_uppercase()),
                statuses.collect(),
            )
        })
    });
    operations.collect()
}

/// What is beside the API's own paths.
const METRICS: &str = "GET metrics";

#[test]
fn every_endpoint_is_described_with_its_statuses_and_no_other_is() {
    let served: BTreeMap<_, BTreeSet<u16>> = v1::ENDPOINTS
        .iter()
        .map(|endpoint| {
            let name = format!("{} {}", endpoint.method, endpoint.name);
            (name, endpoint.statuses().iter().copied().collect())
        })
        .chain([(METRICS.to_owned(), [200, 400, 429].into())])
        .collect();
    assert_eq!(served, described());
}

#[test]
fn every_status_that_is_described_is_answered_at_some_time_and_no_other_is() {
    let mut answered: BTreeMap<String, BTreeSet<u16>> = BTreeMap::new();
    let granted = |request: &Request| match request {
        Request::Info => Some(how(State::Running)),
        Request::Observe => Some(seen(State::Running)),
        Request::AddDevice(configs, _) => Some(added(configs)),
        Request::AddVirtio(config, _) => Some(added_virtio(config)),
        Request::RemoveDevice { id, .. } => Some(removed(id)),
        Request::Resize { vcpus, .. } => Some(resized(*vcpus)),
        Request::ResizeMemory(bytes) => Some(resized_memory(*bytes)),
        Request::ResizeZone { id, bytes } => Some(resized_zone(id, *bytes)),
        _ => Some(Ok(Answer::Done)),
    };
    let refused = |_: &Request| Some(Err(RequestError::State("held")));
    let absent = |request: &Request| match request {
        Request::Info
        | Request::Observe
        | Request::Boot
        | Request::AddDevice(..)
        | Request::AddVirtio(..)
        | Request::RemoveDevice { .. }
        | Request::Resize { .. }
        | Request::ResizeMemory(_)
        | Request::ResizeZone { .. } => Some(Err(RequestError::NotCreated)),
        _ => Some(Err(RequestError::NotRunning)),
    };
    let created = |request: &Request| match request {
        Request::Info => Some(how(State::Created)),
        Request::Observe => Some(seen(State::Created)),
        _ => Some(Ok(Answer::Done)),
    };
    let crowded = |_: &Request| Some(Err(RequestError::TooMany));
    let description = description();
    let reactions: [fn(&Request) -> Reaction; 5] = [granted, refused, absent, created, crowded];
    for endpoint in v1::ENDPOINTS {
        let name = format!("{} {}", endpoint.method, endpoint.name);
        let bodies: &[&str] = match endpoint.name {
            "vm.create" => &["", "{}", r#"{"vdpa": [{"path": "/dev/vhost-vdpa-0"}]}"#],
            "vm.add-device" => &[
                "",
                r#"{"path": "0000:02:00.0", "iommu": true}"#,
                r#"{"path": "0000:02:00.0", "id": "drive"}"#,
                r#"{"path": "0000:02:00.0", "id": "early"}"#,
                r#"{"path": "0000:02:00.0", "functions": [{"path": "0000:02:00.1"}]}"#,
                r#"{"path": "0000:01:00.0"}"#,
            ],
            "vm.add-disk" => &[
                "",
                r#"{"path": "/a.raw", "readonly": true}"#,
                r#"{"path": "/a.raw", "id": "twice"}"#,
                r#"{"path": "/a.raw", "iommu": true}"#,
            ],
            "vm.add-net" => &[
                "",
                r#"{"tap": "vmtap0"}"#,
                r#"{"id": "twice"}"#,
                r#"{"host_mac": "52:54:00:12:34:56"}"#,
            ],
            "vm.add-fs" => &[
                "",
                r#"{"tag": "t", "socket": "/run/s"}"#,
                r#"{"tag": "t", "socket": "/run/s", "id": "twice"}"#,
                r#"{"tag": "t", "socket": "/run/s", "iommu": true}"#,
            ],
            "vm.add-pmem" => &[
                "",
                r#"{"file": "/f"}"#,
                r#"{"file": "/f", "id": "twice"}"#,
                r#"{"file": "/f", "iommu": true}"#,
            ],
            "vm.add-generic-vhost-user" => &[
                "",
                r#"{"socket": "/run/s", "device_type": 4, "queue_sizes": [64]}"#,
                r#"{"socket": "/run/s", "device_type": 4, "queue_sizes": [64], "id": "twice"}"#,
                r#"{"socket": "/run/s", "device_type": 4, "queue_sizes": [64], "iommu": true}"#,
            ],
            "vm.add-vsock" => &[
                "",
                r#"{"cid": 3}"#,
                r#"{"cid": 3, "id": "twice"}"#,
                r#"{"cid": 3, "socket": "/run/s", "iommu": true}"#,
            ],
            "vm.check-device" => &["", r#"{"path": "0000:02:00.0"}"#, r#"{"path": "no-nic"}"#],
            "vm.resize" => &[
                "",
                r#"{"desired_vcpus": 2}"#,
                r#"{"desired_vcpus": 9}"#,
                r#"{"desired_balloon": 4096}"#,
                r#"{"desired_ram": 1073741824}"#,
                r#"{"desired_ram": 1}"#,
            ],
            "vm.resize-zone" => &[
                "",
                r#"{"id": "a", "desired_ram": 1073741824}"#,
                r#"{"id": "a", "desired_ram": 1}"#,
                r#"{"id": "b", "desired_ram": 1073741824}"#,
            ],
            "vm.remove-device" => &[
                "",
                r#"{"id": "0000:01:00.0"}"#,
                r#"{"id": "card"}"#,
                r#"{"id": "another"}"#,
            ],
            _ => &[""],
        };
        let each = [endpoint.method, "POST"]
            .into_iter()
            .flat_map(|method| reactions.map(|react| (method, react)))
            .flat_map(|(method, react)| bodies.iter().map(move |body| (method, react, *body)));
        {
            for (method, react, body) in each {
                let mut vm = Vm::new(react);
                let mut client = vm.connect();
                let length = match body.len() {
                    0 => String::new(),
                    length => format!("Content-Length: {length}\r\n"),
                };
                client.send(request(method, endpoint.name, &length) + body);
                let ends = ["vm.shutdown", "vm.delete", "vmm.shutdown"].contains(&endpoint.name);
                let end = Request::End(Extent::Vm);
                if ends && method == "PUT" && react(&end) == Some(Ok(Answer::Done)) {
                    vm.machine.take().unwrap().join().unwrap();
                    vm.finish();
                }
                let reply = client.reply().unwrap();
                if !reply.body.is_empty() {
                    let operation = &description["paths"][format!("/{}", endpoint.name)]
                        [endpoint.method.to_lowercase()];
                    let status = reply.status.to_string();
                    let response = resolved(&description, &operation["responses"][&status]);
                    let schema = &response["content"]["application/json"]["schema"];
                    conforms(&description, schema, &reply.json(), &name);
                }
                answered
                    .entry(name.clone())
                    .or_default()
                    .insert(reply.status);
            }
        }
    }
    for react in reactions {
        let vm = Vm::new(react);
        let mut client = vm.connect();
        for method in ["GET", "PUT"] {
            client.send(format!(
                "{method} /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
            ));
            let status = client.reply().unwrap().status;
            answered.entry(METRICS.into()).or_default().insert(status);
        }
    }
    assert_eq!(answered, described());
}

#[test]
fn statuses_of_any_path_are_described_too() {
    let description = description();
    let any = &description["components"]["responses"]["NoRequest"]["x-statuses"];
    assert_eq!(*any, json!([404, 408, 413, 431, 503]));
}

/// As much of JSON Schema as the description uses.
fn conforms(description: &Value, schema: &Value, value: &Value, place: &str) {
    let schema = resolved(description, schema);
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    let is = match schema["type"]
        .as_str()
        .unwrap_or_else(|| panic!("{place}: no type"))
    {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "boolean" => value.is_boolean(),
        other => panic!("{place}: a type of {other}"),
    };
    assert!(is, "{place}: {value}");
    if let Some(words) = schema["enum"].as_array() {
        assert!(words.contains(value), "{place}: {value}");
    }
    for required in schema["required"].as_array().into_iter().flatten() {
        let key = required.as_str().unwrap();
        assert!(value.get(key).is_some(), "{place}: {key} is missing");
    }
    for (key, part) in value.as_object().into_iter().flatten() {
        let place = format!("{place}/{key}");
        let schema = match &schema["properties"][key] {
            Value::Null => &schema["additionalProperties"],
            schema => schema,
        };
        assert!(schema.is_object(), "{place} is not described");
        conforms(description, schema, part, &place);
    }
    for (index, part) in value.as_array().into_iter().flatten().enumerate() {
        conforms(
            description,
            &schema["items"],
            part,
            &format!("{place}/{index}"),
        );
    }
}

#[test]
fn a_full_configuration_is_as_described() {
    use crate::config::{
        Accepted, Choice, ConsoleConfig, DiskConfig, FirmwareConfig, FsConfig, HotplugMethod,
        NetConfig, QueueAffinity, Topology, VcpuAffinity,
    };

    let mut device = DeviceConfig::new("01:00.0").unwrap();
    device.fd = Some(7);
    device.id = Some("e".into());
    device.x_nv_gpudirect_clique = Some(1);
    device.root_port = Some(true);
    device.on_error = crate::config::OnError::Pause;
    let mut config = VmConfig {
        kernel: Some("k".into()),
        firmware: Some(FirmwareConfig {
            path: Some("f".into()),
            vars: None,
        }),
        initramfs: Some("i".into()),
        disk: vec![DiskConfig {
            id: Some("d".into()),
            vhost_user: true,
            socket: Some("s".into()),
            serial: Some("s".into()),
            bw_size: Some(1 << 20),
            bw_refill_time: Some(1000),
            ops_size: Some(100),
            ops_refill_time: Some(1000),
            queue_affinity: vec![QueueAffinity {
                queue_index: 0,
                host_cpus: vec![0, 1],
            }],
            ..DiskConfig::new("d")
        }],
        vsock: Some(crate::config::VsockConfig {
            cid: 3,
            socket: Some("s".into()),
            id: Some("v".into()),
            pci_segment: 1,
            pci_device_id: Some(7),
        }),
        net: vec![NetConfig {
            tap: Some("t".into()),
            vhost_user: true,
            socket: Some("s".into()),
            mtu: Some(1500),
            mac: Some("52:54:00:12:34:56".parse().unwrap()),
            id: Some("n".into()),
            vhost: crate::config::Choice::On,
            spoofchk: true,
            ..NetConfig::default()
        }],
        fs: vec![FsConfig {
            id: Some("f".into()),
            ..FsConfig::new("t", "s")
        }],
        pmem: vec![crate::config::PmemConfig {
            size: Some(2 << 20),
            id: Some("p".into()),
            ..crate::config::PmemConfig::new("f")
        }],
        generic: vec![crate::config::GenericConfig {
            config_size: Some(8),
            id: Some("g".into()),
            ..crate::config::GenericConfig::new(4, "s", vec![64])
        }],
        tpm: Some(crate::config::TpmConfig { socket: "s".into() }),
        serial: ConsoleConfig::file("f"),
        console: ConsoleConfig::Socket("s".into()),
        device: vec![device],
        ..VmConfig::default()
    };
    config.device[0].pci_device_id = Some(16);
    config.disk[0].pci_device_id = Some(1);
    config.net[0].pci_device_id = Some(2);
    config.fs[0].pci_device_id = Some(3);
    config.pmem[0].pci_device_id = Some(4);
    config.generic[0].pci_device_id = Some(5);
    config.landlock = Choice::On;
    config.landlock_rules = vec![crate::config::LandlockRule {
        path: "p".into(),
        access: crate::config::LandlockAccess::Read,
    }];
    config.memory.hugepage_size = Some(1 << 30);
    config.memory_zone = vec![crate::config::MemoryZoneConfig {
        host_numa_node: Some(1),
        hugepage_size: Some(1 << 30),
        hotplug_size: Some(1 << 30),
        hotplugged_size: Some(0),
        ..crate::config::MemoryZoneConfig::new("z", 1 << 30)
    }];
    config.numa = vec![crate::config::NumaConfig {
        guest_numa_id: 1,
        cpus: vec![0],
        distances: vec![crate::config::NumaDistance {
            destination: 0,
            distance: 21,
        }],
        memory_zones: vec!["z".into()],
        pci_segments: vec![0],
    }];
    config.place = crate::config::Placing::Auto;
    config.platform.iommufd = Choice::On;
    config.platform.p2p = Choice::Off;
    config.platform.root_ports = Some(false);
    config.platform.serial_number = Some("s".into());
    config.platform.uuid = Some("3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611".into());
    config.platform.oem_strings = vec!["o".into()];
    config.cpus.max = Some(4);
    config.cpus.dedicated = true;
    config.cpus.affinity = vec![VcpuAffinity {
        vcpu: 0,
        host_cpus: vec![1],
    }];
    config.cpus.topology = Some(Topology::cores(4));
    config.memory.hotplug_size = Some(1 << 30);
    config.memory.hotplug_method = HotplugMethod::VirtioMem;
    config.memory.hotplugged_size = Some(1 << 29);
    config.accepted = Some(Box::new(Accepted {
        max_phys_bits: Some(46),
    }));
    config.platform.num_pci_segments = Some(2);
    let vm = Vm::new(move |request| match request {
        Request::Info => {
            let config = config.clone();
            let info = Info {
                config,
                zones: BTreeMap::from([("z".into(), 1 << 30)]),
                ..Info::default()
            };
            Some(Ok(Answer::Info(Box::new(info))))
        }
        _ => Some(Ok(Answer::Done)),
    });
    let info = vm.connect().ask("GET", "vm.info").json();
    let description = description();
    let schema = &description["components"]["schemas"]["VmInfo"];
    conforms(&description, schema, &info, "vm.info");
    // Each property that there can be is there.
    let schemas = &description["components"]["schemas"];
    for (part, properties) in schemas["VmConfig"]["properties"].as_object().unwrap() {
        let there = &info["config"][part];
        let there = there.get(0).unwrap_or(there);
        let properties = properties.get("items").unwrap_or(properties);
        for key in properties["properties"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, _)| key)
        {
            assert!(there.get(key).is_some(), "{part}/{key}");
        }
    }
}
