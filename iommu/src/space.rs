//! Which of the kernel's interfaces a VM's devices use.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::memlock::{self, Accounting};
use crate::{Container, DmaSpace, HostPaths, Ioas, MemlockError, OpenError};

/// Whether to use iommufd, as the user says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Required.
    On,
    /// Forbidden.
    Off,
    /// Used where the host and every device have it.
    #[default]
    Auto,
}

/// Which interface a space is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VFIO container, groups.
    Type1,
    /// iommufd, character devices.
    Iommufd,
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
    /// Opens a space for the functions whose folders in sysfs are `devices`. [`Mode::Auto`] takes
    /// iommufd where it is there, may be opened, and every device has a character device for it.
    ///
    /// An `iommufd` that is open already is used in the place of the host's node.
    ///
    /// # Errors
    /// [`OpenError`]: that of the interface that was chosen.
    pub fn open(
        paths: &HostPaths,
        mode: Mode,
        devices: &[&Path],
        iommufd: Option<File>,
    ) -> Result<Self, OpenError> {
        if let Some(file) = iommufd {
            return Ioas::in_iommufd(file, paths).map(Self::Iommufd);
        }
        match mode {
            Mode::On => Ioas::open(paths).map(Self::Iommufd),
            Mode::Off => Container::open(paths).map(Self::Type1),
            Mode::Auto => {
                if prefers_iommufd(paths, devices) {
                    match Ioas::open(paths) {
                        Ok(ioas) => return Ok(Self::Iommufd(ioas)),
                        Err(error) => log::info!("using VFIO's container: {error}"),
                    }
                }
                Container::open(paths).map(Self::Type1)
            }
        }
    }

    /// Which interface it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Type1(_) => Kind::Type1,
            Self::Iommufd(_) => Kind::Iommufd,
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
    pub fn reserve(&self, paths: &HostPaths, bytes: u64) -> Result<(), MemlockError> {
        let accounting = match self {
            Self::Type1(_) => Accounting::Process,
            Self::Iommufd(_) => Accounting::User,
        };
        memlock::reserve(paths, accounting, bytes)
    }
}

/// Without devices there is nothing to tell by but the folder of character devices.
fn prefers_iommufd(paths: &HostPaths, devices: &[&Path]) -> bool {
    paths.iommufd().exists()
        && if devices.is_empty() {
            paths.dev.join("vfio/devices").exists()
        } else {
            devices.iter().all(|device| paths.cdev(device).is_some())
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn iommufd_is_taken_where_the_host_and_every_device_have_it() {
        let root = tempfile::tempdir().unwrap();
        let paths = HostPaths {
            sys: root.path().join("sys"),
            dev: root.path().join("dev"),
            proc: root.path().join("proc"),
        };
        let [with, without] = ["a", "b"].map(|name| root.path().join("sys").join(name));
        fs::create_dir_all(with.join("vfio-dev/vfio3")).unwrap();
        fs::create_dir_all(&without).unwrap();
        fs::create_dir_all(paths.dev.join("vfio/devices")).unwrap();
        fs::write(paths.dev.join("vfio/devices/vfio3"), "").unwrap();
        assert!(!prefers_iommufd(&paths, &[&with]));
        fs::write(paths.iommufd(), "").unwrap();
        assert!(prefers_iommufd(&paths, &[&with]));
        assert!(prefers_iommufd(&paths, &[]));
        assert!(!prefers_iommufd(&paths, &[&with, &without]));
    }

    #[test]
    fn an_interface_that_is_required_and_missing_is_an_error_that_names_it() {
        let paths = HostPaths {
            sys: "/nowhere/sys".into(),
            dev: "/nowhere/dev".into(),
            proc: "/nowhere/proc".into(),
        };
        for (mode, node) in [
            (Mode::On, "/nowhere/dev/iommu"),
            (Mode::Off, "/nowhere/dev/vfio/vfio"),
            (Mode::Auto, "/nowhere/dev/vfio/vfio"),
        ] {
            let text = Space::open(&paths, mode, &[], None)
                .unwrap_err()
                .to_string();
            assert!(text.starts_with(&format!("cannot open {node}: ")), "{text}");
        }
    }
}
