//! How CPUID says which package, die and core a processor is of.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::Topology;

/// Types of levels of leaves 0BH and 1FH. Intel SDM vol. 2A, CPUID, leaf 1FH.
const THREAD: u32 = 1;
const CORE: u32 = 2;
const DIE: u32 = 5;
/// The leaf that knows more levels than threads and cores.
const EXTENDED: u32 = 0x1f;

/// AMD's extended topology, and its levels. AMD APM vol. 3, Fn8000_0026.
const AMD_LEVELS: u32 = 0x8000_0026;
const AMD_CORE: u32 = 1;
const AMD_COMPLEX: u32 = 2;
const AMD_DIE: u32 = 3;
const AMD_SOCKET: u32 = 4;

/// A processor among the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grouping {
    apic_id: u32,
    /// Processors of a core, of a die, and of a package.
    of: [u32; 3],
    /// Bits of an APIC id below those of the core, of the die, and of the package.
    below: [u32; 3],
}

impl Grouping {
    pub(super) fn of(topology: Topology, apic_id: u32) -> Self {
        let [threads, cores, dies] = topology.bits();
        let core = u32::from(topology.threads_per_core);
        let die = core * u32::from(topology.cores_per_die);
        Self {
            apic_id,
            of: [core, die, die * u32::from(topology.dies_per_package)],
            below: [threads, threads + cores, threads + cores + dies],
        }
    }

    /// Whether a package has more than one processor.
    pub(super) fn is_shared(self) -> bool {
        self.of[2] > 1
    }

    /// Leaf 1, EBX: how many ids a package has in bits 16 to 23, the initial APIC id in 24 to 31.
    pub(super) fn basic(self) -> u32 {
        let ids = (1_u32 << self.below[2]).min(0xff);
        ids << 16 | self.apic_id << 24
    }

    /// Ids that share a cache, less one: those of a die for one of the third level, those of a core for the others.
    /// `eax` holds the level in bits 5 to 7. Intel SDM vol. 2A, CPUID leaf 04H; AMD APM vol. 3, Fn8000_001D.
    pub(super) fn sharers(self, eax: u32) -> u32 {
        let bits = match eax >> 5 & 7 {
            3.. => self.below[1],
            _ => self.below[0],
        };
        (1 << bits) - 1
    }

    /// Leaf 4, EAX bits 26 to 31: ids for cores of a package, less one.
    pub(super) fn core_ids(self) -> u32 {
        let ids = 1_u32 << (self.below[2] - self.below[0]);
        (ids - 1).min(63)
    }

    /// Fn8000_0008, ECX: NC, the package's processors less one, and ApicIdCoreIdSize, the bits that they take.
    pub(super) fn size(self) -> u32 {
        self.below[2] << 12 | self.of[2].saturating_sub(1).min(0xff)
    }

    /// Fn8000_001E: the extended APIC id; the core's id, and its threads less one; the package's node, of which it has
    /// one.
    pub(super) fn extended_id(self) -> [u32; 4] {
        let core = self.apic_id >> self.below[0] & 0xff;
        let threads = self.of[0].saturating_sub(1) & 0xff;
        let node = self.apic_id >> self.below[2] & 0xff;
        [self.apic_id, threads << 8 | core, node, 0]
    }

    /// Leaf 0BH or 1FH: threads, cores, in the latter dies where a package has several, and the end. Intel SDM vol. 2A,
    /// CPUID leaves 0BH and 1FH.
    pub(super) fn levels(self, function: u32) -> Vec<kvm_cpuid_entry2> {
        let [core, die, package] = self.of;
        let [below_core, below_die, below_package] = self.below;
        let mut levels = vec![(THREAD, below_core, core)];
        if function == EXTENDED && package > die {
            levels.push((CORE, below_die, die));
            levels.push((DIE, below_package, package));
        } else {
            // What lies above cores is not to be told apart by the older leaf but for the package.
            levels.push((CORE, below_package, package));
        }
        self.entries(function, &levels)
    }

    /// Fn8000_0026: cores, complexes, which are as the dies, dies, and the socket.
    pub(super) fn amd_levels(self) -> Vec<kvm_cpuid_entry2> {
        let [core, die, package] = self.of;
        let [below_core, below_die, below_package] = self.below;
        let levels = [
            (AMD_CORE, below_core, core),
            (AMD_COMPLEX, below_die, die),
            (AMD_DIE, below_die, die),
            (AMD_SOCKET, below_package, package),
        ];
        self.entries(AMD_LEVELS, &levels)
    }

    /// A subleaf for each level (type, bits of an id below the next level's, processors), and one that ends them.
    fn entries(self, function: u32, levels: &[(u32, u32, u32)]) -> Vec<kvm_cpuid_entry2> {
        let end = (0, 0, 0);
        let levels = levels.iter().chain([&end]);
        (0..)
            .zip(levels)
            .map(|(index, (kind, shift, processors))| kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: *shift,
                ebx: *processors,
                ecx: kind << 8 | index,
                edx: self.apic_id,
                ..Default::default()
            })
            .collect()
    }
}
