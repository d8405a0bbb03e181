//! The frame buffer that the firmware left for the kernel's console, which keeps a BAR from VFIO.

use busway_pci::Bdf;

use super::boot::Loader;
use super::finding::{Finding, Level, Remedy};
use super::root::{self, SysRoot};

/// What `/proc/iomem` calls it: the platform's device (drivers/firmware/sysfb_simplefb.c) and the
/// drivers that take it (drivers/video/fbdev/efifb.c, vesafb.c, simplefb.c; drivers/gpu/drm/sysfb).
const NAMES: [&str; 9] = [
    "BOOTFB",
    "simpledrm",
    "simplefb",
    "simple-framebuffer",
    "efifb",
    "efidrm",
    "vesafb",
    "vesadrm",
    "ofdrm",
];

/// What holds a part of a BAR of the device at `address` for the console.
pub(super) fn holder(root: &SysRoot, address: Bdf) -> Option<String> {
    let text = root::text(&root.proc.join("iomem"))?;
    let address = address.to_string();
    // A line is indented by two for each range that it lies in (kernel/resource.c, r_show).
    let mut inside: Option<usize> = None;
    let mut found = Vec::new();
    for line in text.lines() {
        let Some((_, name)) = line.split_once(" : ") else {
            continue;
        };
        let depth = line.len() - line.trim_start().len();
        if inside.is_some_and(|of| depth <= of) {
            inside = None;
        }
        let name = name.trim();
        if inside.is_some() && NAMES.contains(&name) && !found.contains(&name) {
            found.push(name);
        } else if inside.is_none() && name == address {
            inside = Some(depth);
        }
    }
    (!found.is_empty()).then(|| found.join(", "))
}

/// What `busway device check` reports of a device that has the console's frame buffer, and what helps.
pub(super) fn finding(root: &SysRoot, address: Bdf) -> Option<Finding> {
    let holder = holder(root, address)?;
    let text = format!(
        "the console's frame buffer is in a BAR of it ({holder} in /proc/iomem), and VFIO cannot have \
         that BAR meanwhile"
    );
    let finding = Finding::new(Level::Obstacle, "display", text);
    let finding = finding.remedy(Remedy::words(
        "have the kernel leave the firmware's frame buffer alone (the console is dark until a driver \
         takes a display), by the parameter initcall_blacklist=sysfb_init of its command line",
    ));
    // video=efifb:off is without effect since the frame buffer is a device of its own (Linux 5.15).
    Some(finding.remedies(Loader::read(root).add("initcall_blacklist=sysfb_init")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_frame_buffer_within_the_device_s_own_range_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        std::fs::create_dir_all(&root.proc).unwrap();
        let text = "00000000-00000000 : PCI Bus 0000:00\n  \
                    00000000-00000000 : PCI Bus 0000:01\n    \
                    00000000-00000000 : 0000:01:00.0\n      \
                    00000000-00000000 : BOOTFB\n        \
                    00000000-00000000 : simpledrm\n    \
                    00000000-00000000 : 0000:01:00.1\n  \
                    00000000-00000000 : efifb\n";
        std::fs::write(root.proc.join("iomem"), text).unwrap();
        let of = |address: &str| holder(&root, address.parse().unwrap());
        assert_eq!(of("0000:01:00.0").as_deref(), Some("BOOTFB, simpledrm"));
        assert_eq!(of("0000:01:00.1"), None);
        assert_eq!(of("0000:02:00.0"), None);
    }
}
