//! Whether a VM is placed on the host's NUMA nodes by where its devices are.

use serde::{Deserialize, Serialize};

/// `--place`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placing {
    /// RAM and vCPUs are where `--memory-zone`, `--numa` and `--cpus affinity=` say, or wherever the host has room.
    #[default]
    Off,
    /// They are on the nodes of the host that the assigned devices are on, and the guest has a node for each.
    Auto,
}

impl Placing {
    /// Both, with their words.
    pub const WORDS: [&str; 2] = ["off", "auto"];

    /// What the word means; nothing where it is none.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        match word {
            "off" => Some(Self::Off),
            "auto" => Some(Self::Auto),
            _ => None,
        }
    }
}
