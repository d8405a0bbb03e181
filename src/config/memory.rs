//! What a VM's RAM is to be.

use serde::{Deserialize, Serialize};

/// What RAM that can be plugged comes in multiples of: the pieces in which Linux adds memory on x86_64.
/// Linux, arch/x86/include/asm/sparsemem.h, `SECTION_SIZE_BITS`.
const PLUGGABLE_STEP: u64 = 128 << 20;
/// Bytes of the smallest block by which RAM comes and goes: one of the IOMMU's and the processors' larger pages.
const SMALLEST_BLOCK: u64 = 2 << 20;
/// The most blocks of a VM. Each is a mapping of its own for devices, of which the kernel's type1 container takes 65535
/// where nothing else is said (linux/vfio.h, `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`): BARs have the rest.
pub const MOST_BLOCKS: u64 = 32768;

/// `--memory`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Bytes of RAM.
    pub size: u64,
    /// Map RAM shared, so that another process can map it. It is so as well where a device that the VM starts with
    /// needs it: [`VmConfig::shares_memory`](super::VmConfig::shares_memory).
    pub shared: bool,
    /// Take RAM from hugetlbfs.
    pub hugepages: bool,
    /// Bytes of a huge page; the host's default where absent.
    pub hugepage_size: Option<u64>,
    /// Touch all RAM before the guest starts. Absent: done when devices are assigned, for the IOMMU
    /// pins it all anyway.
    pub prefault: Option<bool>,
    /// Ask for transparent huge pages.
    pub thp: bool,
    /// Bytes of RAM that can come while the guest runs, beside `size`.
    pub hotplug_size: Option<u64>,
    /// How they come.
    pub hotplug_method: HotplugMethod,
    /// Bytes of `hotplug_size` that the guest is to have from its start on.
    pub hotplugged_size: Option<u64>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: None,
            thp: true,
            hotplug_size: None,
            hotplug_method: HotplugMethod::default(),
            hotplugged_size: None,
        }
    }
}

/// By what RAM is added to a guest that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// ACPI's memory devices. None of them is served yet: such a VM keeps the RAM that it starts with.
    #[default]
    Acpi,
    /// virtio-mem.
    VirtioMem,
}

impl HotplugMethod {
    /// Its word on the command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Acpi => "acpi",
            Self::VirtioMem => "virtio-mem",
        }
    }
}

/// RAM that cannot come and go so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidHotplug {
    /// hotplug_size={size} is no multiple of {step} bytes
    #[error(
        "hotplug_size={size}: it must be a multiple of {step} bytes, in which the guest's kernel has memory come"
    )]
    Uneven {
        /// What was asked for, in bytes.
        size: u64,
        /// What it has to be a multiple of.
        step: u64,
    },
    /// hotplugged_size={size} is more than hotplug_size={most}, or no multiple of {block} bytes
    #[error(
        "hotplugged_size={size}: it must be a multiple of {block} bytes, and no more than hotplug_size={most}"
    )]
    Plugged {
        /// What was asked for, in bytes.
        size: u64,
        /// Bytes that can be plugged.
        most: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// hotplugged_size= needs hotplug_size= and hotplug_method=virtio-mem beside it
    #[error("hotplugged_size= needs hotplug_size= and hotplug_method=virtio-mem beside it")]
    Alone,
    /// hotplug_size= with hotplug_method=acpi
    #[error(
        "hotplug_size= with hotplug_method=acpi, which is the default: Busway cannot do this yet; say \
         hotplug_method=virtio-mem beside it"
    )]
    Acpi,
    /// hotplug_size= beside hugepages=on
    #[error(
        "hotplug_size= beside hugepages=on: RAM that comes by virtio-mem is made of ordinary pages, and huge ones are \
         reserved at the start: leave one of the two out"
    )]
    HugePages,
}

impl MemoryConfig {
    /// Bytes of RAM that can be plugged while the guest runs; nothing where there are none.
    #[must_use]
    pub fn pluggable(&self) -> Option<u64> {
        let size = self.hotplug_size.filter(|size| *size > 0)?;
        (self.hotplug_method == HotplugMethod::VirtioMem).then_some(size)
    }

    /// That nobody is promised RAM that cannot come. Cloud Hypervisor's clients say of every VM that it can, and most never
    /// have any come: to them it is kept and shown.
    ///
    /// # Errors
    /// [`InvalidHotplug::Acpi`]
    pub fn refuse_acpi(&self) -> Result<(), InvalidHotplug> {
        match (self.hotplug_size, self.hotplug_method) {
            (Some(1..), HotplugMethod::Acpi) => Err(InvalidHotplug::Acpi),
            _ => Ok(()),
        }
    }

