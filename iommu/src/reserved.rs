//! Who reserves I/O virtual addresses: what the kernel says of each group in sysfs.
//! Linux, Documentation/ABI/testing/sysfs-kernel-iommu_groups

use std::fmt;
use std::path::Path;

use crate::ranges::normalise;
use crate::{IovaRange, SysRoot};

/// A range that no memory of a guest may be at, for the devices of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reserved {
    pub(crate) range: IovaRange,
    /// The kernel's word for it: `msi`, `direct`, `reserved`.
    kind: String,
    group: u32,
    /// The group's devices, by address.
    devices: Vec<String>,
}

impl Reserved {
    /// The group's devices, as a person says them.
    pub(crate) fn devices(&self) -> String {
        self.devices.join(" and ")
    }
}

impl fmt::Display for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.kind.as_str() {
            "msi" => "for interrupt messages",
            "direct" => "because firmware demands it (an RMRR or unity mapping)",
            _ => "because the host's IOMMU uses it",
        };
        write!(
            f,
            "{} is reserved {reason} for {} (IOMMU group {})",
            self.range,
            self.devices(),
            self.group
        )
    }
}

/// What a group reserves, ascending. Ranges that the kernel gives up for a guest are left out.
pub(crate) fn of_group(paths: &SysRoot, group: u32) -> Vec<Reserved> {
    let file = paths
        .sys
        .join("kernel/iommu_groups")
        .join(group.to_string())
        .join("reserved_regions");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let devices: Vec<_> = paths
        .members(group)
        .into_iter()
        .map(|(address, _)| address)
        .collect();
    let mut found: Vec<_> = text
        .lines()
        .filter_map(parse)
        .map(|(range, kind)| Reserved {
            range,
            kind: kind.to_owned(),
            group,
            devices: devices.clone(),
        })
        .collect();
    found.sort_by_key(|reserved| reserved.range);
    found
}

/// What firmware keeps for a use of its own of the group's devices (an RMRR of Intel's, an IVMD of
/// AMD's), which a guest may not have then.
pub(crate) fn for_firmware(paths: &SysRoot, group: u32) -> Option<Reserved> {
    of_group(paths, group)
        .into_iter()
        .find(|reserved| reserved.kind == "direct")
}

/// `0x00000000fee00000 0x00000000feefffff msi`; the last address is in the range.
fn parse(line: &str) -> Option<(IovaRange, &str)> {
    let mut words = line.split_whitespace();
    let mut address = || u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok();
    let (start, last) = (address()?, address()?);
    let kind = words.next()?;
    // A guest's mappings may replace these (VFIO's own check leaves them out as well).
    (start <= last && kind != "direct-relaxable").then_some((IovaRange { start, last }, kind))
}

/// The ranges where the devices whose folders in sysfs are `devices` let no memory be, ascending
/// and disjoint. What an IOMMU does not reach at all is not among them: that shows when a device is
/// attached.
#[must_use]
pub fn reserved_ranges(paths: &SysRoot, devices: &[&Path]) -> Vec<IovaRange> {
    let mut groups: Vec<_> = devices
        .iter()
        .filter_map(|device| paths.group_of(device))
        .collect();
    groups.sort_unstable();
    groups.dedup();
    normalise(
        groups
            .into_iter()
            .flat_map(|group| of_group(paths, group))
            .map(|reserved| reserved.range)
            .collect(),
    )
}

/// Why the addresses of `gap` cannot be used by devices of `groups`.
pub(crate) fn explain(
    paths: &SysRoot,
    groups: &[u32],
    gap: IovaRange,
    usable: &[IovaRange],
) -> String {
    let mut groups = groups.to_vec();
    groups.sort_unstable();
    groups.dedup();
    let reserved = groups
        .iter()
        .flat_map(|&group| of_group(paths, group))
        .find(|reserved| reserved.range.overlaps(&gap));
    if let Some(reserved) = reserved {
        return reserved.to_string();
    }
    let usable: Vec<_> = usable.iter().map(ToString::to_string).collect();
    format!(
        "the host's IOMMU does not reach {gap} (it reaches {})",
        usable.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn who_reserves_a_range_is_named_and_relaxable_ones_are_nobodys() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot {
            sys: root.path().join("sys"),
            ..SysRoot::default()
        };
        let group = paths.sys.join("kernel/iommu_groups/7");
        let device = root.path().join("0000:01:00.0");
        fs::create_dir_all(group.join("devices/0000:01:00.0")).unwrap();
        fs::create_dir_all(&device).unwrap();
        symlink(&group, device.join("iommu_group")).unwrap();
        fs::write(
            group.join("reserved_regions"),
            "0x0000000000000000 0x0000000000ffffff direct-relaxable\n\
             0x00000000fee00000 0x00000000feefffff msi\n\
             0x000000fd00000000 0x000000ffffffffff reserved\n\
             nonsense\n0x2 0x1 reserved\n",
        )
        .unwrap();
        let range = |start, last| IovaRange { start, last };
        assert_eq!(
            reserved_ranges(&paths, &[&device, &device]),
            [
                range(0xfee0_0000, 0xfeef_ffff),
                range(0xfd_0000_0000, 0xff_ffff_ffff)
            ]
        );
        let usable = [range(0, 0xfedf_ffff)];
        let why = |gap| explain(&paths, &[7], gap, &usable);
        assert_eq!(
            why(range(0xfd_0000_0000, 0xfd_0000_ffff)),
            "0xfd00000000..=0xffffffffff is reserved because the host's IOMMU uses it for \
             0000:01:00.0 (IOMMU group 7)"
        );
        assert!(why(range(0xfee0_0000, 0xfee0_0fff)).contains("for interrupt messages"));
        assert_eq!(
            why(range(1 << 48, 1 << 48)),
            "the host's IOMMU does not reach 0x1000000000000..=0x1000000000000 \
             (it reaches 0x0..=0xfedfffff)"
        );
    }
}
