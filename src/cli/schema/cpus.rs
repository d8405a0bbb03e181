//! The words of `--cpus`.

use super::super::value::{Reason, Value};
use super::{Key, Section, disk};
use crate::config::{CpusConfig, Topology, VcpuAffinity};

/// `--cpus`
pub(in crate::cli) static CPUS: Section<CpusConfig> = Section {
    name: "cpus",
    summary: "Processors: boot=N[,max=N][,topology=T:C:D:P][,nested=on|off]…",
    words: &[],
    notes: "",
    blank: CpusConfig::default,
    keys: keys! {
        "boot" { "N": "how many run at boot, 1 to 255 [1]" }
            |cpus, value| cpus.boot = value.number()?;
        "max" { "N": "how many there can be, by `busway ctl resize` while it runs [boot]" }
            |cpus, value| cpus.max = Some(value.number()?);
        "topology" { "T:C:D:P": "threads of a core, cores of a die, dies of a package, packages\n[1:max:1:1]" }
            |cpus, value| cpus.topology = Some(topology(value)?);
        "nested" { "on|off": "the guest can run guests of its own, where the host's KVM lets it [on]" }
            |cpus, value| cpus.nested = value.switch()?;
        "pmu" { "on|off": "it has performance counters, where the host's KVM has them [on]" }
            |cpus, value| cpus.pmu = value.switch()?;
        "affinity" { "[0@[1],1@[2-3]]": "processors of the host's that each vCPU runs on [any]" }
            |cpus, value| cpus.affinity = affinity(value)?;
        "dedicated" { "on|off": "the vCPU's alone: halting and waiting do not leave the guest,\nand Busway's other threads keep away [off]" }
            |cpus, value| cpus.dedicated = value.switch()?;
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// As those of a disk's queues.
fn affinity(value: &Value) -> Result<Vec<VcpuAffinity>, Reason> {
    let places = disk::affinity(value)?.into_iter();
    Ok(places
        .map(|place| VcpuAffinity {
            vcpu: place.queue_index,
            host_cpus: place.host_cpus,
        })
        .collect())
}

/// Four numbers, as Cloud Hypervisor has them: `2:4:1:1`.
fn topology(value: &Value) -> Result<Topology, Reason> {
    let text = value.text()?;
    let number = |part: &str| {
        let digits = part.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| part.parse().ok()).flatten()
    };
    let numbers: Option<Vec<u16>> = text.split(':').map(number).collect();
    match numbers.unwrap_or_default()[..] {
        [threads_per_core, cores_per_die, dies_per_package, packages] => Ok(Topology {
            threads_per_core,
            cores_per_die,
            dies_per_package,
            packages,
        }),
        _ => Err(Reason::Topology(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topology_is_four_numbers() {
        let read = |text: &str| topology(&Value::Text(text.to_owned()));
        let expected = Topology {
            threads_per_core: 2,
            cores_per_die: 4,
            dies_per_package: 1,
            packages: 3,
        };
        assert_eq!(read("2:4:1:3"), Ok(expected));
        for wrong in [
            "2",
            "1:2:3",
            "1:2:3:4:5",
            "1:+2:3:4",
            "a:1:1:1",
            "1:1:1:65536",
            "::::",
        ] {
            let why = read(wrong).unwrap_err().to_string();
            assert!(why.contains(&format!("`{wrong}`")), "{why}");
        }
    }
}
