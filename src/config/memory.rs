//! What a VM's RAM is to be.

use serde::{Deserialize, Serialize};

/// What RAM that can be plugged comes in multiples of: the pieces in which Linux adds memory on x86_64.
/// Linux, arch/x86/include/asm/sparsemem.h, `SECTION_SIZE_BITS`.
const PLUGGABLE_STEP: u64 = 128 << 20;
/// Bytes of the smallest block by which RAM comes and goes by virtio-mem: one of the IOMMU's and the processors' larger
/// pages.
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
    /// ACPI's memory devices: somebody has it come, in whole blocks of 128 MiB, and it stays.
    #[default]
    Acpi,
    /// virtio-mem: the guest's driver plugs and unplugs blocks.
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
    /// hotplugged_size= needs hotplug_size= beside it, of 128 MiB or more
    #[error("hotplugged_size= needs hotplug_size= beside it, of 128 MiB or more")]
    Alone,
}

impl MemoryConfig {
    /// Bytes of RAM that can be plugged while the guest runs; nothing where there are none. By ACPI only whole blocks come,
    /// of what Cloud Hypervisor's clients say in any number of bytes.
    #[must_use]
    pub fn pluggable(&self) -> Option<u64> {
        let asked = self.hotplug_size?;
        let size = match self.hotplug_method {
            HotplugMethod::Acpi => asked
                .checked_rem(self.block_size())
                .map(|odd| asked - odd)?,
            HotplugMethod::VirtioMem => asked,
        };
        (size > 0).then_some(size)
    }

    /// Whether RAM comes by a virtio device, where it comes.
    #[must_use]
    pub fn comes_by_virtio(&self) -> bool {
        self.hotplug_method == HotplugMethod::VirtioMem
    }

    /// Bytes of RAM that the guest has from its start on, with those that have come by ACPI in an earlier life: what Cloud
    /// Hypervisor's clients read in `memory.size`, and ask for more than.
    #[must_use]
    pub fn at_start(&self) -> u64 {
        let plugged = self.hotplugged_size.filter(|_| !self.comes_by_virtio());
        self.size.saturating_add(plugged.unwrap_or(0))
    }

    /// Bytes of a block by which RAM comes and goes: a power of two, so large that there are [`MOST_BLOCKS`] at most, and
    /// that it is a whole number of the huge pages that were said.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        BlockOf {
            acpi: !self.comes_by_virtio(),
            huge_page: self.hugepage_size.filter(|_| self.hugepages),
            total: self.hotplug_size.unwrap_or(0),
        }
        .size()
    }

    /// That what can be plugged can be.
    ///
    /// # Errors
    /// [`InvalidHotplug`]
    pub(super) fn validate_hotplug(&self) -> Result<(), InvalidHotplug> {
        check_plugged(self.pluggable(), self.hotplugged_size, self.block_size())
    }
}

/// What the size of blocks follows from.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockOf {
    /// They come by ACPI.
    pub(super) acpi: bool,
    /// Bytes of the huge pages that they are said to be made of.
    pub(super) huge_page: Option<u64>,
    /// Bytes of all that can come to the VM.
    pub(super) total: u64,
}

impl BlockOf {
    /// Bytes of a block: a power of two.
    pub(super) fn size(self) -> u64 {
        let least = match self.acpi {
            true => PLUGGABLE_STEP,
            false => SMALLEST_BLOCK,
        };
        // What is no power of two is no page's size, which is found out with the host's.
        let page = self.huge_page.filter(|page| page.is_power_of_two());
        let mut block = least.max(page.unwrap_or(0));
        while self.total.checked_div(block).unwrap_or(0) > MOST_BLOCKS {
            block = block.saturating_mul(2);
        }
        block
    }
}

/// That `size` bytes can come in blocks of `block` bytes, and that `plugged` of them can be there from the start on.
///
/// # Errors
/// [`InvalidHotplug`]
pub(super) fn check_plugged(
    size: Option<u64>,
    plugged: Option<u64>,
    block: u64,
) -> Result<(), InvalidHotplug> {
    let plugged = plugged.filter(|size| *size > 0);
    let Some(size) = size else {
        return match plugged {
            Some(_) => Err(InvalidHotplug::Alone),
            None => Ok(()),
        };
    };
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

    fn by_acpi(size: u64) -> MemoryConfig {
        MemoryConfig {
            hotplug_method: HotplugMethod::Acpi,
            ..pluggable(size)
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
        }
        assert!(pluggable(u64::MAX).block_size().is_power_of_two());
        assert!(by_acpi(u64::MAX).block_size().is_power_of_two());
        assert_eq!(pluggable(0).pluggable(), None);
        // Whole huge pages, of what can be one.
        for (page, block) in [(2 << 20, 2 << 20), (1 << 30, 1 << 30), (3 << 30, 2 << 20)] {
            let memory = MemoryConfig {
                hugepages: true,
                hugepage_size: Some(page),
                ..pluggable(4 << 30)
            };
            assert_eq!(memory.block_size(), block, "{page}");
        }
    }

    #[test]
    fn by_acpi_whole_blocks_of_128_mib_come_of_whatever_a_client_says() {
        const STEP: u64 = 128 << 20;
        for (said, comes) in [
            (0, None),
            (STEP - 1, None),
            (STEP, Some(STEP)),
            (3 * STEP + 4096, Some(3 * STEP)),
            (4 << 40, Some(4 << 40)),
        ] {
            let memory = by_acpi(said);
            assert_eq!((memory.pluggable(), memory.block_size()), (comes, STEP));
            memory.validate_hotplug().unwrap();
        }
        let plugged = |bytes| MemoryConfig {
            hotplugged_size: Some(bytes),
            ..by_acpi(3 * STEP)
        };
        plugged(2 * STEP).validate_hotplug().unwrap();
        for wrong in [STEP / 2, 4 * STEP] {
            let refused = plugged(wrong).validate_hotplug();
            assert!(matches!(refused, Err(InvalidHotplug::Plugged { .. })));
        }
        let size = plugged(2 * STEP).size;
        assert_eq!(plugged(2 * STEP).at_start(), size + 2 * STEP);
        assert_eq!(by_acpi(STEP).at_start(), size);
        let other = MemoryConfig {
            hotplugged_size: Some(STEP),
            ..pluggable(STEP)
        };
        assert_eq!(other.at_start(), size);
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
        huge.validate_hotplug().unwrap();
    }
}
