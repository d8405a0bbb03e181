//! Devices that a driver of the host's makes out of another one, and lends by VFIO: mediated devices.
//! They are on no PCI bus, no IOMMU translates for them, and their driver is what keeps guests apart.
//! Linux, Documentation/driver-api/vfio-mediated-device.rst

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{SysRoot, one_line};

/// A UUID, in the order in which it is written. RFC 9562 §4
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid([u8; 16]);

/// `{0}` is no UUID: it is written as bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no UUID: it is written as bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3")]
pub struct ParseUuidError(pub String);

impl Uuid {
    /// The bytes, as the kernel's `uuid_t` has them.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// That of the mediated device whose folder in sysfs is `device`; nothing where it is another kind of
    /// device. A link may have any name.
    #[must_use]
    pub fn of_device(device: &Path) -> Option<Self> {
        let real = device.canonicalize();
        let name = real.as_deref().unwrap_or(device).file_name()?;
        name.to_str()?.parse().ok()
    }
}

impl FromStr for Uuid {
    type Err = ParseUuidError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text)
            .map(Self)
            .ok_or_else(|| ParseUuidError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<[u8; 16]> {
    let mut parts = text.split('-');
    let mut digits = String::with_capacity(32);
    for length in [8, 4, 4, 4, 12] {
        let part = parts.next()?;
        if part.len() != length || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        digits.push_str(part);
    }
    if parts.next().is_some() {
        return None;
    }
    let number = u128::from_str_radix(&digits, 16).ok()?;
    Some(number.to_be_bytes())
}

/// In lower case, as the kernel names the device (`%pUl`).
impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What a mediated device looks like to who opens it, that a guest's PCI driver can use.
/// linux/vfio.h, `VFIO_DEVICE_API_PCI_STRING`
pub const PCI_API: &str = "vfio-pci";

impl SysRoot {
    /// The folder in sysfs of the bus of mediated devices.
    #[must_use]
    pub fn mediated_bus(&self) -> PathBuf {
        self.sys.join("bus/mdev")
    }

    /// The folder in sysfs of the mediated device that is called `uuid`.
    #[must_use]
    pub fn mediated(&self, uuid: Uuid) -> PathBuf {
        self.mediated_bus().join("devices").join(uuid.to_string())
    }

    /// What the mediated device whose folder in sysfs is `device` looks like: `vfio-pci`, `vfio-ccw`,
    /// `vfio-ap`. Nothing where sysfs does not say, as while the device is being removed.
    #[must_use]
    pub fn device_api(&self, device: &Path) -> Option<String> {
        let text = fs::read(device.join("mdev_type/device_api")).ok()?;
        Some(one_line(String::from_utf8_lossy(&text).trim()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_uuid_is_read_and_anything_else_is_named() {
        let text = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let uuid: Uuid = text.parse().unwrap();
        assert_eq!(uuid.bytes()[..6], [0xbd, 0x8d, 0x9d, 0x2b, 0x5a, 0x5f]);
        assert_eq!(uuid.to_string(), text);
        assert_eq!(text.to_uppercase().parse(), Ok(uuid));
        for text in [
            "",
            "bd8d9d2b5a5f4f5aa211f591514ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f",
            "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3-",
            "+d8d9d2b-5a5f-4f5a-a211-f591514ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211 vf_token=ab",
        ] {
            let error = text.parse::<Uuid>().unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with(&format!("`{text}` is no UUID")));
        }
    }

    #[test]
    fn a_device_is_mediated_by_its_real_name_and_says_what_it_looks_like() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::under(root.path());
        let uuid: Uuid = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3".parse().unwrap();
        let folder = paths.mediated(uuid);
        fs::create_dir_all(folder.join("mdev_type")).unwrap();
        fs::write(folder.join("mdev_type/device_api"), "vfio-pci\n").unwrap();
        let link = root.path().join("my-serial-card");
        symlink(&folder, &link).unwrap();
        assert_eq!(Uuid::of_device(&link), Some(uuid));
        assert_eq!(Uuid::of_device(&folder), Some(uuid));
        assert_eq!(Uuid::of_device(root.path()), None);
        assert_eq!(paths.device_api(&link).as_deref(), Some(PCI_API));
        assert_eq!(paths.device_api(root.path()), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes: [u8; 16]) {
            let uuid = Uuid(bytes);
            prop_assert_eq!(uuid.to_string().parse(), Ok(uuid));
        }

        #[test]
        fn no_text_is_too_odd(text: String) {
            let _uuid = text.parse::<Uuid>();
        }
    }
}
