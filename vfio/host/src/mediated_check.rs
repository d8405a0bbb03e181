//! Whether a guest can have a mediated device.

use busway_iommu::{Command, PCI_API, Uuid};

use super::asker::Asker;
use super::finding::{Finding, Level, Remedy, worst};
use super::host::Host;
use super::mediated::{MediatedDevice, MediatedType, nodes};
use super::surroundings::{self, Opens};

/// What was found about one mediated device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediatedCheck {
    /// The device.
    pub uuid: Uuid,
    /// Whether there is such a device.
    pub is_there: bool,
    /// What was found.
    pub findings: Vec<Finding>,
}

impl MediatedCheck {
    /// Looks one over. `opens` is asked whether a node can be opened.
    pub(super) fn of(host: &Host, uuid: Uuid, asker: &Asker, opens: Opens<'_>) -> Self {
        let device = host.mediated_device(uuid);
        Self {
            uuid,
            is_there: device.is_some(),
            findings: match device {
                Some(device) => findings(host, device, asker, opens),
                None => vec![absent(host)],
            },
        }
    }

    /// Whether a guest can have it now, as far as it alone goes.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        worst(&self.findings) < Level::Obstacle
    }
}

/// That there is no such device, and how one is made.
fn absent(host: &Host) -> Finding {
    let finding = Finding::new(
        Level::Obstacle,
        "device",
        "there is no such mediated device",
    );
    let usable = |kind: &&MediatedType| {
        kind.api.as_deref() == Some(PCI_API) && kind.available.is_none_or(|left| left > 0)
    };
    match host.mediated_types().iter().find(usable) {
        Some(kind) => finding.remedy(Remedy::words(format!(
            "make it: write its UUID to /sys/class/mdev_bus/{}/mdev_supported_types/{}/create, or to that of \
             another type that `busway device list` shows",
            kind.parent.name, kind.id
        ))),
        None => finding.remedy(Remedy::command(
            "see those there are",
            Command::new(["busway", "device", "list"]),
        )),
    }
}

fn findings(host: &Host, device: &MediatedDevice, asker: &Asker, opens: Opens<'_>) -> Vec<Finding> {
    let mut findings = vec![kind(device), driver(device)];
    findings.extend(device.users.iter().map(|process| {
        let text = format!("in use: {process}");
        Finding::new(Level::Obstacle, "use", text).remedy(Remedy::words(format!(
            "end {process}, or take the device out of its guest"
        )))
    }));
    if device.driver.is_some() {
        findings.extend(open_nodes(host, device, asker, opens));
    }
    findings
}

/// What kind of device it is, and whether a guest's PCI driver can use that.
fn kind(device: &MediatedDevice) -> Finding {
    const TOPIC: &str = "device";
    let (Some(kind), Some(api)) = (&device.kind, &device.api) else {
        let text = "it is being removed: its type is gone, and the device goes when its users have closed it";
        return Finding::new(Level::Obstacle, TOPIC, text);
    };
    let of = match &device.parent {
        Some(parent) => format!(", made of {}", parent.name),
        None => String::new(),
    };
    let name = device.kind_name.as_ref().filter(|name| *name != kind);
    let name = name.map(|name| format!(" ({name})"));
    let text = format!("{kind}{}{of}", name.unwrap_or_default());
    if api != PCI_API {
        let text = format!("{text}: it is of the kind {api}, and a guest can have {PCI_API} only");
        return Finding::new(Level::Obstacle, TOPIC, text).remedy(Remedy::words(
            "its driver has to offer a type whose device_api is vfio-pci",
        ));
    }
    Finding::new(Level::Fine, TOPIC, text)
}

fn driver(device: &MediatedDevice) -> Finding {
    const TOPIC: &str = "driver";
    if let Some(driver) = &device.driver {
        let text = format!("{driver} lends it; nothing is to be bound");
        return Finding::new(Level::Fine, TOPIC, text);
    }
    let text = "no driver has it, so that VFIO does not lend it";
    let remove = format!("/sys/bus/mdev/devices/{}/remove", device.uuid);
    Finding::new(Level::Obstacle, TOPIC, text).remedy(Remedy::command(
        "remove it and make it anew; `dmesg` may say why its driver did not take it",
        Command::write("1", remove),
    ))
}

/// The nodes that a guest's VMM opens for it.
fn open_nodes(
    host: &Host,
    device: &MediatedDevice,
    asker: &Asker,
    opens: Opens<'_>,
) -> Vec<Finding> {
    let root = host.root();
    let there = nodes(device).into_iter();
    let there: Vec<_> = there.filter(|node| root.dev.join(node).exists()).collect();
    if there.is_empty() {
        let text = "its driver lends it, and there is no node of it in /dev/vfio: a container of its own, \
                    or udev does not run";
        let remedy = Remedy::words("let the container have /dev/vfio");
        return vec![Finding::new(Level::Obstacle, "nodes", text).remedy(remedy)];
    }
    let there = there.iter().filter_map(|node| node.to_str());
    there
        .filter_map(|node| surroundings::node(root, asker, node, opens))
        .collect()
}
