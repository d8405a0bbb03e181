//! The words of `--generic-vhost-user`.

use super::{Key, Section};
use crate::cli::value::{Reason, Value};
use crate::config::GenericConfig;

/// `--generic-vhost-user`
pub(in crate::cli) static GENERIC: Section<GenericConfig> = Section {
    name: "generic-vhost-user",
    summary: "Device of any kind by another process: virtio_id=N,socket=PATH,queue_sizes=[N,…]…",
    words: &[],
    notes: "\
A kind is a number of virtio's, or block, console, rng, scsi, gpu, input, vsock,
crypto, sound, fs, i2c, can or gpio. The guest is offered what the back end offers.",
    blank: || GenericConfig::new(0, "", Vec::new()),
    keys: keys! {
        "virtio_id" { "N": "the kind of device: 4 or rng, for example" }
            |generic, value| generic.virtio_id = kind(value)?;
        "device_type" { "N": "the same, as newer Cloud Hypervisors call it" }
            |generic, value| generic.virtio_id = kind(value)?;
        "socket" { "PATH": "the Unix socket where its back end listens" }
            |generic, value| generic.socket = value.text()?.into();
        "queue_sizes" { "[N,…]": "descriptors of each queue, powers of two" }
            |generic, value| generic.queue_sizes = sizes(value)?;
        "config_size" { "N": "bytes of its configuration [those of its kind]" }
            |generic, value| generic.config_size = Some(value.number()?);
        "id" { "NAME": "name, unique in the VM" }
            |generic, value| generic.id = Some(value.text()?.to_owned());
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |generic, value| generic.pci_segment = value.number()?;
        "pci_device_id" { "N": "its device number on bus 0 there, 1 to 15 [any that is free]" }
            |generic, value| generic.pci_device_id = Some(value.number()?);
    },
    required: &["virtio_id", "device_type"],
    bare: None,
    single: false,
    details: &[],
};

fn kind(value: &Value) -> Result<u16, Reason> {
    match value {
        Value::Text(name) => {
            let number = || Value::Text(name.clone()).number();
            GenericConfig::kind(name).map_or_else(number, Ok)
        }
        other => other.number(),
    }
}

fn sizes(value: &Value) -> Result<Vec<u16>, Reason> {
    match value {
        Value::List(sizes) => sizes.iter().map(Value::number).collect(),
        one => Ok(vec![one.number()?]),
    }
}
