//! Where boot data lies in the first MiB. Nothing here survives the kernel's early start-up.

/// Segment of the extended BIOS data area, in the BIOS data area.
pub(super) const BDA_EBDA_SEGMENT: u64 = 0x40e;
/// KiB of base memory, in the BIOS data area.
pub(super) const BDA_BASE_MEMORY_KIB: u64 = 0x413;
/// The global descriptor table.
pub(super) const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`.
pub(super) const PVH_START_INFO: u64 = 0x6000;
/// PVH: the module list, one entry.
pub(super) const PVH_MODULES: u64 = 0x6040;
/// PVH: the memory map.
pub(super) const PVH_MEMORY_MAP: u64 = 0x6080;
/// Linux's `boot_params`, "the zero page".
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Top of a stack that is there for a kernel that wants one before it has its own.
pub(super) const STACK_TOP: u64 = 0x8ff0;
/// Page map level 4.
pub(super) const PML4: u64 = 0x9000;
/// Page directory pointer table.
pub(super) const PDPT: u64 = 0xa000;
/// Four page directories, 2 MiB pages over the first 4 GiB.
pub(super) const PAGE_DIRECTORIES: u64 = 0xb000;
/// The command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Bytes that there are for it, the terminating zero included.
pub(super) const CMDLINE_ROOM: u64 = 0x1_0000;
/// The extended BIOS data area: where low memory ends.
pub(super) const EBDA_START: u64 = 0x9_fc00;
/// Where the hole for video memory and ROMs starts.
pub(super) const LOW_HOLE_START: u64 = 0xa_0000;
/// SMBIOS' entry point, where a kernel looks for it, and its tables behind that: up to [`HIGH_MEMORY`].
/// DMTF DSP0134, SMBIOS 3.0 §5.2.2
pub(super) const SMBIOS: u64 = 0xf_0000;
/// Where memory goes on above it; nothing of a kernel is loaded below.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;
