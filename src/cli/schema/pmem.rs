//! The words of `--pmem`.

use super::{Key, Section};
use crate::config::PmemConfig;

/// `--pmem`
pub(in crate::cli) static PMEM: Section<PmemConfig> = Section {
    name: "pmem",
    summary: "Persistent memory: file=FILE[,size=SIZE][,discard_writes=on|off]…",
    words: &[],
    notes: "\
The guest has the file as /dev/pmem0, and mounts a file system on it by -o dax. Beside an
assigned device it is pinned in memory: it has to be on tmpfs or hugetlbfs, or has
discard_writes=on.",
    blank: || PmemConfig::new(""),
    keys: keys! {
        "file" { "FILE": "what the memory is; of a folder, a file in it without a name" }
            |pmem, value| pmem.file = value.text()?.into();
        "size" { "SIZE": "a multiple of 2M, no more than the file has [all of it]" }
            |pmem, value| pmem.size = Some(value.size()?);
        "discard_writes" { "on|off": "the file is only read, and what the guest writes ends with the VM [off]" }
            |pmem, value| pmem.discard_writes = value.switch()?;
        "id" { "NAME": "name, unique in the VM" }
            |pmem, value| pmem.id = Some(value.text()?.to_owned());
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |pmem, value| pmem.pci_segment = value.number()?;
        "pci_device_id" { "N": "its device number on bus 0 there, 1 to 15 [any that is free]" }
            |pmem, value| pmem.pci_device_id = Some(value.number()?);
    },
    required: &["file"],
    bare: None,
    single: false,
    details: &[],
};
