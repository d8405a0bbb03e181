//! The zoo: the emulated host's PCI devices, each behind a root port of its own unless it is a conventional one.

use std::collections::BTreeMap;
use std::path::Path;

/// One device of the emulated host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// What QMP and [`Host::address`](crate::Host::address) know it by.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// The device, by its id, whose further function it is: behind the same root port, in the same group.
    pub beside: Option<String>,
    /// The host's NUMA node whose root bus it is on; the first root bus, which is of none, where absent.
    pub node: Option<u32>,
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
    /// A frame buffer in one large 32-bit BAR, with no interrupt.
    Display {
        /// The BAR's size, 256 at most.
        size_mib: u64,
    },
    /// The same as [`IvshmemPlain`](Self::IvshmemPlain) with a small BAR and MSI-X, but no DMA. It is its own and only peer.
    IvshmemDoorbell {
        /// How many vectors it has.
        vectors: u16,
    },
    /// A USB 3 controller with a disk.
    Xhci,
    /// A sound controller with a codec, whose output the outer machine finds in a file.
    Hda,
    /// A virtio source of random numbers: the one device here that signals the errors which it is made to have, for
    /// QEMU's NICs have AER and no enable for it.
    Rng,
}

impl Device {
    fn new(id: &str, kind: Kind) -> Self {
        Self {
            id: id.to_owned(),
            kind,
            beside: None,
            node: None,
        }
    }

    /// Puts it on the root bus of one of the host's NUMA nodes, which has room for one device.
    pub fn on_node(mut self, node: u32) -> Self {
        self.node = Some(node);
        self
    }

