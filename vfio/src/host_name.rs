//! What a host calls a device that a guest is given.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use busway_iommu::Uuid;
use busway_pci::Bdf;

/// A device's name on the host, which VFIO knows it by as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostName {
    /// A PCI function's: its address.
    Pci(Bdf),
    /// A mediated device's, which is on no bus of the host's.
    Mediated(Uuid),
}

/// `{0}` is neither a PCI address (0000:01:00.0) nor a mediated device's UUID
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither a PCI address (0000:01:00.0) nor a mediated device's UUID \
     (bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3)"
)]
pub struct ParseHostNameError(pub String);

impl HostName {
    /// That of the device whose folder in sysfs is `device`. A link may have any name: two that lead to
    /// one device are one.
    #[must_use]
    pub fn of_device(device: &Path) -> Option<Self> {
        let real = device.canonicalize();
        let name = real.as_deref().unwrap_or(device).file_name()?;
        name.to_str()?.parse().ok()
    }

    /// A PCI function's address.
    #[must_use]
    pub const fn address(self) -> Option<Bdf> {
        match self {
            Self::Pci(address) => Some(address),
            Self::Mediated(_) => None,
        }
    }

    /// Whether it is a mediated device's.
    #[must_use]
    pub const fn is_mediated(self) -> bool {
        matches!(self, Self::Mediated(_))
    }

    /// What kind of device it is, for a person.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Pci(_) => "PCI device",
            Self::Mediated(_) => "mediated device",
        }
    }
}

impl FromStr for HostName {
    type Err = ParseHostNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address = text.parse().map(Self::Pci).ok();
        let uuid = || text.parse().map(Self::Mediated).ok();
        address
            .or_else(uuid)
            .ok_or_else(|| ParseHostNameError(text.to_owned()))
    }
}

/// As the kernel writes it.
impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Mediated(uuid) => uuid.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_address_or_a_uuid_and_written_as_the_kernel_does() {
        for (text, kind) in [
            ("0000:01:00.0", "PCI device"),
            ("BD8D9D2B-5A5F-4F5A-A211-F591514BA1F3", "mediated device"),
        ] {
            let name: HostName = text.parse().unwrap();
            assert_eq!(name.to_string(), text.to_lowercase());
            assert_eq!(name.kind(), kind);
            assert_eq!(name.is_mediated(), name.address().is_none());
        }
        let error = "usb1".parse::<HostName>().unwrap_err().to_string();
        assert!(
            error.starts_with("`usb1` is neither a PCI address"),
            "{error}"
        );
    }
}
