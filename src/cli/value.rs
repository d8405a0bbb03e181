//! A value of the configuration, as it was written in a flag or in a file, and what it can mean.
//!
//! The same word means the same in both: `size = "512M"` and `size=512M`, `shared = true` and
//! `shared=on`.

use std::fmt;

use busway_host::Mac;

use super::nearest::Nearest;
use crate::config::Choice;

/// A value before anybody knows what it is for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A word; all that a flag can say.
    Text(String),
    /// A number of a file.
    Integer(i64),
    /// `true` or `false` of a file.
    Switch(bool),
    /// `[a,b]`
    List(Vec<Value>),
    /// Something else that a file can say: `a float`.
    Other(&'static str),
}

/// Why a value is not what a key wants.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Reason {
    /// `{0}` is not a size: write a whole number of bytes, or one with K, M, G or T after it
    #[error(
        "`{0}` is not a size: write a whole number of bytes, or one with K, M, G or T after it"
    )]
    Size(String),
    /// `{0}` is more than a 64-bit number of bytes
    #[error("`{0}` is more bytes than there can be")]
    HugeSize(String),
    /// `{0}` is neither on nor off
    #[error("`{0}` is neither on nor off")]
    Switch(String),
    /// `{value}` is not a whole number from 0 to {most}
    #[error("`{value}` is not a whole number from 0 to {most}")]
    Number {
        /// What was written.
        value: String,
        /// The greatest one.
        most: u64,
    },
    /// `{0}` is not text
    #[error("`{0}` is not text: put it in quotes")]
    Text(String),
    /// is empty
    #[error("there is nothing after the `=`")]
    Empty,
    /// there is no file that it could be the size of
    #[error("it is the size of a file: it goes with file=PATH")]
    NoFile,
    /// `{0}` does not say what runs where
    #[error("`{0}` does not say what runs where: write [0@[1,4-6],1@[2]]")]
    Affinity(String),
    /// `{0}` is no list of numbers
    #[error("`{0}` is not a list of numbers: write [0-3,8]")]
    Numbers(String),
    /// `{0}` says no distances
    #[error("`{0}` does not say how far which node is: write [1@20,2@30]")]
    Distances(String),
    /// `{0}` is no topology
    #[error(
        "`{0}` is not four numbers: threads of a core, cores of a die, dies of a package, and packages, as 1:4:1:1"
    )]
    Topology(String),
    /// `{value}` is none of the words
    #[error("`{value}` is not one of {}{}", Words(.words), Nearest(.value, .words))]
    Word {
        /// What was written.
        value: String,
        /// What could have been.
        words: &'static [&'static str],
    },
    /// not a MAC address
    #[error(transparent)]
    Mac(#[from] busway_host::ParseMacError),
    /// no name of a device
    #[error(transparent)]
    HostName(#[from] busway_vfio::ParseHostNameError),
    /// not one device
    #[error(transparent)]
    Called(#[from] busway_host::CalledError),
}

/// What a switch with a default of the host's can be.
const CHOICES: &[&str] = &["on", "off", "auto"];

impl Value {
    /// A path, a name, any text that is not empty.
    pub(super) fn text(&self) -> Result<&str, Reason> {
        match self {
            Self::Text(text) if text.is_empty() => Err(Reason::Empty),
            Self::Text(text) => Ok(text),
            other => Err(Reason::Text(other.to_string())),
        }
    }

    /// Texts, or only one.
    pub(super) fn texts(&self) -> Result<Vec<String>, Reason> {
        let texts = match self {
            Self::List(texts) => texts,
            one => std::slice::from_ref(one),
        };
        texts
            .iter()
            .map(|text| Ok(text.text()?.to_owned()))
            .collect()
    }

    /// An interface's MAC address.
    pub(super) fn mac(&self) -> Result<Mac, Reason> {
        Ok(self.text()?.parse()?)
    }

    /// A number of bytes.
    pub(super) fn size(&self) -> Result<u64, Reason> {
        match self {
            Self::Text(text) => parse_size(text),
            Self::Integer(bytes) => {
                u64::try_from(*bytes).map_err(|_negative| Reason::Size(self.to_string()))
            }
            other => Err(Reason::Size(other.to_string())),
        }
    }

    /// `on` or `off`.
    pub(super) fn switch(&self) -> Result<bool, Reason> {
        match self {
            Self::Switch(on) => Ok(*on),
            Self::Text(text) => match text.as_str() {
                "on" | "true" => Ok(true),
                "off" | "false" => Ok(false),
                _ => Err(Reason::Switch(text.clone())),
            },
            other => Err(Reason::Switch(other.to_string())),
        }
    }

    /// `on`, `off` or `auto`.
    pub(super) fn choice(&self) -> Result<Choice, Reason> {
        if matches!(self, Self::Text(text) if text == "auto") {
            return Ok(Choice::Auto);
        }
        let on = self.switch().map_err(|_not_a_switch| Reason::Word {
            value: self.to_string(),
            words: CHOICES,
        })?;
        Ok(if on { Choice::On } else { Choice::Off })
    }

    /// A count of something, which has a type that holds the most there can be.
    pub(super) fn number<T: TryFrom<u64> + Bounded>(&self) -> Result<T, Reason> {
        let number = match self {
            Self::Text(text) if text.bytes().all(|digit| digit.is_ascii_digit()) => {
                text.parse().ok()
            }
            Self::Integer(number) => u64::try_from(*number).ok(),
            _ => None,
        };
        number
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| Reason::Number {
                value: self.to_string(),
                most: T::MOST,
            })
    }
}

/// As a person would write it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Integer(number) => number.fmt(f),
            Self::Switch(on) => on.fmt(f),
            Self::Other(what) => f.write_str(what),
            Self::List(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    write!(f, "{comma}{value}")?;
                }
                f.write_str("]")
            }
        }
    }
}

