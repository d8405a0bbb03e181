//! The words of `--landlock` and `--landlock-rules`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What may be done with a file, or with all that is below a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LandlockAccess {
    /// Files are read, and folders listed.
    #[serde(rename = "r")]
    Read,
    /// Files are written, made, renamed and removed, and so are sockets; not read.
    #[serde(rename = "w")]
    Write,
    /// Both.
    #[serde(rename = "rw", alias = "wr")]
    ReadWrite,
}

impl LandlockAccess {
    /// As Cloud Hypervisor writes it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Read => "r",
            Self::Write => "w",
            Self::ReadWrite => "rw",
        }
    }

    /// That of a word; the letters may stand in either order.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        match word {
            "r" => Some(Self::Read),
            "w" => Some(Self::Write),
            "rw" | "wr" => Some(Self::ReadWrite),
            _ => None,
        }
    }
}

/// `--landlock-rules`: a path that may be opened, beside those that the VM's configuration names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LandlockRule {
    /// A file, or a folder with all that is below it.
    pub path: PathBuf,
    /// What may be done with it.
    pub access: LandlockAccess,
}
