//! Descriptors that somebody else has opened, so that Busway needs no access to `/dev/vfio`.
//!
//! What a descriptor is follows from its device number alone: `/sys/dev/char` leads to the device in
//! sysfs, and that says which device or group it belongs to. The node that it was opened
//! by may be out of reach, or not there at all.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use busway_iommu::{IommufdMode, SysRoot};

use crate::{HostName, sys};

/// A descriptor that was inherited, and what it is. It is closed on exec.
#[derive(Debug)]
pub struct Inherited {
    pub(crate) kind: InheritedKind,
    pub(crate) file: File,
    number: u32,
}

/// What a descriptor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum InheritedKind {
    /// The VFIO character device of the device with this folder in sysfs.
    Cdev(PathBuf),
    /// The VFIO group of this number.
    Group(u32),
    /// An iommufd.
    Iommufd,
}

impl fmt::Display for InheritedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cdev(folder) => write!(
                f,
                "the VFIO device {}",
                folder.file_name().unwrap_or_default().display()
            ),
            Self::Group(number) => write!(f, "IOMMU group {number}"),
            Self::Iommufd => f.write_str("an iommufd"),
        }
    }
}

/// A descriptor that was inherited is of no use.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// descriptor {number} is not open
    #[error(
        "descriptor {number} is not open in Busway's process: whoever starts Busway opens it \
         without close-on-exec, and says its number"
    )]
    NotOpen {
        /// The descriptor.
        number: u32,
    },
    /// descriptor {number} is {what}, not {wanted}
    #[error("descriptor {number} is {what}, not {wanted}")]
    Wrong {
        /// The descriptor.
        number: u32,
        /// What it is.
        what: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// descriptor {number} is another device than path= says
    #[error("descriptor {number} is {is}, and path= beside it says {asked}: leave path= out")]
    OtherDevice {
        /// The descriptor.
        number: u32,
        /// What it is.
        is: String,
        /// What was asked for.
        asked: String,
    },
    /// descriptor {number} is a group of which no device, or more than one, can be meant
    #[error(
        "descriptor {number} is IOMMU group {group}, of which {}: say which one by path= beside it",
        match members.as_slice() {
            [] => "no device is bound to vfio-pci".to_owned(),
            members => format!("{} are bound to vfio-pci", members.join(" and ")),
        }
    )]
    WhichDevice {
        /// The descriptor.
        number: u32,
        /// The group.
        group: u32,
        /// Its devices that could be meant.
        members: Vec<String>,
    },
    /// {count} descriptors were sent for what has one
    #[error("{count} descriptors were sent for what has one")]
    Several {
        /// How many.
        count: usize,
    },
    /// a descriptor that was sent cannot be used: {0}
    #[error("a descriptor that was sent cannot be used: {0}")]
    Copy(std::io::Error),
    /// the descriptors are for both of the kernel's interfaces
    #[error(
        "the inherited descriptors belong to both of the kernel's interfaces: {cdev} needs \
         iommufd, {group} a type1 container; pass /dev/vfio/devices/vfioN of every device, or \
         the groups of all"
    )]
    Mixed {
        /// One for a character device.
        cdev: String,
        /// One for a group.
        group: String,
    },
    /// a descriptor needs the interface that was forbidden, or the other way round
    #[error("--platform iommufd={said} contradicts {what}, which was inherited: leave it out")]
    Contradicted {
        /// `on` or `off`
        said: &'static str,
        /// The descriptor.
        what: String,
    },
}

/// What a device's descriptor should be.
const DEVICE: &str = "a VFIO device's (/dev/vfio/devices/vfioN) or group's (/dev/vfio/N)";
const IOMMUFD: &str = "an iommufd (/dev/iommu)";

impl Inherited {
    /// Takes over descriptor `number` for a device.
    ///
    /// # Safety
    /// The descriptor came from whoever started this process: nothing in it uses or closes it.
    ///
    /// # Errors
    /// [`InheritedError`]; the descriptor stays open then.
    pub unsafe fn device(paths: &SysRoot, number: u32) -> Result<Self, InheritedError> {
        // SAFETY: as the caller promises.
        unsafe {
            Self::take(paths, number, DEVICE, |kind| {
                *kind != InheritedKind::Iommufd
            })
        }
    }

    /// Takes over descriptor `number` as iommufd.
    ///
    /// # Safety
    /// As for [`device`](Self::device).
    ///
    /// # Errors
    /// As for [`device`](Self::device).
    pub unsafe fn iommufd(paths: &SysRoot, number: u32) -> Result<File, InheritedError> {
        let is_iommufd = |kind: &InheritedKind| *kind == InheritedKind::Iommufd;
        // SAFETY: as the caller promises.
        unsafe { Self::take(paths, number, IOMMUFD, is_iommufd) }.map(|inherited| inherited.file)
    }

