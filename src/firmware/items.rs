//! What firmware is told of the board by fw_cfg. References are to EDK II's OvmfPkg, which reads it.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::error::FirmwareError;
use crate::acpi;
use crate::devices::fw_cfg::{Content, Items};
use crate::smbios::{self, FirmwareTable, Identity};

// Numbers of items. QEMU hw/nvram/fw_cfg.h and include/standard-headers/linux/qemu_fw_cfg.h.
const CPUS: u16 = 0x05;
const BOOT_MENU: u16 = 0x0e;
const MAX_CPUS: u16 = 0x0f;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_SIZE: u16 = 0x0b;
const KERNEL: u16 = 0x11;
const INITRD: u16 = 0x12;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE: u16 = 0x15;
const SETUP_SIZE: u16 = 0x17;
const SETUP: u16 = 0x18;

/// Types of the memory map's entries. ACPI 6.5 §15.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What a table that is made when it is read can be larger than one that was made before: the tables name
/// more or fewer parts of the windows then.
const ROOM: usize = 0x1000;

// Hardware information: a host bridge. OvmfPkg/Include/Library/HardwareInfoLib.h and
// OvmfPkg/Library/HardwareInfoLib/HardwareInfoPciHostBridgeLib.c
const HOST_BRIDGE: u64 = 1;
const HOST_BRIDGE_SIZE: u64 = 120;
/// ISA and VGA ports, memory above 4 GiB. MdePkg/Include/Protocol/PciRootBridgeIo.h
const ATTRIBUTES: u64 = 0x7_0029;
/// DMA above 4 GiB, and prefetchable memory in the same windows as the other.
const FLAGS: u32 = 0b101;
/// No such window: its base.
const NO_WINDOW: u64 = u64::MAX;

/// A range for the BARs of PCI devices; nothing where there is none.
pub type Window = Option<Range<u64>>;

/// What the board is.
pub struct BoardItems {
    /// Processors that are there, asked when firmware reads it: it waits for each of them at every start.
    pub cpus: Box<dyn Fn() -> u16 + Send + Sync>,
    /// Processors that there can be.
    pub most_cpus: u16,
    /// RAM, ascending.
    pub ram: Vec<Range<u64>>,
    /// Addresses that nothing may be put at, ascending.
    pub reserved: Vec<Range<u64>>,
    /// Where addresses end at which RAM can come while the guest runs; nothing where none can. Firmware that chooses windows
    /// for BARs itself has them behind that. OvmfPkg/Library/PlatformInitLib/MemDetect.c
    pub pluggable_end: Option<u64>,
    /// What the ACPI tables describe, asked when firmware reads them: it has numbered the buses by then, and
    /// put configuration space where it wants it.
    pub acpi: Arc<dyn Fn() -> acpi::Hardware + Send + Sync>,
    /// [`hardware_info`], asked when firmware reads it.
    pub hardware_info: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
    /// What only a BIOS is told.
    pub bios: Option<BiosItems>,
    /// Which machine it is.
    pub identity: Identity,
    /// A kernel that firmware starts.
    pub kernel: Option<Kernel>,
    /// What is booted from, the first before the others: paths in Open Firmware's form.
    pub boot_order: Vec<String>,
}

/// What a BIOS is told besides, which asks it by names of SeaBIOS's. SeaBIOS, docs/Runtime_config.md
#[derive(Debug, Default)]
pub struct BiosItems {
    /// The port of a serial console, which is all that it has to show text on.
    pub console: Option<u16>,
    /// Where addresses for BARs begin above 4 GiB.
    pub memory_above: Option<u64>,
}

/// A kernel that firmware starts, with what belongs to it.
#[derive(Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: File,
    /// Its bytes.
    pub size: u64,
    /// How many of them are its real-mode part.
    pub setup: u64,
    /// Initial RAM file system, and its bytes.
    pub initramfs: Option<(File, u64)>,
    /// Command line.
    pub cmdline: String,
}

impl std::fmt::Debug for BoardItems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoardItems")
            .field("cpus", &(self.cpus)())
            .field("ram", &self.ram)
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