    /// Makes it a further function of another device, named by its id, which has to come before it.
    pub fn beside(mut self, first: &str) -> Self {
        self.beside = Some(first.to_owned());
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

    /// A `bochs-display` with a BAR of this size.
    pub fn display(id: &str, size_mib: u64) -> Self {
        Self::new(id, Kind::Display { size_mib })
    }

    /// An `ivshmem-doorbell` with so many vectors.
    pub fn doorbell(id: &str, vectors: u16) -> Self {
        Self::new(id, Kind::IvshmemDoorbell { vectors })
    }

    /// A USB controller with a disk of [`USB_DISK_MIB`].
    pub fn xhci(id: &str) -> Self {
        Self::new(id, Kind::Xhci)
    }

    /// A sound controller.
    pub fn hda(id: &str) -> Self {
        Self::new(id, Kind::Hda)
    }

    /// A source of random numbers, with AER.
    pub fn rng(id: &str) -> Self {
        Self::new(id, Kind::Rng)
    }

    /// The device that a command line means: `nvme`, `nvme:SIZE_MIB`, `e1000e`, `igb`, `e1000`, `rtl8139`, `edu`,
    /// `ivshmem:SIZE_MIB`, `display:SIZE_MIB`, `doorbell`, `xhci`, `hda` or `rng`.
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
            ("display", size) => Self::display(id, size.unwrap_or(16)),
            (_, Some(_)) => return Err(format!("{name} has no size")),
            ("e1000e", _) => Self::e1000e(id),
            ("igb", _) => Self::igb(id),
            ("e1000", _) => Self::e1000(id),
            ("rtl8139", _) => Self::rtl8139(id),
            ("edu", _) => Self::edu(id),
            ("doorbell", _) => Self::doorbell(id, 4),
            ("xhci", _) => Self::xhci(id),
            ("hda", _) => Self::hda(id),
            ("rng", _) => Self::rng(id),
            _ => return Err(format!("the zoo has no {name:?}")),
        })
    }

    fn is_conventional(&self) -> bool {
        matches!(self.kind, Kind::E1000 | Kind::Rtl8139)
    }

    /// The file behind the device, to be made in the host's scratch folder, with its size in bytes.
    pub(crate) fn backing(&self) -> Option<(String, u64)> {
        let size_mib = match self.kind {
            Kind::Nvme { size_mib, .. } => size_mib,
            // A larger one is not to be written to a disk.
            Kind::IvshmemPlain { size_mib } if size_mib <= 256 => size_mib,
            Kind::IvshmemDoorbell { .. } => DOORBELL_MIB,
            Kind::Xhci => USB_DISK_MIB,
            _ => return None,
        };
        Some((format!("{}.img", self.id), size_mib << 20))
    }

    /// Whether it has to be there when the host boots: a sound controller's bus takes no codec later, and the window
    /// below 4 GiB of a port where something may be plugged later is small.
    fn is_fixed(&self) -> bool {
        matches!(self.kind, Kind::Hda | Kind::Display { .. })
    }

    /// `place` is the bus, and the function's address there if it is one of several.
    fn plan(&self, place: &str, scratch: &Path) -> Plan {
        let id = &self.id;
        let scratch = scratch.display();
        let plan = |backend: Option<(&str, String)>, devices: Vec<String>| Plan {
            words: backend
                .into_iter()
                .flat_map(|(name, value)| [name.to_owned(), value])
                .collect(),
            devices,
        };
        let nic = |model: &str| {
            let device = format!("{model},id={id},netdev={id}-net,{place}");
            let network =
                format!("user,id={id}-net,tftp={scratch}/share/{NETBOOT},bootfile={BOOT_FILE}");
            plan(Some(("-netdev", network)), vec![device])
        };
        let drive = || {
            let file = format!("file={scratch}/{id}.img,format=raw,if=none,id={id}-drive");
            Some(("-drive", file))
        };
        match &self.kind {
            Kind::Nvme { serial, .. } => plan(
                drive(),
                vec![format!(
                    "nvme,id={id},drive={id}-drive,serial={serial},{place}"
                )],
            ),
            Kind::E1000e => nic("e1000e"),
            Kind::Igb => nic("igb"),
            Kind::E1000 => nic("e1000"),
            Kind::Rtl8139 => nic("rtl8139"),
            // Its own DMA engine reaches 28 bits, which no guest's memory has to be within.
            Kind::Edu => plan(
                None,
                vec![format!("edu,id={id},dma_mask={},{place}", u64::MAX)],
            ),
            Kind::IvshmemPlain { size_mib } => {
                let memory = match self.backing() {
                    Some((file, _)) => format!(
                        "memory-backend-file,id={id}-memory,mem-path={scratch}/{file},\
                         size={size_mib}M,share=on"
                    ),
                    None => {
                        format!("memory-backend-memfd,id={id}-memory,size={size_mib}M,share=on")
                    }
                };
                let device = format!("ivshmem-plain,id={id},memdev={id}-memory,{place}");
                plan(Some(("-object", memory)), vec![device])
            }
            Kind::Display { size_mib } => plan(
                None,
                vec![format!("bochs-display,id={id},vgamem={size_mib}M,{place}")],
            ),
            // The server's end of the line is `Host`'s.
            Kind::IvshmemDoorbell { vectors } => plan(
                None,
                vec![format!(
                    "ivshmem-doorbell,id={id},chardev={id}-server,vectors={vectors},{place}"
                )],
            ),
            Kind::Xhci => plan(
                drive(),
                vec![
                    format!("qemu-xhci,id={id},{place}"),
                    format!("usb-storage,drive={id}-drive,bus={id}.0,serial={id}"),
                ],
            ),
            Kind::Rng => plan(
                None,
                vec![format!(
                    "virtio-rng-pci,id={id},disable-legacy=on,iommu_platform=on,aer=on,{place}"
                )],
            ),
            // Without a mixer there is nothing that a driver would mute.
            Kind::Hda => plan(
                Some((
                    "-audiodev",
                    format!("wav,id={id}-audio,path={scratch}/{id}.wav"),
                )),
                vec![
                    format!("intel-hda,id={id},{place}"),
                    format!("hda-output,bus={id}.0,audiodev={id}-audio,mixer=off"),
                ],
            ),
        }
    }
}

/// What stands for devices: words of the command line for what is behind them, and the devices themselves, each as
/// `-device` and the monitor's `device_add` take it, in the order in which they are plugged.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) words: Vec<String>,
    pub(crate) devices: Vec<String>,
}

impl Plan {
    fn add(&mut self, other: Self) {
        self.words.extend(other.words);
        self.devices.extend(other.devices);
    }
}

/// The size of a USB disk.
pub const USB_DISK_MIB: u64 = 16;
/// The size of the memory that an `ivshmem-doorbell` has beside its vectors.
const DOORBELL_MIB: u64 = 1;

/// The folder below `/lab` of the host's that the router of each NIC's network serves by TFTP, and the file that it names to
/// who asks for one to boot.
pub const NETBOOT: &str = "netboot";
/// See [`NETBOOT`].
pub const BOOT_FILE: &str = "boot.efi";

/// The address by which whoever is on an emulated NIC's network reaches a server on the outer machine's 127.0.0.1.
pub const GATEWAY: &str = "10.0.2.2";

/// Each device that is the first of its slot, with the number of its root port. Conventional ones share the bridge behind
/// the first port, which every host has, so that hosts differ in less before their devices are plugged.
fn places(devices: &[Device]) -> impl Iterator<Item = (Option<usize>, &Device)> {
    let mut last = 1;
    let first = devices.iter().filter(|device| device.beside.is_none());
    first.map(move |device| {
        if device.is_conventional() || device.node.is_some() {
            return (None, device);
        }
        last += 1;
        (Some(last), device)
    })
}

