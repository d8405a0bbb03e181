//! Which host devices a VM is given, found before any of them is opened: by address or by a descriptor
//! that Busway inherited, and what each lets nothing be mapped at.

use std::fs::File;

use busway_iommu::{IommufdMode, SysRoot, reserved_ranges};
use busway_pci::Reserve;
use busway_vfio::{AssignOptions, Inherited, RomChoice, RomImage, interface};

use super::placement::{Behind, HostIdentity, behind_ports, on_root_bus};
use crate::config::{Choice, ConsoleConfig, DeviceConfig, VmConfig, validate_functions};
use crate::machine::RunError;
use crate::machine::address_plan::PlannedFunction;
use crate::machine::definition::Definition;
use crate::machine::handed::{Files, iommufd, received};
use crate::machine::seats::LOW_SLOTS;

/// A host device that the guest is to have.
#[derive(Debug)]
pub(in crate::machine) struct Request {
    /// What was said of it, with its path where a descriptor said which it is.
    pub(super) config: DeviceConfig,
    pub(super) options: AssignOptions,
    pub(super) identity: HostIdentity,
    /// The descriptor to use, where one was inherited.
    pub(super) inherited: Option<Inherited>,
    /// It sits on bus 0 by itself at the guest's start.
    pub(super) on_root_bus: bool,
}

/// Host devices that were asked for together, and the way to them.
#[derive(Debug)]
pub(in crate::machine) struct Found {
    pub(super) paths: SysRoot,
    pub(super) requests: Vec<Request>,
    /// What was asked for.
    pub(super) asked: IommufdMode,
    /// The same, but for what the inherited descriptors need.
    pub(super) mode: IommufdMode,
    /// The iommufd that was inherited.
    pub(super) iommufd: Option<File>,
}

/// Which of the kernel's interfaces was asked for.
pub(super) fn mode(asked: Choice) -> IommufdMode {
    match asked {
        Choice::On => IommufdMode::On,
        Choice::Off => IommufdMode::Off,
        Choice::Auto => IommufdMode::Auto,
    }
}

/// What was said about a device.
///
/// # Errors
/// [`RunError::Rom`]
pub(in crate::machine) fn options(config: &DeviceConfig) -> Result<AssignOptions, RunError> {
    let rom = match (&config.romfile, config.rom) {
        (Some(path), _) => RomChoice::Image(RomImage::load(path)?),
        (None, Some(true)) => RomChoice::Device,
        (None, Some(false)) => RomChoice::None,
        (None, None) => RomChoice::Auto,
    };
    Ok(AssignOptions {
        rom,
        nv_gpudirect_clique: config.x_nv_gpudirect_clique,
    })
}

/// How many slots of bus 0 of a segment a machine's own devices leave to others at its start: slot 0 is the host bridge's,
/// and there are the disks and NICs, and in segment 0 the entropy source, and the console where there is one.
fn low_slots(config: &VmConfig, segment: u16) -> usize {
    let virtio = config.virtio();
    let here = virtio.filter(|(_, device)| device.place().segment == segment);
    let fixed = match segment {
        0 => usize::from(config.console != ConsoleConfig::Off) + 1,
        _ => 0,
    };
    usize::from(LOW_SLOTS).saturating_sub(here.count() + fixed + 1)
}

/// Functions of one host device are together in the guest, so that the same has to be said of their places.
fn check_places(requests: &[Request]) -> Result<(), RunError> {
    for behind in behind_ports(requests.iter().map(|one| &one.identity)) {
        let one = |behind: &Behind| requests.get(behind.index);
        let mut places: Vec<_> = behind.iter().filter_map(one).collect();
        let names: Vec<_> = places.iter().map(|one| one.identity.name()).collect();
        places.dedup_by_key(|one| one.config.place());
        if places.len() > 1 {
            return Err(RunError::SplitDevice(names.join(" and ")));
        }
    }
    Ok(())
}

