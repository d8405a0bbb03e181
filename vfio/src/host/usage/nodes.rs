//! The nodes by which programs use graphics and sound cards.

use std::collections::BTreeMap;
use std::path::PathBuf;

use busway_pci::Bdf;

use crate::host::root::{self, SysRoot};

/// The classes whose nodes are a program's way to a card: `dri/card0`, `dri/renderD128`, `snd/pcmC0D0p`.
const CLASSES: [&str; 2] = ["drm", "sound"];

/// Which PCI device each node, by its path below `/dev`, belongs to.
pub(super) fn read(root: &SysRoot) -> BTreeMap<PathBuf, Bdf> {
    let mut nodes = BTreeMap::new();
    for class in CLASSES {
        let class = root.sys.join("class").join(class);
        for name in root::names(&class) {
            let link = class.join(name);
            let owner = root.target(&link).and_then(|at| root::innermost_pci(&at));
            let Some(owner) = owner else {
                continue;
            };
            // A card's connectors and a sound card as a whole have no node.
            let text = root::attribute(&link.join("uevent")).unwrap_or_default();
            let mut lines = text.lines();
            if let Some(node) = lines.find_map(|line| line.strip_prefix("DEVNAME=")) {
                nodes.insert(node.into(), owner);
            }
        }
    }
    // NVIDIA's own driver makes a node that is of no class, and says in its own folder which it is.
    let cards = root.proc.join("driver/nvidia/gpus");
    for name in root::names(&cards) {
        let text = root::text(&cards.join(&name).join("information")).unwrap_or_default();
        let mut lines = text.lines();
        let minor = lines.find_map(|line| line.strip_prefix("Device Minor:"));
        let minor = minor.and_then(|minor| minor.trim().parse::<u32>().ok());
        if let (Some(owner), Some(minor)) = (root::full_address(&name), minor) {
            nodes.insert(format!("nvidia{minor}").into(), owner);
        }
    }
    nodes
}
