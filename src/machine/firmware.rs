//! The board of a machine that begins with firmware: flash chips, what firmware is told, and where
//! configuration space is.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Weak};

use busway_pci::{Topology, Windows};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::RunError;
use super::address_plan::AddressPlan;
use super::assembly::processors_now;
use super::pci::Pci;
use super::virtio::VirtioDevices;
use crate::acpi;
use crate::arch::CpuModel;
use crate::arch::board::Board;
use crate::arch::boot::BootSource;
use crate::arch::debug_port::{self, DebugPort};
use crate::arch::layout;
use crate::config::{ConsoleConfig, VmConfig};
use crate::devices::cpu_hotplug::CpuHotplug;
use crate::devices::fw_cfg::{self, FwCfg};
use crate::devices::pflash::{self, Pflash};
use crate::firmware::{
    BiosItems, BoardItems, Firmware, FirmwareError, FirmwareRoots, Kernel, Window, hardware_info,
    items,
};
use crate::kvm::Buses;
use crate::memory::{GuestRam, Ram, Region, Regions};
use crate::smbios::Identity;

/// The widest addresses that OVMF uses, in bits: with pages of 1 GiB, and without.
/// EDK II OvmfPkg/Library/PlatformInitLib/MemDetect.c, `PlatformAddressWidthFromCpuid`
const WIDEST: u8 = 46;
const WIDEST_WITHOUT_LARGE_PAGES: u8 = 40;

/// What a VM that begins with firmware is started with.
#[derive(Debug)]
pub(super) struct FirmwareSource {
    pub(super) firmware: Firmware,
    kernel: Option<Kernel>,
}

impl FirmwareSource {
    /// Opens what `config` names, and `kernel` for firmware to start.
    pub(super) fn open(config: &VmConfig, kernel: Option<BootSource>) -> Result<Self, RunError> {
        let asked = config.firmware.clone().unwrap_or_default();
        let firmware = Firmware::open(&asked, &FirmwareRoots::default())?;
        log::info!("firmware {}", firmware.path.display());
        if firmware.is_bios() && kernel.is_some() {
            let path = firmware.path;
            return Err(FirmwareError::BiosKernel { path }.into());
        }
        if asked.vars.is_none() && !firmware.is_bios() {
            log::info!(
                "what the firmware's variables are set to lasts until the VM's end (vars=FILE keeps it)"
            );
        }
        let wrong = |why| FirmwareError::Kernel {
            path: config.kernel.as_deref().unwrap_or(Path::new("")).to_owned(),
            why,
        };
        let kernel = kernel
            .map(BootSource::for_firmware)
            .transpose()
            .map_err(wrong)?;
        Ok(Self { firmware, kernel })
    }
}

/// The board.
#[derive(Debug)]
pub(super) struct FirmwareBoard {
    fw_cfg: Arc<FwCfg>,
    /// None of a BIOS.
    variables: Option<Arc<Pflash>>,
    /// What of a BIOS is in RAM at power-on, and where.
    low_copy: Option<(u64, Vec<u8>)>,
    ram: GuestRam,
    /// Bytes of RAM below and above 4 GiB.
    memory: (u64, u64),
}

/// What the board is made of, and beside.
pub(super) struct Surroundings<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) plan: &'a AddressPlan,
    pub(super) model: &'a CpuModel,
    pub(super) ram: &'a Ram,
    pub(super) regions: &'a Arc<Regions>,
    pub(super) buses: &'a Buses,
    pub(super) pci: &'a Pci,
    pub(super) virtio: &'a VirtioDevices,
    /// Where BARs may be.
    pub(super) windows: &'a Windows,
    /// Which processors are there.
    pub(super) processors: &'a Arc<CpuHotplug>,
    pub(super) acpi: acpi::Hardware,
}

