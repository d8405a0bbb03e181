//! A VMM's counters at one moment of a guest's run.

use std::collections::BTreeMap;

/// One thread's use of a processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its id in the emulated host.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Ticks in user mode, guest's time included (proc(5), `utime`).
    pub user: u64,
    /// Ticks in the kernel (`stime`).
    pub system: u64,
}

impl Thread {
    /// Whether it runs a vCPU, by the name that Busway or QEMU gives it.
    pub fn is_vcpu(&self) -> bool {
        self.name.starts_with("vcpu") || self.name.ends_with("/KVM")
    }
}

/// One mapping of the VMM's memory (proc(5), `smaps`), in KiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// The file or the kernel's name in brackets; empty for anonymous memory.
    pub name: String,
    /// Its address range's size.
    pub size: u64,
    /// The proportional share of what is resident.
    pub pss: u64,
    /// What is resident, modified and nobody else's.
    pub private_dirty: u64,
}

/// What the host saw of the VMM when the guest made a mark.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Seconds since the epoch by the emulated host's clock.
    pub at: f64,
    /// KVM's counters for the VM, by the names that debugfs gives them, such as `exits`.
    pub kvm: BTreeMap<String, u64>,
    /// Interrupts by MSI and MSI-X of all devices that VFIO has, as the host counts them (proc(5), `interrupts`).
    pub interrupts: u64,
    /// System calls that the VMM's threads have made, where the host counts them by thread (tracefs).
    pub calls: Option<u64>,
    /// The VMM's threads.
    pub threads: Vec<Thread>,
    /// The VMM's memory, if the mark's name begins with `memory`.
    pub mappings: Vec<Mapping>,
}

impl Snapshot {
    pub(crate) fn parse(text: &str) -> Self {
        let mut snapshot = Self::default();
        for line in text.lines() {
            let Some((kind, rest)) = line.split_once(' ') else {
                continue;
            };
            match kind {
                "at" => snapshot.at = rest.parse().unwrap_or_default(),
                "kvm" => {
                    if let Some((name, Ok(value))) = rest
                        .split_once(' ')
                        .map(|(name, value)| (name, value.parse()))
                    {
                        snapshot.kvm.insert(name.to_owned(), value);
                    }
                }
                "interrupts" => snapshot.interrupts = rest.parse().unwrap_or_default(),
                "calls" => snapshot.calls = rest.parse().ok(),
                "thread" => snapshot.threads.extend(parse_thread(rest)),
                "map" => parse_mapping(rest, &mut snapshot.mappings),
                _ => {}
            }
        }
        snapshot
    }

    /// How much a counter of KVM's grew since an earlier snapshot.
    pub fn since(&self, earlier: &Self, counter: &str) -> Option<u64> {
        Some(
            self.kvm
                .get(counter)?
                .saturating_sub(*earlier.kvm.get(counter)?),
        )
    }

    /// Seconds that the vCPUs' threads have run, in the guest and for it.
    pub fn vcpu_seconds(&self) -> f64 {
        // Linux counts it in hundredths, USER_HZ, for every program (times(2)).
        let ticks = self
            .threads
            .iter()
            .filter(|thread| thread.is_vcpu())
            .map(|thread| thread.user + thread.system);
        ticks.sum::<u64>() as f64 / 100.0
    }

    /// The VMM's own memory, PSS in KiB: every mapping smaller than the guest's memory.
    pub fn own_pss(&self, guest_memory_mib: u64) -> u64 {
        let own = self
            .mappings
            .iter()
            .filter(|each| each.size < guest_memory_mib << 10);
        own.map(|each| each.pss).sum()
    }

    /// The part of [`own_pss`](Self::own_pss) that is modified and nobody else's, in KiB.
    pub fn own_dirty(&self, guest_memory_mib: u64) -> u64 {
        let own = self
            .mappings
            .iter()
            .filter(|each| each.size < guest_memory_mib << 10);
        own.map(|each| each.private_dirty).sum()
    }
}

fn parse_thread(rest: &str) -> Option<Thread> {
    let mut words = rest.splitn(4, ' ');
    Some(Thread {
        id: words.next()?.parse().ok()?,
        user: words.next()?.parse().ok()?,
        system: words.next()?.parse().ok()?,
        name: words.next()?.to_owned(),
    })
}

fn parse_mapping(line: &str, mappings: &mut Vec<Mapping>) {
    let mut words = line.split_ascii_whitespace();
    let Some(first) = words.next() else { return };
    let Some(field) = first.strip_suffix(':') else {
        // A mapping's first line: range, permissions, offset, device, inode, name.
        mappings.push(Mapping {
            name: words.skip(4).collect(),
            ..Mapping::default()
        });
        return;
    };
    let (Some(mapping), Some(Ok(kib))) = (mappings.last_mut(), words.next().map(str::parse)) else {
        return;
    };
    match field {
        "Size" => mapping.size = kib,
        "Pss" => mapping.pss = kib,
        "Private_Dirty" => mapping.private_dirty = kib,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_threads_and_maps_are_read() {
        let text = "at 5.5\nkvm exits 120\ncalls 71\nthread 12 30 4 CPU 0/KVM\n\
                    map 7f00-7f01 rw-p 00000000 00:00 0 \nmap Size:  524288 kB\nmap Pss:  1000 kB\n\
                    map 5500-5501 r-xp 00000000 00:01 7    /usr/local/bin/busway\n\
                    map Size: 800 kB\nmap Pss: 600 kB\nmap Private_Dirty: 8 kB\nmap VmFlags: rd\n";
        let snapshot = Snapshot::parse(text);
        assert_eq!(snapshot.kvm["exits"], 120);
        assert_eq!(snapshot.calls, Some(71));
        assert_eq!(Snapshot::parse("at 5.5\n").calls, None);
        assert_eq!(snapshot.threads[0].name, "CPU 0/KVM");
        assert_eq!(snapshot.vcpu_seconds(), 0.34);
        assert_eq!(snapshot.mappings[1].name, "/usr/local/bin/busway");
        assert_eq!((snapshot.own_pss(512), snapshot.own_dirty(512)), (600, 8));
        let later = Snapshot {
            kvm: [("exits".to_owned(), 150)].into(),
            ..Snapshot::default()
        };
        assert_eq!(later.since(&snapshot, "exits"), Some(30));
    }
}
