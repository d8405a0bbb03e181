//! Where in the guest a device is to be: `pci_segment=` and `pci_device_id=`.

use busway_pci::{Device, Segment};

use super::validate::Name;
use super::{DeviceConfig, InvalidConfig, VirtioConfig, VmConfig};

/// The most PCI segments that a VM can have. Each has objects of its own in the ACPI tables, for which there are 64 KiB.
pub const MAX_SEGMENTS: u16 = 16;

/// A place on bus 0 of a segment: of a device, or of the root port that it is behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciPlace {
    /// The segment.
    pub segment: u16,
    /// The device number; any that is free where absent.
    pub device: Option<u8>,
}

impl PciPlace {
    /// The segment, as addresses have it.
    #[must_use]
    pub fn segment(self) -> Segment {
        Segment(self.segment.into())
    }

    /// The device number, as addresses have it.
    #[must_use]
    pub fn device(self) -> Option<Device> {
        self.device.and_then(Device::new)
    }

    /// Whether a VM with so many `segments` can have the place.
    ///
    /// # Errors
    /// [`InvalidPlace`]
    pub fn check(self, segments: u16) -> Result<(), InvalidPlace> {
        let Self { segment, device } = self;
        if segment >= segments {
            return Err(InvalidPlace::Segment { segment, segments });
        }
        match device {
            Some(device) if !(1..Device::COUNT).contains(&device) => {
                Err(InvalidPlace::Device { device })
            }
            _ => Ok(()),
        }
    }
}

/// A place that a device cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPlace {
    /// the VM does not have so many segments
    #[error(
        "pci_segment={segment}: the VM has {segments}, numbered from 0; start it with more (--platform \
         num_pci_segments=N), or leave pci_segment out"
    )]
    Segment {
        /// The segment.
        segment: u16,
        /// How many there are.
        segments: u16,
    },
    /// there is no such device number for devices
    #[error("pci_device_id={device}: it is from 1 to 31; 0 is the host bridge's")]
    Device {
        /// The device number.
        device: u8,
    },
}

impl VirtioConfig {
    /// Where it is to be.
    #[must_use]
    pub const fn place(&self) -> PciPlace {
        let (segment, device) = match self {
            Self::Disk(disk) => (disk.pci_segment, disk.pci_device_id),
            Self::Net(net) => (net.pci_segment, net.pci_device_id),
            Self::Fs(fs) => (fs.pci_segment, fs.pci_device_id),
            Self::Pmem(pmem) => (pmem.pci_segment, pmem.pci_device_id),
            Self::Generic(generic) => (generic.pci_segment, generic.pci_device_id),
            Self::Vsock(vsock) => (vsock.pci_segment, vsock.pci_device_id),
        };
        PciPlace { segment, device }
    }

    /// The flag that makes one.
    pub(super) const fn flag(&self) -> &'static str {
        match self {
            Self::Disk(_) => "--disk",
            Self::Net(_) => "--net",
            Self::Fs(_) => "--fs",
            Self::Vsock(_) => "--vsock",
            Self::Pmem(_) => "--pmem",
            Self::Generic(_) => "--generic-vhost-user",
        }
    }
}

impl DeviceConfig {
    /// Where it, or the root port that it is behind, is to be.
    #[must_use]
    pub const fn place(&self) -> PciPlace {
        PciPlace {
            segment: self.pci_segment,
            device: self.pci_device_id,
        }
    }
}

impl VmConfig {
    /// The places of all devices that can have one said, each with the device's name and what shares it: functions of one
    /// host device are behind one port.
    fn places(&self) -> impl Iterator<Item = (Name, PciPlace, Option<String>)> {
        let virtio = self.virtio().map(|(index, device)| {
            let id = device.id().map(str::to_owned);
            let name = Name::new(device.flag(), index, id.as_ref());
            (name, device.place(), None)
        });
        let devices = self.device.iter().enumerate().map(|(index, device)| {
            let name = Name::new("--device", index, device.id.as_ref());
            let host = device.host_name().ok().map(|host| host.to_string());
            let host = host.and_then(|host| Some(host.rsplit_once('.')?.0.to_owned()));
            (name, device.place(), host)
        });
        virtio.chain(devices)
    }

