//! Failures that may be the emulator's own, and not what is on trial: see `docs/lab.md`.

use std::error::Error;
use std::fmt;

/// A failure of a kind that the emulator is known for.
#[derive(Debug)]
pub(crate) struct Suspect(pub(crate) String);

impl fmt::Display for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Suspect {}

/// Whether something did not come within its limit, the emulated host died, a guest did, or an interrupt came twice.
pub fn may_be_the_emulators(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Suspect>())
}
