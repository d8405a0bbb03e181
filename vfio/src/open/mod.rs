//! Opening a host device for a VM: what has to hold before, and in which order the kernel wants it.

mod error;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use busway_iommu::{
    Container, DeviceFolder, Group, Ioas, Obstacle, OpenError, PCI_API, Space, SysRoot, holder,
    is_vfio_driver,
};

pub use error::DeviceError;

use crate::attachment::{AttachedFile, Attachment, OpenGroup, OpenOnes, read_reset_methods};
use crate::held_up::{self, Step};
use crate::inherited::Inherited;
use crate::patience::patiently;
use crate::refusal::{Binding, MODULE};
use crate::vf_token::TokenUse;
use crate::{HostName, KernelDevice, KvmFiles, VfToken, sys};

/// Opens devices for one VM. Several threads may open devices at once, which pays: the kernel resets
/// each one meanwhile.
#[derive(Debug)]
pub struct Opener {
    paths: SysRoot,
    space: Space,
    kvm: Option<Arc<dyn KvmFiles>>,
    open: Arc<OpenOnes>,
}

/// The devices that an [`Opener`] has opened, opens or closes now, for who wants to know. It keeps none of them.
#[derive(Clone, Debug)]
pub struct Claimed(Weak<OpenOnes>);

/// Keeps a space of use before a device of it is open.
#[derive(Debug)]
pub struct Joined {
    _group: Option<Arc<OpenGroup>>,
}

impl Claimed {
    /// Their names. A device is there from before it is opened until what it was attached to is released.
    #[must_use]
    pub fn names(&self) -> Vec<HostName> {
        let Some(open) = self.0.upgrade() else {
            return Vec::new();
        };
        let devices = open.devices();
        let held = devices.iter().filter(|(_, claim)| claim.strong_count() > 0);
        held.map(|(name, _)| *name).collect()
    }

    /// Whether there can be none any more: the opener is gone, with all devices.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl Opener {
    /// Which devices it has, from now on.
    #[must_use]
    pub fn claimed(&self) -> Claimed {
        Claimed(Arc::downgrade(&self.open))
    }

    /// An opener whose devices are attached to `space`, and whose files `kvm` is told of.
    #[must_use]
    pub fn new(paths: SysRoot, space: Space, kvm: Option<Arc<dyn KvmFiles>>) -> Self {
        Self {
            paths,
            space,
            kvm,
            open: Arc::default(),
        }
    }

    /// Takes a descriptor to use in the place of one that would be opened, for the device whose
    /// folder in sysfs is `device` and, where it is a group's, for the group's other devices.
    ///
    /// # Errors
    /// [`DeviceError::Twice`]
    pub fn inherit(&self, inherited: Inherited, device: &Path) -> Result<(), DeviceError> {
        let name = name_of(device)?;
        match self.open.inherited().take(inherited, name) {
            true => Ok(()),
            false => Err(DeviceError::Twice { name }),
        }
    }

    /// Has the VM's space be of use for devices that are opened later, the first of which has its folder in
    /// `device`: a container maps nothing before a group is in it. That resets nothing.
    ///
    /// # Errors
    /// [`DeviceError`]
    pub fn join(&self, device: &Path) -> Result<Joined, DeviceError> {
        let address = check(&self.paths, device)?;
        Ok(Joined {
            _group: match &self.space {
                Space::Type1(container) => Some(self.group(container, device, address)?),
                Space::Iommufd(_) => None,
            },
        })
    }

