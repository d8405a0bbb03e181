//! What CPUID tells the guest: what KVM can do on this host, with the VM's own topology.
//!
//! The topology is one package of single-threaded cores. Leaves that describe the host's own
//! (4, 0xB, 0x1F, 0x8000_0008, 0x8000_001D, 0x8000_001E) are rewritten, for a guest that believed
//! them would number its processors wrongly.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

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
}

impl Default for CpuFeatures {
    /// All that the host's KVM has.
    fn default() -> Self {
        Self {
            nested: true,
            pmu: true,
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

/// Takes from what KVM supports what the guest shall not have.
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
    if !features.pmu {
        // Its subleaves are lists of counters and events. Intel SDM vol. 2A, CPUID leaf 23H.
        supported.retain(|entry| entry.function != 0x23);
    }
}

/// What the table needs to know beside what KVM supports.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuidInput {
    /// vCPUs that there can be; 1 to 64.
    pub(super) cpus: u8,
    /// The TSC's frequency, where it is known and constant.
    pub(super) tsc_khz: Option<u32>,
    /// Whether KVM's local APIC timer has the deadline mode, which `KVM_GET_SUPPORTED_CPUID` does
    /// not say.
    pub(super) tsc_deadline: bool,
}

impl CpuidInput {
    /// Bits of an APIC id that tell the cores of the package apart.
    fn core_bits(self) -> u32 {
        u32::from(self.cpus.max(1))
            .next_power_of_two()
            .trailing_zeros()
    }
}

/// The guest's table for vCPU `id`, whose APIC id is the same number, made from what KVM supports.
pub(super) fn guest_table(
    supported: &[kvm_cpuid_entry2],
    input: CpuidInput,
    id: u8,
) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(supported);
    let (apic_id, cores, bits) = (u32::from(id), u32::from(input.cpus), input.core_bits());
    // As many ids as the bits can tell apart, less one: how the cache and core counts are written.
    let ids = (1 << bits) - 1;

