//! Taking a network interface out of what it is part of.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use busway_iommu::Command;

use crate::root::{self, SysRoot};

/// What an interface is part of, as far as that says how it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upper {
    /// A datapath of Open vSwitch, which alone lets ports go (net/openvswitch/vport-netdev.c).
    OpenVSwitch,
    /// A bond, a bridge, a team or a VRF: its ports can be taken from it.
    Master,
    /// A device on top of the interface, which ends without it: VLAN, macvlan, ipvlan.
    OnTop,
}

impl Upper {
    /// Tells by what the kernel says of both interfaces, whose folders these are, and not by names that
    /// anybody can choose; only Open vSwitch's has a name of its own (lib/dpif-netlink.c).
    fn of(root: &SysRoot, lower: &Path, upper: &Path, name: &OsStr) -> Self {
        // Documentation/ABI/testing/sysfs-class-net: uevent has the kind of some interfaces.
        let kind = root::attribute(&upper.join("uevent")).unwrap_or_default();
        let kind = kind.lines().find_map(|line| line.strip_prefix("DEVTYPE="));
        // netdev_adjacent_sysfs_add and netdev_master_upper_dev_link, net/core/dev.c
        let master = fs::read_link(lower.join("master")).ok();
        let is_master = master.is_some_and(|path| path.file_name() == Some(name));
        if name == "ovs-system" {
            Self::OpenVSwitch
        } else if is_master
            || matches!(kind, Some("bond" | "bridge" | "team" | "vrf"))
            || upper.join("bonding").is_dir()
            || upper.join("bridge").is_dir()
        {
            Self::Master
        } else if root.proc.join("net/vlan").join(name).exists()
            || matches!(
                kind,
                Some("vlan" | "macvlan" | "macvtap" | "ipvlan" | "ipvtap")
            )
            || !lower.join("brport").is_dir()
        {
            Self::OnTop
        } else {
            Self::Master
        }
    }
}

/// The command that takes the interface in the folder `path` out of the one of those that it is part of,
/// by their names, which is number `index`; none where it is not part of so many.
pub(super) fn leave(root: &SysRoot, path: &Path, index: usize) -> Option<Command> {
    let name = path.file_name()?;
    let entries = root::raw_names(path);
    let mut uppers = entries
        .iter()
        .filter_map(|entry| entry.as_bytes().strip_prefix(b"upper_"));
    let upper = OsString::from_vec(uppers.nth(index)?.to_vec());
    let folder = root::target(root, &root.sys.join("class/net").join(&upper))?;
    Some(match Upper::of(root, path, &folder, &upper) {
        Upper::OpenVSwitch => Command::new(["ovs-vsctl", "del-port"])
            .end_of_options()
            .operand(name),
        // What stands behind the word `dev` is a name, whatever it begins with.
        Upper::Master => Command::new(["ip", "link", "set", "dev"])
            .operand(name)
            .operand("nomaster"),
        Upper::OnTop => Command::new(["ip", "link", "delete", "dev"]).operand(upper),
    })
}
