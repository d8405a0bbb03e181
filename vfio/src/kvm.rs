//! Telling KVM which VFIO files its VM uses.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

/// The KVM-VFIO device of a VM. `KVM_DEV_VFIO_FILE`: Linux, virt/kvm/devices/vfio.rst
///
/// KVM keeps a file open for as long as it is registered, so each is removed before it is closed.
pub trait KvmFiles: Send + Sync + Debug {
    /// `KVM_DEV_VFIO_FILE_ADD`: for a group before its first device is opened, for a character
    /// device before it is bound to an iommufd.
    ///
    /// # Errors
    /// The kernel's.
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()>;

    /// `KVM_DEV_VFIO_FILE_DEL`. Errors are the implementation's to log.
    fn remove(&self, file: BorrowedFd<'_>);
}