    /// A descriptor that another process has sent for a device.
    ///
    /// # Errors
    /// [`InheritedError`]; the descriptor is closed then.
    pub fn received_device(paths: &SysRoot, file: OwnedFd) -> Result<Self, InheritedError> {
        Self::received(paths, file, DEVICE, |kind| *kind != InheritedKind::Iommufd)
    }

    /// A descriptor that another process has sent as iommufd.
    ///
    /// # Errors
    /// As for [`received_device`](Self::received_device).
    pub fn received_iommufd(paths: &SysRoot, file: OwnedFd) -> Result<File, InheritedError> {
        let is_iommufd = |kind: &InheritedKind| *kind == InheritedKind::Iommufd;
        Self::received(paths, file, IOMMUFD, is_iommufd).map(|inherited| inherited.file)
    }

    fn received(
        paths: &SysRoot,
        file: OwnedFd,
        wanted: &'static str,
        fits: impl Fn(&InheritedKind) -> bool,
    ) -> Result<Self, InheritedError> {
        let number = u32::try_from(file.as_raw_fd()).unwrap_or(u32::MAX);
        let kind = Self::kind(paths, number, wanted, fits)?;
        Ok(Self {
            kind,
            file: file.into(),
            number,
        })
    }

    unsafe fn take(
        paths: &SysRoot,
        number: u32,
        wanted: &'static str,
        fits: impl Fn(&InheritedKind) -> bool,
    ) -> Result<Self, InheritedError> {
        let kind = Self::kind(paths, number, wanted, fits)?;
        // SAFETY: it is open, and nothing else in this process uses it, as the caller promises.
        let file = unsafe { sys::adopt(number) }.map_err(|error| InheritedError::Wrong {
            number,
            what: error.to_string(),
            wanted,
        })?;
        Ok(Self { kind, file, number })
    }

    /// What descriptor `number` is, where that `fits`.
    fn kind(
        paths: &SysRoot,
        number: u32,
        wanted: &'static str,
        fits: impl Fn(&InheritedKind) -> bool,
    ) -> Result<InheritedKind, InheritedError> {
        let link = format!("self/fd/{number}");
        let link = paths.proc.join(link);
        let Ok(meta) = std::fs::metadata(&link) else {
            return Err(InheritedError::NotOpen { number });
        };
        let wrong = |what| InheritedError::Wrong {
            number,
            what,
            wanted,
        };
        let kind = meta
            .file_type()
            .is_char_device()
            .then(|| identify(paths, meta.rdev()))
            .flatten();
        match kind {
            Some(kind) if fits(&kind) => Ok(kind),
            Some(kind) => Err(wrong(kind.to_string())),
            None => Err(wrong(describe(&link))),
        }
    }

    /// The folder in sysfs of the device that is meant, where `path` may say which (or is empty).
    ///
    /// # Errors
    /// [`InheritedError::OtherDevice`] or [`InheritedError::WhichDevice`]
    pub fn folder(&self, paths: &SysRoot, path: &Path) -> Result<PathBuf, InheritedError> {
        let asked = path.file_name();
        let other = |asked: &Path| InheritedError::OtherDevice {
            number: self.number,
            is: self.kind.to_string(),
            asked: asked.file_name().unwrap_or_default().display().to_string(),
        };
        match (&self.kind, asked) {
            (InheritedKind::Cdev(folder), Some(asked)) if folder.file_name() != Some(asked) => {
                Err(other(path))
            }
            (InheritedKind::Cdev(folder), _) => Ok(folder.clone()),
            (InheritedKind::Group(number), Some(_)) => match paths.group_of(path) {
                Some(group) if group == *number => Ok(path.to_owned()),
                _ => Err(other(path)),
            },
            (InheritedKind::Group(number), None) => {
                let mut members: Vec<_> = paths
                    .members(*number)
                    .into_iter()
                    .filter(|(_, folder)| paths.is_with_vfio(folder))
                    .collect();
                match (members.pop(), members.is_empty()) {
                    (Some((_, folder)), true) => Ok(folder),
                    (last, _) => Err(InheritedError::WhichDevice {
                        number: self.number,
                        group: *number,
                        members: members
                            .into_iter()
                            .chain(last)
                            .map(|(name, _)| name)
                            .collect(),
                    }),
                }
            }
            (InheritedKind::Iommufd, _) => Err(other(path)),
        }
    }
}