/// The greatest value of a type, for the message.
pub(super) trait Bounded {
    /// The greatest value.
    const MOST: u64;
}

impl Bounded for u8 {
    const MOST: u64 = Self::MAX as u64;
}

impl Bounded for u32 {
    const MOST: u64 = Self::MAX as u64;
}

impl Bounded for u64 {
    const MOST: u64 = Self::MAX;
}

impl Bounded for u16 {
    const MOST: u64 = Self::MAX as u64;
}

/// `on, off, auto`
pub(super) struct Words<'a>(pub(super) &'a [&'a str]);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, word) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{word}")?;
        }
        Ok(())
    }
}

fn parse_size(text: &str) -> Result<u64, Reason> {
    let digits = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(Reason::Size(text.to_owned())),
    };
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(Reason::Size(text.to_owned()));
    }
    // All digits: what does not parse is too large.
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| Reason::HugeSize(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (written, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1 << 10),
            ("512M", 512 << 20),
            ("3g", 3 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text(written).size(), Ok(bytes), "{written}");
        }
        assert_eq!(Value::Integer(4096).size(), Ok(4096));
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_way_to_write_one() {
        for written in [
            "", "M", "1.5G", "-1", "+1", "512MiB", "5X", "1 G", "0x10", "١",
        ] {
            assert_eq!(text(written).size(), Err(Reason::Size(written.to_owned())));
        }
        for written in ["18446744073709551616", "17179869184G"] {
            assert_eq!(
                text(written).size(),
                Err(Reason::HugeSize(written.to_owned()))
            );
        }
        assert!(Value::Integer(-1).size().is_err());
        assert!(Value::Switch(true).size().is_err());
    }

    #[test]
    fn switches_have_two_spellings() {
        for (written, on) in [
            ("on", true),
            ("true", true),
            ("off", false),
            ("false", false),
        ] {
            assert_eq!(text(written).switch(), Ok(on));
        }
        assert_eq!(Value::Switch(true).switch(), Ok(true));
        assert!(text("yes").switch().is_err());
        assert!(Value::Integer(1).switch().is_err());
    }

    #[test]
    fn a_choice_names_its_words_and_the_nearest() {
        assert_eq!(text("auto").choice(), Ok(Choice::Auto));
        assert_eq!(Value::Switch(false).choice(), Ok(Choice::Off));
        assert_eq!(
            text("atuo").choice().unwrap_err().to_string(),
            "`atuo` is not one of on, off, auto; did you mean `auto`?"
        );
    }

    #[test]
    fn numbers_fit_what_they_count() {
        assert_eq!(text("255").number::<u8>(), Ok(255));
        assert_eq!(
            text("256").number::<u8>().unwrap_err().to_string(),
            "`256` is not a whole number from 0 to 255"
        );
        for written in ["", "+1", "-1", "1.0", "two"] {
            assert!(text(written).number::<u16>().is_err(), "{written}");
        }
        assert!(Value::Integer(-1).number::<u16>().is_err());
        assert!(Value::Other("a float").number::<u16>().is_err());
    }

    proptest! {
        #[test]
        fn every_size_round_trips(bytes: u64) {
            prop_assert_eq!(text(&bytes.to_string()).size(), Ok(bytes));
        }

        #[test]
        fn no_text_is_too_odd(written: String) {
            let value = text(&written);
            let _size = value.size();
            let _switch = value.switch();
            let _choice = value.choice().map_err(|reason| reason.to_string());
            let _number = value.number::<u16>();
        }
    }
}
