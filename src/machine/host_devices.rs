//! Which host devices a VM is given, found before any of them is opened: by address or by a descriptor
//! that somebody else has opened, and what each lets nothing be mapped at.

use std::fs::File;
use std::path::PathBuf;

use busway_iommu::{Mode, SysRoot, reserved_ranges};
use busway_vfio::{AssignOptions, Handed, interface};

use super::RunError;
use super::address_plan::PlannedFunction;
use super::places::HostFunction;
use crate::config::{Choice, DeviceConfig, VmConfig, validate_functions};

/// The devices, by their folders in sysfs, and the way to them.
#[derive(Debug)]
pub(super) struct HostDevices {
    pub(super) paths: SysRoot,
    /// With the descriptor to use, where one was handed over.
    pub(super) devices: Vec<(PathBuf, Option<Handed>)>,
    /// What was asked for.
    pub(super) asked: Mode,
    /// The same, but for what the descriptors that were handed over need.
    pub(super) mode: Mode,
    /// The iommufd that was handed over.
    pub(super) iommufd: Option<File>,
}

impl HostDevices {
    /// Takes over the descriptors that `config` names, and finds every device.
    ///
    /// # Errors
    /// [`RunError::Handed`], or [`RunError::Config`] where two are one device
    pub(super) fn find(config: &VmConfig) -> Result<Self, RunError> {
        let paths = SysRoot::default();
        let mut devices = Vec::new();
        for device in &config.device {
            devices.push(match device.fd {
                Some(fd) => {
                    // SAFETY: `VmConfig::validate` lets each descriptor be named once, and what is
                    // one of VFIO's is not this process's own: it opens those later, by `Opener`.
                    let handed = unsafe { Handed::device(&paths, fd) }?;
                    (handed.folder(&paths, &device.path)?, Some(handed))
                }
                None => (device.path.clone(), None),
            });
        }
        // SAFETY: as above; an iommufd is opened later, by `Space`.
        let take = |fd| unsafe { Handed::iommufd(&paths, fd) };
        let iommufd = config.platform.iommufd_fd.map(take).transpose()?;
        let asked = match config.platform.iommufd {
            Choice::On => Mode::On,
            Choice::Off => Mode::Off,
            Choice::Auto => Mode::Auto,
        };
        let handed = devices.iter().filter_map(|(_, handed)| handed.as_ref());
        let mode = interface(asked, iommufd.is_some(), handed)?;
        let found = Self {
            paths,
            devices,
            asked,
            mode,
            iommufd,
        };
        validate_functions(&found.configs(config))?;
        Ok(found)
    }

    /// What `config` says of each device, with its path where a descriptor said which it is.
    pub(super) fn configs(&self, config: &VmConfig) -> Vec<DeviceConfig> {
        let devices = config.device.iter().zip(&self.devices);
        devices
            .map(|(device, (folder, _))| DeviceConfig {
                path: folder.clone(),
                ..device.clone()
            })
            .collect()
    }

    /// What sysfs says of each device's BARs; `options` come in the same order.
    pub(super) fn planned(&self, options: &[AssignOptions]) -> Vec<PlannedFunction> {
        let devices = self.devices.iter().zip(options);
        devices
            .map(|((folder, _), options)| PlannedFunction::new(folder, options))
            .collect()
    }

    /// Where each device is on the host.
    pub(super) fn functions(&self) -> Vec<HostFunction> {
        let folders = self.devices.iter().map(|(folder, _)| folder);
        folders
            .map(|folder| HostFunction::in_folder(folder))
            .collect()
    }

    /// The addresses, first and last, where these devices let no memory be.
    pub(super) fn reserved(&self) -> Vec<(u64, u64)> {
        let folders: Vec<_> = self.devices.iter().map(|(folder, _)| &**folder).collect();
        reserved_ranges(&self.paths, &folders)
            .into_iter()
            .map(|range| (range.start, range.last))
            .collect()
    }
}
