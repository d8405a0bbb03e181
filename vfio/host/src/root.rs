//! Reading the small files of the kernel's file systems, below a [`SysRoot`].

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

pub use busway_iommu::{SysRoot, one_line};
pub(crate) use busway_iommu::{link_name, printable};
use busway_pci::Bdf;

/// What Busway keeps while the host runs.
pub(crate) fn state(root: &SysRoot) -> PathBuf {
    root.run.join("busway")
}

/// Where a link leads that is below a class or a bus: a folder below `sys/devices`. Not resolved
/// step by step, for there are no links on the way.
pub(crate) fn target(root: &SysRoot, link: &Path) -> Option<PathBuf> {
    // `../../devices/…`, seen from `sys/class/net`.
    let mut down = PathBuf::new();
    for part in fs::read_link(link).ok()?.components() {
        match part {
            Component::ParentDir => drop(down.pop()),
            part => down.push(part),
        }
    }
    Some(root.sys.join(down))
}

/// Where the pools of huge pages are, a folder for each size: those of a NUMA node, or of all.
pub(crate) fn huge_page_pools(root: &SysRoot, node: Option<u32>) -> PathBuf {
    match node {
        Some(node) => root
            .sys
            .join(format!("devices/system/node/node{node}/hugepages")),
        None => root.sys.join("kernel/mm/hugepages"),
    }
}

/// Where the pages of a size are, on a node or on all.
pub(crate) fn huge_page_pool(root: &SysRoot, node: Option<u32>, size: u64) -> PathBuf {
    huge_page_pools(root, node).join(format!("hugepages-{}kB", size / 1024))
}

/// The driver that alone may take the device in this folder, where one was set.
pub(crate) fn override_in(folder: &Path) -> Option<String> {
    // An attribute without a value reads as the kernel's printf of a null pointer.
    attribute(&folder.join("driver_override")).filter(|name| !name.is_empty() && name != "(null)")
}

/// A file's text without white space at its ends, where it can be read. What could steer a terminal is
/// not let through.
pub(crate) fn text(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    Some(printable(String::from_utf8_lossy(&bytes).trim()))
}

/// The same of an attribute of sysfs, which gives all that it has in one read of a page
/// (Documentation/filesystems/sysfs.rst): neither its length nor its end is asked for.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    Some(printable(String::from_utf8_lossy(&page(path)?).trim()))
}

/// The bytes of an attribute of sysfs that is a name, without the line end that the kernel writes behind
/// it.
pub(crate) fn raw_name(path: &Path) -> Option<OsString> {
    let mut bytes = page(path)?;
    bytes.pop_if(|last| *last == b'\n');
    Some(OsString::from_vec(bytes))
}

/// The first page of an attribute of sysfs, as its bytes are.
pub(crate) fn page(path: &Path) -> Option<Vec<u8>> {
    let mut page = [0; 4096];
    let mut file = File::open(path).ok()?;
    let length = loop {
        match file.read(&mut page) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => break read.ok()?,
        }
    };
    Some(page.get(..length)?.to_vec())
}

/// A number written as `0x1af4`.
pub(crate) fn hex(path: &Path) -> Option<u32> {
    let text = attribute(path)?;
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// A decimal number.
pub(crate) fn number<T: std::str::FromStr>(path: &Path) -> Option<T> {
    attribute(path)?.parse().ok()
}

/// The names in a folder as their bytes are, sorted; none where it is absent or may not be read.
pub(crate) fn raw_names(folder: &Path) -> Vec<OsString> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .collect();
    names.sort();
    names
}

/// The names in a folder, sorted; none where it is absent or may not be read.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    try_names(folder).unwrap_or_default()
}

/// The names in a folder, sorted.
pub(crate) fn try_names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// The PCI device that stands innermost on a path below `/sys/devices`.
pub(crate) fn innermost_pci(path: &Path) -> Option<Bdf> {
    path.components()
        .rev()
        .find_map(|part| full_address(part.as_os_str().to_str()?))
}

/// The address that sysfs would name so. [`Bdf`] also reads the short form, which is none of sysfs's.
pub(crate) fn full_address(name: &str) -> Option<Bdf> {
    let address: Bdf = name.parse().ok()?;
    (address.to_string() == name).then_some(address)
}
