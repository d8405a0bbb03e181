//! ELF kernels by the PVH entry. System V ABI (ELF-64), xen/include/public/elfnote.h and
//! xen/include/public/arch-x86/hvm/start_info.h.

use std::ops::Range;

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory};

use super::e820::E820;
use super::entry::{BootProtocol, Entry};
use super::error::BootError;
use super::initramfs::{self, Reach};
use super::input::{Input, Inputs};
use super::low_memory::{CMDLINE, HIGH_MEMORY, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};

/// `e_ident`: "\x7fELF", ELFCLASS64, ELFDATA2LSB.
const IDENT: [u8; 6] = *b"\x7fELF\x02\x01";
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// Far more than any kernel has; Linux has five.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Bytes of notes that are searched.
const MAX_NOTES: u64 = 64 << 10;

/// `XEN_ELFNOTE_PHYS32_ENTRY`
const PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";

/// What Linux on x86 takes of a command line (`COMMAND_LINE_SIZE` less the zero); an ELF does not say.
const CMDLINE_MAX: u64 = 2047;
/// An initramfs goes below 2 GiB where it fits there, as a bzImage's `initrd_addr_max` asks.
const INITRAMFS_PREFERRED: u64 = 0x8000_0000;
/// A module's address has 64 bits, but Linux keeps the lower 32 of the initramfs's. Linux,
/// arch/x86/platform/pvh/enlighten.c, `init_pvh_bootparams`. It uses it up to there, as the comment on
/// `ramdisk_max` in arch/x86/boot/header.S says.
const INITRAMFS_LIMIT: u64 = 1 << 32;

/// An ELF kernel with a PVH entry.
#[derive(Debug)]
pub(super) struct PvhElf {
    segments: Vec<Segment>,
    entry: u32,
}

/// A part of the file that goes to memory.
#[derive(Debug)]
struct Segment {
    offset: u64,
    file_size: u64,
    memory: Range<u64>,
}

impl PvhElf {
    /// The file's segments and entry; `None` where the file is no 64-bit x86 ELF of a kernel.
    pub(super) fn read(kernel: &Input) -> Result<Option<Self>, BootError> {
        let mut header = [0; HEADER_SIZE];
        let read = kernel.read_at(&mut header, 0)?;
        let fields = Fields(&header);
        if read < IDENT.len() || !header.starts_with(&IDENT) {
            return Ok(None);
        }
        if read < HEADER_SIZE {
            return Err(kernel.damaged("it ends within its ELF header"));
        }
        if fields.u16(18) != EM_X86_64 || !matches!(fields.u16(16), ET_EXEC | ET_DYN) {
            return Ok(None);
        }
        let (table, entry_size, count) = (fields.u64(32), fields.u16(54), fields.u16(56));
        if usize::from(entry_size) != PROGRAM_HEADER_SIZE || count > MAX_PROGRAM_HEADERS {
            return Err(kernel.damaged(format!(
                "it has {count} program headers of {entry_size} bytes"
            )));
        }
        let mut headers = vec![0; usize::from(count) * PROGRAM_HEADER_SIZE];
        if kernel.read_at(&mut headers, table)? < headers.len() {
            return Err(kernel.damaged("it ends within its program headers"));
        }
        let mut segments = Vec::new();
        let (mut entry, mut interpreted) = (None, false);
        for header in headers.chunks_exact(PROGRAM_HEADER_SIZE).map(Fields) {
            let (offset, file_size) = (header.u64(8), header.u64(32));
            if offset
                .checked_add(file_size)
                .is_none_or(|end| end > kernel.size)
            {
                return Err(kernel.damaged(format!(
                    "a segment of {file_size} bytes at {offset} goes beyond its end"
                )));
            }
            match header.u32(0) {
                // A program has an interpreter, and so has FreeBSD's kernel: the note tells them apart.
                PT_INTERP => interpreted = true,
                PT_NOTE if entry.is_none() => {
                    let mut notes = vec![0; file_size.min(MAX_NOTES) as usize];
                    kernel.read_at(&mut notes, offset)?;
                    entry = pvh_entry(&notes, header.u64(48));
                }
                PT_LOAD => {
                    let (start, size) = (header.u64(24), header.u64(40));
                    let end = start.checked_add(size).filter(|_| file_size <= size);
                    let end = end.ok_or_else(|| {
                        kernel.damaged(format!(
                            "a segment of {file_size} bytes takes {size} bytes at {start:#x}"
                        ))
                    })?;
                    segments.push(Segment {
                        offset,
                        file_size,
                        memory: start..end,
                    });
                }
                _ => {}
            }
        }
        if interpreted && entry.is_none() {
            return Ok(None);
        }
        segments.retain(|segment| !segment.memory.is_empty());
        let entry = entry.ok_or_else(|| BootError::NoPvhEntry {
            path: kernel.path.clone(),
        })?;
        if !segments
            .iter()
            .any(|segment| segment.memory.contains(&entry.into()))
        {
            return Err(kernel.damaged(format!("its entry {entry:#x} is in no segment")));
        }
        Ok(Some(Self { segments, entry }))
    }
}

