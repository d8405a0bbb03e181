//! JSON in ASCII: a client that reads an answer in pieces finds no character cut in two.

use std::io::{self, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Serializer;
use serde_json::ser::Formatter;

/// Compact, with what is beyond ASCII as `\uXXXX`.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for character in fragment.chars() {
            if character.is_ascii() {
                write!(writer, "{character}")?;
            } else {
                // RFC 8259 §7: beyond U+FFFF by the two halves of UTF-16.
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

/// What a client said, or in words why it is not that.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    // serde would read a list as an object's values, in an order that nobody knows.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err("the body is not what is expected: a list, and no object".to_owned());
    }
    serde_json::from_slice(body)
        .map_err(|error| format!("the body is not what is expected: {error}"))
}

/// The value as compact JSON in ASCII.
///
/// # Errors
/// Those of the value's own `Serialize`.
pub(super) fn ascii<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut text, Ascii))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_beyond_ascii_is_escaped() {
        assert_eq!(ascii(&"a\"\né😀").unwrap(), br#""a\"\n\u00e9\ud83d\ude00""#);
    }

    proptest! {
        #[test]
        fn every_text_comes_back(text: String) {
            let bytes = ascii(&text).unwrap();
            prop_assert!(bytes.is_ascii());
            prop_assert_eq!(serde_json::from_slice::<String>(&bytes).unwrap(), text);
        }
    }
}
