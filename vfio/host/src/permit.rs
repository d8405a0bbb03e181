//! What a person may allow though it stands against moving a device: one switch for each reason, and
//! none for all of them.

use std::collections::BTreeSet;
use std::fmt;

use super::usage::{Usage, is_system};

/// The reasons that were allowed.
pub type Permits = BTreeSet<Permit>;

/// A reason not to move a device, which its own switch overrules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permit {
    /// A file system on it is mounted.
    Mounted,
    /// The host itself runs from it.
    System,
    /// The host swaps to it.
    Swap,
    /// LVM, RAID or encryption stands on it.
    Holders,
    /// Somebody not otherwise known has a disk of it for themselves.
    Claimed,
    /// A route that somebody needs, a bond or bridge, or storage of another machine goes through it, or
    /// its interface is in another network namespace.
    Route,
    /// It is the display that the host's console appears on.
    Display,
    /// Programs have nodes of it open, of whichever kind.
    Programs,
    /// It has virtual functions.
    VirtualFunctions,
    /// Others of its IOMMU group stay with the host.
    Group,
    /// A process has it open by VFIO.
    Open,
}

impl Permit {
    /// Every reason that a switch overrules.
    pub const ALL: [Self; 11] = [
        Self::Mounted,
        Self::System,
        Self::Swap,
        Self::Holders,
        Self::Claimed,
        Self::Route,
        Self::Display,
        Self::Programs,
        Self::VirtualFunctions,
        Self::Group,
        Self::Open,
    ];

    /// The switch's name on the command line.
    #[must_use]
    pub fn switch(self) -> &'static str {
        match self {
            Self::Mounted => "--allow-mounted",
            Self::System => "--allow-system",
            Self::Swap => "--allow-swap",
            Self::Holders => "--allow-holders",
            Self::Claimed => "--allow-claimed",
            Self::Route => "--allow-route",
            Self::Display => "--allow-display",
            Self::Programs => "--allow-programs",
            Self::VirtualFunctions => "--allow-vfs",
            Self::Group => "--allow-group",
            Self::Open => "--allow-open",
        }
    }

    /// What allows a device to be taken in spite of this use; none where no switch does.
    #[must_use]
    pub fn of(usage: &Usage) -> Option<Self> {
        Some(match usage {
            Usage::Mounted { at, .. } if at.iter().any(|path| is_system(path)) => Self::System,
            Usage::Mounted { .. } => Self::Mounted,
            Usage::Swap { .. } => Self::Swap,
            Usage::Held { .. } => Self::Holders,
            Usage::Claimed { .. } => Self::Claimed,
            Usage::NetworkStorage { at, .. } if at.iter().any(|path| is_system(path)) => {
                Self::System
            }
            Usage::DefaultRoute { .. }
            | Usage::SshRoute { .. }
            | Usage::Interface { .. }
            | Usage::Representors { .. }
            | Usage::NetworkStorage { .. }
            | Usage::StaticRoutes { .. }
            | Usage::OtherNamespace => Self::Route,
            Usage::BootDisplay => Self::Display,
            Usage::Opened { .. } => Self::Programs,
            Usage::VirtualFunctions { .. } => Self::VirtualFunctions,
            Usage::Process(_) => return None,
        })
    }
}

impl fmt::Display for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.switch())
    }
}