    /// Opens the device whose folder in sysfs is `device` and attaches it to the VM's space.
    /// `vf_token` is what the user of its physical function, and of its other virtual functions, says
    /// too. A physical function's is set by opening it, so that comes before its virtual ones.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is left open or attached then.
    pub fn open(
        &self,
        device: &Path,
        vf_token: Option<&VfToken>,
    ) -> Result<KernelDevice, DeviceError> {
        let name = check(&self.paths, device)?;
        if vf_token.is_some() && TokenUse::of(&self.paths, device) == TokenUse::None {
            return Err(DeviceError::UnusedVfToken { name });
        }
        let claim = self.claim(name)?;
        held_up::where_a_test_asks(Step::Opening, name);
        let opened = match &self.space {
            Space::Type1(container) => {
                let group = self.group(container, device, name)?;
                let folder = DeviceFolder::open(device);
                let methods = read_reset_methods(&folder);
                AttachedFile {
                    file: self.in_group(&group.group, name, vf_token)?,
                    attachment: Attachment::Group(group),
                    name,
                    folder,
                    paths: self.paths.clone(),
                    inherited: false,
                    open: self.open.clone(),
                    _claim: claim,
                    methods,
                }
            }
            Space::Iommufd(ioas) => self.cdev(device, name, ioas, vf_token, claim)?,
        };
        KernelDevice::new(&name.to_string(), opened).map_err(|source| DeviceError::Kernel {
            name,
            what: "VFIO_DEVICE_GET_INFO",
            source,
        })
    }

    /// Takes a device for as long as the claim lives: the kernel would let a group's device be
    /// opened twice.
    fn claim(&self, name: HostName) -> Result<Arc<()>, DeviceError> {
        let mut devices = self.open.devices();
        let taken = devices.get(&name);
        if taken.is_some_and(|claim| claim.strong_count() > 0) {
            return Err(DeviceError::Twice { name });
        }
        let claim = Arc::new(());
        devices.insert(name, Arc::downgrade(&claim));
        Ok(claim)
    }

    /// The device's group, opened now or before.
    fn group(
        &self,
        container: &Arc<Container>,
        device: &Path,
        name: HostName,
    ) -> Result<Arc<OpenGroup>, DeviceError> {
        let number = self
            .paths
            .group_of(device)
            .ok_or_else(|| no_group(&self.paths, name))?;
        let mut groups = self.open.groups();
        if let Some(group) = groups.get(&number).and_then(Weak::upgrade) {
            return Ok(group);
        }
        let inherited = self.open.inherited().groups.remove(&number);
        let group = match inherited {
            Some(file) => Group::from_file(&self.paths, file, number, container),
            None => Group::open(&self.paths, number, container),
        };
        let group = group.map_err(|source| DeviceError::Open { name, source })?;
        self.tell_kvm(group.as_fd(), name)?;
        let group = Arc::new(OpenGroup {
            kvm: self.kvm.clone(),
            group,
        });
        groups.insert(number, Arc::downgrade(&group));
        Ok(group)
    }