/// The physical entry point among the notes of a segment whose `p_align` is `alignment`: name and
/// descriptor are padded to 8 bytes where that is 8, else to 4. System V ABI, "Note Section".
fn pvh_entry(notes: &[u8], alignment: u64) -> Option<u32> {
    const NOTE_HEADER: usize = 12;
    let padding = if alignment == 8 { 8 } else { 4 };
    let part = |start: usize, size: u32| notes.get(start..start.checked_add(size as usize)?);
    let mut at = 0_usize;
    loop {
        let header = Fields(notes.get(at..at.checked_add(NOTE_HEADER)?)?);
        let name = part(at + NOTE_HEADER, header.u32(0))?;
        let start = (at + NOTE_HEADER + name.len()).next_multiple_of(padding);
        let descriptor = part(start, header.u32(4))?;
        if header.u32(8) == PHYS32_ENTRY && name == NOTE_NAME {
            // Four or eight bytes wide; the address has 32 bits in either.
            return descriptor.first_chunk().copied().map(u32::from_le_bytes);
        }
        at = (start + descriptor.len()).next_multiple_of(padding);
    }
}

/// Loads the segments where they ask to be, the initramfs as high as it can be, and the start
/// information.
pub(super) fn load(
    ram: &impl GuestMemory,
    inputs: &Inputs,
    elf: &PvhElf,
    map: &E820,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let kernel = &inputs.kernel;
    let mut kernel_end = HIGH_MEMORY;
    for segment in &elf.segments {
        let Range { start, end } = segment.memory;
        if start < HIGH_MEMORY {
            return Err(kernel.damaged(format!("it asks to be loaded at {start:#x}")));
        }
        if !map.is_ram(&segment.memory) || end > map.low_ram_end() {
            return Err(BootError::no_ram_for_kernel(&kernel.path, start..end, map));
        }
        kernel_end = kernel_end.max(end);
    }
    inputs.write_cmdline(ram, CMDLINE_MAX)?;
    let module = match &inputs.initramfs {
        Some(file) => {
            let reach = Reach {
                floor: kernel_end,
                preferred: INITRAMFS_PREFERRED,
                limit: INITRAMFS_LIMIT,
                other_kernel: Some("the bzImage of this kernel, which takes it at any address"),
            };
            let address = initramfs::place(file, map, &reach)?;
            file.read_into(ram, address, 0, file.size)?;
            Some(hvm_modlist_entry {
                paddr: address,
                size: file.size,
                ..Default::default()
            })
        }
        None => None,
    };
    for segment in &elf.segments {
        let start = segment.memory.start;
        kernel.read_into(ram, start, segment.offset, segment.file_size)?;
        // RAM is not fresh after a guest's reset.
        zero(ram, start + segment.file_size..segment.memory.end)?;
    }
    write_start_info(ram, module, map, rsdp)?;
    Ok(Entry {
        protocol: BootProtocol::Pvh,
        address: GuestAddress(elf.entry.into()),
    })
}

fn zero(ram: &impl GuestMemory, range: Range<u64>) -> Result<(), BootError> {
    static ZEROS: [u8; 4 << 10] = [0; 4 << 10];
    let mut address = range.start;
    while address < range.end {
        let count = (range.end - address).min(ZEROS.len() as u64);
        write(ram, "zeros", address, &ZEROS[..count as usize])?;
        address += count;
    }
    Ok(())
}

fn write_start_info(
    ram: &impl GuestMemory,
    module: Option<hvm_modlist_entry>,
    map: &E820,
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    let mut address = PVH_MEMORY_MAP;
    for region in map.regions() {
        let entry = hvm_memmap_table_entry {
            addr: region.range.start,
            size: region.range.end - region.range.start,
            type_: region.kind as u32,
            reserved: 0,
        };
        write(ram, "the memory map", address, entry.as_slice())?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    if let Some(module) = &module {
        write(ram, "the module list", PVH_MODULES, module.as_slice())?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: module.is_some().into(),
        modlist_paddr: if module.is_some() { PVH_MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp.0,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.regions().len() as u32,
        ..Default::default()
    };
    write(
        ram,
        "the start information",
        PVH_START_INFO,
        info.as_slice(),
    )
}

fn write(
    ram: &impl GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(address))
        .map_err(|source| BootError::Memory {
            what,
            address,
            source,
        })
}

/// Little-endian fields of a structure; 0 beyond its end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0
            .get(offset..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .unwrap_or([0; N])
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}
