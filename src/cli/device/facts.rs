//! What is known of a device, in the words that tables, trees and pictures share.

use std::collections::HashMap;
use std::fmt::Write as _;

use busway_host::{Aliases, Host, HostDevice, LinkState, Resource, Usage, is_vfio_driver};

use super::names::Names;

/// What turns a device's numbers into words.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) host: &'a Host,
    aliases: Aliases,
    /// Names of kinds of devices: a host has many devices of a kind, and a vendor's part of the database
    /// may be long.
    known: HashMap<(u16, u16), String>,
    classes: HashMap<u32, String>,
    /// The modules that drivers are of.
    modules: HashMap<&'a str, String>,
}

impl<'a> Facts<'a> {
    /// Looks up what the devices of a host are called, and which modules there are.
    pub(super) fn of(host: &'a Host, names: &Names) -> Self {
        let mut known = HashMap::new();
        let mut classes = HashMap::new();
        let mut modules = HashMap::new();
        for device in host.devices() {
            let ids = (device.vendor, device.device);
            known
                .entry(ids)
                .or_insert_with(|| names.device(ids.0, ids.1));
            classes
                .entry(device.class)
                .or_insert_with(|| names.class(device.class));
            if let Some(driver) = device.driver.as_deref() {
                modules
                    .entry(driver)
                    .or_insert_with(|| host.module_of(driver).unwrap_or_default());
            }
        }
        Self {
            host,
            aliases: Aliases::read(host.root()),
            known,
            classes,
            modules,
        }
    }

    /// Vendor and device.
    pub(super) fn name(&self, device: &HostDevice) -> &str {
        let name = self.known.get(&(device.vendor, device.device));
        name.map_or("", String::as_str)
    }

    /// What kind of device it is.
    pub(super) fn class(&self, device: &HostDevice) -> &str {
        self.classes.get(&device.class).map_or("", String::as_str)
    }

    /// The modules of the host's own that match it.
    pub(super) fn native(&self, device: &HostDevice) -> Vec<&str> {
        self.aliases
            .native(device.modalias.as_deref().unwrap_or(""))
    }

    /// The modules that can lend it to user space, the best first.
    pub(super) fn vfio(&self, device: &HostDevice) -> Vec<&str> {
        // Bridges of all kinds: none is of use to a guest.
        if device.class >> 16 == 0x06 {
            return Vec::new();
        }
        self.aliases.vfio(device.modalias.as_deref().unwrap_or(""))
    }

    /// The drivers that it could have in place of its own: all but `vfio_pci`, which takes any.
    pub(super) fn alternatives(&self, device: &HostDevice) -> Vec<&str> {
        let plain = |name: &str| name.replace('-', "_");
        let driver = device.driver.as_deref().unwrap_or_default();
        let module = self.modules.get(driver).map_or("", String::as_str);
        let now = ["vfio_pci".to_owned(), plain(driver), plain(module)];
        let all = self.native(device).into_iter().chain(self.vfio(device));
        all.filter(|name| !now.contains(&plain(name))).collect()
    }

    /// What uses it, one in a few words each.
    pub(super) fn uses(&self, device: &HostDevice) -> Vec<String> {
        uses(self.host.usage(device.address))
    }
}

/// The uses in words. What is known of one interface makes one of them:
/// `eth0 > bond0 10.0.0.4 (default route)`.
fn uses(all: &[Usage]) -> Vec<String> {
    let mut words = Vec::new();
    for usage in all {
        match usage {
            Usage::Interface { chain, .. } => {
                let mut text = usage.to_string();
                let mut ways = Vec::new();
                for other in all {
                    let route = other.route();
                    if !route.is_some_and(|route| Usage::leads_by(route, chain)) {
                        continue;
                    }
                    match other {
                        Usage::SshRoute { .. } => ways.push("this SSH session"),
                        _ => ways.push("default route"),
                    }
                }
                if !ways.is_empty() {
                    let _infallible = write!(text, " ({})", ways.join(", "));
                }
                words.push(text);
            }
            // Said with the interface; a representor is none that is named.
            _ if usage.route().is_some_and(|route| is_named(all, route)) => {}
            _ => words.push(usage.to_string()),
        }
    }
    words
}

/// Whether one of the uses is the interface that a route goes by.
fn is_named(all: &[Usage], route: &[String]) -> bool {
    all.iter().any(|usage| match usage {
        Usage::Interface { chain, .. } => Usage::leads_by(route, chain),
        _ => false,
    })
}

/// `8.0` for 80 tenths of GT/s.
pub(super) fn speed(state: LinkState) -> String {
    format!("{}.{}", state.speed / 10, state.speed % 10)
}

/// Speed and width of a link in few characters, with the most it can where that is more:
/// `2.5/8.0 x4/16`.
pub(super) fn link(device: &HostDevice) -> String {
    let Some(link) = device.link else {
        return String::new();
    };
    let max = link.max;
    let Some(now) = link.current else {
        return format!("down/{} x{}", speed(max), max.width);
    };
    let mut text = speed(now);
    if now.speed < max.speed {
        let _infallible = write!(text, "/{}", speed(max));
    }
    let _infallible = write!(text, " x{}", now.width);
    if now.width < max.width {
        let _infallible = write!(text, "/{}", max.width);
    }
    text
}

/// Bytes in few characters: `16K`, `256M`; powers of two are what BARs have.
pub(super) fn size(bytes: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    let unit = units
        .into_iter()
        .find(|(_, shift)| bytes >> shift > 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((unit, shift)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// The BARs' sizes: `16M 256M 32M 128io`.
pub(super) fn bars(device: &HostDevice) -> String {
    let bars = device.resources.iter().filter(|bar| bar.index < 6);
    let one = |bar: &Resource| {
        let io = if bar.is_io() { "io" } else { "" };
        size(bar.size) + io
    };
    bars.map(one).collect::<Vec<_>>().join(" ")
}

/// Virtual functions that there are, of those that it can make: `2/64`.
pub(super) fn functions(device: &HostDevice) -> String {
    match (&device.sriov, device.physical_function) {
        (Some(sriov), _) => format!("{}/{}", sriov.functions.len(), sriov.total),
        (None, Some(_)) => "VF".to_owned(),
        (None, None) => String::new(),
    }
}

/// The style that a driver is shown in: one that lends the device to user space stands out.
pub(super) fn is_lent(driver: &str) -> bool {
    is_vfio_driver(driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_in_the_largest_unit_that_fits() {
        for (bytes, text) in [
            (0, "0"),
            (128, "128"),
            (16 << 10, "16K"),
            (1536, "1536"),
            (3 << 20, "3M"),
            (64 << 30, "64G"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
