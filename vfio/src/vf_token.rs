//! The secret that the users of a physical function and of its virtual functions share, where VFIO has
//! both. Linux, Documentation/driver-api/vfio.rst

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use busway_iommu::{SysRoot, Uuid, is_vfio_driver};

/// A VF token: a UUID.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VfToken(Uuid);

/// It is a secret, and no log's business.
impl fmt::Debug for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken")
    }
}

/// `{0}` is no UUID: write it as bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3 (`uuidgen` makes one)
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no UUID: write it as bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3 (`uuidgen` makes one)")]
pub struct ParseVfTokenError(pub String);

impl VfToken {
    /// The bytes, as the kernel's `uuid_t` has them.
    pub(crate) fn bytes(&self) -> &[u8; 16] {
        self.0.bytes()
    }
}

impl FromStr for VfToken {
    type Err = ParseVfTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(uuid) => Ok(Self(uuid)),
            Err(_not_a_uuid) => Err(ParseVfTokenError(text.to_owned())),
        }
    }
}

impl fmt::Display for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a VF token is to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenUse {
    /// Nothing: the kernel refuses one.
    None,
    /// The device is a physical function: opening it sets its token, while no virtual function of it
    /// is in use, and has to name it else.
    Sets,
    /// The device is a virtual function whose physical function is with VFIO: opening it needs that
    /// one's token.
    Needs,
}

impl TokenUse {
    /// What it is to the device whose folder in sysfs is `device`.
    #[must_use]
    pub fn of(paths: &SysRoot, device: &Path) -> Self {
        let physical = device.join("physfn");
        if physical.exists() {
            let driver = paths.driver_of(&physical);
            return match driver.is_some_and(|driver| is_vfio_driver(&driver)) {
                true => Self::Needs,
                false => Self::None,
            };
        }
        match device.join("sriov_totalvfs").exists() {
            true => Self::Sets,
            false => Self::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_token_is_a_uuid_and_is_not_shown_to_logs() {
        let text = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let token: VfToken = text.parse().unwrap();
        assert_eq!(token.bytes()[..6], [0xbd, 0x8d, 0x9d, 0x2b, 0x5a, 0x5f]);
        assert_eq!(token.to_string(), text);
        assert_eq!(format!("{token:?}"), "VfToken");
        let error = "uuid".parse::<VfToken>().unwrap_err().to_string();
        assert!(error.starts_with("`uuid` is no UUID") && error.contains("uuidgen"));
    }

    #[test]
    fn a_token_is_for_physical_functions_and_for_virtual_ones_of_those_with_vfio() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::default();
        let used = |name: &str| TokenUse::of(&paths, &root.path().join(name));
        for name in ["plain", "pf-igb", "pf-vfio", "vf-igb", "vf-vfio"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        for (pf, driver, vf) in [
            ("pf-igb", "igb", "vf-igb"),
            ("pf-vfio", "vfio-pci", "vf-vfio"),
        ] {
            let pf = root.path().join(pf);
            fs::write(pf.join("sriov_totalvfs"), "8").unwrap();
            symlink(format!("../drivers/{driver}"), pf.join("driver")).unwrap();
            symlink(&pf, root.path().join(vf).join("physfn")).unwrap();
        }
        assert_eq!([used("plain"), used("vf-igb")], [TokenUse::None; 2]);
        assert_eq!([used("pf-igb"), used("pf-vfio")], [TokenUse::Sets; 2]);
        assert_eq!(used("vf-vfio"), TokenUse::Needs);
    }
}
