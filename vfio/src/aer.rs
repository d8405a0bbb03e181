//! What a device says of its errors: its AER and device status registers, and what the host's kernel
//! has counted. PCIe 6.0 §6.2, §7.5.3.5 and §7.8.4.
//!
//! The kernel clears the registers when it has dealt with an error, which is often sooner than anybody
//! else can look; its counters stay.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use busway_iommu::DeviceFolder;
use busway_pci::{capabilities, extended_capabilities, spec};

use crate::access::read_dword;
use crate::{DeviceIo, RegionIndex};

/// Uncorrectable errors by their bits. §7.8.4.2.
const UNCORRECTABLE: [(u32, &str); 22] = [
    (4, "Data Link Protocol Error"),
    (5, "Surprise Down"),
    (12, "Poisoned TLP Received"),
    (13, "Flow Control Protocol Error"),
    (14, "Completion Timeout"),
    (15, "Completer Abort"),
    (16, "Unexpected Completion"),
    (17, "Receiver Overflow"),
    (18, "Malformed TLP"),
    (19, "ECRC Error"),
    (20, "Unsupported Request"),
    (21, "ACS Violation"),
    (22, "Uncorrectable Internal Error"),
    (23, "MC Blocked TLP"),
    (24, "AtomicOp Egress Blocked"),
    (25, "TLP Prefix Blocked"),
    (26, "Poisoned TLP Egress Blocked"),
    (27, "DMWr Request Egress Blocked"),
    (28, "IDE Check Failed"),
    (29, "Misrouted IDE TLP"),
    (30, "PCRC Check Failed"),
    (31, "TLP Translation Egress Blocked"),
];

/// What the device status register tells of errors. §7.5.3.5.
const DEVICE: [(u32, &str); 4] = [
    (0, "correctable error"),
    (1, "non-fatal error"),
    (2, "fatal error"),
    (3, "unsupported request"),
];

/// The uncorrectable errors in a device's AER capability. §7.8.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uncorrectable {
    /// The errors seen, a bit each.
    pub status: u32,
    /// Which errors are fatal, a bit each.
    pub severity: u32,
    /// The bit of the error that came first.
    pub first: u8,
}

/// What a device's registers say of its errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorStatus {
    /// It reads all ones: it is gone, without power or in reset.
    pub silent: bool,
    /// The device status register, where there is one.
    pub device: Option<u16>,
    /// Where it has the AER capability.
    pub uncorrectable: Option<Uncorrectable>,
}

impl ErrorStatus {
    /// Reads the registers as they are now.
    #[must_use]
    pub fn read(io: &dyn DeviceIo) -> Self {
        let dword = |offset| read_dword(io, offset);
        if is_silent(io) {
            return Self {
                silent: true,
                ..Self::default()
            };
        }
        let express = capabilities(&dword)
            .into_iter()
            .find(|found| found.id == spec::CAP_PCI_EXPRESS);
        let device = express.map(|found| {
            let control = found.offset.saturating_add(spec::EXP_DEVICE_CONTROL);
            (dword(control) >> 16) as u16
        });
        let has_more = io.region(RegionIndex::CONFIG).size > spec::EXTENDED_CONFIG_START.into();
        let aer = extended_capabilities(&dword)
            .into_iter()
            .find(|found| has_more && found.id == spec::EXT_CAP_AER);
        let uncorrectable = aer.map(|found| {
            let register = |offset| dword(found.offset.saturating_add(offset));
            Uncorrectable {
                status: register(spec::AER_UNCORRECTABLE_STATUS),
                severity: register(spec::AER_UNCORRECTABLE_SEVERITY),
                first: (register(spec::AER_CONTROL) & spec::AER_CONTROL_FIRST_ERROR) as u8,
            }
        });
        Self {
            silent: false,
            device,
            uncorrectable,
        }
    }

    /// The names of the uncorrectable errors, each with its severity; none where the registers are
    /// clear.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        let Some(aer) = self.uncorrectable else {
            return Vec::new();
        };
        (0..u32::BITS)
            .filter(|bit| aer.status & 1 << bit != 0)
            .map(|bit| {
                let name = UNCORRECTABLE.iter().find(|(named, _)| *named == bit);
                let name = name.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).into());
                let fatal = aer.severity & 1 << bit != 0;
                format!("{name} ({})", if fatal { "fatal" } else { "non-fatal" })
            })
            .collect()
    }
}

/// Whether the device does not answer at all. A class code of all ones is nobody's, a VF's neither; VFIO
/// answers for the vendor itself.
#[must_use]
pub fn is_silent(io: &dyn DeviceIo) -> bool {
    read_dword(io, spec::REVISION_ID) == u32::MAX
}