/// Which of the kernel's interfaces the descriptors that were inherited need, where `asked` is what
/// the user said and `iommufd` whether one was inherited.
///
/// # Errors
/// [`InheritedError::Mixed`] or [`InheritedError::Contradicted`]
pub fn interface<'a>(
    asked: IommufdMode,
    iommufd: bool,
    inherited: impl Iterator<Item = &'a Inherited> + Clone,
) -> Result<IommufdMode, InheritedError> {
    interface_for(asked, iommufd, inherited.map(|inherited| &inherited.kind))
}

fn interface_for<'a>(
    asked: IommufdMode,
    iommufd: bool,
    inherited: impl Iterator<Item = &'a InheritedKind> + Clone,
) -> Result<IommufdMode, InheritedError> {
    let cdev = inherited
        .clone()
        .find(|kind| matches!(kind, InheritedKind::Cdev(_)))
        .or(iommufd.then_some(&InheritedKind::Iommufd));
    let group = inherited
        .clone()
        .find(|kind| matches!(kind, InheritedKind::Group(_)));
    match (cdev, group, asked) {
        (Some(cdev), Some(group), _) => Err(InheritedError::Mixed {
            cdev: cdev.to_string(),
            group: group.to_string(),
        }),
        (Some(cdev), None, IommufdMode::Off) => Err(InheritedError::Contradicted {
            said: "off",
            what: cdev.to_string(),
        }),
        (None, Some(group), IommufdMode::On) => Err(InheritedError::Contradicted {
            said: "on",
            what: group.to_string(),
        }),
        (Some(_), None, _) => Ok(IommufdMode::On),
        (None, Some(_), _) => Ok(IommufdMode::Off),
        (None, None, asked) => Ok(asked),
    }
}

/// What the character device of this number is, where it is one of VFIO's.
fn identify(paths: &SysRoot, rdev: u64) -> Option<InheritedKind> {
    let number = format!("{}:{}", libc::major(rdev), libc::minor(rdev));
    // …/0000:01:00.0/vfio-dev/vfio3, …/virtual/vfio/7 or …/virtual/misc/iommu
    let folder = std::fs::canonicalize(paths.sys.join("dev/char").join(number)).ok()?;
    let class = folder.parent()?;
    match class.file_name()?.to_str()? {
        "vfio-dev" => {
            let device = class.parent()?;
            device.file_name()?.to_str()?.parse::<HostName>().ok()?;
            Some(InheritedKind::Cdev(device.to_owned()))
        }
        "vfio" => {
            let group = folder.file_name()?.to_str()?.parse().ok()?;
            Some(InheritedKind::Group(group))
        }
        "misc" if folder.file_name()? == "iommu" => Some(InheritedKind::Iommufd),
        _ => None,
    }
}

