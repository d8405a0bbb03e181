//! `vm.info`: what a VM is made of and what it is doing, as clients read it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::config::Config;
use super::succeeded;
use crate::control::http::Answer;
use crate::machine::{Info, State};

/// `VmInfo`
#[derive(Serialize)]
struct VmInfo<'a> {
    config: Config,
    state: &'static str,
    memory_actual_size: u64,
    device_tree: BTreeMap<&'a str, DeviceNode<'a>>,
    /// Beside Cloud Hypervisor's: the guest is paused after an error of a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<bool>,
    /// Beside Cloud Hypervisor's: how many devices can be added.
    empty_slots: usize,
}

/// `DeviceNode`
#[derive(Serialize)]
struct DeviceNode<'a> {
    id: &'a str,
    resources: [(); 0],
    children: [&'a str; 0],
    /// The address in the guest.
    pci_bdf: &'a str,
    /// Beside Cloud Hypervisor's, of a host device: the address on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    host_bdf: Option<&'a str>,
    /// Beside Cloud Hypervisor's, of a host device: how it is reset.
    #[serde(skip_serializing_if = "Option::is_none")]
    reset: Option<&'a str>,
}

impl<'a> DeviceNode<'a> {
    fn new(id: &'a str, pci_bdf: &'a str) -> Self {
        Self {
            id,
            resources: [],
            children: [],
            pci_bdf,
            host_bdf: None,
            reset: None,
        }
    }
}

/// The word that clients know for a state.
pub(super) fn word(state: State) -> &'static str {
    match state {
        State::Created => "Created",
        State::Running => "Running",
        // Clients know no other word for a guest that does not run.
        State::Paused | State::Held => "Paused",
        State::Shutdown => "Shutdown",
    }
}

/// The answer to `vm.info`.
pub(super) fn show(info: &Info) -> Answer {
    let (devices, ids) = (&info.devices, &info.ids);
    let nodes = devices.iter().map(|device| {
        let id = ids.get(&device.host).unwrap_or(&device.host).as_str();
        let mut node = DeviceNode::new(id, &device.guest);
        node.host_bdf = Some(&device.host);
        node.reset = Some(device.reset);
        (id, node)
    });
    let virtio = info.virtio.iter().map(|device| {
        let node = DeviceNode::new(&device.id, &device.address);
        (device.id.as_str(), node)
    });
    succeeded(&VmInfo {
        config: info.into(),
        state: word(info.state),
        // Clients compute with it, before the guest has any as well.
        memory_actual_size: match info.memory {
            0 => info.config.memory.at_start(),
            memory => memory.saturating_sub(info.balloon),
        },
        device_tree: nodes.chain(virtio).collect(),
        held: (info.state == State::Held).then_some(true),
        empty_slots: info.empty_slots,
    })
}
