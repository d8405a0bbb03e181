//! An opened device, what it is attached to, and what its VM has open beside it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::held_up::{self, Step};
use crate::hot_reset::{self, Owner};
use crate::inherited::{Inherited, InheritedKind};
use crate::{Affected, FunctionReset, HostName, KvmFiles, sys};
use busway_iommu::{DeviceFolder, Group, Ioas, SysRoot};
use busway_pci::Bdf;

/// What a device is attached to, and has to release after it is closed.
#[derive(Debug)]
pub(crate) enum Attachment {
    /// A group, which its other devices hold as well.
    Group(#[expect(dead_code, reason = "held, not used")] Arc<OpenGroup>),
    /// An address space of an iommufd.
    Ioas {
        kvm: Option<Arc<dyn KvmFiles>>,
        ioas: Arc<Ioas>,
        /// The device's group, which the space knows of.
        group: Option<u32>,
    },
}

/// An attached device's descriptor. KVM, where it knows the descriptor itself, has to forget it before
/// it closes; what the device is attached to is released after that.
#[derive(Debug)]
pub(crate) struct AttachedFile {
    // Dropped in this order, after `Drop::drop`.
    pub(crate) file: File,
    pub(crate) attachment: Attachment,
    pub(crate) name: HostName,
    /// Its folder in sysfs.
    pub(crate) folder: DeviceFolder,
    pub(crate) paths: SysRoot,
    /// Somebody else has opened it, and may hold it as well.
    pub(crate) inherited: bool,
    /// Of the same VM.
    pub(crate) open: Arc<OpenOnes>,
    pub(crate) _claim: Arc<()>,
    /// What sysfs says of its resets, from when it was opened: the thread that resets it opens nothing.
    pub(crate) methods: Option<Option<FunctionReset>>,
}

impl Drop for AttachedFile {
    fn drop(&mut self) {
        held_up::where_a_test_asks(Step::Closing, self.name);
        if let Attachment::Ioas { kvm, ioas, group } = &self.attachment {
            if let Some(kvm) = kvm {
                kvm.remove(self.file.as_fd());
            }
            if let Some(group) = group {
                ioas.left(*group);
            }
        }
    }
}

/// A group that KVM knows of.
#[derive(Debug)]
pub(crate) struct OpenGroup {
    pub(crate) kvm: Option<Arc<dyn KvmFiles>>,
    pub(crate) group: Group,
}

impl Drop for OpenGroup {
    fn drop(&mut self) {
        if let Some(kvm) = &self.kvm {
            kvm.remove(self.group.as_fd());
        }
    }
}

/// What a VM has open.
#[derive(Debug, Default)]
pub(crate) struct OpenOnes {
    groups: Mutex<BTreeMap<u32, Weak<OpenGroup>>>,
    devices: Mutex<BTreeMap<HostName, Weak<()>>>,
    /// What somebody else has opened, until it is asked for.
    inherited: Mutex<InheritedOnes>,
}

/// Descriptors by what they are of.
#[derive(Debug, Default)]
pub(crate) struct InheritedOnes {
    pub(crate) devices: BTreeMap<HostName, File>,
    pub(crate) groups: BTreeMap<u32, File>,
}

impl InheritedOnes {
    /// Takes a descriptor over for the device called `name`; not one of a device that has another.
    ///
    /// A second one of a group is closed: the kernel opens a group once, so they are two of one file.
    pub(crate) fn take(&mut self, inherited: Inherited, name: HostName) -> bool {
        match inherited.kind {
            InheritedKind::Cdev(_) => self.devices.insert(name, inherited.file).is_none(),
            InheritedKind::Group(number) => {
                self.groups.entry(number).or_insert(inherited.file);
                true
            }
            InheritedKind::Iommufd => true,
        }
    }
}

impl OpenOnes {
    pub(crate) fn inherited(&self) -> MutexGuard<'_, InheritedOnes> {
        self.inherited
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn groups(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<OpenGroup>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn devices(&self) -> MutexGuard<'_, BTreeMap<HostName, Weak<()>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self, number: u32) -> Option<Arc<OpenGroup>> {
        self.groups().get(&number).and_then(Weak::upgrade)
    }
}

/// How the kernel resets a device, as the file `reset_method` in its folder says it (Linux 5.15).
pub(crate) fn read_reset_methods(folder: &DeviceFolder) -> Option<Option<FunctionReset>> {
    let methods = folder.text("reset_method")?;
    Some(FunctionReset::parse(&methods))
}

impl AttachedFile {
    /// Where it is on the host's buses.
    ///
    /// # Errors
    /// ENODEV of a mediated device, which is on none.
    fn address(&self) -> io::Result<Bdf> {
        let none = || io::Error::from_raw_os_error(libc::ENODEV);
        self.name.address().ok_or_else(none)
    }

    /// How the kernel resets it, as sysfs says it, and a mediated device's driver that; nothing where the
    /// kernel is too old to.
    pub(crate) fn reset_methods(&self) -> Option<Option<FunctionReset>> {
        if self.name.is_mediated() {
            return Some(Some(FunctionReset::Mediated));
        }
        self.methods
    }

    /// What a hot reset touches.
    pub(crate) fn hot_reset_reach(&self) -> io::Result<Vec<Affected>> {
        let address = self.address()?;
        let words = sys::hot_reset_info(&self.file)?;
        let dependents = hot_reset::parse(&words, address.segment);
        let affected = dependents.into_iter().map(|dependent| {
            let folder = self.paths.device(dependent.address);
            Affected {
                address: dependent.address,
                owned: match dependent.owner {
                    Owner::Group(number) => self.open.group(number).is_some(),
                    Owner::Iommufd { ours } => ours,
                },
                driver: self.paths.driver_of(&folder),
            }
        });
        Ok(affected.collect())
    }

    /// Resets slot or bus. A group is proof that its devices are this VM's, and the kernel wants no
    /// more groups than there are devices; a character device's iommufd is proof by itself.
    pub(crate) fn hot_reset(&self) -> io::Result<()> {
        let groups: Vec<Arc<OpenGroup>> = match self.attachment {
            Attachment::Ioas { .. } => Vec::new(),
            Attachment::Group(_) => {
                let address = self.address()?;
                let words = sys::hot_reset_info(&self.file)?;
                let mut numbers: Vec<u32> = hot_reset::parse(&words, address.segment)
                    .into_iter()
                    .filter_map(|dependent| match dependent.owner {
                        Owner::Group(number) => Some(number),
                        Owner::Iommufd { .. } => None,
                    })
                    .collect();
                numbers.sort_unstable();
                numbers.dedup();
                let groups = numbers.into_iter().map(|number| self.open.group(number));
                groups.flatten().collect()
            }
        };
        let fds: Vec<_> = groups.iter().map(|open| open.group.as_fd()).collect();
        sys::hot_reset(&self.file, &fds)
    }
}
