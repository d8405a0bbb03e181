//! Who opens devices: the kernel's VFIO, and in tests what plays it.

use std::any::Any;
use std::fmt::Debug;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use busway_iommu::{DmaSpace, Space, SpaceKind, SysRoot};
use busway_vfio::{DeviceIo, Inherited, KvmFiles, Opener, VfToken};

use super::open_devices::OpenDevices;
use crate::machine::RunError;

/// Makes DMA spaces, each with somebody who opens devices in it.
pub(super) trait MakeSpace: Debug + Send + Sync {
    /// Where the host's files are.
    fn paths(&self) -> &SysRoot;

    /// A new space of a kind; an `iommufd` that is open already is used in the place of the host's node. The limit of
    /// locked memory has room for `ram` bytes then.
    ///
    /// # Errors
    /// [`RunError`]
    fn make(&self, kind: SpaceKind, iommufd: Option<File>, ram: u64)
    -> Result<OpenSpace, RunError>;
}

/// The DMA space that all devices of a machine are in, and who opens devices in it.
pub(in crate::machine) type OpenSpace = Arc<dyn OpenDevice>;

/// Keeps a space of use before a device of it is open.
pub(super) type Joined = Box<dyn Any + Send>;

/// Opens devices in one DMA space.
pub(in crate::machine) trait OpenDevice: Debug + Send + Sync {
    /// What is mapped for the devices.
    fn dma(&self) -> Arc<dyn DmaSpace>;

    /// [`Opener::join`]
    fn join(&self, folder: &Path) -> Result<Joined, RunError>;

    /// [`Opener::inherit`]
    fn inherit(&self, inherited: Inherited, folder: &Path) -> Result<(), RunError>;

    /// [`Opener::open`]
    fn open(&self, folder: &Path, token: Option<&VfToken>) -> Result<Arc<dyn DeviceIo>, RunError>;
}

/// The kernel's VFIO.
#[derive(Debug)]
pub(super) struct Vfio {
    pub(super) paths: SysRoot,
    /// KVM has one such device in each VM; none where the VM can have no devices.
    pub(super) kvm: Option<Arc<dyn KvmFiles>>,
    /// What is opened.
    pub(super) devices: OpenDevices,
}

impl MakeSpace for Vfio {
    fn paths(&self) -> &SysRoot {
        &self.paths
    }

    fn make(
        &self,
        kind: SpaceKind,
        iommufd: Option<File>,
        ram: u64,
    ) -> Result<OpenSpace, RunError> {
        let space = Space::open(&self.paths, kind, iommufd)?;
        space.reserve(&self.paths, ram)?;
        let opener = Opener::new(self.paths.clone(), space.clone(), self.kvm.clone());
        self.devices.watch(&opener);
        Ok(Arc::new(InKernel { opener, space }))
    }
}

/// A space of the kernel's.
///
/// Fields go in the order in which they stand: a space goes after what is attached to it.
#[derive(Debug)]
struct InKernel {
    opener: Opener,
    space: Space,
}

impl OpenDevice for InKernel {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        self.space.dma()
    }

    fn join(&self, folder: &Path) -> Result<Joined, RunError> {
        Ok(Box::new(self.opener.join(folder)?))
    }

    fn inherit(&self, inherited: Inherited, folder: &Path) -> Result<(), RunError> {
        Ok(self.opener.inherit(inherited, folder)?)
    }

    fn open(&self, folder: &Path, token: Option<&VfToken>) -> Result<Arc<dyn DeviceIo>, RunError> {
        Ok(Arc::new(self.opener.open(folder, token)?))
    }
}
