//! What CPUID tells the guest: what KVM can do on this host, with the VM's own topology.
//!
//! Leaves that describe the host's own topology (4, 0xB, 0x1F, 0x8000_0008, 0x8000_001D, 0x8000_001E, 0x8000_0026) are
//! rewritten ([`grouping`]), for a guest that believed them would number its processors wrongly.

mod grouping;

use kvm_bindings::kvm_cpuid_entry2;

use self::grouping::Grouping;
use crate::config::Topology;

/// CPUID.1:ECX. Intel SDM vol. 2A, CPUID, table "Feature Information Returned in the ECX Register".
const ECX1_X2APIC: u32 = 1 << 21;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
/// Reserved for hypervisors by both makers.
const ECX1_HYPERVISOR: u32 = 1 << 31;
/// CPUID.1:EDX, HTT: the package has room for more than one logical processor.
const EDX1_HTT: u32 = 1 << 28;

/// CPUID.7.0:EDX: there is IA32_ARCH_CAPABILITIES. Intel SDM vol. 2A, CPUID leaf 07H.
const EDX7_ARCH_CAPABILITIES: u32 = 1 << 29;

/// The leaves for hypervisors; KVM's own start here. linux Documentation/virt/kvm/x86/cpuid.rst.
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// What KVM has for guests, and in EDX what it hints at: that vCPUs are never kept from running. linux
/// arch/x86/include/uapi/asm/kvm_para.h, KVM_CPUID_FEATURES and KVM_HINTS_REALTIME.
const KVM_FEATURES: u32 = 0x4000_0001;
const HINTS_REALTIME: u32 = 1 << 0;
/// Frequencies in kHz: EAX the TSC's, EBX the local APIC timer's. Made by VMware, and read by any
/// guest that knows hypervisors.
const HYPERVISOR_FREQUENCIES: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds: linux arch/x86/kvm/lapic.h, APIC_BUS_CYCLE_NS.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// "AuthenticAMD" and "HygonGenuine", as the EBX of leaf 0 begins them.
const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// What a processor can have or not have, as the person who runs the VM decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFeatures {
    /// VMX or SVM: the guest can run guests of its own, where the host's KVM lets it.
    pub nested: bool,
    /// Performance counters, where the host's KVM has them for guests.
    pub pmu: bool,
    /// Each processor is one of the host's alone.
    pub dedicated: bool,
}

impl Default for CpuFeatures {
    /// All that the host's KVM has.
    fn default() -> Self {
        Self {
            nested: true,
            pmu: true,
            dedicated: false,
        }
    }
}

/// A register of a leaf of which bits go: function, index, and the bits of EAX, EBX, ECX and EDX.
type Hidden = (u32, u32, [u32; 4]);

/// What says that the processor can run guests. KVM has nothing of it for a vCPU without these bits: no
/// MSR, no CR4.VMXE, no EFER.SVME. Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.
const NESTED: &[Hidden] = &[
    (1, 0, [0, 0, 1 << 5, 0]),           // VMX
    (0x8000_0001, 0, [0, 0, 1 << 2, 0]), // SVM
    (0x8000_000a, 0, [u32::MAX; 4]),     // SVM's revision and features
];

/// What says that there are performance counters, and what stands on them. Intel SDM vol. 2A, CPUID; AMD
/// APM vol. 3, appendix E.
const PMU: &[Hidden] = &[
    (1, 0, [0, 0, 1 << 2 | 1 << 15, 1 << 21]), // DTES64, PDCM (IA32_PERF_CAPABILITIES), DS
    (7, 0, [0, 0, 0, 1 << 19]),                // architectural LBRs
    (7, 1, [1 << 8, 0, 0, 0]),                 // leaf 23H
    (0xa, 0, [u32::MAX; 4]),                   // architectural performance monitoring
    (0x1c, 0, [u32::MAX; 4]),                  // architectural LBRs
    (0x8000_0001, 0, [0, 0, 1 << 23 | 1 << 24 | 1 << 28, 0]), // PerfCtrExt of core, NB and L3
    (0x8000_0022, 0, [u32::MAX; 4]),           // extended performance monitoring
];

/// Takes from what KVM supports what the guest shall not have, and hints at what it has to itself.
pub(super) fn hide(supported: &mut Vec<kvm_cpuid_entry2>, features: CpuFeatures) {
    let nested = NESTED.iter().filter(|_| !features.nested);
    let pmu = PMU.iter().filter(|_| !features.pmu);
    for (function, index, [eax, ebx, ecx, edx]) in nested.chain(pmu) {
        let of =
            |entry: &&mut kvm_cpuid_entry2| (entry.function, entry.index) == (*function, *index);
        for entry in supported.iter_mut().filter(of) {
            entry.eax &= !eax;
            entry.ebx &= !ebx;
            entry.ecx &= !ecx;
            entry.edx &= !edx;
        }
    }
    if features.dedicated {
        let of = |entry: &&mut kvm_cpuid_entry2| entry.function == KVM_FEATURES;
        for entry in supported.iter_mut().filter(of) {
            entry.edx |= HINTS_REALTIME;
        }
    }
    if !features.pmu {
        // Its subleaves are lists of counters and events. Intel SDM vol. 2A, CPUID leaf 23H.
        supported.retain(|entry| entry.function != 0x23);
    }
}