    let mut table: Vec<kvm_cpuid_entry2> = Vec::with_capacity(supported.len() + 8);
    for entry in supported {
        let mut entry = *entry;
        match entry.function {
            1 => {
                let count = if cores > 1 { 1 << bits } else { 1 };
                entry.ebx = entry.ebx & 0xffff | count << 16 | apic_id << 24;
                entry.ecx |= ECX1_HYPERVISOR | ECX1_X2APIC;
                set(&mut entry.ecx, ECX1_TSC_DEADLINE, input.tsc_deadline);
                set(&mut entry.edx, EDX1_HTT, cores > 1);
            }
            // Deterministic cache parameters; AMD leaves the leaf reserved.
            4 if !amd && entry.eax & 0x1f != 0 => {
                entry.eax =
                    entry.eax & 0x3fff | shared_by(entry.eax, ids) << 14 | ids.min(63) << 26;
            }
            // KVM has that register on every host, AMD's processors have not: Windows refuses such a one.
            7 if amd && entry.index == 0 => set(&mut entry.edx, EDX7_ARCH_CAPABILITIES, false),
            0xb | 0x1f => {
                // KVM gives one empty entry; the levels replace it.
                if entry.index == 0 {
                    table.extend(topology(entry.function, apic_id, cores, bits));
                }
                continue;
            }
            KVM_SIGNATURE if input.tsc_khz.is_some() => {
                entry.eax = entry.eax.max(HYPERVISOR_FREQUENCIES);
            }
            HYPERVISOR_FREQUENCIES => continue,
            // NC is the number of cores less one, ApicIdCoreIdSize the bits they take.
            0x8000_0008 if amd => {
                entry.ecx = entry.ecx & !0xf0ff | bits << 12 | cores.saturating_sub(1);
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | shared_by(entry.eax, ids) << 14;
            }
            // Extended APIC id; core id, one thread; node 0 of one.
            0x8000_001e => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (apic_id, apic_id, 0, 0);
            }
            // AMD's extended topology: the older leaves say all there is.
            0x8000_0026 => continue,
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

/// APIC ids that share a cache, less one: all of the package for a third-level cache, one core for
/// the others. `eax` holds the level in bits 7 to 5.
fn shared_by(eax: u32, ids: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { ids } else { 0 }
}

/// The levels of the extended topology leaves: thread, core, and the end.
/// Intel SDM vol. 2A, CPUID leaves 0BH and 1FH.
fn topology(function: u32, apic_id: u32, cores: u32, bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index, shift, processors, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, 0, 1, THREAD),
        level(1, bits, cores, CORE),
        level(2, 0, 0, 0),
    ]
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
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host(maker: &[u8; 4]) -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0x1f, u32::from_le_bytes(*maker), 0, 0]),
            entry(1, 0, [0, 0x2a40_0800, 0, EDX1_HTT]),
            entry(4, 0, [0xfc00_4121, 0, 0, 0]),
            entry(4, 3, [0xfc0f_c163, 0, 0, 0]),
            entry(0xb, 0, [0; 4]),
            entry(KVM_SIGNATURE, 0, [0x4000_0001, 0, 0, 0]),
            entry(0x8000_0008, 0, [0x0030_3030, 0, 0x703f, 0]),
            entry(0x8000_001d, 3, [0x3c163, 0, 0, 0]),
            entry(0x8000_001e, 0, [42, 0x0115, 0x301, 0]),
            entry(0x8000_0026, 0, [1, 1, 1, 1]),
        ]
    }

    fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    const SIX: CpuidInput = CpuidInput {
        cpus: 6,
        tsc_khz: Some(2_000_000),
        tsc_deadline: true,
    };

    #[test]
    fn every_leaf_names_the_same_apic_id_and_the_same_number_of_cores() {
        let table = guest_table(&host(b"Auth"), SIX, 5);
        assert_eq!(find(&table, 1, 0).ebx, 5 << 24 | 8 << 16 | 0x0800);
        let core = find(&table, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!(find(&table, 0xb, 2).ecx, 2);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0x3005);
        let node = find(&table, 0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx), (5, 5, 0));
        assert_eq!(find(&table, 0x8000_001d, 3).eax >> 14 & 0xfff, 7);
        assert!(!table.iter().any(|entry| entry.function == 0x8000_0026));
    }

    #[test]
    fn caches_of_the_core_are_its_own_and_the_last_is_the_packages() {
        let table = guest_table(&host(b"Genu"), SIX, 0);
        let (first, third) = (find(&table, 4, 0).eax, find(&table, 4, 3).eax);
        assert_eq!([first >> 14 & 0xfff, third >> 14 & 0xfff], [0, 7]);
        assert_eq!([first >> 26, third >> 26], [7, 7]);
        // Intel's leaf 8000_0008 has nothing in ECX; it is left alone.
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0x703f);
    }

    #[test]
    fn a_register_that_only_intel_has_is_told_of_on_intel_only() {
        for (maker, reported) in [(b"Genu", EDX7_ARCH_CAPABILITIES), (b"Auth", 0)] {
            let mut host = host(maker);
            host.push(entry(7, 0, [1, 0, 0, u32::MAX]));
            host.push(entry(7, 1, [0, 0, 0, u32::MAX]));
            let table = guest_table(&host, SIX, 0);
            assert_eq!(find(&table, 7, 0).edx, !EDX7_ARCH_CAPABILITIES | reported);
            assert_eq!(find(&table, 7, 1).edx, u32::MAX);
        }
    }

    #[test]
    fn a_switch_hides_what_it_says_and_nothing_else() {
        let all = || {
            let leaves = [
                1,
                7,
                0xa,
                0x1c,
                0x23,
                0x8000_0001,
                0x8000_000a,
                0x8000_0022,
                0x8000_0008,
            ];
            let leaves = leaves.map(|function| entry(function, 0, [u32::MAX; 4]));
            let mut leaves = leaves.to_vec();
            leaves.push(entry(7, 1, [u32::MAX; 4]));
            leaves
        };
        let hidden = |nested, pmu| {
            let mut leaves = all();
            hide(&mut leaves, CpuFeatures { nested, pmu });
            leaves
        };
        assert_eq!(hidden(true, true), all());
        let plain = hidden(false, true);
        assert_eq!(find(&plain, 1, 0).ecx, !(1 << 5), "VMX");
        assert_eq!(find(&plain, 0x8000_0001, 0).ecx, !(1 << 2), "SVM");
        assert_eq!(find(&plain, 0x8000_000a, 0).eax, 0);
        assert_eq!(find(&plain, 0xa, 0).eax, u32::MAX);
        let uncounted = hidden(true, false);
        let one = find(&uncounted, 1, 0);
        assert_eq!([one.ecx, one.edx], [!(1 << 2 | 1 << 15), !(1 << 21)]);
        for leaf in [0xa, 0x1c, 0x8000_0022] {
            let leaf = find(&uncounted, leaf, 0);
            assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [0; 4]);
        }
        assert_eq!(find(&uncounted, 7, 0).edx, !(1 << 19));
        assert_eq!(find(&uncounted, 7, 1).eax, !(1 << 8));
        assert_eq!(
            find(&uncounted, 0x8000_0001, 0).ecx,
            !(1 << 23 | 1 << 24 | 1 << 28)
        );
        assert_eq!(find(&uncounted, 0x8000_000a, 0).eax, u32::MAX);
        assert!(!uncounted.iter().any(|entry| entry.function == 0x23));
        for leaves in [&plain, &uncounted] {
            assert_eq!(find(leaves, 0x8000_0008, 0), find(&all(), 0x8000_0008, 0));
        }
    }

    #[test]
    fn one_vcpu_is_no_multiprocessor_and_unknown_clocks_are_not_told() {
        let alone = CpuidInput {
            cpus: 1,
            tsc_khz: None,
            tsc_deadline: false,
        };
        let table = guest_table(&host(b"Genu"), alone, 0);
        let one = find(&table, 1, 0);
        assert_eq!((one.ebx >> 16 & 0xff, one.edx & EDX1_HTT), (1, 0));
        assert_eq!(one.ecx & ECX1_TSC_DEADLINE, 0);
        assert_eq!(find(&table, 0xb, 1).eax, 0);
        assert_eq!(find(&table, KVM_SIGNATURE, 0).eax, 0x4000_0001);
    }

    #[test]
    fn the_address_width_is_the_smaller_of_processor_and_guest() {
        assert_eq!(address_bits(&host(b"Auth")), 48);
        assert_eq!(
            address_bits(&[entry(0x8000_0008, 0, [0x0028_3030, 0, 0, 0])]),
            40
        );
        assert_eq!(
            address_bits(&[entry(0x8000_0008, 0, [0x3027, 0, 0, 0])]),
            39
        );
        assert_eq!(address_bits(&[]), 36);
    }
}
