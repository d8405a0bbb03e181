//! Opening a host device for a VM: what has to hold before, and in which order the kernel wants it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use busway_iommu::{Container, Group, HostPaths, Ioas, Obstacle, OpenError, Space};
use busway_pci::Bdf;

use crate::{KernelDevice, KvmFiles, sys};

/// A device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// the path does not name a PCI device
    #[error(
        "{path} is not a PCI device: give its address (0000:01:00.0) or its folder in \
         /sys/bus/pci/devices"
    )]
    NotPci {
        /// What was given.
        path: PathBuf,
    },
    /// there is no such device
    #[error(
        "there is no PCI device {address} on this host: `busway device list` shows those there are"
    )]
    NotThere {
        /// The address.
        address: Bdf,
    },
    /// the device is with another driver
    #[error("{address} is bound to {driver}, not to vfio-pci: `busway device bind {address}`")]
    WrongDriver {
        /// The address.
        address: Bdf,
        /// Its driver.
        driver: String,
    },
    /// the device has no driver
    #[error("{address} is bound to no driver, and needs vfio-pci: `busway device bind {address}`")]
    NoDriver {
        /// The address.
        address: Bdf,
    },
    /// the device is in no IOMMU group
    #[error("{address} cannot be isolated: {obstacle}")]
    NoGroup {
        /// The address.
        address: Bdf,
        /// Why.
        obstacle: Obstacle,
    },
    /// the VM has it already
    #[error("{address} is given to this VM twice")]
    Twice {
        /// The address.
        address: Bdf,
    },
    /// {address}: {source}
    #[error("{address}: {source}")]
    Open {
        /// The address.
        address: Bdf,
        /// Why.
        source: OpenError,
    },
    /// somebody else uses the device
    #[error(
        "{address} is in use: another process has it open through {path} \
         (`fuser -v {path}` as root names it); end that first"
    )]
    Busy {
        /// The address.
        address: Bdf,
        /// The node it is open through.
        path: PathBuf,
    },
    /// the device is a VF of a PF that is itself with VFIO
    #[error(
        "{address} is a virtual function whose physical function is with VFIO as well, and needs \
         its VF token: bind the physical function to its own driver"
    )]
    VfToken {
        /// The address.
        address: Bdf,
    },
    /// {what} failed for {address}: {source}
    #[error("{what} failed for {address}: {source}")]
    Kernel {
        /// The address.
        address: Bdf,
        /// The call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What a device is attached to, and has to let go of after it is closed.
#[derive(Debug)]
enum Attachment {
    /// A group, which its other devices hold as well.
    Group(#[expect(dead_code, reason = "held, not used")] Arc<OpenGroup>),
    /// An address space of an iommufd.
    Ioas {
        kvm: Option<Arc<dyn KvmFiles>>,
        #[expect(dead_code, reason = "held, not used")]
        ioas: Arc<Ioas>,
    },
}

/// An attached device's descriptor. KVM, where it knows the descriptor itself, has to forget it before
/// it closes; what the device is attached to is let go after that.
#[derive(Debug)]
pub(crate) struct Opened {
    // Dropped in this order, after `Drop::drop`.
    pub(crate) file: File,
    attachment: Attachment,
    _token: Arc<()>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Attachment::Ioas { kvm: Some(kvm), .. } = &self.attachment {
            kvm.remove(self.file.as_fd());
        }
    }
}

/// A group that KVM knows of.
#[derive(Debug)]
struct OpenGroup {
    kvm: Option<Arc<dyn KvmFiles>>,
    group: Group,
}

impl Drop for OpenGroup {
    fn drop(&mut self) {
        if let Some(kvm) = &self.kvm {
            kvm.remove(self.group.as_fd());
        }
    }
}

/// Opens devices for one VM.
#[derive(Debug)]
pub struct Opener {
    paths: HostPaths,
    space: Space,
    kvm: Option<Arc<dyn KvmFiles>>,
    open: Mutex<Open>,
}

/// What this VM has open.
#[derive(Debug, Default)]
struct Open {
    groups: BTreeMap<u32, Weak<OpenGroup>>,
    devices: BTreeMap<Bdf, Weak<()>>,
}

impl Opener {
    /// An opener whose devices are attached to `space`, and whose files `kvm` is told of.
    #[must_use]
    pub fn new(paths: HostPaths, space: Space, kvm: Option<Arc<dyn KvmFiles>>) -> Self {
        Self {
            paths,
            space,
            kvm,
            open: Mutex::default(),
        }
    }

    /// Opens the device whose folder in sysfs is `device` and attaches it to the VM's space.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is left open or attached then.
    pub fn open(&self, device: &Path) -> Result<KernelDevice, DeviceError> {
        let address = self.check(device)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open
            .devices
            .get(&address)
            .is_some_and(|token| token.strong_count() > 0)
        {
            return Err(DeviceError::Twice { address });
        }
        let token = Arc::new(());
        let opened = match &self.space {
            Space::Type1(container) => {
                let group = self.group(&mut open, container, device, address)?;
                Opened {
                    file: self.in_group(&group.group, address)?,
                    attachment: Attachment::Group(group),
                    _token: token.clone(),
                }
            }
            Space::Iommufd(ioas) => self.cdev(device, address, ioas, token.clone())?,
        };
        open.devices.insert(address, Arc::downgrade(&token));
        KernelDevice::new(&address.to_string(), opened).map_err(|source| DeviceError::Kernel {
            address,
            what: "VFIO_DEVICE_GET_INFO",
            source,
        })
    }

    /// That the device is there and ready, as sysfs shows it.
    fn check(&self, device: &Path) -> Result<Bdf, DeviceError> {
        let address: Bdf = device
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
            .ok_or_else(|| DeviceError::NotPci {
                path: device.to_owned(),
            })?;
        if !device.exists() {
            return Err(DeviceError::NotThere { address });
        }
        match self.paths.driver_of(device) {
            None => Err(DeviceError::NoDriver { address }),
            Some(driver) if !driver.contains("vfio") => {
                Err(DeviceError::WrongDriver { address, driver })
            }
            Some(_) => Ok(address),
        }
    }

    /// The device's group, opened now or before.
    fn group(
        &self,
        open: &mut Open,
        container: &Arc<Container>,
        device: &Path,
        address: Bdf,
    ) -> Result<Arc<OpenGroup>, DeviceError> {
        let number = self
            .paths
            .group_of(device)
            .ok_or_else(|| DeviceError::NoGroup {
                address,
                obstacle: Obstacle::no_iommu(&self.paths),
            })?;
        if let Some(group) = open.groups.get(&number).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let group = Group::open(&self.paths, number, container)
            .map_err(|source| DeviceError::Open { address, source })?;
        self.tell_kvm(group.as_fd(), address)?;
        let group = Arc::new(OpenGroup {
            kvm: self.kvm.clone(),
            group,
        });
        open.groups.insert(number, Arc::downgrade(&group));
        Ok(group)
    }

    fn in_group(&self, group: &Group, address: Bdf) -> Result<File, DeviceError> {
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => DeviceError::Busy {
                address,
                path: self.paths.group(group.number()),
            },
            Some(libc::EACCES) => DeviceError::VfToken { address },
            _ => DeviceError::Kernel {
                address,
                what: "VFIO_GROUP_GET_DEVICE_FD",
                source,
            },
        };
        group
            .device(&address.to_string())
            .map(File::from)
            .map_err(failed)
    }

    fn cdev(
        &self,
        device: &Path,
        address: Bdf,
        ioas: &Arc<Ioas>,
        token: Arc<()>,
    ) -> Result<Opened, DeviceError> {
        let failed = |source| DeviceError::Open { address, source };
        let path = self.paths.cdev(device).ok_or_else(|| {
            failed(OpenError::NoCdev {
                device: address.to_string(),
                why: "the host's kernel makes no character device for it (it was built without \
                      CONFIG_VFIO_DEVICE_CDEV); use `--platform iommufd=off`"
                    .to_owned(),
            })
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| {
                failed(OpenError::Node {
                    obstacle: Obstacle::opening(&self.paths, &path, error),
                    path: path.clone(),
                })
            })?;
        self.tell_kvm(file.as_fd(), address)?;
        // From here on dropping it undoes everything.
        let opened = Opened {
            file,
            attachment: Attachment::Ioas {
                kvm: self.kvm.clone(),
                ioas: ioas.clone(),
            },
            _token: token,
        };
        sys::bind_iommufd(&opened.file, ioas.fd()).map_err(|source| {
            match source.raw_os_error() {
                // EBUSY: open through its group; EINVAL: bound to another iommufd.
                Some(libc::EBUSY | libc::EINVAL) => DeviceError::Busy { address, path },
                Some(libc::EACCES) => DeviceError::VfToken { address },
                _ => DeviceError::Kernel {
                    address,
                    what: "VFIO_DEVICE_BIND_IOMMUFD",
                    source,
                },
            }
        })?;
        sys::attach_ioas(&opened.file, ioas.id()).map_err(|error| {
            failed(OpenError::Attach {
                what: address.to_string(),
                obstacle: Obstacle::attaching(&self.paths, "iommufd", error),
            })
        })?;
        Ok(opened)
    }

    fn tell_kvm(&self, file: BorrowedFd<'_>, address: Bdf) -> Result<(), DeviceError> {
        self.kvm
            .as_ref()
            .map_or(Ok(()), |kvm| kvm.add(file))
            .map_err(|source| DeviceError::Kernel {
                address,
                what: "KVM_DEV_VFIO_FILE_ADD",
                source,
            })
    }
}
