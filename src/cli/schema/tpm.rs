//! The words of `--tpm`.

use super::{Key, Section};
use crate::config::TpmConfig;

/// `--tpm`
pub(in crate::cli) static TPM: Section<TpmConfig> = Section {
    name: "tpm",
    summary: "TPM 2.0, which swtpm is: socket=PATH",
    words: &[],
    notes: "\
swtpm is another process, of the package of that name, and is started first:
swtpm socket --tpm2 --tpmstate dir=FOLDER --ctrl type=unixio,path=PATH",
    blank: || TpmConfig { socket: "".into() },
    keys: keys! {
        "socket" { "PATH": "the Unix socket of its control channel" }
            |tpm, value| tpm.socket = value.text()?.into();
    },
    required: &["socket"],
    bare: None,
    single: false,
    details: &[],
};