/// What the table needs to know beside what KVM supports.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuidInput {
    /// How the vCPUs that there can be are grouped.
    pub(super) topology: Topology,
    /// The TSC's frequency, where it is known and constant.
    pub(super) tsc_khz: Option<u32>,
    /// Whether KVM's local APIC timer has the deadline mode, which `KVM_GET_SUPPORTED_CPUID` does
    /// not say.
    pub(super) tsc_deadline: bool,
}

/// The guest's table for the vCPU with this APIC id, made from what KVM supports.
pub(super) fn guest_table(
    supported: &[kvm_cpuid_entry2],
    input: CpuidInput,
    apic_id: u32,
) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(supported);
    let grouping = Grouping::of(input.topology, apic_id);

    let mut table: Vec<kvm_cpuid_entry2> = Vec::with_capacity(supported.len() + 8);
    for entry in supported {
        let mut entry = *entry;
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | grouping.basic();
                entry.ecx |= ECX1_HYPERVISOR | ECX1_X2APIC;
                set(&mut entry.ecx, ECX1_TSC_DEADLINE, input.tsc_deadline);
                set(&mut entry.edx, EDX1_HTT, grouping.is_shared());
            }
            // Deterministic cache parameters; AMD leaves the leaf reserved.
            4 if !amd && entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff
                    | grouping.sharers(entry.eax) << 14
                    | grouping.core_ids() << 26;
            }
            // KVM has that register on every host, AMD's processors have not: Windows refuses such a one.
            7 if amd && entry.index == 0 => set(&mut entry.edx, EDX7_ARCH_CAPABILITIES, false),
            0xb | 0x1f => {
                // KVM gives one empty entry; the levels replace it.
                if entry.index == 0 {
                    table.extend(grouping.levels(entry.function));
                }
                continue;
            }
            KVM_SIGNATURE if input.tsc_khz.is_some() => {
                entry.eax = entry.eax.max(HYPERVISOR_FREQUENCIES);
            }
            HYPERVISOR_FREQUENCIES => continue,
            // NC is the number of cores less one, ApicIdCoreIdSize the bits they take.
            0x8000_0008 if amd => {
                entry.ecx = entry.ecx & !0xf0ff | grouping.size();
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | grouping.sharers(entry.eax) << 14;
            }
            0x8000_001e => {
                [entry.eax, entry.ebx, entry.ecx, entry.edx] = grouping.extended_id();
            }
            // AMD's extended topology, which the older leaves say all of where a package has one die.
            0x8000_0026 => {
                if entry.index == 0 && input.topology.dies_per_package > 1 {
                    table.extend(grouping.amd_levels());
                }
                continue;
            }
            _ => {}
        }
        table.push(entry);
    }
    if let Some(khz) = input.tsc_khz {
        table.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_FREQUENCIES,
            eax: khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    table
}

/// Whether the processor is AMD's, or made after it.
pub(super) fn is_amd(supported: &[kvm_cpuid_entry2]) -> bool {
    let mut leaves = supported.iter();
    leaves.any(|entry| entry.function == 0 && AMD.contains(&entry.ebx))
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

/// Whether the guest's pages can have 1 GiB. AMD APM vol. 3, Fn8000_0001 EDX, Page1GB; Intel SDM vol. 2A, CPUID
/// leaf 80000001H.
pub(super) fn has_large_pages(supported: &[kvm_cpuid_entry2]) -> bool {
    const PAGES_1_GIB: u32 = 1 << 26;
    let mut leaves = supported.iter();
    leaves.any(|leaf| leaf.function == 0x8000_0001 && leaf.edx & PAGES_1_GIB != 0)
}

/// The width of a guest-physical address, from what KVM supports. AMD APM vol. 3, Fn8000_0008.
pub(super) fn address_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    /// Where the leaf is missing. Intel SDM vol. 2A, CPUID leaf 80000008H.
    const LEGACY: u8 = 36;
    supported
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(LEGACY, |entry| {
            let (physical, guest) = (entry.eax as u8, (entry.eax >> 16) as u8);
            // Where a guest can be given less than the processor has, KVM says so in bits 23 to 16.
            match guest {
                0 => physical,
                guest => physical.min(guest),
            }
        })
}

#[cfg(test)]
mod tests;
