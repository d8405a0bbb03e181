//! Where the kernel's file systems are mounted, and reading their small files.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use busway_iommu::HostPaths;
pub use busway_iommu::one_line;
pub(crate) use busway_iommu::printable;
use busway_pci::Bdf;

/// The mount points that the host is read from: the real ones, or a made-up tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysRoot {
    /// sysfs
    pub sys: PathBuf,
    /// procfs
    pub proc: PathBuf,
    /// Device nodes.
    pub dev: PathBuf,
    /// What is kept until the host is switched off.
    pub run: PathBuf,
    /// The host's configuration.
    pub etc: PathBuf,
    /// The kernels' modules, a folder for each release.
    pub modules: PathBuf,
}

impl Default for SysRoot {
    fn default() -> Self {
        Self::under(Path::new("/"))
    }
}

impl SysRoot {
    /// The usual names in one folder.
    #[must_use]
    pub fn under(folder: &Path) -> Self {
        Self {
            sys: folder.join("sys"),
            proc: folder.join("proc"),
            dev: folder.join("dev"),
            run: folder.join("run"),
            etc: folder.join("etc"),
            modules: folder.join("lib/modules"),
        }
    }

    /// The same for the crate that maps memory.
    #[must_use]
    pub fn paths(&self) -> HostPaths {
        HostPaths {
            sys: self.sys.clone(),
            dev: self.dev.clone(),
            proc: self.proc.clone(),
        }
    }

    /// The PCI bus.
    pub(crate) fn bus(&self) -> PathBuf {
        self.sys.join("bus/pci")
    }

    /// What Busway keeps while the host runs.
    pub(crate) fn state(&self) -> PathBuf {
        self.run.join("busway")
    }

    /// What devices had before they were moved.
    pub(crate) fn journal(&self) -> PathBuf {
        self.state().join("devices.json")
    }

    /// The host's own rules for udev.
    pub(crate) fn rules(&self) -> PathBuf {
        self.etc.join("udev/rules.d")
    }

    /// A device's folder.
    #[must_use]
    pub fn device(&self, address: Bdf) -> PathBuf {
        self.bus().join("devices").join(address.to_string())
    }

    /// A PCI driver's folder.
    pub(crate) fn driver(&self, name: &str) -> PathBuf {
        self.bus().join("drivers").join(name)
    }

    /// The driver that a device is bound to now.
    pub(crate) fn driver_of(&self, address: Bdf) -> Option<String> {
        link_name(&self.device(address).join("driver"))
    }

    /// The driver that alone may take a device, where one was set.
    pub(crate) fn override_of(&self, address: Bdf) -> Option<String> {
        override_in(&self.device(address))
    }

    /// Where a link leads that is below a class or a bus: a folder below `sys/devices`. Not resolved
    /// step by step, for there are no links on the way.
    pub(crate) fn target(&self, link: &Path) -> Option<PathBuf> {
        // `../../devices/…`, seen from `sys/class/net`.
        let mut down = PathBuf::new();
        for part in fs::read_link(link).ok()?.components() {
            match part {
                Component::ParentDir => drop(down.pop()),
                part => down.push(part),
            }
        }
        Some(self.sys.join(down))
    }
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

fn page(path: &Path) -> Option<Vec<u8>> {
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

/// The last component of what a link points to.
pub(crate) fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(one_line(&target.file_name()?.to_string_lossy()))
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
