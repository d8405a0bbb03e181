//! What a TPM is to be.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `--tpm`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TpmConfig {
    /// The Unix socket of the control channel of the swtpm that it is.
    pub socket: PathBuf,
}
