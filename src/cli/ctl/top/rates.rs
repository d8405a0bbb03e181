//! What has happened between two looks at a VM.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::cli::ctl::answer::{list, number, text};
use crate::cli::ctl::devices;

/// A look at a VM: what `vm.activity` answered, and when, since the first one.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) at: Duration,
    pub(super) answer: Value,
}

impl Look {
    /// Whether a guest runs, or stands still.
    pub(super) fn lives(&self) -> bool {
        self.answer.get("uptime_ms").is_some()
    }
}

/// So many a second, by name.
pub(super) type Rates = BTreeMap<String, f64>;

/// What a vCPU does.
#[derive(Clone, Debug, Default)]
pub(super) struct Vcpu {
    pub(super) id: u64,
    /// Processor time of its thread, by time: 1 is one processor.
    pub(super) cpu: f64,
    /// Exits to Busway, by kind.
    pub(super) exits: Rates,
    /// What KVM counts, by its names.
    pub(super) kvm: Rates,
    /// Page faults of its thread.
    pub(super) faults: f64,
}

/// What a device does.
#[derive(Clone, Debug)]
pub(super) struct Device {
    /// As it is shown.
    pub(super) shown: Value,
    /// Accesses that left the guest.
    pub(super) exits: f64,
    /// Interrupts, where they are counted.
    pub(super) interrupts: Option<f64>,
    /// What its queues count.
    pub(super) counters: Rates,
    /// Processor time of its threads.
    pub(super) cpu: Option<f64>,
}

/// What a VM does.
#[derive(Clone, Debug, Default)]
pub(super) struct Doing {
    /// Between the looks.
    pub(super) time: Duration,
    /// Of the whole process.
    pub(super) cpu: f64,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) devices: Vec<Device>,
}

/// Between a look and a later one.
pub(super) fn between(before: &Look, now: &Look) -> Doing {
    let time = now.at.saturating_sub(before.at);
    let seconds = time.as_secs_f64().max(1e-3);
    // What began anew meanwhile has counted from 0.
    let rate = |before: u64, now: u64| now.checked_sub(before).unwrap_or(now) as f64 / seconds;
    let rates = |before: &Value, now: &Value, pointer: &str| -> Rates {
        let all = now.pointer(pointer).and_then(Value::as_object);
        let all = all.into_iter().flatten();
        all.filter_map(|(name, value)| {
            let at = format!("{pointer}/{name}");
            Some((name.clone(), rate(number(before, &at), value.as_u64()?)))
        })
        .collect()
    };
    let (old, new) = (&before.answer, &now.answer);
    let threads = Threads::between(old, new);
    let none = Value::Null;
    let same = |part: &str, one: &Value| {
        let others = list(old, &format!("/{part}"));
        let other = others.iter().find(|other| other["id"] == one["id"]);
        other.unwrap_or(&none).clone()
    };
    let vcpus = list(new, "/vcpus").iter().map(|vcpu| {
        let (before, id) = (same("vcpus", vcpu), number(vcpu, "/id"));
        let (cpu, faults) = threads.named(|name| name == format!("vcpu{id}"));
        Vcpu {
            id,
            cpu: cpu as f64 / 1e6 / seconds,
            exits: rates(&before, vcpu, "/exits"),
            kvm: rates(&before, vcpu, "/kvm"),
            faults: faults as f64 / seconds,
        }
    });
    let devices = list(new, "/devices").iter().map(|device| {
        let (before, id) = (same("devices", device), text(device, "/id"));
        let exits = |of: &Value| devices::exits(of).unwrap_or(0);
        let sent = "/interrupts/sent";
        let counts = device.get("counters").is_some();
        Device {
            exits: rate(exits(&before), exits(device)),
            interrupts: device
                .pointer(sent)
                .map(|_| rate(number(&before, sent), number(device, sent))),
            counters: rates(&before, device, "/counters"),
            cpu: counts.then(|| threads.of_device(&id) as f64 / 1e6 / seconds),
            shown: device.clone(),
        }
    });
    let process = "/process_cpu_us";
    Doing {
        time,
        cpu: rate(number(old, process), number(new, process)) / 1e6,
        vcpus: vcpus.collect(),
        devices: devices.collect(),
    }
}

/// What threads have used between two looks: name, microseconds, page faults.
struct Threads(Vec<(String, u64, u64)>);

impl Threads {
    fn between(old: &Value, new: &Value) -> Self {
        let faults = |thread: &Value| {
            number(thread, "/minor_faults").saturating_add(number(thread, "/major_faults"))
        };
        let all = list(new, "/threads").iter().map(|thread| {
            let mut others = list(old, "/threads").iter();
            let before = others.find(|other| other["tid"] == thread["tid"]);
            let since =
                |of: &dyn Fn(&Value) -> u64| of(thread).saturating_sub(before.map_or(0, of));
            (
                text(thread, "/name"),
                since(&|thread| number(thread, "/cpu_us")),
                since(&faults),
            )
        });
        Self(all.collect())
    }

    fn named(&self, is: impl Fn(&str) -> bool) -> (u64, u64) {
        let these = self.0.iter().filter(|(name, ..)| is(name));
        these.fold((0, 0), |(cpu, faults), one| {
            (cpu.saturating_add(one.1), faults.saturating_add(one.2))
        })
    }

    /// Those that serve a device's queues: Linux keeps 15 bytes of `_disk-NAME-q0`.
    fn of_device(&self, id: &str) -> u64 {
        let serves = |name: &str| {
            let rest = name.strip_prefix('_').unwrap_or_default();
            let kinds = ["", "disk-", "net-"];
            kinds.into_iter().any(|kind| {
                let whole = format!("{kind}{id}-q");
                let cut: String = whole.chars().take(14).collect();
                rest.starts_with(&whole) || (rest.len() >= 14 && rest == cut)
            })
        };
        self.named(serves).0
    }
}

/// What is printed of it for scripts: the totals as the VM answers them, and what that is by the second.
pub(super) fn json(now: &Look, doing: &Doing) -> Value {
    let rates = |rates: &Rates| -> Value {
        let all = rates
            .iter()
            .map(|(name, rate)| (name.clone(), rounded(*rate)));
        Value::Object(all.collect::<Map<_, _>>())
    };
    let vcpus = doing.vcpus.iter().map(|vcpu| {
        json!({
            "id": vcpu.id, "cpu": rounded(vcpu.cpu), "faults": rounded(vcpu.faults),
            "exits": rates(&vcpu.exits), "kvm": rates(&vcpu.kvm),
        })
    });
    let devices = doing.devices.iter().map(|device| {
        let mut json = json!({ "id": device.shown["id"], "exits": rounded(device.exits) });
        if let Some(interrupts) = device.interrupts {
            json["interrupts"] = rounded(interrupts);
        }
        if let Some(cpu) = device.cpu {
            json["cpu"] = rounded(cpu);
        }
        if !device.counters.is_empty() {
            // A latency is no count.
            let counts = device
                .counters
                .iter()
                .filter(|(name, _)| !name.contains("latency"));
            let counts = counts.map(|(name, rate)| (name.clone(), *rate));
            json["counters"] = rates(&counts.collect());
        }
        json
    });
    json!({
        "interval_ms": u64::try_from(doing.time.as_millis()).unwrap_or(u64::MAX),
        "totals": now.answer,
        "per_second": {
            "cpu": rounded(doing.cpu),
            "vcpus": vcpus.collect::<Vec<_>>(),
            "devices": devices.collect::<Vec<_>>(),
        },
    })
}

fn rounded(rate: f64) -> Value {
    json!((rate * 1000.0).round() / 1000.0)
}