/// What an open file is, for a person.
fn describe(link: &Path) -> String {
    let target = std::fs::read_link(link).unwrap_or_default();
    let target = target.display().to_string();
    if target.starts_with("anon_inode:[vfio-device") {
        "a device that was opened through its group".to_owned()
    } else {
        target
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::InheritedOnes;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A host with a function that has a character device (510:3), groups 7 (one device) and 8 (two),
    /// and an iommufd (10:124).
    fn host() -> (tempfile::TempDir, SysRoot) {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot {
            sys: root.path().canonicalize().unwrap(),
            ..SysRoot::default()
        };
        let chars = paths.sys.join("dev/char");
        fs::create_dir_all(&chars).unwrap();
        let device = |number: &str, path: &str| {
            fs::create_dir_all(paths.sys.join(path)).unwrap();
            symlink(paths.sys.join(path), chars.join(number)).unwrap();
        };
        device("510:3", "devices/pci0000:00/0000:01:00.0/vfio-dev/vfio3");
        let mediated = "devices/virtual/mtty/mtty/bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        device("510:4", &format!("{mediated}/vfio-dev/vfio4"));
        device("243:7", "devices/virtual/vfio/7");
        device("243:8", "devices/virtual/vfio/8");
        device("10:124", "devices/virtual/misc/iommu");
        device("10:196", "devices/virtual/misc/vfio");
        for (group, address) in [
            (7, "0000:01:00.0"),
            (8, "0000:02:00.0"),
            (8, "0000:02:00.1"),
        ] {
            let folder = paths.sys.join("devices/pci0000:00").join(address);
            let group = paths.sys.join(format!("kernel/iommu_groups/{group}"));
            fs::create_dir_all(group.join("devices")).unwrap();
            fs::create_dir_all(&folder).unwrap();
            symlink(&folder, group.join("devices").join(address)).unwrap();
            symlink(&group, folder.join("iommu_group")).unwrap();
            symlink("../../drivers/vfio-pci", folder.join("driver")).unwrap();
        }
        (root, paths)
    }

    fn inherited(kind: InheritedKind) -> Inherited {
        Inherited {
            kind,
            file: File::open("/dev/null").unwrap(),
            number: 9,
        }
    }

    #[test]
    fn a_descriptor_is_known_by_its_device_number() {
        let (_root, paths) = host();
        let known = |major, minor| identify(&paths, libc::makedev(major, minor));
        let folder = paths.sys.join("devices/pci0000:00/0000:01:00.0");
        assert_eq!(known(510, 3), Some(InheritedKind::Cdev(folder)));
        let mediated = "devices/virtual/mtty/mtty/bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let mediated = paths.sys.join(mediated);
        assert_eq!(known(510, 4), Some(InheritedKind::Cdev(mediated)));
        assert_eq!(known(243, 7), Some(InheritedKind::Group(7)));
        assert_eq!(known(10, 124), Some(InheritedKind::Iommufd));
        assert_eq!(known(10, 196), None);
        assert_eq!(known(1, 3), None);
    }

    #[test]
    fn the_device_that_is_meant_is_found_or_asked_for() {
        let (_root, paths) = host();
        let folder = |name| paths.sys.join("devices/pci0000:00").join(name);
        let nothing = Path::new("");
        let cdev = inherited(InheritedKind::Cdev(folder("0000:01:00.0")));
        assert_eq!(
            cdev.folder(&paths, nothing).unwrap(),
            folder("0000:01:00.0")
        );
        let error = cdev.folder(&paths, &folder("0000:02:00.0")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("path= beside it says 0000:02:00.0"),
            "{error}"
        );
        let alone = inherited(InheritedKind::Group(7))
            .folder(&paths, nothing)
            .unwrap();
        assert_eq!(alone.file_name().unwrap(), "0000:01:00.0");
        let pair = inherited(InheritedKind::Group(8));
        let error = pair.folder(&paths, nothing).unwrap_err().to_string();
        assert!(
            error.contains("0000:02:00.0 and 0000:02:00.1 are bound"),
            "{error}"
        );
        let second = folder("0000:02:00.1");
        assert_eq!(pair.folder(&paths, &second).unwrap(), second);
        assert!(pair.folder(&paths, &folder("0000:01:00.0")).is_err());
    }

    #[test]
    fn descriptors_choose_the_interface_and_cannot_be_of_both() {
        let cdev = InheritedKind::Cdev("/x/0000:01:00.0".into());
        let group = InheritedKind::Group(7);
        let of = |asked, iommufd, kinds: &[&InheritedKind]| {
            interface_for(asked, iommufd, kinds.iter().copied()).map_err(|error| error.to_string())
        };
        assert_eq!(of(IommufdMode::Auto, false, &[&cdev]), Ok(IommufdMode::On));
        assert_eq!(of(IommufdMode::Auto, true, &[]), Ok(IommufdMode::On));
        assert_eq!(
            of(IommufdMode::Auto, false, &[&group, &group]),
            Ok(IommufdMode::Off)
        );
        assert_eq!(of(IommufdMode::Off, false, &[]), Ok(IommufdMode::Off));
        assert!(
            of(IommufdMode::Auto, false, &[&cdev, &group])
                .unwrap_err()
                .contains("both")
        );
        assert!(
            of(IommufdMode::Off, false, &[&cdev])
                .unwrap_err()
                .contains("iommufd=off")
        );
        assert!(
            of(IommufdMode::On, false, &[&group])
                .unwrap_err()
                .contains("IOMMU group 7")
        );
    }

    #[test]
    fn two_descriptors_of_a_group_serve_as_one_and_two_of_a_device_do_not() {
        let mut ones = InheritedOnes::default();
        let [first, second] = ["0000:02:00.0", "0000:02:00.1"].map(|it| it.parse().unwrap());
        let group = || inherited(InheritedKind::Group(8));
        assert!(ones.take(group(), first) && ones.take(group(), second));
        assert_eq!(ones.groups.len(), 1);
        let device = || inherited(InheritedKind::Cdev("/x/0000:02:00.0".into()));
        assert!(ones.take(device(), first) && !ones.take(device(), first));
    }

    #[test]
    fn what_is_no_vfio_descriptor_is_named_and_left_open() {
        let (_root, paths) = host();
        let file = File::open("/dev/null").unwrap();
        let number = file.as_raw_fd() as u32;
        // SAFETY: it is refused, and so stays this test's.
        let error = unsafe { Inherited::device(&paths, number) }.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("is /dev/null, not a VFIO device's"),
            "{error}"
        );
        assert!(file.metadata().is_ok());
        // SAFETY: nothing is open by that number.
        let error = unsafe { Inherited::iommufd(&paths, 1_000_000) }.unwrap_err();
        assert!(error.to_string().contains("is not open"), "{error}");
    }
}
