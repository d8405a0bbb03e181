//! The KVM-VFIO device: tells KVM which VFIO files the VM uses, for cache coherency and PCI
//! accesses that depend on it. linux Documentation/virt/kvm/devices/vfio.rst.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use busway_vfio::KvmFiles;
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::error::KvmError;

/// The VM's KVM-VFIO device.
#[derive(Debug)]
pub struct KvmVfio {
    fd: DeviceFd,
}

impl KvmVfio {
    pub(super) fn new(vm: &VmFd) -> Result<Self, KvmError> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let fd = vm
            .create_device(&mut device)
            .map_err(KvmError::ioctl("KVM_CREATE_DEVICE", "the VM (KVM-VFIO)"))?;
        Ok(Self { fd })
    }

    fn set(&self, attribute: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        // KVM reads the descriptor's number through the pointer. KVM_DEV_VFIO_FILE is the older
        // KVM_DEV_VFIO_GROUP under a new name, so this serves groups on every kernel.
        let number: RawFd = file.as_raw_fd();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: attribute.into(),
            addr: &raw const number as u64,
            flags: 0,
        };
        self.fd.set_device_attr(&attribute).map_err(io::Error::from)
    }
}

impl KvmFiles for KvmVfio {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    fn remove(&self, file: BorrowedFd<'_>) {
        if let Err(error) = self.set(KVM_DEV_VFIO_FILE_DEL, file) {
            log::error!("KVM_DEV_VFIO_FILE_DEL: {error}; the device stays open until the VM ends");
        }
    }
}
