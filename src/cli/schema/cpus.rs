//! The words of `--cpus`.

use super::super::value::{Reason, Value};
use super::{Key, Section, disk};
use crate::config::{CoreScheduling, CpusConfig, Topology, VcpuAffinity};

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
        "core_scheduling" { "vm|vcpu|off": "what may be on a core beside it: its VM's, no other vCPU, any\n[vm, where the host can do that]" }
            |cpus, value| cpus.core_scheduling = Some(core_scheduling(value)?);
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// The words of [`CoreScheduling`], for messages.
const CORE_SCHEDULING: &[&str] = &["vm", "vcpu", "off"];

fn core_scheduling(value: &Value) -> Result<CoreScheduling, Reason> {
    let text = value.text()?;
    let mut choices = CoreScheduling::ALL.into_iter();
    let found = choices.find(|choice| choice.word() == text);
    found.ok_or_else(|| Reason::Word {
        value: text.to_owned(),
        words: CORE_SCHEDULING,
    })
}

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
    fn each_word_of_core_scheduling_is_one_and_no_other_is() {
        let read = |text: &str| core_scheduling(&Value::Text(text.to_owned()));
        for one in CoreScheduling::ALL {
            assert_eq!(read(one.word()), Ok(one));
        }
        assert!(
            CoreScheduling::ALL
                .iter()
                .map(|one| one.word())
                .eq(CORE_SCHEDULING.iter().copied())
        );
        assert!(read("on").unwrap_err().to_string().contains("`on`"));
    }

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
