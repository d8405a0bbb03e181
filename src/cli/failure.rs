//! What went wrong, as the exit status and as a person reads it.

use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal as _};
use std::process::ExitCode;

use busway_iommu::printable;

use super::logging;
use super::style::ColorChoice;
use crate::exit::USAGE;
use crate::sandbox::landlock;
use crate::shortage;

/// An error and the status that the process exits with for it.
#[derive(Debug)]
pub struct Failure {
    status: u8,
    error: anyhow::Error,
}

impl Failure {
    /// An error with its exit status: one of [`crate::exit`].
    pub fn new(status: u8, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        // As one type: anyhow has code and relocations for each type of error that it is given.
        Self::explained(status, anyhow::Error::from_boxed(error.into()))
    }

    /// An error with its context, and its exit status: one of [`crate::exit`].
    pub(super) fn explained(status: u8, error: anyhow::Error) -> Self {
        Self { status, error }
    }

    /// The command line or the configuration is wrong.
    pub fn usage(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(USAGE, error)
    }

    /// A status to exit with, where everything has been said.
    pub(super) fn silent(status: u8) -> Self {
        Self::new(status, "")
    }

    /// Prints the error and gives its status.
    pub fn report(&self) -> ExitCode {
        // Names of files and the like stand in it as somebody chose them.
        let text = printable(&self.to_string());
        if text.is_empty() {
            return ExitCode::from(self.status);
        }
        let coloured = ColorChoice::chosen().applies(io::stderr().is_terminal());
        let label = if coloured {
            "\x1b[1;31merror:\x1b[0m"
        } else {
            "error:"
        };
        logging::last_words(&format!("busway: {label} {text}\n"));
        ExitCode::from(self.status)
    }
}

/// The error, and below it each cause that says something new.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = String::new();
        for error in self.error.chain() {
            let text = error.to_string();
            if said.is_empty() {
                f.write_str(&text)?;
            } else if !said.contains(&text) {
                write!(f, "\n  because: {text}")?;
            }
            said.push_str(&text);
        }
        let root: &(dyn Error + 'static) = self.error.as_ref();
        if let Some(remedy) =
            shortage::remedy(root, &said).or_else(|| landlock::remedy(root).map(Into::into))
        {
            write!(f, "\n  because: {remedy}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::HOST;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open /dev/kvm: {0}")]
    struct Open(#[source] Cause);

    #[derive(Debug, thiserror::Error)]
    #[error("permission denied")]
    struct Cause(#[source] io::Error);

    #[test]
    fn a_cause_is_said_once() {
        let root = io::Error::other("the device cgroup forbids it");
        let failure = Failure::new(HOST, Open(Cause(root)));
        assert_eq!(
            failure.to_string(),
            "cannot open /dev/kvm: permission denied\n  because: the device cgroup forbids it"
        );
    }
}