impl Found {
    /// Takes over the descriptors that the configuration names, or that were handed over for it, and finds every
    /// device; `options` come in the order of the devices.
    ///
    /// # Errors
    /// [`RunError::Inherited`], or [`RunError::Config`] where two are one device
    pub(in crate::machine) fn find(
        definition: &Definition,
        options: Vec<AssignOptions>,
    ) -> Result<Self, RunError> {
        let paths = SysRoot::default();
        let config = &definition.config;
        let mut requests = Vec::new();
        for (device, options) in config.device.iter().zip(options) {
            let handed = definition.unused.take(&device.id());
            let (folder, inherited) = match device.fd {
                _ if handed.is_some() => {
                    let inherited = received(&paths, &handed.unwrap_or_default())?;
                    (device.path.clone(), Some(inherited))
                }
                Some(fd) => {
                    // SAFETY: `VmConfig::validate` lets each descriptor be named once, and what is
                    // one of VFIO's is not this process's own: it opens those later, by `Opener`.
                    let inherited = unsafe { Inherited::device(&paths, fd) }?;
                    (inherited.folder(&paths, &device.path)?, Some(inherited))
                }
                None => (device.path.clone(), None),
            };
            requests.push(Request {
                identity: HostIdentity::in_folder(&folder),
                config: DeviceConfig {
                    path: folder,
                    ..device.clone()
                },
                options,
                inherited,
                on_root_bus: false,
            });
        }
        check_places(&requests)?;
        let wanted = requests.iter().map(|one| {
            let wanted = config.platform.has_on_root_bus(&one.config);
            let segment = wanted.then_some(one.config.pci_segment);
            (&one.identity, segment)
        });
        let on_root_bus = on_root_bus(wanted, |segment| low_slots(config, segment));
        for (one, on_root_bus) in requests.iter_mut().zip(on_root_bus) {
            one.on_root_bus = on_root_bus;
        }
        // SAFETY: as above; an iommufd is opened later, by `Space`.
        let take = |fd| unsafe { Inherited::iommufd(&paths, fd) };
        let iommufd = match definition.iommufd.is_empty() {
            true => config.platform.iommufd_fd.map(take).transpose()?,
            false => Some(iommufd(&paths, &definition.iommufd)?),
        };
        let asked = mode(config.platform.iommufd);
        let inherited = requests.iter().filter_map(|one| one.inherited.as_ref());
        let mode = interface(asked, iommufd.is_some(), inherited)?;
        let configs: Vec<_> = requests.iter().map(|one| one.config.clone()).collect();
        validate_functions(&configs)?;
        Ok(Self {
            paths,
            requests,
            asked,
            mode,
            iommufd,
        })
    }

    /// Finds devices for a machine that runs; `files` may have been handed over for the first of them. An `iommufd`
    /// that is open already is used in the place of the host's node.
    ///
    /// # Errors
    /// [`RunError::Rom`], [`RunError::Inherited`], or [`RunError::Config`] where two are one device
    pub(super) fn find_more(
        paths: SysRoot,
        configs: &[DeviceConfig],
        files: &Files,
        asked: Choice,
        iommufd: Option<File>,
    ) -> Result<Self, RunError> {
        validate_functions(configs)?;
        let mut inherited = match files.is_empty() {
            true => None,
            false => Some(received(&paths, files)?),
        };
        let asked = mode(asked);
        let mode = interface(asked, iommufd.is_some(), inherited.iter())?;
        let requests = configs.iter().map(|config| {
            Ok(Request {
                config: config.clone(),
                options: options(config)?,
                identity: HostIdentity::in_folder(&config.path),
                inherited: inherited.take(),
                // Its seat is found already.
                on_root_bus: false,
            })
        });
        let requests: Vec<_> = requests.collect::<Result<_, RunError>>()?;
        check_places(&requests)?;
        Ok(Self {
            requests,
            paths,
            asked,
            mode,
            iommufd,
        })
    }

    /// What sysfs says of each device's BARs; `reserve` is room for those of which it says nothing.
    pub(in crate::machine) fn planned(&self, reserve: Reserve) -> Vec<PlannedFunction> {
        let requests = self.requests.iter();
        requests
            .map(|one| {
                let planned = PlannedFunction::new(&one.identity, &one.options, reserve);
                let planned = planned.on_root_bus(one.on_root_bus);
                planned.in_segment(one.config.pci_segment)
            })
            .collect()
    }

    /// The addresses, first and last, where these devices let no memory be.
    pub(in crate::machine) fn reserved(&self) -> Vec<(u64, u64)> {
        let folders = self.requests.iter().map(|one| &*one.identity.folder);
        reserved_ranges(&self.paths, &folders.collect::<Vec<_>>())
            .into_iter()
            .map(|range| (range.start, range.last))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;

    #[test]
    fn a_machines_own_devices_leave_the_other_slots_of_bus_0() {
        let segment_1 = DiskConfig {
            pci_segment: 1,
            ..DiskConfig::new("a")
        };
        let with = |disks: usize, console| {
            let mut config = VmConfig {
                disk: vec![DiskConfig::new("a"); disks],
                console,
                ..VmConfig::default()
            };
            config.disk.push(segment_1.clone());
            assert_eq!(low_slots(&config, 1), 14);
            low_slots(&config, 0)
        };
        // The host bridge and the entropy source.
        assert_eq!(with(0, ConsoleConfig::Off), 14);
        assert_eq!(with(3, ConsoleConfig::Null), 10);
        assert_eq!(with(40, ConsoleConfig::Off), 0);
    }
}