/// All that firmware can read of the board.
///
/// # Errors
/// [`FirmwareError::Items`]
pub fn items(board: BoardItems) -> Result<Items, FirmwareError> {
    let mut items = Items::default();
    let identified_cpus = (board.cpus)();
    let present = board.cpus;
    let present = Content::Made {
        size: size_of::<u16>(),
        make: Box::new(move || present().to_le_bytes().to_vec()),
    };
    items.item(CPUS, present);
    items.item(MAX_CPUS, board.most_cpus);
    items.item(BOOT_MENU, 0_u16);
    items.file(
        "etc/e820",
        Content::Bytes(e820(&board.ram, &board.reserved)),
    )?;

    if let Some(end) = board.pluggable_end {
        let end = end.to_le_bytes().to_vec();
        items.file("etc/reserved-memory-end", Content::Bytes(end))?;
    }

    let acpi = board.acpi;
    let built = acpi::Loader::new(&acpi());
    let made = |size: usize, part: fn(acpi::Loader) -> Vec<u8>| {
        let acpi = acpi.clone();
        Content::Made {
            size,
            make: Box::new(move || part(acpi::Loader::new(&acpi()))),
        }
    };
    let room = |size: usize| size.next_multiple_of(ROOM) + ROOM;
    items.file(
        "etc/acpi/tables",
        made(room(built.tables.len()), |loader| loader.tables),
    )?;
    items.file(
        "etc/acpi/rsdp",
        made(built.rsdp.len(), |loader| loader.rsdp),
    )?;
    items.file(
        "etc/table-loader",
        made(built.script.len(), |loader| loader.script),
    )?;

    let memory = board.ram.iter().map(|range| range.end - range.start).sum();
    let identified = smbios::Board {
        cpus: identified_cpus,
        memory,
        identity: board.identity,
    };
    let smbios = smbios::tables(&identified, FirmwareTable::Firmwares);
    let anchor = smbios.entry_point(0);
    items.file("etc/smbios/smbios-anchor", Content::Bytes(anchor))?;
    items.file("etc/smbios/smbios-tables", Content::Bytes(smbios.bytes))?;

    let hardware = Content::Made {
        size: (board.hardware_info)().len(),
        make: board.hardware_info,
    };
    items.file("etc/hardware-info", hardware)?;
    if let Some(bios) = board.bios {
        let number = |value: u64| Content::Bytes(value.to_le_bytes().to_vec());
        if let Some(port) = bios.console {
            items.file("etc/sercon-port", number(port.into()))?;
        }
        if let Some(start) = bios.memory_above {
            items.file("etc/reserved-memory-end", number(start))?;
        }
    }
    if !board.boot_order.is_empty() {
        let mut order = board.boot_order.join("\n").into_bytes();
        order.push(0);
        items.file("bootorder", Content::Bytes(order))?;
    }
    if let Some(kernel) = board.kernel {
        offer_kernel(&mut items, kernel);
    }
    Ok(items)
}

/// Entries of 20 bytes: address, size, type. OvmfPkg/Include/IndustryStandard/E820.h
fn e820(ram: &[Range<u64>], reserved: &[Range<u64>]) -> Vec<u8> {
    let ram = ram.iter().map(|range| (range, E820_RAM));
    let reserved = reserved.iter().map(|range| (range, E820_RESERVED));
    let mut bytes = Vec::new();
    for (range, kind) in ram.chain(reserved) {
        bytes.extend(range.start.to_le_bytes());
        bytes.extend((range.end - range.start).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
    }
    bytes
}

/// What firmware does not find out itself of the host bridge: where BARs may be, ports and memory below and
/// above 4 GiB, and where configuration space is.
#[must_use]
pub fn hardware_info(io: &Window, memory: &Window, above: &Window, ecam: &Window) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(HOST_BRIDGE.to_le_bytes());
    bytes.extend(HOST_BRIDGE_SIZE.to_le_bytes());
    // Version.
    bytes.extend(0_u64.to_le_bytes());
    bytes.extend(ATTRIBUTES.to_le_bytes());
    bytes.extend(FLAGS.to_le_bytes());
    // First and last bus.
    bytes.extend([0, u8::MAX, 0, 0]);
    for window in [io, memory, &None, above, &None, ecam] {
        let (base, size) = match window {
            Some(range) => (range.start, range.end - range.start),
            None => (NO_WINDOW, 0),
        };
        bytes.extend(base.to_le_bytes());
        bytes.extend(size.to_le_bytes());
    }
    bytes
}

/// Kernel, initial RAM file system and command line, which firmware makes a file system of.
/// OvmfPkg/QemuKernelLoaderFsDxe/QemuKernelLoaderFsDxe.c
fn offer_kernel(items: &mut Items, kernel: Kernel) {
    let size = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let rest = kernel.size.saturating_sub(kernel.setup);
    items.item(SETUP_SIZE, size(kernel.setup));
    items.item(KERNEL_SIZE, size(rest));
    if let Ok(file) = kernel.image.try_clone() {
        let setup = Content::File {
            file,
            offset: 0,
            size: kernel.setup,
        };
        items.item(SETUP, setup);
    }
    let image = Content::File {
        file: kernel.image,
        offset: kernel.setup,
        size: rest,
    };
    items.item(KERNEL, image);
    if let Some((file, bytes)) = kernel.initramfs {
        items.item(INITRD_SIZE, size(bytes));
        let initrd = Content::File {
            file,
            offset: 0,
            size: bytes,
        };
        items.item(INITRD, initrd);
    }
    let mut cmdline = kernel.cmdline.into_bytes();
    cmdline.push(0);
    items.item(CMDLINE_SIZE, cmdline.len() as u32);
    items.item(CMDLINE, Content::Bytes(cmdline));
}
