//! Which of the kernel's interfaces a VM's devices use.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use crate::memlock::{self, Accounting};
use crate::{Container, DmaSpace, Ioas, MemlockError, OpenError, SysRoot};

/// Whether to use iommufd, as the user says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IommufdMode {
    /// Required.
    On,
    /// Forbidden.
    Off,
    /// Used where it can do all that the VM may need: [`Way::choose`](crate::Way::choose).
    #[default]
    Auto,
}

/// Which interface a space is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceKind {
    /// VFIO container, groups.
    Type1,
    /// iommufd, character devices.
    Iommufd,
}

impl SpaceKind {
    /// The interface in one word, which does not change.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Iommufd => "iommufd",
        }
    }
}

impl fmt::Display for SpaceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A VM's set of DMA mappings, which its devices are attached to.
#[derive(Clone, Debug)]
pub enum Space {
    /// Over the VFIO container.
    Type1(Arc<Container>),
    /// Over iommufd.
    Iommufd(Arc<Ioas>),
}

impl Space {
    /// Opens an empty space. An `iommufd` that is open already is used in the place of the host's node.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(
        paths: &SysRoot,
        kind: SpaceKind,
        iommufd: Option<File>,
    ) -> Result<Self, OpenError> {
        match (kind, iommufd) {
            (SpaceKind::Type1, _) => Container::open(paths).map(Self::Type1),
            (SpaceKind::Iommufd, Some(file)) => Ioas::in_iommufd(file, paths).map(Self::Iommufd),
            (SpaceKind::Iommufd, None) => Ioas::open(paths).map(Self::Iommufd),
        }
    }

    /// Which interface it is.
    #[must_use]
    pub fn kind(&self) -> SpaceKind {
        match self {
            Self::Type1(_) => SpaceKind::Type1,
            Self::Iommufd(_) => SpaceKind::Iommufd,
        }
    }

    /// The space as memory code sees it.
    #[must_use]
    pub fn dma(&self) -> Arc<dyn DmaSpace> {
        match self {
            Self::Type1(container) => container.clone(),
            Self::Iommufd(ioas) => ioas.clone(),
        }
    }

    /// Makes sure that `bytes` of guest memory can be pinned, raising RLIMIT_MEMLOCK where this
    /// process may. Called once, before the memory is mapped.
    ///
    /// # Errors
    /// [`MemlockError`], with the figure to set.
    pub fn reserve(&self, paths: &SysRoot, bytes: u64) -> Result<(), MemlockError> {
        let accounting = match self {
            Self::Type1(_) => Accounting::Process,
            Self::Iommufd(_) => Accounting::User,
        };
        memlock::reserve(paths, accounting, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_required_and_missing_is_an_error_that_names_it() {
        let paths = SysRoot::under("/nowhere".as_ref());
        for (kind, node) in [
            (SpaceKind::Iommufd, "/nowhere/dev/iommu"),
            (SpaceKind::Type1, "/nowhere/dev/vfio/vfio"),
        ] {
            let text = Space::open(&paths, kind, None).unwrap_err().to_string();
            assert!(text.starts_with(&format!("cannot open {node}: ")), "{text}");
        }
    }
}
