//! Binding that outlives a reboot: a rule of udev's for each device.
//!
//! The rule is keyed on the address and on the kind of device, so that another that comes to the
//! address stays with the host. It reserves the device before any driver's module is loaded, and has
//! Busway bind it, which looks first whether the host uses it, as it always does.

use std::fs;
use std::path::{Path, PathBuf};

use busway_pci::Bdf;

use super::journal::Identity;
use super::root::SysRoot;

/// What udev runs: this, with the words that bind a device. Its place must be known at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Persist {
    /// The program `busway`, by its whole path.
    pub program: PathBuf,
}

/// Where the rule of a device is.
pub(super) fn rule(root: &SysRoot, address: Bdf) -> PathBuf {
    root.rules().join(format!("60-busway-{address}.rules"))
}

/// The rule's text, where there is one.
pub(super) fn rule_text(root: &SysRoot, address: Bdf) -> Option<String> {
    fs::read_to_string(rule(root, address)).ok()
}

/// The devices that have a rule.
pub(super) fn addresses(root: &SysRoot) -> Vec<Bdf> {
    let names = super::root::names(&root.rules());
    let address = |name: &String| {
        let name = name.strip_prefix("60-busway-")?.strip_suffix(".rules")?;
        super::root::full_address(name)
    };
    names.iter().filter_map(address).collect()
}

/// A rule that binds a device at each boot. udev(7)
pub(super) fn text(
    persist: &Persist,
    address: Bdf,
    identity: Identity,
    driver: &str,
    user: Option<u32>,
) -> String {
    let kind = kind(identity);
    let program = quoted(&persist.program);
    let user = user.map_or_else(String::new, |user| format!(" --user {user}"));
    format!(
        "# Gives {address} to {driver} at every boot, while it is this kind of device.\n\
         # Made by `busway device bind --persist`; `busway device restore {address}` removes it.\n\
         ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"{address}\", {kind}, \
         ATTR{{driver_override}}=\"{driver}\", \
         RUN+=\"{program} device bind --from-rule --driver {driver}{user} {address}\"\n"
    )
}

/// What a rule asks of the kind of device.
fn kind(identity: Identity) -> String {
    let Identity {
        vendor,
        device,
        subsystem_vendor,
        subsystem_device,
    } = identity;
    format!(
        "ATTR{{vendor}}==\"{vendor:#06x}\", ATTR{{device}}==\"{device:#06x}\", \
         ATTR{{subsystem_vendor}}==\"{subsystem_vendor:#06x}\", \
         ATTR{{subsystem_device}}==\"{subsystem_device:#06x}\""
    )
}

/// Whether a rule is for this kind of device.
pub(super) fn is_for(rule: &str, identity: Identity) -> bool {
    rule.contains(&kind(identity))
}

/// A path in a rule's RUN: in single quotes where it has a space; a percent or dollar sign of its own
/// is doubled, for these begin udev's substitutions.
fn quoted(path: &Path) -> String {
    let text = path
        .display()
        .to_string()
        .replace('%', "%%")
        .replace('$', "$$");
    if text.contains(char::is_whitespace) {
        format!("'{text}'")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_what_udev_reads_back() {
        assert_eq!(quoted(Path::new("/usr/bin/busway")), "/usr/bin/busway");
        assert_eq!(
            quoted(Path::new("/opt/my vm/100%/busway")),
            "'/opt/my vm/100%%/busway'"
        );
    }

    #[test]
    fn the_rule_names_address_kind_driver_and_user() {
        let persist = Persist {
            program: PathBuf::from("/usr/local/bin/busway"),
        };
        let identity = Identity {
            vendor: 0x8086,
            device: 0x10d3,
            subsystem_vendor: 0x8086,
            subsystem_device: 0,
        };
        let address = "0000:01:00.0".parse().unwrap();
        let text = text(&persist, address, identity, "vfio-pci", Some(1000));
        let rule = text.lines().last().unwrap();
        assert_eq!(
            rule,
            "ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"0000:01:00.0\", \
             ATTR{vendor}==\"0x8086\", ATTR{device}==\"0x10d3\", \
             ATTR{subsystem_vendor}==\"0x8086\", ATTR{subsystem_device}==\"0x0000\", \
             ATTR{driver_override}=\"vfio-pci\", \
             RUN+=\"/usr/local/bin/busway device bind --from-rule --driver vfio-pci \
             --user 1000 0000:01:00.0\""
        );
    }
}
