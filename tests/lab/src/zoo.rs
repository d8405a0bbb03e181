//! The zoo: the emulated host's PCI devices, each behind a root port of its own unless it is a conventional one.

use std::path::Path;

/// One device of the emulated host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What QMP and [`Host::address`](crate::Host::address) know it by.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Its function number, where it shares a host device with the one before it; else 0.
    pub function: u8,
}

/// What a device is, and what is particular to it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// An NVMe drive: MSI-X with its table inside a 64-bit BAR, and function-level reset.
    Nvme {
        /// The serial number that the drive reports.
        serial: String,
        /// The drive's capacity.
        size_mib: u64,
    },
    /// Intel 82574L: MSI-X, MSI, an expansion ROM and an I/O BAR.
    E1000e,
    /// Intel 82576, the one with SR-IOV.
    Igb,
    /// Intel 82540EM behind the PCI bridge: INTx only, no function-level reset.
    E1000,
    /// Realtek 8139 behind the PCI bridge: INTx only, no function-level reset.
    Rtl8139,
    /// QEMU's teaching device: MSI only, a DMA engine and a factorial unit.
    Edu,
    /// A memory-backed device with one large 64-bit prefetchable BAR and no interrupt.
    IvshmemPlain {
        /// The BAR's size.
        size_mib: u64,
    },
    /// A USB 3 controller.
    Xhci,
    /// A sound controller.
    Hda,
}

impl Device {
    fn new(id: &str, kind: Kind) -> Self {
        Self {
            id: id.to_owned(),
            kind,
            function: 0,
        }
    }

    /// Makes it function `number` of the device that the one before it is function 0 of.
    pub fn function(mut self, number: u8) -> Self {
        self.function = number;
        self
    }

    /// An NVMe drive whose serial number is its id in upper case.
    pub fn nvme(id: &str, size_mib: u64) -> Self {
        Self::new(
            id,
            Kind::Nvme {
                serial: id.to_uppercase(),
                size_mib,
            },
        )
    }

    /// An `e1000e` on a network of its own, whose router is the outer machine: see [`GATEWAY`].
    pub fn e1000e(id: &str) -> Self {
        Self::new(id, Kind::E1000e)
    }

    /// An `igb` on a network of its own.
    pub fn igb(id: &str) -> Self {
        Self::new(id, Kind::Igb)
    }

    /// An `e1000` on a network of its own, on the conventional bus.
    pub fn e1000(id: &str) -> Self {
        Self::new(id, Kind::E1000)
    }

    /// An `rtl8139` on a network of its own, on the conventional bus.
    pub fn rtl8139(id: &str) -> Self {
        Self::new(id, Kind::Rtl8139)
    }

    /// An `edu`.
    pub fn edu(id: &str) -> Self {
        Self::new(id, Kind::Edu)
    }

    /// An `ivshmem-plain` with a BAR of this size.
    pub fn ivshmem(id: &str, size_mib: u64) -> Self {
        Self::new(id, Kind::IvshmemPlain { size_mib })
    }

    /// A USB controller.
    pub fn xhci(id: &str) -> Self {
        Self::new(id, Kind::Xhci)
    }

    /// A sound controller.
    pub fn hda(id: &str) -> Self {
        Self::new(id, Kind::Hda)
    }

    /// The device that a command line means: `nvme`, `nvme:SIZE_MIB`, `e1000e`, `igb`, `e1000`, `rtl8139`, `edu`,
    /// `ivshmem:SIZE_MIB`, `xhci` or `hda`.
    pub fn parse(id: &str, text: &str) -> Result<Self, String> {
        let (name, size) = match text.split_once(':') {
            None => (text, None),
            Some((name, size)) => {
                let size: u64 = size
                    .parse()
                    .map_err(|_| format!("{size:?} is no size in MiB"))?;
                (name, Some(size))
            }
        };
        Ok(match (name, size) {
            ("nvme", size) => Self::nvme(id, size.unwrap_or(1024)),
            ("ivshmem", size) => Self::ivshmem(id, size.unwrap_or(1024)),
            (_, Some(_)) => return Err(format!("{name} has no size")),
            ("e1000e", _) => Self::e1000e(id),
            ("igb", _) => Self::igb(id),
            ("e1000", _) => Self::e1000(id),
            ("rtl8139", _) => Self::rtl8139(id),
            ("edu", _) => Self::edu(id),
            ("xhci", _) => Self::xhci(id),
            ("hda", _) => Self::hda(id),
            _ => return Err(format!("the zoo has no {name:?}")),
        })
    }

    fn is_conventional(&self) -> bool {
        matches!(self.kind, Kind::E1000 | Kind::Rtl8139)
    }