    /// Bytes of RAM that the guest can have at most.
    #[must_use]
    pub fn most(&self) -> u64 {
        self.size.saturating_add(self.pluggable().unwrap_or(0))
    }

    /// Bytes of a block by which RAM comes and goes: a power of two, so large that there are [`MOST_BLOCKS`] at most.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        let size = self.pluggable().unwrap_or(0);
        let mut block = SMALLEST_BLOCK;
        while size.checked_div(block).unwrap_or(0) > MOST_BLOCKS {
            block = block.saturating_mul(2);
        }
        block
    }

    /// That what can be plugged can be.
    ///
    /// # Errors
    /// [`InvalidHotplug`]
    pub(super) fn validate_hotplug(&self) -> Result<(), InvalidHotplug> {
        let plugged = self.hotplugged_size.filter(|size| *size > 0);
        let Some(size) = self.pluggable() else {
            return match plugged {
                Some(_) => Err(InvalidHotplug::Alone),
                None => Ok(()),
            };
        };
        if self.hugepages {
            return Err(InvalidHotplug::HugePages);
        }
        let block = self.block_size();
        let step = block.max(PLUGGABLE_STEP);
        if !size.is_multiple_of(step) {
            return Err(InvalidHotplug::Uneven { size, step });
        }
        match plugged {
            Some(plugged) if plugged > size || !plugged.is_multiple_of(block) => {
                Err(InvalidHotplug::Plugged {
                    size: plugged,
                    most: size,
                    block,
                })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pluggable(size: u64) -> MemoryConfig {
        MemoryConfig {
            hotplug_size: Some(size),
            hotplug_method: HotplugMethod::VirtioMem,
            ..MemoryConfig::default()
        }
    }

    #[test]
    fn blocks_are_as_small_as_their_number_allows() {
        for (size, block) in [
            (1 << 30, 2 << 20),
            (64 << 30, 2 << 20),
            (65 << 30, 4 << 20),
            (1 << 40, 32 << 20),
            (8 << 40, 256 << 20),
        ] {
            let memory = pluggable(size);
            assert_eq!(memory.block_size(), block, "{size}");
            assert!(size / memory.block_size() <= MOST_BLOCKS);
            assert_eq!(memory.most(), memory.size + size);
        }
        assert!(pluggable(u64::MAX).block_size().is_power_of_two());
        let acpi = MemoryConfig {
            hotplug_method: HotplugMethod::Acpi,
            ..pluggable(1 << 30)
        };
        assert_eq!((acpi.pluggable(), acpi.most()), (None, acpi.size));
        assert_eq!(acpi.refuse_acpi(), Err(InvalidHotplug::Acpi));
        assert_eq!(pluggable(1 << 30).refuse_acpi(), Ok(()));
        assert_eq!(MemoryConfig::default().refuse_acpi(), Ok(()));
        assert_eq!(pluggable(0).pluggable(), None);
    }

    #[test]
    fn what_can_never_be_plugged_is_refused() {
        pluggable(1 << 30).validate_hotplug().unwrap();
        MemoryConfig::default().validate_hotplug().unwrap();
        let uneven = pluggable((1 << 30) + (2 << 20)).validate_hotplug();
        assert!(matches!(
            uneven,
            Err(InvalidHotplug::Uneven {
                step: 0x800_0000,
                ..
            })
        ));
        let uneven = pluggable((8 << 40) + (128 << 20)).validate_hotplug();
        assert!(matches!(
            uneven,
            Err(InvalidHotplug::Uneven {
                step: 0x1000_0000,
                ..
            })
        ));
        for (plugged, refused) in [(0, false), (2 << 20, false), (1, true), (2 << 30, true)] {
            let memory = MemoryConfig {
                hotplugged_size: Some(plugged),
                ..pluggable(1 << 30)
            };
            assert_eq!(memory.validate_hotplug().is_err(), refused, "{plugged}");
        }
        let alone = MemoryConfig {
            hotplugged_size: Some(1 << 30),
            ..MemoryConfig::default()
        };
        assert_eq!(alone.validate_hotplug(), Err(InvalidHotplug::Alone));
        let huge = MemoryConfig {
            hugepages: true,
            ..pluggable(1 << 30)
        };
        assert_eq!(huge.validate_hotplug(), Err(InvalidHotplug::HugePages));
    }
}
