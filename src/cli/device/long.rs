//! `busway device list --long`: everything that is known of a device, in a block of lines.

use std::fmt::Write as _;

use busway_host::{HostDevice, LinkState, Resource};

use super::block::labelled;
use super::facts::{self, Facts, Shown};
use super::mediated::{self, type_words};
use crate::cli::style::Screen;

/// A block for each device, with an empty line between.
pub(super) fn show(facts: &Facts<'_>, shown: &Shown<'_>, screen: Screen) -> String {
    let blocks = shown.devices.iter();
    let blocks = blocks.map(|device| block(facts, device, screen));
    let mediated = mediated::blocks(facts.host, &shown.mediated, screen);
    let parents = mediated::parents(&shown.types, screen);
    let blocks: Vec<_> = blocks.chain(mediated).chain(parents).collect();
    blocks.join("\n")
}

fn block(facts: &Facts<'_>, device: &HostDevice, screen: Screen) -> String {
    let title = device.address.to_string();
    labelled(&title, facts.name(device), lines(facts, device), screen)
}

fn lines(facts: &Facts<'_>, device: &HostDevice) -> Vec<(&'static str, String)> {
    let mut lines = vec![(
        "kind",
        format!(
            "{} ({:06x}), {:04x}:{:04x}, subsystem {:04x}:{:04x}",
            facts.class(device),
            device.class,
            device.vendor,
            device.device,
            device.subsystem_vendor,
            device.subsystem_device
        ),
    )];
    lines.push(("driver", driver(facts, device)));
    lines.push(("group", group(facts, device)));
    let mut place = device.root_bus.clone().unwrap_or_default();
    for bridge in facts.host.above(device) {
        let _infallible = write!(place, " > {}", bridge.address);
    }
    if let Some(node) = device.numa_node {
        let _infallible = write!(place, ", NUMA node {node}");
    }
    lines.push(("place", place));
    if let Some(link) = device.link {
        let state = |state: LinkState| format!("{} GT/s x{}", facts::speed(state), state.width);
        let words = match link.current {
            None => format!("down; can {}", state(link.max)),
            Some(now) if link.is_degraded() => {
                format!("{}; can {}", state(now), state(link.max))
            }
            Some(now) => state(now),
        };
        lines.push(("link", words));
    }
    // Nobody resets a host bridge or what stands for the chipset.
    if device.class >> 16 != 0x06 {
        let words = match device.reset_methods.is_empty() {
            true => "none".to_owned(),
            false => device.reset_methods.join(", "),
        };
        lines.push(("reset", words));
    }
    for bar in &device.resources {
        lines.push(("BAR", bar_words(bar)));
    }
    if let Some(sriov) = &device.sriov {
        let mut words = format!("{} of {}", sriov.functions.len(), sriov.total);
        for (index, function) in sriov.functions.iter().enumerate() {
            let _infallible = write!(words, "{} {function}", if index == 0 { ":" } else { "," });
        }
        lines.push(("VFs", words));
    }
    if let Some(physical) = device.physical_function {
        lines.push(("VF of", physical.to_string()));
    }
    for usage in facts.uses(device) {
        lines.push(("used by", usage));
    }
    let types = facts.host.mediated_types().iter();
    let own = types.filter(|kind| kind.parent.address == Some(device.address));
    lines.extend(own.map(|kind| ("mediates", type_words(kind))));
    lines
}

fn driver(facts: &Facts<'_>, device: &HostDevice) -> String {
    let mut words = device.driver.clone().unwrap_or_else(|| "none".to_owned());
    if let Some(only) = &device.driver_override {
        let _infallible = write!(words, ", reserved for {only}");
    }
    let others = facts.alternatives(device);
    if !others.is_empty() {
        let _infallible = write!(words, "; could have {}", others.join(", "));
    }
    if let Some(best) = facts
        .vfio(device)
        .first()
        .filter(|_| !device.is_with_vfio())
    {
        let _infallible = write!(words, "; for a guest {best}");
    }
    words
}

fn group(facts: &Facts<'_>, device: &HostDevice) -> String {
    let Some(group) = device.group else {
        return "none: no IOMMU translates for it".to_owned();
    };
    let members = facts.host.group(group);
    let others: Vec<_> = members
        .filter(|member| member.address != device.address)
        .map(|member| member.address.to_string())
        .collect();
    match others.is_empty() {
        true => format!("{group}, alone"),
        false => format!("{group}, with {}", others.join(", ")),
    }
}

fn bar_words(bar: &Resource) -> String {
    let which = match bar.index {
        6 => "ROM".to_owned(),
        index => index.to_string(),
    };
    let mut words = format!("{which}: {}", facts::size(bar.size));
    if bar.is_io() {
        words += ", I/O ports";
    }
    if bar.is_64bit() {
        words += ", 64-bit";
    }
    if bar.is_prefetchable() && bar.index < 6 {
        words += ", prefetchable";
    }
    words
}
