//! Which of the VFIO drivers a device is for.
//!
//! Beside `vfio-pci`, which takes any device, the kernel has variants for certain ones, which add what
//! these can do more, such as migration. The kernel's list of aliases says which (see
//! [`Aliases::vfio`]).

use busway_pci::Bdf;

use super::modules::Aliases;
use super::root::{self, SysRoot};

/// The driver that lends any PCI device to user space.
pub const VFIO_PCI: &str = "vfio-pci";

/// The module whose driver is made for the device: a variant, where the kernel has one.
pub(super) fn module_for(root: &SysRoot, aliases: &Aliases, address: Bdf) -> String {
    let alias = root::text(&root.device(address).join("modalias")).unwrap_or_default();
    match aliases.vfio(&alias).first() {
        // The one for all has a name that people know.
        None | Some(&"vfio_pci") => VFIO_PCI.to_owned(),
        Some(module) => (*module).to_owned(),
    }
}

/// The name of the PCI driver that a module has: the two may differ in how they are spelled.
pub(super) fn driver_of(root: &SysRoot, module: &str) -> String {
    let module = module.replace('-', "_");
    let drivers = root::names(&root.sys.join("module").join(&module).join("drivers"));
    let known = drivers.iter().find_map(|name| name.strip_prefix("pci:"));
    if let Some(name) = known {
        return name.to_owned();
    }
    // Before it is loaded, nobody says how its driver is spelled; most variants' are as the module.
    let dashed = module.replace('_', "-");
    if dashed == VFIO_PCI || root.driver(&dashed).exists() {
        dashed
    } else {
        module
    }
}