/// The root ports, by number, whose window has to be larger than the firmware makes it, and its size in MiB.
pub(crate) fn large_windows(devices: &[Device]) -> BTreeMap<usize, u64> {
    /// What SeaBIOS reserves for a port of which it does not know what will be plugged there.
    const USUAL_MIB: u64 = 512;
    places(devices)
        .filter_map(|(port, device)| match device.kind {
            Kind::IvshmemPlain { size_mib } if size_mib > USUAL_MIB => Some((port?, size_mib)),
            _ => None,
        })
        .collect()
}

/// The plans of devices that have to be there when the host boots, and of those that can be plugged later.
pub(crate) fn plans(devices: &[Device], scratch: &Path) -> [Plan; 2] {
    let [mut fixed, mut plugged] = [Plan::default(), Plan::default()];
    let bridge = "pcie-pci-bridge,id=conventional,bus=port1".to_owned();
    fixed.devices.push(bridge);
    for (port, device) in places(devices) {
        let bus = match (device.node, port) {
            (Some(node), _) => format!("node{node}-port"),
            (None, Some(port)) => format!("port{port}"),
            (None, None) => "conventional".to_owned(),
        };
        let plan = if device.is_fixed() {
            &mut fixed
        } else {
            &mut plugged
        };
        let beside = |other: &&Device| other.beside.as_ref() == Some(&device.id);
        let more: Vec<_> = devices.iter().filter(beside).collect();
        if more.is_empty() {
            plan.add(device.plan(&format!("bus={bus}"), scratch));
            continue;
        }
        // The first function comes last, for it brings all of them to the host's notice. Each says that it is one of
        // several, without which the host's kernel puts one that is plugged into a group of its own.
        for (function, device) in (1..).zip(more) {
            let place = format!("bus={bus},multifunction=on,addr=0.{function}");
            plan.add(device.plan(&place, scratch));
        }
        // Where a function has ARI, the next one is found by its number there, which is 0 otherwise.
        let place = format!("bus={bus},multifunction=on,addr=0.0,x-pcie-ari-nextfn-1=on");
        plan.add(device.plan(&place, scratch));
    }
    [fixed, plugged]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conventional_devices_share_one_bridge_that_is_there_from_the_beginning() {
        let zoo = [
            Device::e1000("a"),
            Device::nvme("b", 8),
            Device::rtl8139("c"),
        ];
        let [fixed, plugged] = plans(&zoo, Path::new("/tmp"));
        assert_eq!(fixed.devices, ["pcie-pci-bridge,id=conventional,bus=port1"]);
        let ending = |end: &str| {
            let devices = plugged.devices.iter();
            devices.filter(|each| each.ends_with(end)).count()
        };
        assert_eq!((ending("bus=conventional"), ending("bus=port2")), (2, 1));
    }

    #[test]
    fn a_device_of_a_node_is_on_that_nodes_bus_and_takes_no_other_port() {
        let zoo = [Device::nvme("a", 8).on_node(1), Device::nvme("b", 8)];
        let [_, plugged] = plans(&zoo, Path::new("/tmp"));
        for (device, end) in plugged.devices.iter().zip(["bus=node1-port", "bus=port2"]) {
            assert!(device.ends_with(end), "{device}");
        }
    }

    #[test]
    fn further_functions_share_the_first_ones_port_and_come_before_it() {
        let zoo = [
            Device::nvme("a", 8),
            Device::edu("b").beside("a"),
            Device::edu("c"),
        ];
        let [_, plugged] = plans(&zoo, Path::new("/tmp"));
        let ends = [
            "bus=port2,multifunction=on,addr=0.1",
            "bus=port2,multifunction=on,addr=0.0,x-pcie-ari-nextfn-1=on",
            "bus=port3",
        ];
        for (device, end) in plugged.devices.iter().zip(ends) {
            assert!(device.ends_with(end), "{device}");
        }
    }

    #[test]
    fn a_large_bar_has_a_window_that_it_fits_into() {
        let zoo = [
            Device::e1000("a"),
            Device::ivshmem("b", 64),
            Device::ivshmem("c", 4096),
        ];
        assert_eq!(large_windows(&zoo), BTreeMap::from([(3, 4096)]));
    }

    #[test]
    fn a_sound_controller_with_its_codec_and_a_frame_buffer_are_there_from_the_beginning() {
        let [fixed, plugged] = plans(&[Device::hda("a")], Path::new("/tmp"));
        assert_eq!((fixed.devices.len(), plugged.devices.len()), (3, 0));
        let [fixed, plugged] = plans(&[Device::display("a", 256)], Path::new("/tmp"));
        assert_eq!((fixed.devices.len(), plugged.devices.len()), (2, 0));
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