    /// The file behind the device, to be made in the host's scratch folder, with its size in bytes.
    pub(crate) fn backing(&self) -> Option<(String, u64)> {
        match self.kind {
            Kind::Nvme { size_mib, .. } => Some((format!("{}.img", self.id), size_mib << 20)),
            _ => None,
        }
    }

    fn arguments(&self, bus: &str, scratch: &Path) -> Vec<String> {
        let id = &self.id;
        let nic = |model: &str| {
            vec![
                "-netdev".to_owned(),
                format!("user,id={id}-net"),
                "-device".to_owned(),
                format!("{model},id={id},netdev={id}-net,bus={bus}"),
            ]
        };
        let plain = |model: &str| vec!["-device".to_owned(), format!("{model},id={id},bus={bus}")];
        match &self.kind {
            Kind::Nvme { serial, .. } => vec![
                "-drive".to_owned(),
                format!(
                    "file={}/{id}.img,format=raw,if=none,id={id}-drive",
                    scratch.display()
                ),
                "-device".to_owned(),
                format!("nvme,id={id},drive={id}-drive,serial={serial},bus={bus}"),
            ],
            Kind::E1000e => nic("e1000e"),
            Kind::Igb => nic("igb"),
            Kind::E1000 => nic("e1000"),
            Kind::Rtl8139 => nic("rtl8139"),
            Kind::Edu => plain("edu"),
            Kind::IvshmemPlain { size_mib } => vec![
                "-object".to_owned(),
                format!("memory-backend-memfd,id={id}-memory,size={size_mib}M,share=on"),
                "-device".to_owned(),
                format!("ivshmem-plain,id={id},memdev={id}-memory,bus={bus}"),
            ],
            Kind::Xhci => plain("qemu-xhci"),
            Kind::Hda => plain("intel-hda"),
        }
    }
}

/// The address by which whoever is on an emulated NIC's network reaches a server on the outer machine's 127.0.0.1.
pub const GATEWAY: &str = "10.0.2.2";

/// The command line's part for the whole zoo.
pub(crate) fn arguments(devices: &[Device], scratch: &Path) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut port = 0;
    let mut root_port = |arguments: &mut Vec<String>| {
        port += 1;
        arguments.push("-device".to_owned());
        arguments.push(format!(
            "pcie-root-port,id=port{port},slot={port},chassis={port}"
        ));
        format!("port{port}")
    };
    if devices.iter().any(Device::is_conventional) {
        let bus = root_port(&mut arguments);
        arguments.push("-device".to_owned());
        arguments.push(format!("pcie-pci-bridge,id=conventional,bus={bus}"));
    }
    let mut bus = String::new();
    for (index, device) in devices.iter().enumerate() {
        let mut place = String::new();
        if device.function > 0 {
            place = format!(",addr=0.{}", device.function);
        } else {
            bus = match device.is_conventional() {
                true => "conventional".to_owned(),
                false => root_port(&mut arguments),
            };
            let next = devices.get(index + 1);
            if next.is_some_and(|next| next.function > 0) {
                place = ",multifunction=on,addr=0.0".to_owned();
            }
        }
        arguments.extend(device.arguments(&format!("{bus}{place}"), scratch));
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conventional_devices_share_one_bridge() {
        let zoo = [
            Device::e1000("a"),
            Device::nvme("b", 8),
            Device::rtl8139("c"),
        ];
        let arguments = arguments(&zoo, Path::new("/tmp"));
        assert_eq!(
            arguments
                .iter()
                .filter(|each| each.starts_with("pcie-pci-bridge"))
                .count(),
            1
        );
        assert_eq!(
            arguments
                .iter()
                .filter(|each| each.starts_with("pcie-root-port"))
                .count(),
            2
        );
        assert_eq!(
            arguments
                .iter()
                .filter(|each| each.ends_with("bus=conventional"))
                .count(),
            2
        );
    }

    #[test]
    fn functions_of_one_device_share_its_port() {
        let zoo = [
            Device::nvme("a", 8),
            Device::e1000e("b").function(1),
            Device::edu("c"),
        ];
        let arguments = arguments(&zoo, Path::new("/tmp")).join(" ");
        assert!(arguments.contains("serial=A,bus=port1,multifunction=on,addr=0.0"));
        assert!(arguments.contains("netdev=b-net,bus=port1,addr=0.1"));
        assert!(arguments.ends_with("edu,id=c,bus=port2"));
    }

    #[test]
    fn a_size_is_refused_where_it_means_nothing() {
        assert!(Device::parse("a", "edu:4").is_err());
        assert_eq!(
            Device::parse("a", "nvme:64").unwrap(),
            Device::nvme("a", 64)
        );
    }
}
