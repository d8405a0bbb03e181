//! Whether a guest can have a device: every obstacle, and what is worth knowing, each with its remedy.

use std::collections::BTreeSet;

use busway_iommu::{Command, FIRMWARE_REMEDY, IommuAdvice, Uuid, is_vfio_driver};
use busway_pci::Bdf;

use super::acs::{self, Acs};
use super::asker::Asker;
use super::check::{self, Denial};
use super::device::HostDevice;
use super::finding::{Finding, Level, Remedy, worst};
use super::framebuffer;
use super::host::Host;
use super::mediated_check::MediatedCheck;
use super::modules::Aliases;
use super::refusal;
use super::root;
use super::surroundings::{self, Opens, advised};
use super::together::{Together, group_blockers};
use super::usage::Usage;
use super::variant::VFIO_PCI;

/// What was found about one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceCheck {
    /// The device.
    pub address: Bdf,
    /// Whether there is such a device.
    pub is_there: bool,
    /// What was found.
    pub findings: Vec<Finding>,
}

/// What was found about devices that a guest is to have together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// About each PCI device.
    pub devices: Vec<DeviceCheck>,
    /// About each mediated device.
    pub mediated: Vec<MediatedCheck>,
    /// About the host.
    pub host: Vec<Finding>,
}

impl Check {
    /// Looks PCI devices over for a guest of `memory` bytes. `opens` is asked whether a node can be opened.
    #[must_use]
    pub fn of(host: &Host, addresses: &BTreeSet<Bdf>, memory: u64, opens: Opens<'_>) -> Self {
        Self::of_all(host, addresses, &BTreeSet::new(), memory, opens)
    }

    /// The same with mediated devices. For these alone the host needs neither IOMMU nor `vfio-pci`.
    #[must_use]
    pub fn of_all(
        host: &Host,
        addresses: &BTreeSet<Bdf>,
        mediated: &BTreeSet<Uuid>,
        memory: u64,
        opens: Opens<'_>,
    ) -> Self {
        let asker = Asker::read(&host.root);
        let aliases = Aliases::read(&host.root);
        let devices = addresses.iter().map(|&address| DeviceCheck {
            address,
            is_there: host.device(address).is_some(),
            findings: match host.device(address) {
                Some(device) => device_findings(host, device, addresses, &aliases, &asker, opens),
                None => vec![
                    Finding::new(Level::Obstacle, "device", "there is no such PCI device").remedy(
                        Remedy::command(
                            "see those there are",
                            Command::new(["busway", "device", "list"]),
                        ),
                    ),
                ],
            },
        });
        let devices = devices.collect();
        let mediated = mediated.iter();
        let mediated: Vec<_> = mediated
            .map(|&uuid| MediatedCheck::of(host, uuid, &asker, opens))
            .collect();
        let root = &host.root;
        let mut found = Vec::new();
        if !addresses.is_empty() || mediated.is_empty() {
            found.push(surroundings::iommu(root));
            found.extend(surroundings::remapping(root));
            found.extend(surroundings::modules(root));
        }
        for node in ["vfio/vfio", "iommu"] {
            found.extend(surroundings::node(root, &asker, node, opens));
        }
        found.push(surroundings::memlock(&asker, memory));
        found.extend(surroundings::lockdown(root));
        found.extend(surroundings::processes(&asker));
        Self {
            devices,
            mediated,
            host: found,
        }
    }

    /// Whether a guest can have all of the devices now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let devices = self.devices.iter().flat_map(|device| &device.findings);
        let mediated = self.mediated.iter().flat_map(|device| &device.findings);
        worst(devices.chain(mediated).chain(&self.host)) < Level::Obstacle
    }
}

impl DeviceCheck {
    /// Whether nothing about the device itself stands against giving it to a guest.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        worst(&self.findings) < Level::Obstacle
    }

    /// Whether binding it to VFIO is all that is missing.
    #[must_use]
    pub fn needs_only_binding(&self) -> bool {
        let obstacles = self.findings.iter().filter(|f| f.level == Level::Obstacle);
        let mut topics = obstacles.map(|finding| finding.topic).peekable();
        topics.peek().is_some() && topics.all(|topic| topic == "driver")
    }
}

