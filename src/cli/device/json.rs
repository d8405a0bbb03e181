//! `busway device list --json`, whose schema is in `docs/device-json.md`: what stands there does not
//! change its meaning; there may be more of it.

use std::path::{Path, PathBuf};

use busway_host::{HostDevice, InterfaceAddress, LinkState, StorageServer, Usage, one_line};
use busway_pci::Bdf;
use serde::{Serialize, Serializer};

use super::facts::{Facts, Shown};
use super::mediated::{DeviceJson, TypeJson, device_json, type_json};
use crate::preflight::VERSION;

#[derive(Serialize)]
struct List<'a> {
    version: u32,
    devices: Vec<Device<'a>>,
    mediated_devices: Vec<DeviceJson<'a>>,
    mediated_types: Vec<TypeJson<'a>>,
}

#[derive(Serialize)]
struct Device<'a> {
    #[serde(serialize_with = "words")]
    address: Bdf,
    vendor: String,
    device: String,
    subsystem_vendor: String,
    subsystem_device: String,
    class: String,
    class_name: &'a str,
    name: &'a str,
    bridge: bool,
    #[serde(serialize_with = "some_words")]
    parent: Option<Bdf>,
    root_bus: Option<&'a str>,
    numa_node: Option<u32>,
    iommu_group: Option<u32>,
    driver: Option<&'a str>,
    driver_override: Option<&'a str>,
    vfio: bool,
    vfio_node: Option<&'a str>,
    native_drivers: Vec<&'a str>,
    vfio_drivers: Vec<&'a str>,
    link: Option<Link>,
    reset_methods: &'a [String],
    bars: Vec<Bar>,
    sriov: Option<Sriov>,
    #[serde(serialize_with = "some_words")]
    physical_function: Option<Bdf>,
    boot_display: bool,
    uses: Vec<Use>,
}

#[derive(Serialize)]
struct Link {
    current: Option<State>,
    max: State,
    degraded: bool,
}

#[derive(Serialize)]
struct State {
    gigatransfers: f64,
    width: u8,
}

#[derive(Serialize)]
struct Bar {
    index: u8,
    kind: &'static str,
    bytes: u64,
    #[serde(rename = "64bit")]
    wide: bool,
    prefetchable: bool,
}

#[derive(Serialize)]
struct Sriov {
    total: u16,
    functions: Vec<String>,
}

#[derive(Serialize)]
struct Use {
    kind: &'static str,
    text: String,
    prevents_bind: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    chain: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    paths: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<Address>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    interfaces: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    release: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<String>,
}

#[derive(Serialize)]
struct Address {
    interface: String,
    address: String,
}

impl Address {
    fn of(of: &InterfaceAddress) -> Self {
        Self {
            interface: of.interface.clone(),
            address: of.address.to_string(),
        }
    }
}

fn words<S: Serializer>(address: &Bdf, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(address)
}

fn some_words<S: Serializer>(address: &Option<Bdf>, serializer: S) -> Result<S::Ok, S::Error> {
    match address {
        Some(address) => serializer.collect_str(address),
        None => serializer.serialize_none(),
    }
}

/// The devices as JSON, on one line or on many.
pub(super) fn show(
    facts: &Facts<'_>,
    shown: &Shown<'_>,
    one_line: bool,
) -> Result<String, serde_json::Error> {
    let list = List {
        version: VERSION,
        devices: shown.devices.iter().map(|one| device(facts, one)).collect(),
        mediated_devices: shown.mediated.iter().map(|one| device_json(one)).collect(),
        mediated_types: shown.types.iter().map(|one| type_json(one)).collect(),
    };
    let text = match one_line {
        true => serde_json::to_string(&list),
        false => serde_json::to_string_pretty(&list),
    };
    Ok(text? + "\n")
}

