//! The state in which the boot processor enters the kernel.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::error::BootError;
use super::low_memory::{GDT, PAGE_DIRECTORIES, PDPT, PML4, PVH_START_INFO, STACK_TOP, ZERO_PAGE};

// Control registers and EFER. Intel SDM vol. 3 §2.5 and §2.2.1.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that always reads 1. Intel SDM vol. 1 §3.4.3.
const RFLAGS_FIXED: u64 = 1 << 1;

// Page table entries. Intel SDM vol. 3 §4.5.
const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;

/// Selectors that Linux's boot protocol names: `__BOOT_CS` and `__BOOT_DS`.
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TASK: u16 = 0x20;

// Segment types. Intel SDM vol. 3 §3.4.5.1 and §3.5.
const TYPE_CODE: u8 = 0b1011;
const TYPE_DATA: u8 = 0b0011;
const TYPE_BUSY_TSS: u8 = 0b1011;

/// How the kernel wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootProtocol {
    /// 64-bit, paged, RSI at Linux's `boot_params`. Documentation/arch/x86/boot.rst, "64-bit Boot
    /// Protocol".
    Linux64,
    /// 32-bit, unpaged, EBX at `hvm_start_info`. Xen docs/misc/pvh.
    Pvh,
}

/// Where the boot processor starts, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The protocol.
    pub protocol: BootProtocol,
    /// Guest-physical address of the first instruction.
    pub address: GuestAddress,
}

impl Entry {
    /// Sets in `sregs` all that the protocol asks for, whatever was there, and gives the general
    /// registers. The local APIC's base and the interrupt bitmap stay as they are.
    #[must_use]
    pub fn apply(&self, sregs: &mut kvm_sregs) -> kvm_regs {
        let code = segment(
            SELECTOR_CODE,
            TYPE_CODE,
            self.protocol == BootProtocol::Linux64,
        );
        let data = segment(SELECTOR_DATA, TYPE_DATA, false);
        sregs.cs = code;
        for register in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *register = data;
        }
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: SELECTOR_TASK,
            type_: TYPE_BUSY_TSS,
            present: 1,
            ..Default::default()
        };
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..Default::default()
        };
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: (size_of_val(&self.descriptors()) - 1) as u16,
            ..Default::default()
        };
        sregs.idt = kvm_dtable::default();
        sregs.cr2 = 0;
        sregs.cr8 = 0;
        match self.protocol {
            BootProtocol::Linux64 => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = PML4;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
            BootProtocol::Pvh => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr3 = 0;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
        }
        let mut regs = kvm_regs {
            rip: self.address.0,
            rflags: RFLAGS_FIXED,
            rsp: STACK_TOP,
            ..Default::default()
        };
        match self.protocol {
            BootProtocol::Linux64 => regs.rsi = ZERO_PAGE,
            BootProtocol::Pvh => regs.rbx = PVH_START_INFO,
        }
        regs
    }

    /// Writes the descriptor table, and for the 64-bit entry the page tables: the first 4 GiB mapped
    /// to themselves by 2 MiB pages, which every x86-64 processor has.
    pub(super) fn write_tables(&self, ram: &impl GuestMemory) -> Result<(), BootError> {
        write_words(ram, "the descriptor table", GDT, self.descriptors())?;
        if self.protocol == BootProtocol::Pvh {
            return Ok(());
        }
        let table = PAGE_PRESENT | PAGE_WRITABLE;
        write_words(ram, "the page tables", PML4, [PDPT | table])?;
        write_words(
            ram,
            "the page tables",
            PDPT,
            (0..4).map(|gib| (PAGE_DIRECTORIES + gib * 0x1000) | table),
        )?;
        write_words(
            ram,
            "the page tables",
            PAGE_DIRECTORIES,
            (0..4 * 512).map(|page| (page << 21) | table | PAGE_LARGE),
        )
    }

    /// The descriptor table, such that a kernel that reloads a selector finds what it had.
    fn descriptors(&self) -> [u64; 6] {
        let code = segment(
            SELECTOR_CODE,
            TYPE_CODE,
            self.protocol == BootProtocol::Linux64,
        );
        let data = segment(SELECTOR_DATA, TYPE_DATA, false);
        let task = kvm_segment {
            limit: 0x67,
            type_: TYPE_BUSY_TSS,
            present: 1,
            ..Default::default()
        };
        [
            0,
            0,
            descriptor(&code),
            descriptor(&data),
            descriptor(&task),
            0,
        ]
    }
}

/// A flat segment of 4 GiB.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The segment as it stands in a descriptor table. Intel SDM vol. 3 §3.4.5. The base is always 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        u64::from(segment.limit >> 12)
    } else {
        u64::from(segment.limit)
    };
    (limit & 0xffff)
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.dpl) << 45
        | u64::from(segment.present) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

fn write_words(
    ram: &impl GuestMemory,
    what: &'static str,
    address: u64,
    words: impl IntoIterator<Item = u64>,
) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    ram.write_slice(&bytes, GuestAddress(address))
        .map_err(|source| BootError::Memory {
            what,
            address,
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_flat_ones_of_the_boot_protocol() {
        let linux = Entry {
            protocol: BootProtocol::Linux64,
            address: GuestAddress(0x100_0200),
        };
        assert_eq!(linux.descriptors()[2], 0x00af_9b00_0000_ffff);
        assert_eq!(linux.descriptors()[3], 0x00cf_9300_0000_ffff);
        let pvh = Entry {
            protocol: BootProtocol::Pvh,
            ..linux
        };
        assert_eq!(pvh.descriptors()[2], 0x00cf_9b00_0000_ffff);
        assert_eq!(pvh.descriptors()[4], 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_entry_state_does_not_depend_on_what_the_registers_held() {
        for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
            let entry = Entry {
                protocol,
                address: GuestAddress(0x100_0000),
            };
            let mut fresh = kvm_sregs::default();
            let mut used = kvm_sregs {
                cr0: !0,
                cr3: 0x1234_5000,
                cr4: !0,
                efer: 0xd01,
                ..Default::default()
            };
            used.cs.selector = 8;
            used.idt.limit = 0xfff;
            assert_eq!(entry.apply(&mut fresh), entry.apply(&mut used));
            assert_eq!(fresh, used);
        }
    }
}