impl FirmwareBoard {
    /// Puts flash chips and fw_cfg onto the buses.
    pub(super) fn new(source: FirmwareSource, around: &Surroundings<'_>) -> Result<Self, RunError> {
        let FirmwareSource { firmware, kernel } = source;
        let (buses, regions) = (around.buses, around.regions);
        let failed = |what| RunError::system(what);
        let (at, code) = firmware.code();
        let code = pflash::rom(at, code).map_err(failed("memory for the firmware"))?;
        regions.add(Arc::new(Region::rom("the firmware's code", code)))?;

        let variables = match firmware.is_bios() {
            true => None,
            false => Some(chip_of_variables(&firmware, around)?),
        };
        let low_copy = firmware.low_copy();
        let low_copy = low_copy.map(|(at, bytes)| (at, bytes.to_vec()));

        let ram = around.ram.guest_ranges();
        let mut items_of_board = board_items(around, &ram, kernel);
        if firmware.is_bios() {
            tell_bios(&mut items_of_board, around);
        }
        let items = items(items_of_board)?;
        let fw_cfg = Arc::new(FwCfg::new(items, around.ram.guest().clone()));
        let ports = &buses.ports;
        ports.insert(
            "firmware configuration",
            layout::FW_CFG_PORT.into(),
            fw_cfg::SIZE.into(),
            fw_cfg.clone(),
        )?;
        let debug = Arc::new(DebugPort::default());
        ports.insert("firmware's messages", debug_port::PORT.into(), 1, debug)?;
        let bytes = |high: bool| {
            let parts = ram.iter();
            let parts = parts.filter(|part| (part.start >= layout::HIGH_RAM_START) == high);
            parts.map(|part| part.end - part.start).sum()
        };
        Ok(Self {
            fw_cfg,
            variables,
            low_copy,
            ram: around.ram.guest().clone(),
            memory: (bytes(false), bytes(true)),
        })
    }

    /// As at power-on, the variables as they were set. No vCPU may run.
    pub(super) fn power_on(&self, board: &Board) {
        self.fw_cfg.reset();
        if let Some(variables) = &self.variables {
            variables.reset();
        }
        if let Some((at, bytes)) = &self.low_copy
            && let Err(error) = self.ram.memory().write_slice(bytes, GuestAddress(*at))
        {
            log::error!("the BIOS cannot be put into RAM at {at:#x}: {error}");
        }
        let (below, above) = self.memory;
        board.rtc.tell_memory(below, above);
    }
}

/// The chip with the firmware's variables, on the bus.
fn chip_of_variables(
    firmware: &Firmware,
    around: &Surroundings<'_>,
) -> Result<Arc<Pflash>, RunError> {
    let (at, variables) = firmware.variables();
    let memory = pflash::rom(at, variables);
    let memory = memory.map_err(RunError::system("memory for the firmware's variables"))?;
    let variables = Arc::new(Pflash::new(
        memory,
        firmware.store(),
        around.regions.clone(),
    )?);
    let (start, size) = variables.place();
    let mmio = &around.buses.mmio;
    mmio.insert("the firmware's variables", start, size, variables.clone())?;
    Ok(variables)
}

/// What a BIOS is told besides.
fn tell_bios(items: &mut BoardItems, around: &Surroundings<'_>) {
    let serial = around.config.serial != ConsoleConfig::Off;
    items.bios = Some(BiosItems {
        console: serial.then_some(layout::SERIAL_PORT),
        memory_above: around.windows.memory64.first().map(|window| window.start),
    });
}

fn board_items(
    around: &Surroundings<'_>,
    ram: &[Range<u64>],
    kernel: Option<Kernel>,
) -> BoardItems {
    let ecam = {
        let mch = around.pci.mch().cloned();
        move || {
            let place = mch.as_ref().and_then(|mch| mch.ecam());
            place.unwrap_or(layout::ECAM_START..layout::ECAM_START + layout::ECAM_SIZE)
        }
    };
    let acpi = {
        let (platform, ecam) = (around.acpi.clone(), ecam.clone());
        let (windows, topology) = (
            around.windows.clone(),
            Arc::downgrade(around.pci.topology()),
        );
        let processors = around.processors.clone();
        move || {
            let mut now = tables_now(&platform, &windows, &topology, &ecam());
            processors_now(&mut now, &processors);
            now
        }
    };
    let bits = match around.model.has_large_pages() {
        true => WIDEST,
        false => WIDEST_WITHOUT_LARGE_PAGES,
    };
    let windows = around.windows.clone();
    let hardware_info = move || told(&windows, &ecam(), bits);
    let reserved = around.plan.reserved.iter();
    let reserved = reserved
        .filter(|(start, _)| *start >= layout::HIGH_RAM_START)
        .map(|(start, last)| *start..last.saturating_add(1));
    BoardItems {
        cpus: {
            let processors = around.processors.clone();
            Box::new(move || processors.processors().present.count())
        },
        most_cpus: around.config.cpus.most().into(),
        ram: ram.to_vec(),
        reserved: reserved.collect(),
        pluggable_end: around.ram.pluggable_ranges().last().map(|range| range.end),
        acpi: Arc::new(acpi),
        hardware_info: Box::new(hardware_info),
        bios: None,
        identity: Identity::of(&around.config.platform),
        kernel,
        boot_order: boot_order(around),
    }
}

