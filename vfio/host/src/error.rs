//! What can go wrong on the host's side.

use std::fmt;
use std::io;
use std::path::PathBuf;

use busway_pci::Bdf;

use super::check::Refusal;
use super::hugepages::HugePagesError;
use super::journal::JournalError;
use super::lock::LockError;
use super::persist::PersistError;
use super::restore::Restored;
use super::steps::StepError;
use super::unbind::Unbound;
use super::vfs::VfsError;

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

/// Devices were not moved as asked.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something stands against it. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// Somebody else is changing devices. Nothing was changed.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What devices had before cannot be read. Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Devices cannot be bound at each boot by this program. Nothing was changed.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// A step failed, and what had been done was undone, but for `stranded`.
    #[error("{source}{}", Undone(.stranded))]
    Bind {
        /// The step.
        source: StepError,
        /// Devices that could not be given back.
        stranded: Vec<Stranded>,
    },
    /// Steps failed; every other device was given to the host's own drivers.
    #[error("{}", Lines(.failures))]
    Unbind {
        /// Devices that the host has now.
        unbound: Vec<Unbound>,
        /// The steps, one for each of the others.
        failures: Vec<StepError>,
    },
    /// Steps failed; every other device was put back, and these still are in the journal.
    #[error("{}\n  what they had is still recorded: try again with `busway device restore --all`", Lines(.stranded))]
    Restore {
        /// Devices that are as they were.
        restored: Vec<Restored>,
        /// The others.
        stranded: Vec<Stranded>,
    },
    /// Virtual functions cannot be as asked. Nothing was changed.
    #[error(transparent)]
    NoFunctions(#[from] VfsError),
    /// A step failed, and virtual functions that were new were removed.
    #[error(transparent)]
    Functions(StepError),
    /// Huge pages cannot be as asked. Nothing was changed.
    #[error(transparent)]
    NoHugePages(#[from] HugePagesError),
    /// A pool of huge pages could not be changed.
    #[error(transparent)]
    HugePages(StepError),
}

struct Lines<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for Lines<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, line) in self.0.iter().enumerate() {
            write!(f, "{}{line}", if index > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
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
        f.write_str("\n  what it had is recorded: try again with `busway device restore --all`")
    }
}
