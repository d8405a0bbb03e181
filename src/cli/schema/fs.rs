//! The words of `--fs`.

use super::{Key, Section};
use crate::config::FsConfig;

/// `--fs`
pub(in crate::cli) static FS: Section<FsConfig> = Section {
    name: "fs",
    summary: "Shared folder by virtiofsd: tag=NAME,socket=PATH[,num_queues=N]…",
    words: &[],
    notes: "The guest mounts it by `mount -t virtiofs NAME FOLDER`.",
    blank: || FsConfig::new("", ""),
    keys: keys! {
        "tag" { "NAME": "what the guest mounts it by, up to 36 bytes" }
            |fs, value| fs.tag = value.text()?.to_owned();
        "socket" { "PATH": "the Unix socket where virtiofsd listens" }
            |fs, value| fs.socket = value.text()?.into();
        "num_queues" { "N": "request queues, beside one for urgent requests [1]" }
            |fs, value| fs.num_queues = value.number()?;
        "queue_size" { "N": "descriptors of a queue, a power of two from 16 to 1024 [1024]" }
            |fs, value| fs.queue_size = value.number()?;
        "id" { "NAME": "name, unique in the VM" }
            |fs, value| fs.id = Some(value.text()?.to_owned());
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |fs, value| fs.pci_segment = value.number()?;
        "pci_device_id" { "N": "its device number on bus 0 there, 1 to 15 [any that is free]" }
            |fs, value| fs.pci_device_id = Some(value.number()?);
    },
    required: &["tag"],
    bare: None,
    single: false,
    details: &[],
};