/// Where builds of OVMF put configuration space that are older than edk2-stable202305, such as Debian 12's. Told of the windows
/// they give no device a place. Those that they choose themselves, from 0xC0000000 and from high up, lie within them.
const OLD_ECAM: u64 = 0xb000_0000;

/// What firmware is told of the windows: an older one nothing, by an item whose type is none,
/// `HardwareInfoTypeUndefined`. OvmfPkg/Include/Library/HardwareInfoLib.h
fn told(windows: &Windows, ecam: &Range<u64>, bits: u8) -> Vec<u8> {
    let mut item = windows_for_firmware(windows, ecam, bits);
    if ecam.start == OLD_ECAM {
        let kind = item.iter_mut().take(size_of::<u64>());
        kind.for_each(|byte| *byte = 0);
    }
    item
}

/// Where firmware finds what it is to boot from, the lowest index first.
fn boot_order(around: &Surroundings<'_>) -> Vec<String> {
    let pci = around.pci;
    let disks = around.virtio.disks().filter_map(|(name, disk)| {
        Some((disk.boot_index?, pci.boot_path(|called| called == name)))
    });
    let devices = around.config.device.iter().filter_map(|device| {
        let name = device.host_name().map(|name| name.to_string());
        let is = |called: &str| {
            let called = called.split(' ').next();
            name.as_deref().ok() == called
        };
        Some((device.boot_index?, pci.boot_path(is)))
    });
    let mut order: Vec<_> = disks.chain(devices).collect();
    order.sort();
    order.into_iter().filter_map(|(_, path)| path).collect()
}

/// The windows as firmware is told them: one below 4 GiB and one above, beside configuration space, and within the
/// addresses of `bits` that it uses.
fn windows_for_firmware(windows: &Windows, ecam: &Range<u64>, bits: u8) -> Vec<u8> {
    let beyond = 1 << bits..u64::MAX;
    let below = largest(&layout::without(&windows.memory32, ecam));
    let above = largest(&layout::without(&windows.memory64, &beyond));
    hardware_info(
        &Some(windows.io.clone()),
        &below,
        &above,
        &Some(ecam.clone()),
    )
}

fn largest(parts: &[Range<u64>]) -> Window {
    parts
        .iter()
        .max_by_key(|part| part.end - part.start)
        .cloned()
}