fn device<'a>(facts: &'a Facts<'_>, device: &'a HostDevice) -> Device<'a> {
    let hex = |id: u16| format!("{id:04x}");
    let state = |state: LinkState| State {
        gigatransfers: f64::from(state.speed) / 10.0,
        width: state.width,
    };
    Device {
        address: device.address,
        vendor: hex(device.vendor),
        device: hex(device.device),
        subsystem_vendor: hex(device.subsystem_vendor),
        subsystem_device: hex(device.subsystem_device),
        class: format!("{:06x}", device.class),
        class_name: facts.class(device),
        name: facts.name(device),
        bridge: device.is_bridge(),
        parent: device.parent,
        root_bus: device.root_bus.as_deref(),
        numa_node: device.numa_node,
        iommu_group: device.group,
        driver: device.driver.as_deref(),
        driver_override: device.driver_override.as_deref(),
        vfio: device.is_with_vfio(),
        vfio_node: device.vfio_cdev.as_deref(),
        native_drivers: facts.native(device),
        vfio_drivers: facts.vfio(device),
        link: device.link.map(|link| Link {
            current: link.current.map(state),
            max: state(link.max),
            degraded: link.is_degraded(),
        }),
        reset_methods: &device.reset_methods,
        bars: device
            .resources
            .iter()
            .map(|bar| Bar {
                index: bar.index,
                kind: match bar.index {
                    6 => "rom",
                    _ if bar.is_io() => "io",
                    _ => "memory",
                },
                bytes: bar.size,
                wide: bar.is_64bit(),
                prefetchable: bar.is_prefetchable(),
            })
            .collect(),
        sriov: device.sriov.as_ref().map(|sriov| Sriov {
            total: sriov.total,
            functions: sriov.functions.iter().map(Bdf::to_string).collect(),
        }),
        physical_function: device.physical_function,
        boot_display: device.boot_display,
        uses: facts.host.usage(device.address).iter().map(used).collect(),
    }
}

fn used(usage: &Usage) -> Use {
    let mut used = Use {
        kind: "",
        text: usage.to_string(),
        prevents_bind: usage.prevents_bind(),
        chain: Vec::new(),
        paths: Vec::new(),
        addresses: Vec::new(),
        interfaces: Vec::new(),
        disks: Vec::new(),
        release: None,
        client: None,
        server: None,
        protocol: None,
        pid: None,
        command: None,
    };
    used.kind = match usage {
        Usage::Mounted { chain, at } => {
            used.chain.clone_from(chain);
            let paths = at.iter().map(|path| one_line(&path.to_string_lossy()));
            used.paths = paths.collect();
            "mount"
        }
        Usage::Swap { chain, device } => {
            used.chain.clone_from(chain);
            used.paths = vec![device.to_string_lossy().into_owned()];
            "swap"
        }
        Usage::Held { chain, release } => {
            used.chain.clone_from(chain);
            used.release = release.as_ref().map(ToString::to_string);
            "held"
        }
        Usage::Claimed { disk } => {
            used.chain = vec![disk.clone()];
            "claimed"
        }
        Usage::DefaultRoute { chain } => {
            used.chain.clone_from(chain);
            "default-route"
        }
        Usage::SshRoute { chain, client } => {
            used.chain.clone_from(chain);
            used.client = Some(client.to_string());
            "ssh"
        }
        Usage::Interface {
            chain, addresses, ..
        } => {
            used.chain.clone_from(chain);
            used.addresses = addresses.iter().map(Address::of).collect();
            "interface"
        }
        Usage::Representors {
            names,
            part_of,
            addresses,
        } => {
            used.chain.clone_from(part_of);
            used.interfaces.clone_from(names);
            used.addresses = addresses.iter().map(Address::of).collect();
            "representors"
        }
        Usage::NetworkStorage {
            chain,
            server,
            protocol,
            at,
            disks,
        } => {
            used.chain.clone_from(chain);
            used.server = match server {
                StorageServer::Address(address) => Some(address.to_string()),
                StorageServer::OnLink(_) | StorageServer::Unseen => None,
            };
            used.protocol = Some(protocol.clone());
            let paths = at.iter().map(|path| path.to_string_lossy().into_owned());
            used.paths = paths.collect();
            used.disks.clone_from(disks);
            "network-storage"
        }
        Usage::StaticRoutes { chain, .. } => {
            used.chain.clone_from(chain);
            "static-routes"
        }
        Usage::OtherNamespace => "other-namespace",
        Usage::BootDisplay => "boot-display",
        Usage::VirtualFunctions { functions } => {
            used.chain = functions.iter().map(Bdf::to_string).collect();
            "virtual-functions"
        }
        Usage::Process(process) => {
            used.pid = Some(process.pid);
            used.command = Some(process.command.clone());
            "process"
        }
        Usage::Opened { process, nodes } => {
            let node = |node: &PathBuf| Path::new("/dev").join(node).to_string_lossy().into_owned();
            used.paths = nodes.iter().map(node).collect();
            used.pid = Some(process.pid);
            used.command = Some(process.command.clone());
            "open"
        }
    };
    used
}