    /// Each segment that is spoken of is there, and no two devices are to be at one place.
    pub(super) fn validate_places(&self) -> Result<(), InvalidConfig> {
        let segments = self.platform.segments();
        if !(1..=MAX_SEGMENTS).contains(&segments) {
            return Err(InvalidConfig::Segments { segments });
        }
        if segments > 1 && self.firmware.is_some() {
            return Err(InvalidConfig::FirmwareSegments { segments });
        }
        let mut taken: Vec<(Name, PciPlace, Option<String>)> = Vec::new();
        for (device, place, host) in self.places() {
            if let Err(why) = place.check(segments) {
                return Err(InvalidConfig::Place { device, why });
            }
            if place.device.is_none() {
                continue;
            }
            let clash = taken
                .iter()
                .find(|(_, other, of)| *other == place && (of.is_none() || *of != host));
            if let Some((first, ..)) = clash {
                return Err(InvalidConfig::Twice {
                    first: first.clone(),
                    second: device,
                    what: "pci_device_id",
                    value: place.device.unwrap_or_default().to_string(),
                    remedy: "give each a number of its own in its segment, or none",
                });
            }
            taken.push((device, place, host));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, FirmwareConfig, NetConfig};

    fn config(segments: u16) -> VmConfig {
        let mut config = VmConfig::default();
        config.platform.num_pci_segments = Some(segments);
        config
    }

    fn disk(pci_segment: u16, pci_device_id: Option<u8>) -> DiskConfig {
        DiskConfig {
            pci_segment,
            pci_device_id,
            ..DiskConfig::new(format!("{pci_segment}-{pci_device_id:?}"))
        }
    }

    fn why(config: &VmConfig) -> String {
        config.validate_places().unwrap_err().to_string()
    }

    #[test]
    fn segments_are_counted_and_each_that_is_named_is_there() {
        for segments in [1, 2, 16] {
            config(segments).validate_places().unwrap();
        }
        for segments in [0, 17, 96] {
            assert!(why(&config(segments)).contains("1 to 16"));
        }
        let mut two = config(2);
        two.disk = vec![disk(0, None), disk(1, None)];
        two.validate_places().unwrap();
        two.disk.push(disk(2, None));
        let why = why(&two);
        assert!(
            why.contains("--disk no. 3") && why.contains("num_pci_segments=N"),
            "{why}"
        );
    }

    #[test]
    fn no_two_devices_are_to_be_at_one_place_but_functions_of_one() {
        let mut two = config(2);
        two.disk = vec![disk(0, Some(5)), disk(1, Some(5))];
        two.validate_places().unwrap();
        two.net = vec![NetConfig {
            pci_segment: 1,
            pci_device_id: Some(5),
            ..NetConfig::default()
        }];
        let said = why(&two);
        assert!(
            said.contains("--disk no. 2") && said.contains("--net"),
            "{said}"
        );
        two.net.clear();
        for (function, fits) in [("01:00.0", true), ("01:00.1", true), ("02:00.0", false)] {
            two.device.push(DeviceConfig {
                pci_device_id: Some(16),
                ..DeviceConfig::new(function).unwrap()
            });
            assert_eq!(two.validate_places().is_ok(), fits, "{function}");
        }
        for number in [0, 32, 255] {
            let mut one = config(1);
            one.disk = vec![disk(0, Some(number))];
            assert!(why(&one).contains("from 1 to 31"));
        }
    }

    #[test]
    fn firmware_has_one_segment() {
        let mut one = config(1);
        one.firmware = Some(FirmwareConfig::default());
        one.validate_places().unwrap();
        one.platform.num_pci_segments = Some(2);
        let said = why(&one);
        assert!(
            said.contains("--kernel") && said.contains("num_pci_segments"),
            "{said}"
        );
    }
}
