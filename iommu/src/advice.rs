//! Why no IOMMU translates for a device, and what to do about it.

use std::fmt;
use std::fs;

use crate::SysRoot;

/// What keeps the IOMMU from being used, as far as the host tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuAdvice {
    /// An Intel processor, and the firmware's tables have no DMAR.
    IntelFirmware,
    /// An Intel processor, and the kernel was not told to use its IOMMU.
    IntelParameter,
    /// An AMD processor, and the firmware's tables have no IVRS.
    AmdFirmware,
    /// An AMD processor, and the kernel was told not to use its IOMMU.
    AmdParameter,
    /// A virtual machine, whose hypervisor gives it no IOMMU.
    VirtualMachine,
    /// The IOMMU is on, but this device is not behind it.
    NotBehind,
    /// Nothing stands out.
    Unknown,
}

impl IommuAdvice {
    /// Looks at processor, firmware tables and the kernel's command line.
    #[must_use]
    pub fn read(paths: &SysRoot) -> Self {
        let has_unit = fs::read_dir(paths.sys.join("class/iommu"))
            .is_ok_and(|mut units| units.next().is_some());
        if has_unit {
            return Self::NotBehind;
        }
        let text = |name: &str| fs::read(paths.proc.join(name)).unwrap_or_default();
        let (processor, parameters) = (text("cpuinfo"), text("cmdline"));
        let processor = String::from_utf8_lossy(&processor);
        let parameters = String::from_utf8_lossy(&parameters);
        let tables = paths.sys.join("firmware/acpi/tables");
        let table = |name: &str| tables.join(name).exists();
        let says = |key, value| says(&parameters, key, value);
        let is_virtual = processor
            .lines()
            .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
            .is_some_and(|(_, flags)| flags.split_whitespace().any(|flag| flag == "hypervisor"));
        if is_virtual && !table("DMAR") && !table("IVRS") {
            return Self::VirtualMachine;
        }
        if processor.contains("GenuineIntel") {
            match (table("DMAR"), says("intel_iommu", "on")) {
                (false, _) => Self::IntelFirmware,
                (true, false) => Self::IntelParameter,
                (true, true) => Self::Unknown,
            }
        } else if processor.contains("AuthenticAMD") || processor.contains("HygonGenuine") {
            match (
                table("IVRS"),
                says("amd_iommu", "off") || says("iommu", "off"),
            ) {
                (false, _) => Self::AmdFirmware,
                (true, true) => Self::AmdParameter,
                (true, false) => Self::Unknown,
            }
        } else {
            Self::Unknown
        }
    }
}

/// A change to the kernel's command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterChange {
    /// To be added.
    Add(&'static str),
    /// To be removed.
    Remove(&'static str),
}

impl IommuAdvice {
    /// What to change of the kernel's command line, where that is (part of) it.
    #[must_use]
    pub fn parameter(self) -> Option<ParameterChange> {
        match self {
            Self::IntelFirmware | Self::IntelParameter => {
                Some(ParameterChange::Add("intel_iommu=on"))
            }
            Self::AmdParameter => Some(ParameterChange::Remove("amd_iommu=off")),
            Self::AmdFirmware | Self::VirtualMachine | Self::NotBehind | Self::Unknown => None,
        }
    }
}

/// Whether the kernel's command line has `key=…,value,…`.
fn says(parameters: &str, key: &str, value: &str) -> bool {
    parameters
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .any(|(k, values)| k == key && values.split(',').any(|v| v == value))
}

impl fmt::Display for IommuAdvice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IntelFirmware => {
                "the firmware offers no IOMMU: turn VT-d on in its set-up, and boot the kernel with \
                 intel_iommu=on"
            }
            Self::IntelParameter => "boot the kernel with the parameter intel_iommu=on",
            Self::AmdFirmware => {
                "the firmware offers no IOMMU: turn AMD-Vi (called IOMMU there) on in its set-up"
            }
            Self::AmdParameter => {
                "boot the kernel without the parameter amd_iommu=off (or iommu=off)"
            }
            Self::VirtualMachine => {
                "this is a virtual machine without an IOMMU: have whoever runs it give it one (QEMU: \
                 -device intel-iommu,intremap=on or amd-iommu; libvirt: <iommu model='intel'/>)"
            }
            Self::NotBehind => {
                "the host's IOMMU is on, but this device is not behind it, so it cannot be given away"
            }
            Self::Unknown => {
                "turn the IOMMU on in the firmware's set-up, and look what the kernel says of it: \
                 dmesg | grep -i iommu"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(processor: &str, table: Option<&str>, parameters: &str) -> IommuAdvice {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        let tables = root.sys.join("firmware/acpi/tables");
        fs::create_dir_all(&tables).unwrap();
        fs::create_dir_all(&root.proc).unwrap();
        if let Some(table) = table {
            fs::write(tables.join(table), "").unwrap();
        }
        fs::write(
            root.proc.join("cpuinfo"),
            format!("vendor_id\t: {processor}\n"),
        )
        .unwrap();
        fs::write(root.proc.join("cmdline"), parameters).unwrap();
        IommuAdvice::read(&root)
    }

    #[test]
    fn the_advice_is_for_this_processor_and_these_parameters() {
        use IommuAdvice::*;
        let intel = "GenuineIntel";
        assert_eq!(advice(intel, None, ""), IntelFirmware);
        assert_eq!(advice(intel, Some("DMAR"), "quiet"), IntelParameter);
        assert_eq!(advice(intel, Some("DMAR"), "intel_iommu=sm_on,on"), Unknown);
        let amd = "AuthenticAMD";
        assert_eq!(advice(amd, None, ""), AmdFirmware);
        assert_eq!(advice(amd, Some("IVRS"), "amd_iommu=off"), AmdParameter);
        assert_eq!(advice(amd, Some("IVRS"), "intel_iommu=on"), Unknown);
        assert_eq!(advice("unheard of", None, ""), Unknown);
        let guest = "GenuineIntel\nflags\t\t: fpu hypervisor vmx";
        assert_eq!(advice(guest, None, ""), VirtualMachine);
        assert_eq!(advice(guest, Some("DMAR"), ""), IntelParameter);
    }
}