impl fmt::Display for ErrorStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.silent {
            return f.write_str("the device does not answer: it is gone, or in reset");
        }
        match self.uncorrectable {
            None => f.write_str("no AER registers")?,
            Some(aer) if aer.status == 0 => f.write_str("AER status clear")?,
            Some(aer) => write!(
                f,
                "AER status {:#010x}: {}",
                aer.status,
                self.errors().join(", ")
            )?,
        }
        let Some(device) = self.device else {
            return Ok(());
        };
        let named: Vec<_> = DEVICE
            .iter()
            .filter(|(bit, _)| device & 1 << bit != 0)
            .map(|(_, name)| *name)
            .collect();
        match named.is_empty() {
            true => write!(f, "; device status {device:#06x}"),
            false => write!(f, "; device status {device:#06x}: {}", named.join(", ")),
        }
    }
}

/// How often the host's kernel has seen each of a device's uncorrectable errors, by its own names.
/// linux/Documentation/ABI/testing/sysfs-bus-pci-devices-aer_stats
#[derive(Debug)]
pub struct ErrorCounts {
    folder: DeviceFolder,
    counts: BTreeMap<String, u64>,
}

impl ErrorCounts {
    /// The counts of the function whose folder in sysfs is `folder`; none where the kernel keeps none.
    #[must_use]
    pub fn read(folder: &Path) -> Self {
        let folder = DeviceFolder::open(folder);
        let counts = Self::now(&folder);
        Self { folder, counts }
    }

    fn now(folder: &DeviceFolder) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for (file, severity) in [
            ("aer_dev_fatal", "fatal"),
            ("aer_dev_nonfatal", "non-fatal"),
        ] {
            let text = folder.text(file).unwrap_or_default();
            for line in text.lines() {
                let Some((name, count)) = line.split_once(' ') else {
                    continue;
                };
                if let Ok(count) = count.trim().parse()
                    && !name.starts_with("TOTAL")
                {
                    counts.insert(format!("{name} ({severity})"), count);
                }
            }
        }
        counts
    }

    /// Counts anew, and gives the names of the errors that have become more since.
    pub fn refresh(&mut self) -> Vec<String> {
        let now = Self::now(&self.folder);
        let before = std::mem::replace(&mut self.counts, now);
        self.counts
            .iter()
            .filter(|(name, count)| before.get(*name).is_none_or(|old| old < *count))
            .filter(|(_, count)| **count > 0)
            .map(|(name, _)| name.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeDevice;

    /// A PCI Express function with AER, in that order.
    fn device(aer_status: u32, severity: u32, device_status: u16) -> FakeDevice {
        let device = FakeDevice::default();
        device.set_config(0x06, &[0x10, 0]);
        device.set_config(0x34, &[0x40]);
        device.set_config(0x40, &[spec::CAP_PCI_EXPRESS, 0, 2, 0]);
        device.set_config(0x4a, &device_status.to_le_bytes());
        device.set_config(0x100, &0x0001_0001_u32.to_le_bytes());
        device.set_config(0x104, &aer_status.to_le_bytes());
        device.set_config(0x10c, &severity.to_le_bytes());
        device
    }

    #[test]
    fn errors_are_named_with_their_severity() {
        let device = device(1 << 20 | 1 << 18 | 1, 1 << 18, 0x000a);
        assert_eq!(
            ErrorStatus::read(&device).to_string(),
            "AER status 0x00140001: bit 0 (non-fatal), Malformed TLP (fatal), Unsupported Request \
             (non-fatal); device status 0x000a: non-fatal error, unsupported request"
        );
    }

    #[test]
    fn a_device_whose_status_was_cleared_or_that_has_none_or_is_gone_is_told_apart() {
        let clear = ErrorStatus::read(&device(0, 0, 0));
        assert_eq!(clear.to_string(), "AER status clear; device status 0x0000");
        assert!(clear.errors().is_empty());
        let plain = ErrorStatus::read(&FakeDevice::default());
        assert_eq!(plain.to_string(), "no AER registers");
        let gone = FakeDevice::default();
        gone.set_config(0, &[0xff; 4096]);
        assert!(is_silent(&gone));
        let gone = ErrorStatus::read(&gone).to_string();
        assert!(gone.starts_with("the device does not answer"), "{gone}");
    }

    #[test]
    fn what_the_kernel_counted_meanwhile_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        assert!(ErrorCounts::read(folder.path()).refresh().is_empty());
        write("aer_dev_fatal", "DLP 1\nMalfTLP 0\nTOTAL_ERR_FATAL 1\n");
        write(
            "aer_dev_nonfatal",
            "UnsupReq 2\nodd\nTOTAL_ERR_NONFATAL x\n",
        );
        let mut counts = ErrorCounts::read(folder.path());
        assert!(counts.refresh().is_empty());
        write("aer_dev_nonfatal", "UnsupReq 3\nTOTAL_ERR_NONFATAL 3\n");
        assert_eq!(counts.refresh(), ["UnsupReq (non-fatal)"]);
        assert!(counts.refresh().is_empty());
    }

    proptest! {
        #[test]
        fn nothing_that_a_device_says_is_too_odd(bytes in vec(any::<u8>(), 4096)) {
            let device = FakeDevice::default();
            device.set_config(0, &bytes);
            let status = ErrorStatus::read(&device);
            prop_assert!(!status.to_string().is_empty());
        }
    }
}
