//! The words of `--disk`.

use super::{Key, Section};
use crate::cli::value::{Reason, Value};
use crate::config::{DiskConfig, ImageType, QueueAffinity};

/// `--disk`
pub(in crate::cli) static DISK: Section<DiskConfig> = Section {
    name: "disk",
    summary: "Virtio disk: path=FILE[,readonly=on|off][,direct=on|off]…",
    words: &[],
    notes: "\
A limit is a bucket: SIZE fills it, and comes back in TIME ms; a burst is there once.
A file is raw unless image_type= says otherwise, whatever a guest has written to it.",
    blank: || DiskConfig::new(""),
    keys: keys! {
        "path" { "FILE": "image file or block device" }
            |disk, value| disk.path = value.text()?.into();
        "fd" { "N": "a descriptor of it that Busway inherits, instead of opening it;\n\
                 path= then is its name in messages" }
            |disk, value| disk.fd = Some(value.number()?);
        "vhost_user" { "on|off": "another process has the image and serves the disk [off]" }
            |disk, value| disk.vhost_user = value.switch()?;
        "socket" { "PATH": "with vhost_user=on: the Unix socket where it listens" }
            |disk, value| disk.socket = Some(value.text()?.into());
        "image_type" { "raw": "the guest's bytes as they are [raw]", "qcow2": "QEMU's format, version 2 or 3" }
            |disk, value| disk.image_type = image_type(value)?;
        "backing_files" { "on|off": "files that a qcow2 image names are opened, to be read only [off]" }
            |disk, value| disk.backing_files = value.switch()?;
        "readonly" { "on|off": "the guest may not write [off]" }
            |disk, value| disk.readonly = value.switch()?;
        "direct" { "on|off": "past the host's page cache, by O_DIRECT [off]" }
            |disk, value| disk.direct = value.switch()?;
        "writeback" { "on|off": "writes may stay in a cache until the guest flushes [on]" }
            |disk, value| disk.writeback = value.switch()?;
        "serial" { "TEXT": "serial number, up to 20 characters [the disk's name]" }
            |disk, value| disk.serial = Some(value.text()?.to_owned());
        "num_queues" { "N": "request queues, a worker each [1]" }
            |disk, value| disk.num_queues = value.number()?;
        "queue_size" { "N": "descriptors of a queue, a power of two from 4 to 1024 [128]" }
            |disk, value| disk.queue_size = value.number()?;
        "queue_affinity" { "[Q@[CPU,…],…]": "the host's processors that queue Q's worker runs on: [0@[1,4-6]]" }
            |disk, value| disk.queue_affinity = affinity(value)?;
        "bw_size" { "SIZE": "bytes of the limit of bandwidth [none]" }
            |disk, value| disk.bw_size = Some(value.size()?);
        "bw_one_time_burst" { "SIZE": "bytes beside it, once [0]" }
            |disk, value| disk.bw_one_time_burst = Some(value.size()?);
        "bw_refill_time" { "TIME": "milliseconds in which they come back" }
            |disk, value| disk.bw_refill_time = Some(value.number()?);
        "ops_size" { "N": "reads and writes of the limit of operations [none]" }
            |disk, value| disk.ops_size = Some(value.number()?);
        "ops_one_time_burst" { "N": "reads and writes beside it, once [0]" }
            |disk, value| disk.ops_one_time_burst = Some(value.number()?);
        "ops_refill_time" { "TIME": "milliseconds in which they come back" }
            |disk, value| disk.ops_refill_time = Some(value.number()?);
        "id" { "NAME": "name, unique in the VM" }
            |disk, value| disk.id = Some(value.text()?.to_owned());
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |disk, value| disk.pci_segment = value.number()?;
        "pci_device_id" { "N": "its device number on bus 0 there, 1 to 15 [any that is free]" }
            |disk, value| disk.pci_device_id = Some(value.number()?);
        "boot_index" { "N": "what firmware boots from, the lowest first" }
            |disk, value| disk.boot_index = Some(value.number()?);
    },
    required: &["path", "fd", "socket"],
    bare: None,
    single: false,
    details: &[],
};

/// What an image can be.
const IMAGE_TYPES: &[&str] = &["raw", "qcow2"];

fn image_type(value: &Value) -> Result<ImageType, Reason> {
    match value {
        Value::Text(word) if word.eq_ignore_ascii_case("raw") => Ok(ImageType::Raw),
        Value::Text(word) if word.eq_ignore_ascii_case("qcow2") => Ok(ImageType::Qcow2),
        other => Err(Reason::Word {
            value: other.to_string(),
            words: IMAGE_TYPES,
        }),
    }
}

/// `[0@[1,4-6],1@[2]]`: a queue and the processors of its worker, several times.
pub(super) fn affinity(value: &Value) -> Result<Vec<QueueAffinity>, Reason> {
    let wrong = |value: &Value| Reason::Affinity(value.to_string());
    let Value::List(entries) = value else {
        return Err(wrong(value));
    };
    let entry = |entry: &Value| {
        let Value::Text(text) = entry else {
            return Err(wrong(entry));
        };
        queue_affinity(text).ok_or_else(|| wrong(entry))
    };
    entries.iter().map(entry).collect()
}

fn queue_affinity(text: &str) -> Option<QueueAffinity> {
    let (queue, list) = text.split_once('@')?;
    let list = list.strip_prefix('[')?.strip_suffix(']')?;
    let mut host_cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        host_cpus.extend((first..=last).map(usize::from));
    }
    Some(QueueAffinity {
        queue_index: number(queue)?,
        host_cpus,
    })
}

/// Digits only, no sign.
fn number(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_of_queues_are_written_as_cloud_hypervisor_has_them() {
        let list = |texts: &[&str]| {
            let texts = texts.iter().map(|text| Value::Text((*text).to_owned()));
            affinity(&Value::List(texts.collect()))
        };
        let of = |queue_index, host_cpus: &[usize]| QueueAffinity {
            queue_index,
            host_cpus: host_cpus.to_vec(),
        };
        assert_eq!(
            list(&["0@[1,4-6]", "3@[2]"]),
            Ok(vec![of(0, &[1, 4, 5, 6]), of(3, &[2])])
        );
        for wrong in [
            "",
            "0",
            "0@",
            "0@1",
            "0@[]",
            "@[1]",
            "0@[2-1]",
            "0@[+1]",
            "0@[1,]",
            "0@[65536]",
            "x@[1]",
            "0@[1-2-3]",
        ] {
            let error = list(&[wrong]).unwrap_err().to_string();
            assert!(error.contains(&format!("`{wrong}`")), "{error}");
        }
        assert!(affinity(&Value::Text("0@[1]".into())).is_err());
    }
}