    fn in_group(
        &self,
        group: &Group,
        name: HostName,
        vf_token: Option<&VfToken>,
    ) -> Result<File, DeviceError> {
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::EBUSY) => DeviceError::Busy {
                name,
                holder: holder(&self.paths, &self.paths.nodes_of_group(group.number())),
            },
            Some(libc::EACCES) => refused(name, vf_token),
            Some(libc::ETIMEDOUT) if name.is_mediated() => DeviceError::TimedOut { name },
            _ => DeviceError::Kernel {
                name,
                what: "VFIO_GROUP_GET_DEVICE_FD",
                source,
            },
        };
        // The name that the kernel knows a device by has its options behind it.
        let called = match vf_token {
            Some(token) => format!("{name} vf_token={token}"),
            None => name.to_string(),
        };
        // The kernel resets it, which it only tries (`vfio_pci_core_enable`).
        let opened = patiently(|| group.device(&called));
        opened.map(File::from).map_err(failed)
    }

    fn cdev(
        &self,
        device: &Path,
        name: HostName,
        ioas: &Arc<Ioas>,
        vf_token: Option<&VfToken>,
        claim: Arc<()>,
    ) -> Result<AttachedFile, DeviceError> {
        let failed = |source| DeviceError::Open { name, source };
        let inherited = self.open.inherited().devices.remove(&name);
        let is_inherited = inherited.is_some();
        let (file, path) = match inherited {
            Some(file) => (file, self.paths.cdev_node(device).unwrap_or_default()),
            None => self.open_cdev(device, name)?,
        };
        self.tell_kvm(file.as_fd(), name)?;
        let group = self.paths.group_of(device);
        if let Some(group) = group {
            ioas.joined(group);
        }
        let folder = DeviceFolder::open(device);
        let methods = read_reset_methods(&folder);
        // From here on dropping it undoes everything.
        let opened = AttachedFile {
            file,
            attachment: Attachment::Ioas {
                kvm: self.kvm.clone(),
                ioas: ioas.clone(),
                group,
            },
            name,
            folder,
            paths: self.paths.clone(),
            inherited: is_inherited,
            open: self.open.clone(),
            _claim: claim,
            methods,
        };
        bind(&opened.file, ioas, name, vf_token).map_err(|source| {
            if source.raw_os_error() == Some(libc::EACCES) {
                return refused(name, vf_token);
            }
            let binding = Binding {
                paths: &self.paths,
                name,
                group,
                node: path,
                inherited: is_inherited,
            };
            binding.refused(source)
        })?;
        sys::attach_ioas(&opened.file, ioas.id()).map_err(|error| {
            // EADDRINUSE: it reserves what is mapped, which can be looked up.
            let conflict = (error.raw_os_error() == Some(libc::EADDRINUSE))
                .then(|| ioas.conflict(group?))
                .flatten();
            failed(match conflict {
                Some(conflict) => OpenError::Map(conflict),
                None => OpenError::Attach {
                    what: "it".to_owned(),
                    obstacle: Obstacle::attaching(&self.paths, MODULE, group, error),
                },
            })
        })?;
        Ok(opened)
    }

    fn open_cdev(&self, device: &Path, name: HostName) -> Result<(File, PathBuf), DeviceError> {
        let failed = |source| DeviceError::Open { name, source };
        // One that cannot be seen from here is for `Obstacle` to explain.
        let path = self.paths.cdev_node(device).ok_or_else(|| {
            failed(OpenError::NoCdev {
                device: name.to_string(),
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
        Ok((file, path))
    }

    fn tell_kvm(&self, file: BorrowedFd<'_>, name: HostName) -> Result<(), DeviceError> {
        self.kvm
            .as_ref()
            .map_or(Ok(()), |kvm| kvm.add(file))
            .map_err(|source| DeviceError::Kernel {
                name,
                what: "KVM_DEV_VFIO_FILE_ADD",
                source,
            })
    }
}

/// Binds a device to the VM's iommufd.
///
/// Kernels before Linux 6.17 neither take a VF token there nor ask for one: the device can be had
/// without, and that is said.
fn bind(file: &File, ioas: &Ioas, name: HostName, vf_token: Option<&VfToken>) -> io::Result<()> {
    // This opens the device, and the kernel resets it, which it only tries (`vfio_pci_core_enable`).
    let bind = |token| patiently(|| sys::bind_iommufd(file, ioas.fd(), token));
    let bound = bind(vf_token.map(VfToken::bytes));
    match bound {
        Err(error) if vf_token.is_some() && error.raw_os_error() == Some(libc::EINVAL) => {
            bind(None)?;
            log::warn!(
                "{name}: this host's kernel takes no VF token over iommufd (Linux 6.17 does), and \
                 asks for none: it was opened without; `--platform iommufd=off` uses the token"
            );
            Ok(())
        }
        other => other,
    }
}

/// What EACCES means: the kernel wants a VF token, or another one.
fn refused(name: HostName, vf_token: Option<&VfToken>) -> DeviceError {
    match vf_token {
        None => DeviceError::NoVfToken { name },
        Some(_) => DeviceError::WrongVfToken { name },
    }
}

fn name_of(device: &Path) -> Result<HostName, DeviceError> {
    HostName::of_device(device).ok_or_else(|| DeviceError::NotPci {
        path: device.to_owned(),
    })
}

/// Why a device is in no group: an IOMMU's are there with it, and those of mediated devices VFIO makes.
fn no_group(paths: &SysRoot, name: HostName) -> DeviceError {
    match name.is_mediated() {
        true => DeviceError::NoVfioGroup { name },
        false => DeviceError::NoGroup {
            name,
            obstacle: Obstacle::no_iommu(paths),
        },
    }
}

/// That the device is there and ready, as sysfs shows it.
fn check(paths: &SysRoot, device: &Path) -> Result<HostName, DeviceError> {
    let name = name_of(device)?;
    if !device.exists() {
        return Err(DeviceError::NotThere { name });
    }
    if name.is_mediated() {
        return check_mediated(paths, device, name).map(|()| name);
    }
    // Without an IOMMU no VFIO driver takes it, and asking for one would lead nowhere.
    if paths.group_of(device).is_none() {
        return Err(no_group(paths, name));
    }
    match paths.driver_of(device) {
        None => Err(DeviceError::NoDriver { name }),
        Some(driver) if !is_vfio_driver(&driver) => Err(DeviceError::WrongDriver { name, driver }),
        Some(_) => Ok(name),
    }
}

fn check_mediated(paths: &SysRoot, device: &Path, name: HostName) -> Result<(), DeviceError> {
    match paths.device_api(device) {
        // Its type goes before the device itself, which waits for its users.
        None => Err(DeviceError::NotThere { name }),
        Some(api) if api != PCI_API => Err(DeviceError::WrongApi { name, api }),
        Some(_) if paths.driver_of(device).is_none() => Err(DeviceError::NotLent { name }),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_not_ready_is_told_before_anything_is_opened() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::under(root.path());
        let folder = |name: &str| paths.sys.join("bus/pci/devices").join(name);
        let device = |name: &str, driver: Option<&str>| {
            fs::create_dir_all(folder(name)).unwrap();
            symlink("../../groups/7", folder(name).join("iommu_group")).unwrap();
            if let Some(driver) = driver {
                symlink(
                    format!("../../drivers/{driver}"),
                    folder(name).join("driver"),
                )
                .unwrap();
            }
        };
        device("0000:01:00.0", Some("nvme"));
        device("0000:02:00.0", None);
        device("0000:03:00.0", Some("vfio-pci"));
        device("0000:05:00.0", Some("mlx5_vfio_pci"));
        fs::create_dir_all(folder("0000:04:00.0")).unwrap();
        let reported = |name: &str| match check(&paths, &folder(name)) {
            Ok(address) => address.to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(
            reported("0000:01:00.0"),
            "0000:01:00.0 is bound to nvme, not to vfio-pci: `busway device bind 0000:01:00.0`"
        );
        assert!(reported("0000:02:00.0").contains("bound to no driver"));
        assert_eq!(reported("0000:03:00.0"), "0000:03:00.0");
        assert_eq!(reported("0000:05:00.0"), "0000:05:00.0");
        assert!(reported("0000:04:00.0").contains("the host has no IOMMU in use"));
        assert!(reported("0000:06:00.0").starts_with("there is no PCI device 0000:06:00.0"));
        assert!(reported("usb1").contains("is neither a PCI device"));
    }

    #[test]
    fn a_mediated_device_needs_no_iommu_and_is_taken_as_a_pci_device_only() {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot::under(root.path());
        let made = |digit: u32, api: &str, driver: Option<&str>| {
            let name = format!("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f{digit}");
            let folder = paths.sys.join("bus/mdev/devices").join(name);
            fs::create_dir_all(folder.join("mdev_type")).unwrap();
            fs::write(folder.join("mdev_type/device_api"), api).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), folder.join("driver")).unwrap();
            }
            folder
        };
        let reported = |folder: &Path| match check(&paths, folder) {
            Ok(name) => name.to_string(),
            Err(error) => error.to_string(),
        };
        let serial = made(0, "vfio-pci\n", Some("mtty"));
        assert_eq!(reported(&serial), "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f0");
        for (digit, api) in [(1, "vfio-ap"), (2, "vfio-ccw")] {
            let text = reported(&made(digit, &format!("{api}\n"), Some("vfio_ap_mdev")));
            assert!(text.contains(&format!("of the kind {api}")), "{text}");
        }
        assert!(reported(&made(3, "vfio-pci\n", None)).contains("bound to no driver"));
        fs::remove_dir_all(serial.join("mdev_type")).unwrap();
        let absent =
            "there is no mediated device bd8d9d2b-5a5f-4f5a-a211-f591514ba1f0 on this host";
        assert!(reported(&serial).starts_with(absent));
        let name = name_of(&serial).unwrap();
        let text = no_group(&paths, name).to_string();
        assert!(text.contains("CONFIG_VFIO_GROUP"), "{text}");
    }
}
