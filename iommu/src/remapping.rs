//! Whether the host remaps interrupts, without which a device can forge any of them.

use std::fs;

use crate::SysRoot;

/// Whether the host remaps interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remapping {
    /// Interrupts are remapped.
    On,
    /// Interrupts are not remapped.
    Off,
    /// The host does not tell.
    Unknown,
}

impl Remapping {
    /// The kernel names the interrupt chips behind a remapping unit with `IR-` in front
    /// (drivers/iommu/intel/irq_remapping.c, drivers/iommu/amd/iommu.c).
    #[must_use]
    pub fn read(paths: &SysRoot) -> Self {
        let text = fs::read(paths.proc.join("interrupts")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let has = |word: &str| text.split_whitespace().any(|w| w.starts_with(word));
        if has("IR-") {
            Self::On
        } else if has("IO-APIC") || has("PCI-MSI") {
            Self::Off
        } else {
            Self::Unknown
        }
    }

    /// Whether `module` lends devices though their interrupts are not remapped.
    #[must_use]
    pub fn is_waived(paths: &SysRoot, module: &str) -> bool {
        fs::read(paths.allow_unsafe_interrupts(module))
            .is_ok_and(|value| matches!(value.trim_ascii(), b"Y" | b"1"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn made_up() -> (tempfile::TempDir, SysRoot) {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot {
            sys: root.path().join("sys"),
            proc: root.path().join("proc"),
            ..SysRoot::default()
        };
        (root, paths)
    }

    fn write(path: &Path, bytes: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn the_names_of_interrupt_chips_say_whether_interrupts_are_remapped() {
        let (_root, paths) = made_up();
        assert_eq!(Remapping::read(&paths), Remapping::Unknown);
        for (interrupts, is) in [
            (&b""[..], Remapping::Unknown),
            (
                b" 24:  0  IR-PCI-MSI-0000:00:1f.2  0-edge  ahci\n",
                Remapping::On,
            ),
            (
                b" 24:  0  PCI-MSI-0000:00:1f.2  0-edge  ahci\n",
                Remapping::Off,
            ),
            (
                b" 2:  0  IO-APIC  2-edge  timer\n 24:  0  IR-PCI-MSI  \xff\n",
                Remapping::On,
            ),
        ] {
            write(&paths.proc.join("interrupts"), interrupts);
            assert_eq!(Remapping::read(&paths), is);
        }
    }

    #[test]
    fn devices_are_lent_without_remapping_where_the_module_s_parameter_is_set() {
        let (_root, paths) = made_up();
        assert!(!Remapping::is_waived(&paths, "iommufd"));
        for (value, is) in [("Y\n", true), ("1\n", true), ("N\n", false), ("", false)] {
            write(&paths.allow_unsafe_interrupts("iommufd"), value.as_bytes());
            assert_eq!(Remapping::is_waived(&paths, "iommufd"), is, "{value:?}");
            assert!(!Remapping::is_waived(&paths, "vfio_iommu_type1"));
        }
    }
}
