//! What a guest reads in CPUID.

use proptest::prelude::*;

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
    topology: Topology {
        threads_per_core: 1,
        cores_per_die: 6,
        dies_per_package: 1,
        packages: 1,
    },
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
        let features = CpuFeatures {
            nested,
            pmu,
            dedicated: false,
        };
        hide(&mut leaves, features);
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
        topology: Topology::cores(1),
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

/// What an operating system makes of a vCPU's leaves: package, die where a leaf has it, core and thread, each as the
/// number that its leaf gives.
fn placed(table: &[kvm_cpuid_entry2], function: u32) -> Vec<(u32, u32)> {
    let mut levels = Vec::new();
    for index in 0.. {
        let level = find(table, function, index);
        let kind = level.ecx >> 8;
        if kind == 0 {
            break;
        }
        levels.push((kind, level.edx >> level.eax));
    }
    levels
}

#[test]
fn a_guest_with_processors_of_its_own_is_told_so() {
    for dedicated in [false, true] {
        let mut leaves = vec![entry(KVM_FEATURES, 0, [1 << 24, 0, 0, 0])];
        let features = CpuFeatures {
            dedicated,
            ..CpuFeatures::default()
        };
        hide(&mut leaves, features);
        let leaf = find(&leaves, KVM_FEATURES, 0);
        assert_eq!((leaf.eax, leaf.edx), (1 << 24, u32::from(dedicated)));
    }
}

proptest! {
    #[test]
    fn whatever_the_topology_all_leaves_agree_on_who_shares_what(
        [threads, cores, dies, packages] in [1_u16..4, 1_u16..7, 1_u16..4, 1_u16..4],
        amd: bool,
    ) {
        let topology = Topology {
            threads_per_core: threads,
            cores_per_die: cores,
            dies_per_package: dies,
            packages,
        };
        let Some(count) = topology.processors().and_then(|count| u8::try_from(count).ok()) else {
            return Ok(());
        };
        // Others are refused.
        prop_assume!(topology.check(count).is_ok());
        let input = CpuidInput { topology, ..SIX };
        let mut host = host(if amd { b"Auth" } else { b"Genu" });
        host.push(entry(0x1f, 0, [0; 4]));
        let tables: Vec<_> = (0..count)
            .map(|cpu| guest_table(&host, input, topology.apic_id(cpu)))
            .collect();
        let mut ids = Vec::new();
        for (cpu, table) in (0_u32..).zip(&tables) {
            let id = topology.apic_id(cpu as u8);
            ids.push(id);
            // Each leaf has the vCPU's own id (K2).
            prop_assert_eq!(find(table, 1, 0).ebx >> 24, id);
            prop_assert_eq!(find(table, 0x8000_001e, 0).eax, id);
            for function in [0xb, 0x1f] {
                prop_assert!(table.iter().filter(|leaf| leaf.function == function).all(|leaf| leaf.edx == id));
            }
            let (core, die, package) = (
                cpu / u32::from(threads),
                cpu / u32::from(threads * cores),
                cpu / u32::from(threads * cores * dies),
            );
            let mut expected = vec![(1, core), (2, package)];
            let rank = |kind: u32, function: u32| {
                // The groups of this level, numbered in the order in which they come.
                let all: Vec<_> = tables.iter().map(|table| {
                    let levels = placed(table, function);
                    levels.iter().find(|level| level.0 == kind).unwrap().1
                }).collect();
                let mut distinct = all.clone();
                distinct.dedup();
                distinct.iter().position(|group| *group == all[cpu as usize]).unwrap() as u32
            };
            for (kind, group) in &expected {
                prop_assert_eq!(rank(*kind, 0xb), *group);
            }
            if dies > 1 {
                expected = vec![(1, core), (2, die), (5, package)];
            }
            for (kind, group) in &expected {
                prop_assert_eq!(rank(*kind, 0x1f), *group);
            }
            // The third cache is shared by the ids of the die, the first by those of the core.
            let cache = |leaf, index| find(table, leaf, index).eax >> 14 & 0xfff;
            let bits = topology.bits();
            if amd {
                prop_assert_eq!(cache(0x8000_001d, 3), (1 << (bits[0] + bits[1])) - 1);
                let size = find(table, 0x8000_0008, 0).ecx;
                prop_assert_eq!(size & 0xff, u32::from(threads * cores * dies) - 1);
                prop_assert_eq!(size >> 12 & 0xf, topology.package_bits());
                let node = find(table, 0x8000_001e, 0);
                prop_assert_eq!(node.ebx >> 8 & 0xff, u32::from(threads) - 1);
                let known = table.iter().any(|leaf| leaf.function == 0x8000_0026);
                prop_assert_eq!(known, dies > 1);
            } else {
                prop_assert_eq!(cache(4, 3), (1 << (bits[0] + bits[1])) - 1);
                prop_assert_eq!(cache(4, 0), (1 << bits[0]) - 1);
            }
            prop_assert_eq!(find(table, 1, 0).ebx >> 16 & 0xff, (1 << topology.package_bits()).min(255));
            prop_assert_eq!(find(table, 1, 0).edx & EDX1_HTT != 0, threads * cores * dies > 1);
        }
        ids.dedup();
        prop_assert_eq!(ids.len(), usize::from(count));
    }
}
