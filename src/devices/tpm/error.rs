//! Why there is no TPM, or none any more.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use super::command::HEADER;
use super::link::Control;

/// The TPM cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("--tpm socket={}: {why}", socket.display())]
pub struct TpmError {
    /// swtpm's control socket.
    pub(super) socket: PathBuf,
    /// Why.
    #[source]
    pub(super) why: Broken,
}

/// Why swtpm is not asked any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(
        "nothing can be reached there ({source}): start `swtpm socket --tpm2 --tpmstate dir=FOLDER --ctrl \
         type=unixio,path={}` first, of the package swtpm", path.display()
    )]
    Unreachable { path: PathBuf, source: io::Error },
    #[error("swtpm does not answer in time ({what}): look whether it hangs, or serves another VM")]
    Late { what: &'static str },
    #[error("swtpm has closed the connection: look in its log why it ended")]
    Closed,
    #[error("what answers is no swtpm, or a broken one: it says what it was not asked for")]
    Unasked,
    #[error("what answers is no swtpm, or a broken one: {bytes:02x?} is no response of a TPM's")]
    NoResponse { bytes: Vec<u8> },
    #[error(
        "swtpm lacks what a TPM of a VM's needs (capabilities {missing:#x}): a newer one has it, such as Debian 12's"
    )]
    Capabilities { missing: u32 },
    #[error(
        "swtpm has buffers of {size} bytes at least, and the guest's has 3968: a newer swtpm has smaller ones"
    )]
    BufferSize { size: u32 },
    #[error(
        "swtpm refuses {} with {code:#x}: its log says why; its state may be damaged, or another swtpm's", command.name()
    )]
    Refused { command: Control, code: u32 },
    #[error(
        "swtpm is a TPM 1.2, and guests are given a TPM 2.0: start it with --tpm2, and another folder for its state"
    )]
    Tpm12,
    #[error("{0}")]
    System(io::Error),
    /// The VM ends.
    #[error("the VM ends")]
    Ended,
}

impl Broken {
    /// The same, of what was being done.
    pub(super) fn of(self, doing: &'static str) -> Self {
        match self {
            Self::Late { what: "" } => Self::Late { what: doing },
            other => other,
        }
    }

    /// The bytes of a header that is none.
    pub(super) fn no_response(bytes: &[u8]) -> Self {
        let bytes = bytes.iter().take(HEADER).copied().collect();
        Self::NoResponse { bytes }
    }

    /// An error of a socket's.
    pub(super) fn of_stream(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::System(error),
        }
    }
}
