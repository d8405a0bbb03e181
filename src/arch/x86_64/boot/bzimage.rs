//! bzImage by Linux's 64-bit boot protocol. Documentation/arch/x86/boot.rst and zero-page.rst.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory};

use super::e820::E820;
use super::entry::{BootProtocol, Entry};
use super::error::BootError;
use super::initramfs::{self, Reach};
use super::input::{Input, Inputs};
use super::low_memory::{CMDLINE, CMDLINE_ROOM, HIGH_MEMORY, ZERO_PAGE};

/// Offset of the setup header in the file, and in the zero page.
const HEADER: u64 = 0x1f1;
/// Offset of the header's second jump byte; the header ends that many bytes behind 0x202.
const HEADER_LENGTH: u64 = 0x201;
const HEADER_LENGTH_BASE: usize = 0x202;
/// `boot_flag`
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS", `header`
const MAGIC: u32 = 0x5372_6448;
/// The first version of the protocol that can say whether there is a 64-bit entry.
const VERSION_WITH_64_BIT: u16 = 0x020c;
/// `XLF_KERNEL_64` of `xloadflags`.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `XLF_CAN_BE_LOADED_ABOVE_4G` of `xloadflags`: the initramfs may be at any address, and the zero page
/// holds the upper halves of its address and size.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// `LOADED_HIGH` of `loadflags`: the protected-mode code goes to 1 MiB, not to 64 KiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `type_of_loader` of a loader that has no number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The 64-bit entry's distance from where the protected-mode code is loaded.
const ENTRY_64: u64 = 0x200;
/// Sectors of the real-mode code where `setup_sects` says 0, and bytes of one.
const DEFAULT_SETUP_SECTORS: u8 = 4;
const SECTOR: u64 = 512;

/// The header of a bzImage that has a 64-bit entry.
#[derive(Debug)]
pub(super) struct SetupHeader {
    header: setup_header,
    /// Where in the file the protected-mode code starts.
    payload: u64,
}

impl SetupHeader {
    /// The file's setup header; `None` where the file is no bzImage.
    pub(super) fn read(kernel: &Input) -> Result<Option<Self>, BootError> {
        let mut header = setup_header::default();
        let read = kernel.read_at(header.as_mut_slice(), HEADER)?;
        let (magic, boot_flag) = (header.header, header.boot_flag);
        if magic != MAGIC || boot_flag != BOOT_FLAG {
            return Ok(None);
        }
        let mut length = [0];
        kernel.read_at(&mut length, HEADER_LENGTH)?;
        let known = (HEADER_LENGTH_BASE + usize::from(length[0])).saturating_sub(HEADER as usize);
        if read < known.min(size_of::<setup_header>()) {
            return Err(kernel.damaged("it ends within its setup header"));
        }
        // What lies behind this kernel's header is code, not fields of a later version.
        if let Some(unknown) = header.as_mut_slice().get_mut(known..) {
            unknown.fill(0);
        }
        let version = header.version;
        if version < VERSION_WITH_64_BIT
            || header.xloadflags & XLF_KERNEL_64 == 0
            || header.loadflags & LOADED_HIGH == 0
        {
            let [minor, major] = version.to_le_bytes();
            return Err(BootError::No64BitEntry {
                path: kernel.path.clone(),
                major,
                minor,
            });
        }
        let sectors = match header.setup_sects {
            0 => DEFAULT_SETUP_SECTORS,
            sectors => sectors,
        };
        let payload = (u64::from(sectors) + 1) * SECTOR;
        if kernel.size <= payload + ENTRY_64 {
            return Err(kernel.damaged(format!(
                "its code should start at byte {payload}, but it has {} bytes",
                kernel.size
            )));
        }
        // `syssize` counts 16-byte units; a file may be longer (a signature), never shorter.
        let promised = u64::from(header.syssize) * 16;
        if kernel.size - payload + 15 < promised {
            return Err(kernel.damaged(format!(
                "it should hold {promised} bytes of code, but it has {}",
                kernel.size - payload
            )));
        }
        Ok(Some(Self { header, payload }))
    }

    /// Where in the file the protected-mode code starts.
    pub(super) fn payload(&self) -> u64 {
        self.payload
    }
}

/// Loads the kernel where it prefers to be, its initramfs as high as it can be, and the zero page.
pub(super) fn load(
    ram: &impl GuestMemory,
    inputs: &Inputs,
    setup: &SetupHeader,
    map: &E820,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let kernel = &inputs.kernel;
    let mut header = setup.header;
    let start = header.pref_address;
    let length = kernel.size - setup.payload;
    // The kernel unpacks itself within `init_size` bytes from where it is loaded.
    let end = start.checked_add(length.max(header.init_size.into()));
    let end = end
        .filter(|_| start >= HIGH_MEMORY)
        .ok_or_else(|| kernel.damaged(format!("it asks to be loaded at {start:#x}")))?;
    if !map.is_ram(&(start..end)) || end > map.low_ram_end() {
        return Err(BootError::no_ram_for_kernel(&kernel.path, start..end, map));
    }
    // Checked first: reading is what takes time.
    let cmdline_max = u64::from(header.cmdline_size).min(CMDLINE_ROOM - 1);
    inputs.write_cmdline(ram, cmdline_max)?;
    let mut page = boot_params::default();
    if let Some(file) = &inputs.initramfs {
        let preferred = u64::from(header.initrd_addr_max) + 1;
        let anywhere = header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
        let reach = Reach {
            floor: end,
            preferred,
            limit: if anywhere { u64::MAX } else { preferred },
            other_kernel: None,
        };
        let address = initramfs::place(file, map, &reach)?;
        file.read_into(ram, address, 0, file.size)?;
        (header.ramdisk_image, page.ext_ramdisk_image) = halves(address);
        (header.ramdisk_size, page.ext_ramdisk_size) = halves(file.size);
    }
    kernel.read_into(ram, start, setup.payload, length)?;

    header.type_of_loader = LOADER_UNDEFINED;
    header.code32_start = start as u32;
    header.cmd_line_ptr = CMDLINE as u32;
    page.hdr = header;
    page.acpi_rsdp_addr = rsdp.0;
    write_zero_page(ram, page, map)?;
    Ok(Entry {
        protocol: BootProtocol::Linux64,
        address: GuestAddress(start + ENTRY_64),
    })
}

/// The lower and the upper 32 bits.
fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

/// Writes `page` with the memory map in it.
fn write_zero_page(
    ram: &impl GuestMemory,
    mut page: boot_params,
    map: &E820,
) -> Result<(), BootError> {
    let mut table = page.e820_table;
    let mut count = 0;
    for (slot, region) in table.iter_mut().zip(map.regions()) {
        *slot = boot_e820_entry {
            addr: region.range.start,
            size: region.range.end - region.range.start,
            r#type: region.kind as u32,
        };
        count += 1;
    }
    page.e820_table = table;
    page.e820_entries = count;
    ram.write_slice(page.as_slice(), GuestAddress(ZERO_PAGE))
        .map_err(|source| BootError::Memory {
            what: "the zero page",
            address: ZERO_PAGE,
            source,
        })
}
