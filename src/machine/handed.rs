//! Descriptors that were handed over with a request (SCM_RIGHTS), and what each is for.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use busway_iommu::SysRoot;
use busway_vfio::{Inherited, InheritedError};

/// Descriptors that were passed with the request. They are closed with the last clone.
#[derive(Clone, Debug, Default)]
pub struct Files(Arc<[OwnedFd]>);

impl Files {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> &[OwnedFd] {
        &self.0
    }

    /// Those that stand at `places` among them, from 0 on, on their own.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] where there are not so many; fcntl(2), `F_DUPFD_CLOEXEC`
    pub fn pick(&self, places: &[usize]) -> io::Result<Self> {
        let pick = |place: &usize| {
            let file = self.0.get(*place).ok_or(io::ErrorKind::NotFound)?;
            file.try_clone()
        };
        let files: io::Result<Vec<_>> = places.iter().map(pick).collect();
        files.map(Self::from)
    }

    /// What the first one is of, as procfs names it.
    #[must_use]
    pub fn described(&self) -> PathBuf {
        let file = self.0.first();
        let link = file.map(|file| format!("/proc/self/fd/{}", file.as_raw_fd()));
        let target = link.and_then(|link| std::fs::read_link(link).ok());
        target.unwrap_or_default()
    }
}

impl From<Vec<OwnedFd>> for Files {
    fn from(files: Vec<OwnedFd>) -> Self {
        Self(files.into())
    }
}

/// The same descriptors, by their numbers.
impl PartialEq for Files {
    fn eq(&self, other: &Self) -> bool {
        let numbers = |files: &Self| {
            files
                .all()
                .iter()
                .map(AsRawFd::as_raw_fd)
                .collect::<Vec<_>>()
        };
        numbers(self) == numbers(other)
    }
}

impl Eq for Files {}

/// What was handed over for a VM that is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handed {
    /// For virtio devices, by their names.
    pub virtio: BTreeMap<String, Files>,
    /// For host devices, by their names: one for each.
    pub devices: BTreeMap<String, Files>,
    /// An iommufd, or nothing.
    pub iommufd: Files,
}

/// The descriptors of host devices that no VM has used yet, by the devices' names.
///
/// VFIO takes one into use once: it is taken from here for that, and closed with the device. The next time
/// the device is opened by its name.
#[derive(Clone, Debug, Default)]
pub(super) struct Unused(Arc<Mutex<BTreeMap<String, Files>>>);

impl Unused {
    pub(super) fn keep(&self, name: String, files: Files) {
        self.with(|all| all.insert(name, files));
    }

    pub(super) fn take(&self, name: &str) -> Option<Files> {
        self.with(|all| all.remove(name))
    }

    fn with<T>(&self, change: impl FnOnce(&mut BTreeMap<String, Files>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl From<BTreeMap<String, Files>> for Unused {
    fn from(all: BTreeMap<String, Files>) -> Self {
        Self(Arc::new(Mutex::new(all)))
    }
}

/// The folder in sysfs of the host device that a descriptor is of. `path` says which, for a group's.
///
/// # Errors
/// [`InheritedError`]: it is none of VFIO's, or of another device than `path` says
pub fn device_of(files: &Files, path: &std::path::Path) -> Result<PathBuf, InheritedError> {
    let paths = SysRoot::default();
    received(&paths, files)?.folder(&paths, path)
}

/// That descriptors are one iommufd.
///
/// # Errors
/// [`InheritedError`]
pub fn check_iommufd(files: &Files) -> Result<(), InheritedError> {
    iommufd(&SysRoot::default(), files).map(drop)
}

/// A host device's descriptor, to be used.
pub(super) fn received(paths: &SysRoot, files: &Files) -> Result<Inherited, InheritedError> {
    Inherited::received_device(paths, only(files)?)
}

/// An iommufd, to be used.
pub(super) fn iommufd(paths: &SysRoot, files: &Files) -> Result<std::fs::File, InheritedError> {
    Inherited::received_iommufd(paths, only(files)?)
}

/// Another descriptor of the only one that there is.
fn only(files: &Files) -> Result<OwnedFd, InheritedError> {
    match files.all() {
        [one] => one
            .as_fd()
            .try_clone_to_owned()
            .map_err(InheritedError::Copy),
        several => Err(InheritedError::Several {
            count: several.len(),
        }),
    }
}