fn device_findings(
    host: &Host,
    device: &HostDevice,
    asked: &BTreeSet<Bdf>,
    aliases: &Aliases,
    asker: &Asker,
    opens: Opens<'_>,
) -> Vec<Finding> {
    if device.is_bridge() {
        let text = "it is a bridge, which no guest can be given";
        let remedy = Remedy::command(
            "name the devices behind it",
            Command::new(["busway", "device", "list", "--tree"]),
        );
        return vec![Finding::new(Level::Obstacle, "device", text).remedy(remedy)];
    }
    if let Some(maker) = check::ends_with(host, device, asked) {
        let text = format!("it is there by the driver of {maker}, and is gone when that is taken");
        let remedy = Remedy::words(format!("name {maker} alone: the guest has it by that"));
        return vec![Finding::new(Level::Obstacle, "device", text).remedy(remedy)];
    }
    let mut findings = vec![group(host, device, asked)];
    findings.extend(leaks(host, device));
    findings.extend(uses(host, device));
    findings.push(driver(host, device, asked));
    findings.extend(variant(device, aliases));
    findings.extend(denied(host, device));
    findings.extend(super::partly_served::partly_served(device));
    findings.extend(framebuffer::finding(&host.root, device.address));
    findings.extend(token(host, device));
    findings.push(reset(device));
    findings.extend(reserved(host, device));
    findings.extend(nodes(host, device, asker, opens));
    findings
}

/// Its IOMMU group, and the other members.
fn group(host: &Host, device: &HostDevice, asked: &BTreeSet<Bdf>) -> Finding {
    let group = device.group.filter(|_| !device.without_iommu);
    let Some(group) = group else {
        let advice = IommuAdvice::read(&host.root);
        let text = match device.without_iommu {
            true => {
                "no IOMMU translates for it: VFIO lends it without (enable_unsafe_noiommu_mode), which \
                 serves programs and no guest"
            }
            false => "it is in no IOMMU group",
        };
        let finding = Finding::new(Level::Obstacle, "group", text);
        return finding.remedies(match advice {
            IommuAdvice::NotBehind => advised(&host.root, advice),
            // The host's own findings say the rest.
            _ => vec![Remedy::words(advice.to_string())],
        });
    };
    let members = host.group(group).filter(|member| !member.is_bridge());
    let others = members.filter(|member| member.address != device.address);
    let others: Vec<_> = others.map(|member| member.address).collect();
    let blockers = group_blockers(host, group, asked);
    if blockers.is_empty() {
        let text = match others.is_empty() {
            true => format!("alone in IOMMU group {group}"),
            false => {
                let others = join(others.iter());
                format!("IOMMU group {group} is free for a guest, with {others} in it")
            }
        };
        return Finding::new(Level::Fine, "group", text);
    }
    let mut text = format!("IOMMU group {group} goes to a guest as a whole, and of it");
    for (index, blocker) in blockers.iter().enumerate() {
        text += if index > 0 { ", " } else { " " };
        text += &format!("{} is with {}", blocker.address, blocker.driver);
        if !blocker.uses.is_empty() {
            let uses: Vec<_> = blocker.uses.iter().map(Usage::to_string).collect();
            text += &format!(" (in use: {})", uses.join(", "));
        }
    }
    let mut finding = Finding::new(Level::Obstacle, "group", text);
    for bridge in blockers.iter().filter(|blocker| blocker.is_bridge) {
        finding = finding.remedy(Remedy::command(
            "take the bridge from its driver",
            refusal::release(bridge),
        ));
    }
    if blockers.iter().all(|blocker| blocker.is_bridge) {
        return finding;
    }
    finding.remedy(match Together::of(host, device, asked) {
        Together::Bind(all) => Remedy::command(
            refusal::how_together(&[device.address], &all, &blockers),
            refusal::bind(&all),
        ),
        Together::Chipset(functions) => Remedy::words(refusal::chipset(&functions)),
    })
}

fn join<'a>(addresses: impl Iterator<Item = &'a Bdf>) -> String {
    let words: Vec<_> = addresses.map(Bdf::to_string).collect();
    words.join(" ")
}