/// What the tables describe when firmware reads them, which has numbered the buses by then, and has put
/// configuration space where it wants it.
fn tables_now(
    platform: &acpi::Hardware,
    windows: &Windows,
    topology: &Weak<Topology>,
    ecam: &Range<u64>,
) -> acpi::Hardware {
    let functions = topology.upgrade().map(|topology| topology.functions());
    let buses = functions.into_iter().flatten().filter_map(|(_, function)| {
        let bridge = function.bridge()?;
        Some(bridge.bus_numbers().1)
    });
    let window = ecam.end - ecam.start;
    let last = u8::try_from((window >> 20).saturating_sub(1)).unwrap_or(u8::MAX);
    let highest = buses.max().unwrap_or(0);
    // Firmware has one segment.
    let root = platform.roots.first().map(|root| acpi::Root {
        last_bus: highest.max(root.last_bus).min(last),
        mmio32: layout::without(&windows.memory32, ecam),
        mmio64: windows.memory64.clone(),
        ecam: ecam.clone(),
        ..root.clone()
    });
    acpi::Hardware {
        roots: root.into_iter().collect(),
        ..platform.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use busway_pci::{BarMapper, BarRegion, HostBridge, PciFunction, Place, Segment};

    use super::super::bus::EcamPlace;
    use crate::arch::q35::EcamListener;

    use super::*;

    /// Where OVMF of 2025 puts configuration space, and that of 2022.
    const PLACES: [Range<u64>; 2] = [0xe000_0000..0xf000_0000, 0xb000_0000..0xc000_0000];

    struct Nowhere;

    impl BarMapper for Nowhere {
        fn map(&self, _: Segment, _: &Arc<dyn PciFunction>, _: &BarRegion) -> io::Result<()> {
            Ok(())
        }

        fn unmap(&self, _: &Arc<dyn PciFunction>, _: &BarRegion) {}
    }

    fn windows() -> Windows {
        Windows {
            io: layout::PCI_IO,
            memory32: layout::firmware_mmio32(0x8000_0000, &[]),
            memory64: vec![1 << 32..1012 << 30, 1 << 40..1 << 48],
        }
    }

    fn topology() -> Arc<Topology> {
        let topology = Topology::new(Arc::new(Nowhere));
        let root = Place::root(busway_pci::Device::default());
        topology.add(root, Arc::new(HostBridge::new())).unwrap();
        Arc::new(topology)
    }

    fn pair(info: &[u8], window: usize) -> (u64, u64) {
        let number = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap());
        let at = 16 + 24 + 16 * window;
        (number(at), number(at + 8))
    }

    #[test]
    fn firmware_is_told_the_windows_and_the_tables_follow_it() {
        let platform = acpi::Hardware {
            cpus: Vec::new(),
            cpu_hotplug: false,
            roots: vec![acpi::Root {
                segment: 0,
                node: None,
                last_bus: 4,
                io: layout::PCI_IO,
                mmio32: Vec::new(),
                mmio64: Vec::new(),
                slots: 0,
                ecam: PLACES[0].clone(),
            }],
            pluggable: None,
            memory_devices: false,
            numa: None,
            serial: true,
            tpm: false,
            native_hotplug: true,
        };
        let topology = topology();
        let below = [(0x8000_0000, 0x6000_0000), (0xc000_0000, 0x3c00_0000)];
        for (ecam, below) in PLACES.into_iter().zip(below) {
            let info = windows_for_firmware(&windows(), &ecam, 46);
            assert_eq!(info.len(), 16 + 120);
            assert_eq!(pair(&info, 1), below);
            assert_eq!(pair(&info, 2), (u64::MAX, 0));
            assert_eq!(pair(&info, 3), (1 << 40, (1 << 46) - (1 << 40)));
            assert_eq!(pair(&info, 5), (ecam.start, 256 << 20));

            let now = tables_now(&platform, &windows(), &Arc::downgrade(&topology), &ecam);
            let now = &now.roots[0];
            assert_eq!((&now.ecam, now.last_bus), (&ecam, 4));
            assert_eq!(now.mmio64, windows().memory64);
            let (start, end) = (below.0, below.0 + below.1);
            assert!(now.mmio32.contains(&(start..end)), "{:x?}", now.mmio32);
            assert!(
                now.mmio32
                    .iter()
                    .all(|part| { part.end <= ecam.start || ecam.end <= part.start })
            );
        }
        let [new, old] = PLACES.map(|ecam| told(&windows(), &ecam, 46));
        assert_eq!(new, windows_for_firmware(&windows(), &PLACES[0], 46));
        assert_eq!((old.len(), &old[..8]), (new.len(), &[0; 8][..]));
        // Without pages of 1 GiB.
        let info = windows_for_firmware(&windows(), &PLACES[0], 40);
        assert_eq!(pair(&info, 3), (1 << 32, (1012 << 30) - (1 << 32)));
    }

    #[test]
    fn configuration_space_is_reached_where_it_was_put_and_nowhere_else() {
        let (topology, buses) = (topology(), Buses::default());
        let place = EcamPlace::new(&buses, &topology);
        let vendor = |address| {
            let mut data = [0; 2];
            buses.mmio.read(address, &mut data);
            u16::from_le_bytes(data)
        };
        assert_eq!(vendor(0xe000_0000), 0xffff);
        place.ecam_moved(Some(PLACES[0].clone()));
        assert_eq!(vendor(0xe000_0000), 0x1b36);
        place.ecam_moved(Some(PLACES[1].clone()));
        assert_eq!([vendor(0xe000_0000), vendor(0xb000_0000)], [0xffff, 0x1b36]);
        place.ecam_moved(None);
        assert_eq!(vendor(0xb000_0000), 0xffff);
    }
}
