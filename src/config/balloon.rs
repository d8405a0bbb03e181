//! What a balloon is to be.

use serde::{Deserialize, Serialize};

/// `--balloon`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Bytes that it has at first; a multiple of 4096.
    pub size: u64,
    /// The guest takes memory out where it would end programs for want of it.
    pub deflate_on_oom: bool,
    /// The guest reports memory as it becomes free.
    pub free_page_reporting: bool,
}
