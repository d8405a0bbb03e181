//! Ethernet addresses, as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address (MAC address), in the order in which it is written. IEEE 802 §8
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// `{0}` is no MAC address of one interface
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no MAC address of one interface: write six bytes as 52:54:00:12:34:56, the first of them \
     even and not all of them zero"
)]
pub struct ParseMacError(pub String);

impl Mac {
    /// Whether one interface can have it: not a group's address (IEEE 802 §8.2, the first byte's lowest
    /// bit), and not all zero.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// The address of these bytes that nobody has been given: locally administered, and one interface's.
    /// IEEE 802 §8.2
    #[must_use]
    pub fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = (bytes[0] & !1) | 2;
        Self(bytes)
    }
}

/// Six bytes of two hexadecimal digits each, between colons or between hyphens; one interface's.
impl FromStr for Mac {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = parse(text, ':').or_else(|| parse(text, '-')).map(Self);
        parsed
            .filter(|mac| mac.is_unicast())
            .ok_or_else(|| ParseMacError(text.to_owned()))
    }
}

fn parse(text: &str, between: char) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(between);
    for byte in &mut bytes {
        let part = parts.next()?;
        // `from_str_radix` takes a sign as well.
        if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for Mac {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_address_is_read_in_both_spellings() {
        let mac = Mac([0x52, 0x54, 0, 0xaa, 2, 3]);
        for text in [
            "52:54:00:aa:02:03",
            "52-54-00-AA-02-03",
            "52:54:00:Aa:02:03",
        ] {
            assert_eq!(text.parse(), Ok(mac), "{text}");
        }
        assert_eq!(mac.to_string(), "52:54:00:aa:02:03");
    }

    #[test]
    fn what_no_interface_can_have_is_no_address() {
        for text in [
            "",
            "52:54:00:01:02",
            "52:54:00:01:02:03:04",
            "52:54:00:01:02:03:",
            "52:54:0:1:2:3",
            "052:54:00:01:02:03",
            "+2:54:00:01:02:03",
            "g2:54:00:01:02:03",
            " 2:54:00:01:02:03",
            "52:54-00:01:02:03",
            "525400010203",
            "\u{665}2:54:00:01:02:03",
            // A group's, everybody's, and nobody's.
            "53:54:00:12:34:56",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            let error = text.parse::<Mac>().unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("`{text}` is no MAC")),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn every_interface_s_address_is_read_back(bytes: [u8; 6]) {
            let mac = Mac::local(bytes);
            prop_assert!(mac.is_unicast());
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            let json = serde_json::to_string(&mac).unwrap();
            prop_assert_eq!(serde_json::from_str::<Mac>(&json).unwrap(), mac);
        }
    }
}
