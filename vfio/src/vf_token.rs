//! The secret that the users of a physical function and of its virtual functions share, where VFIO has
//! both. Linux, Documentation/driver-api/vfio.rst

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use busway_iommu::{SysRoot, is_vfio_driver};

/// A VF token: a UUID, in the order in which it is written. RFC 9562 §4
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VfToken([u8; 16]);

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
        &self.0
    }
}

impl FromStr for VfToken {
    type Err = ParseVfTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text)
            .map(Self)
            .ok_or_else(|| ParseVfTokenError(text.to_owned()))
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

impl fmt::Display for VfToken {
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
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_uuid_is_read_and_anything_else_is_named() {
        let text = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let token: VfToken = text.parse().unwrap();
        assert_eq!(token.bytes()[..6], [0xbd, 0x8d, 0x9d, 0x2b, 0x5a, 0x5f]);
        assert_eq!(token.to_string(), text);
        assert_eq!(text.to_uppercase().parse(), Ok(token));
        assert_eq!(format!("{token:?}"), "VfToken");
        for text in [
            "",
            "bd8d9d2b5a5f4f5aa211f591514ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f",
            "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3-",
            "+d8d9d2b-5a5f-4f5a-a211-f591514ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211 vf_token=ab",
        ] {
            let error = text.parse::<VfToken>().unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("`{text}` is no UUID"))
            );
        }
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

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes: [u8; 16]) {
            let token = VfToken(bytes);
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }

        #[test]
        fn no_text_is_too_odd(text: String) {
            let _token = text.parse::<VfToken>();
        }
    }
}
