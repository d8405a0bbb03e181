//! How many processors a VM has, what they can do, and how they are grouped.

use serde::{Deserialize, Serialize};

use super::MAX_CPUS;

/// `--cpus`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpusConfig {
    /// vCPUs running at boot, from 1 to [`MAX_CPUS`].
    pub boot: u8,
    /// vCPUs that there can be; `boot` where absent.
    pub max: Option<u8>,
    /// How those that there can be are grouped; cores of one package where absent.
    pub topology: Option<Topology>,
    /// The guest can run guests of its own (VMX or SVM), where the host's KVM lets it.
    pub nested: bool,
    /// The guest has performance counters, where the host's KVM has them for guests.
    pub pmu: bool,
    /// Each vCPU has processors of the host's to itself, and is not left when it halts or waits.
    pub dedicated: bool,
    /// What may be on a core of the host's beside a vCPU; [`CoreScheduling::Vm`] where absent, as far as the host can.
    pub core_scheduling: Option<CoreScheduling>,
    /// The host's processors that vCPUs run on; one that is not named runs on any.
    pub affinity: Vec<VcpuAffinity>,
}

/// The host's processors that one vCPU runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuAffinity {
    /// The vCPU's number, from 0 on.
    pub vcpu: u16,
    /// Numbers of processors.
    pub host_cpus: Vec<usize>,
}

/// What may be on a core of the host's at the same time as a vCPU, where cores run several threads (SMT). The kernel's
/// Documentation/admin-guide/hw-vuln/core-scheduling.rst
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoreScheduling {
    /// Threads of the same VM's: its other vCPUs, and those that serve its devices.
    Vm,
    /// No other vCPU, and no thread but what it has started itself, such as a device's and KVM's own.
    Vcpu,
    /// Anything.
    Off,
}

impl CoreScheduling {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vm, Self::Vcpu, Self::Off];

    /// Its word on the command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Vcpu => "vcpu",
            Self::Off => "off",
        }
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot: 1,
            max: None,
            topology: None,
            nested: true,
            pmu: true,
            dedicated: false,
            core_scheduling: None,
            affinity: Vec::new(),
        }
    }
}

impl CpusConfig {
    /// vCPUs that there can be.
    #[must_use]
    pub fn most(&self) -> u8 {
        self.max.unwrap_or(self.boot)
    }

    /// Whether the guest is prepared for processors that come and leave: where it was said how many there can be.
    #[must_use]
    pub fn comes_and_goes(&self) -> bool {
        self.max.is_some_and(|max| max > 1)
    }

    /// How they are grouped.
    #[must_use]
    pub fn grouped(&self) -> Topology {
        self.topology
            .unwrap_or_else(|| Topology::cores(self.most()))
    }
}

impl CpusConfig {
    /// Whether each vCPU that is placed is one that there can be, and dedicated processors are nobody else's.
    ///
    /// # Errors
    /// What is wrong, to be put behind `--cpus `
    pub(crate) fn check_places(&self) -> Result<(), String> {
        let most = u16::from(self.most());
        let mut placed = Vec::new();
        let mut taken: Vec<usize> = Vec::new();
        for VcpuAffinity { vcpu, host_cpus } in &self.affinity {
            if *vcpu >= most {
                return Err(format!(
                    "affinity=: there is no vCPU {vcpu}, only 0 to {}",
                    most - 1
                ));
            }
            if placed.contains(vcpu) {
                return Err(format!("affinity=: vCPU {vcpu} stands there twice"));
            }
            if host_cpus.is_empty() {
                return Err(format!("affinity=: vCPU {vcpu} has no processor to run on"));
            }
            placed.push(*vcpu);
            if !self.dedicated {
                continue;
            }
            if let Some(cpu) = host_cpus.iter().find(|cpu| taken.contains(cpu)) {
                return Err(format!(
                    "dedicated=on: two vCPUs have the host's processor {cpu}: give each its own in affinity="
                ));
            }
            taken.extend(host_cpus);
        }
        if self.dedicated
            && let Some(missing) = (0..most).find(|vcpu| !placed.contains(vcpu))
        {
            return Err(format!(
                "dedicated=on: vCPU {missing} has no processor of the host's: name one for each in affinity=, \
                 as in affinity=[0@[2],1@[3]]"
            ));
        }
        Ok(())
    }
}

/// How processors are grouped. No number is 0 in one that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages of the machine.
    pub packages: u16,
}

impl Topology {
    /// Cores of one thread each, in one package of one die.
    #[must_use]
    pub fn cores(cores: u8) -> Self {
        Self {
            threads_per_core: 1,
            cores_per_die: cores.max(1).into(),
            dies_per_package: 1,
            packages: 1,
        }
    }

    /// How many processors that are; none where the number is past all bounds.
    #[must_use]
    pub fn processors(self) -> Option<u32> {
        let factors = [self.cores_per_die, self.dies_per_package, self.packages];
        let threads = u32::from(self.threads_per_core);
        factors
            .into_iter()
            .try_fold(threads, |count, factor| count.checked_mul(factor.into()))
    }

    /// Bits of an APIC id that tell apart the threads of a core, the cores of a die, and the dies of a package: as many
    /// as the number needs, so that ids are left out where it is no power of two. Intel SDM vol. 3A §9.9.1; AMD APM
    /// vol. 3, Fn8000_0026.
    #[must_use]
    pub fn bits(self) -> [u32; 3] {
        [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
        ]
        .map(|count| u32::from(count.max(1)).next_power_of_two().trailing_zeros())
    }

