//! Writes what PCI vendors, devices and classes are called into one text, in the form of the PCI ID database
//! (`pci.ids(5)`), without its subsystems.
//!
//! The crate `pci-ids` has the database as tables of references. In Busway itself they would cost every process
//! 43,000 relocations before `main`, and 2.6 MB of memory of its own; a text that nobody looks at costs it nothing.

use std::fmt::{self, Write as _};
use std::path::Path;
use std::{env, fs, io};

use pci_ids::{Classes, Vendors};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    let text = names().map_err(io::Error::other)?;
    let folder = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?;
    fs::write(Path::new(&folder).join("pci.ids"), text)
}

/// In the order of the numbers, so that the same database makes the same text.
fn names() -> Result<String, fmt::Error> {
    let mut text = String::new();
    let mut vendors: Vec<_> = Vendors::iter().collect();
    vendors.sort_by_key(|vendor| vendor.id());
    for vendor in vendors {
        writeln!(text, "{:04x}  {}", vendor.id(), vendor.name())?;
        let mut devices: Vec<_> = vendor.devices().collect();
        devices.sort_by_key(|device| device.id());
        for device in devices {
            writeln!(text, "\t{:04x}  {}", device.id(), device.name())?;
        }
    }
    let mut classes: Vec<_> = Classes::iter().collect();
    classes.sort_by_key(|class| class.id());
    for class in classes {
        writeln!(text, "C {:02x}  {}", class.id(), class.name())?;
        let mut subclasses: Vec<_> = class.subclasses().collect();
        subclasses.sort_by_key(|subclass| subclass.id());
        for subclass in subclasses {
            writeln!(text, "\t{:02x}  {}", subclass.id(), subclass.name())?;
        }
    }
    Ok(text)
}
