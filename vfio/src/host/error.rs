//! What can go wrong on the host's side.

use std::fmt;
use std::io;
use std::path::PathBuf;

use busway_pci::Bdf;

use super::check::Refusal;
use super::steps::StepError;

/// The host could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// cannot list the PCI devices in {folder}: {source}
    #[error("cannot list the PCI devices in {}: {source}\n  is sysfs mounted, and has this host PCI?", folder.display())]
    NoPciBus {
        /// Where they were looked for.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Every reason why nothing was done, one below the other.
#[derive(Debug, PartialEq, Eq)]
pub struct RefusedError(pub Vec<Refusal>);

impl std::error::Error for RefusedError {}

impl fmt::Display for RefusedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, refusal) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{refusal}")?;
        }
        Ok(())
    }
}

/// A device that could not be given back what it had before.
#[derive(Debug, thiserror::Error)]
#[error("{address} was with {}, and could not be given back: {source}", driver.as_deref().unwrap_or("no driver"))]
pub struct Stranded {
    /// The device.
    pub address: Bdf,
    /// The driver that it had.
    pub driver: Option<String>,
    /// What went wrong.
    pub source: StepError,
}

/// Devices were not bound to VFIO.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something stands against it. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// A step failed, and what had been done was undone, but for `stranded`.
    #[error("{source}{}", Undone(.stranded))]
    Failed {
        /// The step.
        source: StepError,
        /// Devices that could not be given back.
        stranded: Vec<Stranded>,
    },
}

struct Undone<'a>(&'a [Stranded]);

impl fmt::Display for Undone<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("\n  every device has the driver that it had before");
        }
        for stranded in self.0 {
            write!(f, "\n{stranded}")?;
        }
        Ok(())
    }
}

/// Devices were not given back to the host.
#[derive(Debug, thiserror::Error)]
pub enum UnbindError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something stands against it. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// A step failed. Devices named before this one were given back.
    #[error(transparent)]
    Failed(#[from] StepError),
}
