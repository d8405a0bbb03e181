//! What persistent memory is to be.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::InvalidVirtio;

/// What a region's size and place are multiples of: Linux makes pages of memory that is plugged in by 2 MiB
/// (`SUBSECTION_SIZE`), and huge pages want it too.
pub const PMEM_ALIGNMENT: u64 = 2 << 20;

/// `--pmem`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// The file that is the memory; or a folder, in which a file without a name is made.
    pub file: PathBuf,
    /// Bytes of it that the guest has, a multiple of [`PMEM_ALIGNMENT`]; where it is absent, all of the file.
    #[serde(default)]
    pub size: Option<u64>,
    /// What the guest writes is the VM's alone and ends with it; the file is only read.
    #[serde(default)]
    pub discard_writes: bool,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
    /// The PCI segment that it is in.
    #[serde(default)]
    pub pci_segment: u16,
    /// Its device number on bus 0 of that segment, 1 to 15; any that is free where absent.
    #[serde(default)]
    pub pci_device_id: Option<u8>,
}

impl PmemConfig {
    /// Memory with every choice at its default.
    #[must_use]
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            size: None,
            discard_writes: false,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }

    /// The bytes that it will have, as far as the host's file tells; nothing where that tells nothing. A whole number of
    /// [`PMEM_ALIGNMENT`].
    #[must_use]
    pub fn likely_size(&self) -> u64 {
        let file = || std::fs::metadata(&self.file).map_or(0, |file| file.len());
        let size = self.size.unwrap_or_else(file);
        size.checked_next_multiple_of(PMEM_ALIGNMENT).unwrap_or(0)
    }

    /// Whether there can be such memory.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        if self.file.as_os_str().is_empty() {
            return Err(InvalidVirtio::NoFile);
        }
        match self.size {
            Some(size) if size == 0 || !size.is_multiple_of(PMEM_ALIGNMENT) => {
                Err(InvalidVirtio::PmemSize(size))
            }
            _ => Ok(()),
        }
    }
}
