//! What Cloud Hypervisor's flags can say and Busway's cannot: keys that change nothing here, or that are kept and shown
//! as over the API. They are taken out before the rest is read, in the drop-in personality alone.

use super::options::{self, Item};
use super::value::{Reason, Value};
use crate::config::Accepted;

/// A key that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ForeignError {
    /// --{flag}: {key}: {why}
    #[error("--{flag}: {key}: {why}")]
    Value {
        /// The flag, without its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        why: Reason,
    },
    /// --{flag}: {key}={value}: Busway cannot do this yet
    #[error("--{flag}: {key}={value}: Busway cannot do this yet")]
    Lacks {
        /// The flag, without its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
        /// What was said.
        value: String,
    },
}

/// What is done with a key.
enum Act {
    /// Nothing: it is somebody else's to do, or already so.
    Nothing,
    /// What is off here as well; on is refused.
    Off,
    /// It is kept.
    Keep(fn(&mut Accepted, &Value) -> Result<(), Reason>),
}

/// The keys of each flag.
const KEYS: &[(&str, &str, Act)] = &[
    ("cpus", "kvm_hyperv", Act::Off),
    (
        "cpus",
        "max_phys_bits",
        Act::Keep(|accepted, value| {
            accepted.max_phys_bits = Some(value.number()?);
            Ok(())
        }),
    ),
    ("memory", "mergeable", Act::Off),
    ("memory-zone", "mergeable", Act::Off),
    ("disk", "iommu", Act::Off),
    ("disk", "sparse", Act::Nothing),
    ("net", "iommu", Act::Off),
    // A tap's address is whoever's who makes it.
    ("net", "ip", Act::Nothing),
    ("net", "mask", Act::Nothing),
    ("pmem", "iommu", Act::Off),
    ("generic-vhost-user", "iommu", Act::Off),
    ("vsock", "iommu", Act::Off),
    ("rng", "iommu", Act::Off),
    ("device", "iommu", Act::Off),
    ("platform", "tdx", Act::Off),
    ("platform", "sev_snp", Act::Off),
];

/// What the value `text` of `--flag` says without what is only Cloud Hypervisor's.
///
/// # Errors
/// [`ForeignError`]
pub(super) fn take(
    flag: &'static str,
    text: &str,
    accepted: &mut Accepted,
) -> Result<String, ForeignError> {
    let mut rest = Vec::new();
    for part in parts(text) {
        let name = part.split_once('=').map_or("", |(name, _)| name);
        let known = KEYS.iter().find(|(of, key, _)| *of == flag && *key == name);
        // What is no list is refused by whoever reads the rest.
        match (known, options::parse(part).ok().and_then(only)) {
            (Some((_, key, act)), Some(Item { value, .. })) => {
                apply(flag, key, act, &value, accepted)?
            }
            _ => rest.push(part),
        }
    }
    Ok(rest.join(","))
}

fn only(mut items: Vec<Item>) -> Option<Item> {
    items.pop().filter(|_| items.is_empty())
}

fn apply(
    flag: &'static str,
    key: &'static str,
    act: &Act,
    value: &Value,
    accepted: &mut Accepted,
) -> Result<(), ForeignError> {
    let done = match act {
        Act::Nothing => Ok(()),
        Act::Off => match value.switch() {
            Ok(false) => Ok(()),
            Ok(true) => {
                let value = value.to_string();
                return Err(ForeignError::Lacks { flag, key, value });
            }
            Err(reason) => Err(reason),
        },
        Act::Keep(keep) => keep(accepted, value),
    };
    done.map_err(|why| ForeignError::Value { flag, key, why })
}

/// The parts of a list between its commas, but for those within brackets and quotes.
fn parts(text: &str) -> Vec<&str> {
    let (mut depth, mut quoted, mut start) = (0_usize, false, 0);
    let mut parts = Vec::new();
    for (at, character) in text.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '[' if !quoted => depth = depth.saturating_add(1),
            ']' if !quoted => depth = depth.saturating_sub(1),
            ',' if !quoted && depth == 0 => {
                parts.extend(text.get(start..at));
                start = at.saturating_add(1);
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_cloud_hypervisors_is_taken_out_and_kept_and_the_rest_stays_as_it_is() {
        let mut accepted = Accepted::default();
        for (flag, text, rest) in [
            (
                "cpus",
                "boot=2,max=4,topology=1:4:1:1,kvm_hyperv=off,max_phys_bits=46",
                "boot=2,max=4,topology=1:4:1:1",
            ),
            (
                "memory",
                "size=1G,mergeable=off,hotplug_method=virtio-mem,hotplug_size=1G",
                "size=1G,hotplug_method=virtio-mem,hotplug_size=1G",
            ),
            (
                "disk",
                "path=a,iommu=off,pci_segment=1,queue_affinity=[0@[1,2]],sparse=on",
                "path=a,pci_segment=1,queue_affinity=[0@[1,2]]",
            ),
            (
                "net",
                "tap=t,ip=192.168.249.1,mask=255.255.255.0,mac=52:54:00:12:34:56",
                "tap=t,mac=52:54:00:12:34:56",
            ),
            (
                "net",
                "vhost_user=true,socket=/s,vhost_mode=server,iommu=off",
                "vhost_user=true,socket=/s,vhost_mode=server",
            ),
            (
                "device",
                "path=/sys/bus/pci/devices/0000:01:00.0/,iommu=off",
                "path=/sys/bus/pci/devices/0000:01:00.0/",
            ),
            (
                "platform",
                "num_pci_segments=2,uuid=u,serial_number=s,oem_strings=[a,b]",
                "num_pci_segments=2,uuid=u,serial_number=s,oem_strings=[a,b]",
            ),
            ("disk", "a.raw", "a.raw"),
            ("disk", "path=\"a,iommu=on\"", "path=\"a,iommu=on\""),
            ("net", "nonsense=1", "nonsense=1"),
        ] {
            assert_eq!(take(flag, text, &mut accepted).as_deref(), Ok(rest));
        }
        let expected = Accepted {
            max_phys_bits: Some(46),
        };
        assert_eq!(accepted, expected);
    }

    #[test]
    fn what_would_be_another_vm_is_refused_and_named() {
        for (flag, text, words) in [
            (
                "disk",
                "path=a,iommu=on",
                "iommu=on: Busway cannot do this yet",
            ),
            ("memory", "mergeable=maybe", "neither on nor off"),
        ] {
            let why = take(flag, text, &mut Accepted::default())
                .unwrap_err()
                .to_string();
            assert!(
                why.starts_with(&format!("--{flag}: ")) && why.contains(words),
                "{why}"
            );
        }
    }
}