    /// Bits of an APIC id below those of the package.
    #[must_use]
    pub fn package_bits(self) -> u32 {
        self.bits().into_iter().sum()
    }

    /// The APIC id of the processor with this number: those of a core follow one another, then the cores of a die.
    #[must_use]
    pub fn apic_id(self, processor: u8) -> u32 {
        let mut rest = u32::from(processor);
        let (mut id, mut shift) = (0, 0);
        let counts = [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
        ];
        for (count, bits) in counts.into_iter().zip(self.bits()) {
            let count = u32::from(count.max(1));
            id |= (rest % count) << shift;
            rest /= count;
            shift += bits;
        }
        id | rest << shift
    }

    /// The topology where its processors are `count`, and each has an APIC id that there can be.
    ///
    /// # Errors
    /// What is wrong, to be put behind its name
    pub(crate) fn check(self, count: u8) -> Result<(), TopologyError> {
        if self.processors() != Some(count.into()) {
            return Err(TopologyError::Count { count });
        }
        let last = self.apic_id(count.saturating_sub(1));
        if last >= MAX_CPUS.into() {
            return Err(TopologyError::Ids { last });
        }
        Ok(())
    }
}

/// Why processors cannot be grouped so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// threads, cores, dies and packages, multiplied, are not {count}, ...
    #[error(
        "threads, cores, dies and packages, multiplied, are not {count}, which is how many processors there can be (max)"
    )]
    Count {
        /// Processors that there can be.
        count: u8,
    },
    /// the last processor's APIC id would be {last}, ...
    #[error(
        "the last processor's APIC id would be {last}, but KVM's IOAPIC sends to ids up to {} only: a number that is \
         no power of two leaves ids out, so take another, or fewer",
        MAX_CPUS - 1
    )]
    Ids {
        /// The id.
        last: u32,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn topology([threads, cores, dies, packages]: [u16; 4]) -> Topology {
        Topology {
            threads_per_core: threads,
            cores_per_die: cores,
            dies_per_package: dies,
            packages,
        }
    }

    #[test]
    fn dedicated_processors_are_one_vcpus_each_and_named_for_every_vcpu() {
        let place = |vcpu, host_cpus: &[usize]| VcpuAffinity {
            vcpu,
            host_cpus: host_cpus.to_vec(),
        };
        let check = |dedicated, affinity: Vec<VcpuAffinity>| {
            let config = CpusConfig {
                boot: 2,
                dedicated,
                affinity,
                ..CpusConfig::default()
            };
            config.check_places()
        };
        assert_eq!(check(false, vec![]), Ok(()));
        assert_eq!(check(false, vec![place(0, &[1]), place(1, &[1])]), Ok(()));
        assert_eq!(check(true, vec![place(0, &[1, 2]), place(1, &[3])]), Ok(()));
        for (dedicated, affinity, words) in [
            (false, vec![place(2, &[1])], "no vCPU 2"),
            (false, vec![place(1, &[1]), place(1, &[2])], "twice"),
            (false, vec![place(1, &[])], "no processor to run on"),
            (true, vec![place(0, &[1]), place(1, &[2, 1])], "processor 1"),
            (true, vec![place(1, &[1])], "vCPU 0 has no processor"),
        ] {
            let why = check(dedicated, affinity).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn ids_have_holes_where_a_level_is_no_power_of_two() {
        let ids = |levels, count: u8| {
            let all = topology(levels);
            (0..count).map(|cpu| all.apic_id(cpu)).collect::<Vec<_>>()
        };
        assert_eq!(ids([1, 6, 1, 1], 6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(
            ids([2, 3, 1, 2], 12),
            [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
        );
        assert_eq!(ids([1, 1, 3, 2], 6), [0, 1, 2, 4, 5, 6]);
        assert_eq!(Topology::cores(255).apic_id(254), 254);
    }

    #[test]
    fn a_topology_of_another_number_or_without_ids_for_all_is_refused() {
        let check = |levels, count| topology(levels).check(count).map_err(|why| why.to_string());
        assert_eq!(check([2, 2, 1, 1], 4), Ok(()));
        assert!(check([2, 2, 1, 1], 3).unwrap_err().contains("are not 3"));
        assert!(check([0, 4, 1, 1], 4).is_err());
        assert!(check([u16::MAX; 4], 4).is_err());
        // 3 threads take two bits, so the 75th core has id 74 * 4.
        assert!(check([3, 75, 1, 1], 225).unwrap_err().contains("298"));
        assert_eq!(check([1, 255, 1, 1], 255), Ok(()));
    }

    proptest! {
        #[test]
        fn ids_ascend_and_those_of_a_group_differ_only_below_its_bits(
            levels in [1_u16..5, 1_u16..7, 1_u16..4, 1_u16..4]
        ) {
            let all = topology(levels);
            let Some(count) = all.processors().and_then(|count| u8::try_from(count).ok()) else {
                return Ok(());
            };
            let ids: Vec<_> = (0..count).map(|cpu| all.apic_id(cpu)).collect();
            prop_assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
            let [threads, cores, dies] = all.bits();
            let mut of = 1_usize;
            for (level, shift) in [
                (levels[0], threads),
                (levels[1], threads + cores),
                (levels[2], threads + cores + dies),
            ] {
                of *= usize::from(level);
                let groups: Vec<_> = ids.chunks(of).map(|group| group[0] >> shift).collect();
                for (group, expected) in ids.chunks(of).zip(&groups) {
                    prop_assert!(group.iter().all(|id| id >> shift == *expected));
                }
                prop_assert!(groups.windows(2).all(|pair| pair[0] < pair[1]));
            }
        }
    }
}