/// Why others are in its group.
fn leaks(host: &Host, device: &HostDevice) -> Option<Finding> {
    let leaks = acs::leaks(host, device);
    let ports: Vec<_> = leaks.iter().map(|(port, _)| *port).collect();
    let (first, _) = leaks.first()?;
    // A port of PCI Express has a link; what has none leads to a conventional bus.
    let conventional = leaks.iter().map(|(port, _)| host.device(*port));
    let mut conventional = conventional.flatten().filter(|port| port.link.is_none());
    if let (Some(bridge), None) = (conventional.next(), device.link) {
        let text = format!(
            "the group is shared because it is behind {}, a bridge to conventional PCI, on which no \
             device can be told from another",
            bridge.address
        );
        let remedy = Remedy::words("a card for PCI Express can be given away alone");
        return Some(Finding::new(Level::Note, "acs", text).remedy(remedy));
    }
    let text = format!(
        "the group is shared because {} {} apart what is behind (no ACS)",
        join(ports.iter()).replace(' ', " and "),
        if ports.len() == 1 {
            "does not keep"
        } else {
            "do not keep"
        },
    );
    let mut finding = Finding::new(Level::Note, "acs", text);
    finding = finding.remedy(Remedy::words(
        "put the card into a slot of its own port, best one of the processor's; some firmware has a \
         switch for ACS",
    ));
    // Linux 6.11, Documentation/admin-guide/kernel-parameters.txt: bits 6 to 0 of the ACS control register.
    if leaks.iter().all(|(_, acs)| *acs == Acs::Off) {
        finding = finding.remedy(Remedy::words(format!(
            "it has ACS, but off: from Linux 6.11 on, boot with pci=config_acs=xx111x1@{first}"
        )));
    }
    Some(finding)
}

fn uses(host: &Host, device: &HostDevice) -> Vec<Finding> {
    let uses = match device.is_with_vfio() {
        false => host.breaks(device.address),
        true => {
            let uses = host.usage(device.address).iter();
            let held = uses.filter(|usage| matches!(usage, Usage::Process(_)));
            held.cloned().collect()
        }
    };
    let one = |usage: Usage| {
        let remedy = refusal::remedy(device.address, &usage);
        Finding::new(Level::Obstacle, "use", format!("in use: {usage}")).remedy(remedy)
    };
    let warnings = check::warnings(host, device.address).into_iter();
    let warnings = warnings.map(|text| Finding::new(Level::Warning, "use", text));
    uses.into_iter().map(one).chain(warnings).collect()
}

fn driver(host: &Host, device: &HostDevice, asked: &BTreeSet<Bdf>) -> Finding {
    const TOPIC: &str = "driver";
    let text = match device.driver.as_deref() {
        Some(driver) if is_vfio_driver(driver) => {
            return Finding::new(Level::Fine, TOPIC, format!("{driver} has it"));
        }
        Some(driver) => format!("{driver} has it, and not yet VFIO"),
        None => "no driver has it, and not yet VFIO".to_owned(),
    };
    let finding = Finding::new(Level::Obstacle, TOPIC, text);
    match Together::of(host, device, asked) {
        Together::Bind(all) => finding.remedy(Remedy::command(
            match all.contains(&device.address) {
                true => "give it to VFIO",
                false => "give what it is part of to VFIO",
            },
            refusal::bind(&all),
        )),
        // The finding about its group says why there is no way.
        Together::Chipset(_) => finding,
    }
}

/// A driver made for lending this very kind of device.
fn variant(device: &HostDevice, aliases: &Aliases) -> Option<Finding> {
    let drivers = aliases.vfio(device.modalias.as_deref()?);
    let best = drivers.first().filter(|name| **name != "vfio_pci")?;
    if device.driver.as_deref() != Some(VFIO_PCI) {
        return None;
    }
    let text = format!("{best} is made for this kind of device, and vfio-pci has it");
    let unbind = Command::new(["busway", "device", "unbind"]).operand(device.address.to_string());
    let remedy = Remedy::command(
        "to have what that driver adds, such as migration",
        unbind.then(refusal::bind([&device.address])),
    );
    Some(Finding::new(Level::Note, "variant", text).remedy(remedy))
}

fn denied(host: &Host, device: &HostDevice) -> Option<Finding> {
    if device.is_with_vfio() {
        return None;
    }
    let text = match Denial::of(host, device)? {
        Denial::Waived => {
            let text = "its kind has known faults by which a guest can harm the host, and vfio-pci was \
                        told to take it all the same";
            return Some(Finding::new(Level::Warning, "errata", text));
        }
        Denial::Stands => format!("vfio-pci turns its kind away: {}", refusal::DENIAL),
    };
    Some(Finding::new(Level::Obstacle, "errata", text).remedy(refusal::allow_denied()))
}

/// The secret by which the users of a physical function and of its virtual functions trust each other,
/// where VFIO has the physical one (drivers/vfio/pci/vfio_pci_core.c, vfio_pci_validate_vf_token).
fn token(host: &Host, device: &HostDevice) -> Option<Finding> {
    const TOPIC: &str = "vf_token";
    if let Some(physical) = device.physical_function {
        if !host.device(physical)?.is_with_vfio() {
            return None;
        }
        let text = format!(
            "its physical function {physical} is with VFIO: it is opened only with the token that was \
             said when that one was opened"
        );
        let remedy = Remedy::words(format!(
            "open {physical} first, and say the same UUID for both: --device {},vf_token=UUID",
            device.address
        ));
        return Some(Finding::new(Level::Warning, TOPIC, text).remedy(remedy));
    }
    let sriov = device.sriov.as_ref().filter(|_| device.is_with_vfio())?;
    if sriov.functions.is_empty() {
        return None;
    }
    let text = "it is with VFIO and has virtual functions: whoever opens it or one of them says the \
                token that all share";
    let remedy = Remedy::words(format!(
        "choose one (uuidgen), and say it for each: --device {},vf_token=UUID",
        device.address
    ));
    Some(Finding::new(Level::Note, TOPIC, text).remedy(remedy))
}

fn reset(device: &HostDevice) -> Finding {
    const TOPIC: &str = "reset";
    let methods = &device.reset_methods;
    if !methods.is_empty() {
        let text = match methods.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["yes"] => "it can be reset".to_owned(),
            _ => format!("it can be reset: {}", methods.join(", ")),
        };
        return Finding::new(Level::Fine, TOPIC, text);
    }
    let text = "the kernel knows no way to reset it: what one guest leaves in it the next one finds, \
                and it may not start twice";
    Finding::new(Level::Warning, TOPIC, text).remedy(Remedy::words(
        "give it to guests that trust each other, together with the other functions of its slot, so \
         that the slot can be reset",
    ))
}

/// Addresses that the firmware or the IOMMU keeps.
fn reserved(host: &Host, device: &HostDevice) -> Vec<Finding> {
    const TOPIC: &str = "reserved";
    let Some(group) = device.group else {
        return Vec::new();
    };
    let file = format!("kernel/iommu_groups/{group}/reserved_regions");
    let text = root::text(&host.root.sys.join(file)).unwrap_or_default();
    let regions = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.next()?, words.next()?))
    });
    let short = |address: &str| {
        let digits = address.trim_start_matches("0x").trim_start_matches('0');
        format!("0x{}", if digits.is_empty() { "0" } else { digits })
    };
    let found = regions.filter_map(|(start, end, kind)| {
        let range = format!("{} to {}", short(start), short(end));
        // Documentation/ABI/testing/sysfs-kernel-iommu_groups
        match kind {
            "direct" => Some(
                Finding::new(
                    Level::Obstacle,
                    TOPIC,
                    format!(
                        "the firmware keeps {range} for a use of its own of this device (an RMRR or \
                         IVMD), and the kernel does not lend such a one"
                    ),
                )
                .remedy(Remedy::words(FIRMWARE_REMEDY))
                .remedy(Remedy::command(
                    "see all of them",
                    Command::new(["cat"]).operand(format!(
                        "/sys/kernel/iommu_groups/{group}/reserved_regions"
                    )),
                )),
            ),
            "direct-relaxable" => Some(Finding::new(
                Level::Note,
                TOPIC,
                format!("the firmware has {range} for it until a driver takes it, which a guest's does"),
            )),
            _ => None,
        }
    });
    found.collect()
}

/// The nodes that a guest's VMM opens for it.
fn nodes(host: &Host, device: &HostDevice, asker: &Asker, opens: Opens<'_>) -> Vec<Finding> {
    if !device.is_with_vfio() || device.without_iommu {
        return Vec::new();
    }
    let group = device.group.map(|group| format!("vfio/{group}"));
    let node = device.vfio_cdev.as_ref();
    let node = node.map(|node| format!("vfio/devices/{node}"));
    let exists = |below: &&String| host.root.dev.join(below).exists();
    let all: Vec<_> = node.iter().chain(&group).filter(exists).collect();
    if all.is_empty() {
        let text = "VFIO has it, and there is no node of it in /dev/vfio: a container of its own, or \
                    udev does not run";
        let remedy = Remedy::words("let the container have /dev/vfio");
        return vec![Finding::new(Level::Obstacle, "nodes", text).remedy(remedy)];
    }
    let found = all
        .into_iter()
        .filter_map(|below| surroundings::node(&host.root, asker, below, opens));
    found.collect()
}
