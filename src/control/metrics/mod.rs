//! `/metrics`: what a VM does, in the OpenMetrics text format, for Prometheus and what reads the same.
//!
//! Names are after <https://prometheus.io/docs/practices/naming/> and those of the exporters that there are: base
//! units, counters that end in `_total`. Labels have as many values as the VM has vCPUs, devices and threads, and no
//! guest chooses one.

mod memory;
mod virtio;

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::threads;
use crate::machine::{DeviceSeen, DeviceState, Observed, State, VirtioDoing};
use crate::virtio::Totals;

/// Where it is.
pub(super) const PATH: &str = "/metrics";

/// What the body is. OpenMetrics 1.0, §5.1
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A label and its value.
type Label = (&'static str, String);

#[derive(Clone, Copy, Debug)]
enum Number {
    Whole(u64),
    /// Microseconds, shown in seconds.
    Micros(u64),
}

/// One metric, with its values.
#[derive(Debug)]
struct Family {
    /// Without its unit, and without `_total`.
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    values: Vec<(Vec<Label>, Number)>,
}

impl Family {
    fn counter(name: &'static str, help: &'static str) -> Self {
        Self {
            name,
            help,
            unit: None,
            kind: MetricType::Counter,
            values: Vec::new(),
        }
    }

    fn gauge(name: &'static str, help: &'static str) -> Self {
        Self {
            kind: MetricType::Gauge,
            ..Self::counter(name, help)
        }
    }

    fn in_bytes(mut self) -> Self {
        self.unit = Some(Unit::Bytes);
        self
    }

    fn in_seconds(mut self) -> Self {
        self.unit = Some(Unit::Seconds);
        self
    }

    /// With a value without labels.
    fn whole(mut self, value: u64) -> Self {
        self.values.push((Vec::new(), Number::Whole(value)));
        self
    }

    /// With a number of microseconds.
    fn micros(mut self, value: u64) -> Self {
        self.values.push((Vec::new(), Number::Micros(value)));
        self
    }

    /// With a value where there is one.
    fn maybe(self, value: Option<u64>) -> Self {
        match value {
            Some(value) => self.whole(value),
            None => self,
        }
    }

    /// With a value for each of these.
    fn of<T>(
        mut self,
        all: impl IntoIterator<Item = T>,
        value: impl Fn(T) -> (Vec<Label>, Number),
    ) -> Self {
        self.values.extend(all.into_iter().map(value));
        self
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut metric =
            encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), self.kind)?;
        for (labels, number) in &self.values {
            match labels.is_empty() {
                true => self.encode_number(&mut metric, *number)?,
                false => self.encode_number(&mut metric.encode_family(labels)?, *number)?,
            }
        }
        Ok(())
    }

    fn encode_number(&self, metric: &mut MetricEncoder<'_>, number: Number) -> fmt::Result {
        match (self.kind, number) {
            (MetricType::Counter, Number::Whole(value)) => {
                metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
            }
            (MetricType::Counter, Number::Micros(value)) => {
                metric.encode_counter::<NoLabelSet, _, u64>(&seconds(value), None)
            }
            (_, Number::Whole(value)) => metric.encode_gauge(&value),
            (_, Number::Micros(value)) => metric.encode_gauge(&seconds(value)),
        }
    }
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

/// All of them, as they are at one moment.
#[derive(Debug)]
struct Families(Vec<Family>);

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|family| family.encode(&mut encoder))
    }
}

/// The text of all metrics, of a VM where there is one.
///
/// # Errors
/// Those of writing to a string.
pub(super) fn text(observed: Option<&Observed>) -> Result<String, fmt::Error> {
    let mut families = of_process();
    families.extend(of_vm(observed));
    let nothing = Observed::default();
    let observed = observed.unwrap_or(&nothing);
    families.extend(of_vcpus(observed));
    families.extend(of_threads());
    families.extend(of_dma(observed));
    // Two devices of one name would be one metric twice, which is no metric.
    let devices: BTreeMap<_, _> = observed.devices.iter().map(|one| (&*one.id, one)).collect();
    let devices: Vec<_> = devices.into_values().collect();
    families.extend(of_devices(&devices));
    families.extend(virtio::of_disks(&devices));
    families.extend(virtio::of_nics(&devices));
    families.extend(virtio::of_balloons(&devices));
    families.extend(memory::of_memory(&devices));
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Families(families)));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

/// By the names that all processes have them by.
fn of_process() -> Vec<Family> {
    let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    vec![
        Family::gauge("busway_build_info", "Which Busway it is")
            .of([()], |()| (version.clone(), Number::Whole(1))),
        Family::counter("process_cpu", "Time on processors, of all threads")
            .in_seconds()
            .micros(threads::process_cpu_us()),
        Family::gauge(
            "process_resident_memory",
            "Memory in RAM, the guest's included",
        )
        .in_bytes()
        .maybe(threads::resident_bytes()),
        Family::gauge("process_open_fds", "Descriptors that are open")
            .maybe(threads::open_descriptors()),
    ]
}

fn of_vm(observed: Option<&Observed>) -> Vec<Family> {
    const STATES: [(State, &str); 5] = [
        (State::Created, "created"),
        (State::Running, "running"),
        (State::Paused, "paused"),
        (State::Held, "held"),
        (State::Shutdown, "shutdown"),
    ];
    let is = |(state, word): (State, &str)| {
        let here = observed.is_some_and(|observed| observed.state == state);
        (vec![("state", word.to_owned())], Number::Whole(here.into()))
    };
    let uptime = observed.and_then(|observed| observed.uptime);
    let uptime = uptime.and_then(|uptime| u64::try_from(uptime.as_micros()).ok());
    vec![
        Family::gauge("busway_vm_state", "1 for what the VM is doing").of(STATES, is),
        Family::gauge("busway_guest_uptime", "Time since the guest's last start")
            .in_seconds()
            .of(uptime, |uptime| (Vec::new(), Number::Micros(uptime))),
        Family::gauge("busway_guest_memory", "RAM that the guest has")
            .in_bytes()
            .maybe(observed.map(|observed| observed.memory)),
    ]
}

fn of_vcpus(observed: &Observed) -> Vec<Family> {
    let vcpus = || observed.vcpus.iter().map(|vcpu| (vcpu.id, vcpu));
    let labelled = |label| {
        move |(id, (word, value)): (u8, (&'static str, u64))| {
            let labels = vec![("vcpu", id.to_string()), (label, word.to_owned())];
            (labels, Number::Whole(value))
        }
    };
    let exits = vcpus().flat_map(|(id, vcpu)| vcpu.exits.into_iter().map(move |one| (id, one)));
    let kvm = vcpus().flat_map(|(id, vcpu)| vcpu.kvm.iter().map(move |one| (id, *one)));
    vec![
        Family::counter(
            "busway_vcpu_exits",
            "Exits of a vCPU to Busway, by what the guest did",
        )
        .of(exits, labelled("kind")),
        Family::counter(
            "busway_vcpu_kvm_events",
            "What KVM counts of a vCPU, by KVM's names",
        )
        .of(kvm, labelled("event")),
    ]
}

/// Of the threads that are there for as long as the guest runs; a thread that ends takes its time with it.
fn of_threads() -> Vec<Family> {
    let mut named = BTreeMap::<String, (u64, u64, u64)>::new();
    for thread in threads::all() {
        if thread.lasts() {
            // Linux keeps 15 bytes of a name, so that two can be the same.
            let (cpu, minor, major) = named.entry(thread.name).or_default();
            *cpu = cpu.saturating_add(thread.cpu_us);
            *minor = minor.saturating_add(thread.minor_faults);
            *major = major.saturating_add(thread.major_faults);
        }
    }
    let faults = named.iter().flat_map(|(name, (_, minor, major))| {
        [("minor", *minor), ("major", *major)].map(|(kind, count)| (name.clone(), kind, count))
    });
    vec![
        Family::counter(
            "busway_thread_cpu",
            "Time on processors of a vCPU's or a device's thread",
        )
        .in_seconds()
        .of(&named, |(name, (cpu, _, _))| {
            (vec![("thread", name.clone())], Number::Micros(*cpu))
        }),
        Family::counter(
            "busway_thread_page_faults",
            "Page faults of a vCPU's or a device's thread",
        )
        .of(faults, |(name, kind, count)| {
            let labels = vec![("thread", name), ("kind", kind.to_owned())];
            (labels, Number::Whole(count))
        }),
    ]
}

fn of_dma(observed: &Observed) -> Vec<Family> {
    let dma = observed.dma;
    let calls = dma
        .into_iter()
        .flat_map(|dma| [("memory", dma.map_calls), ("device", dma.device_map_calls)]);
    vec![
        Family::gauge("busway_dma_mappings", "Mappings for assigned devices")
            .maybe(dma.map(|dma| dma.mappings)),
        Family::gauge(
            "busway_dma_mapped",
            "Guest memory that assigned devices reach",
        )
        .in_bytes()
        .maybe(dma.map(|dma| dma.bytes)),
        Family::counter(
            "busway_dma_map_calls",
            "Calls to the kernel that mapped, by what",
        )
        .of(calls, |(what, count)| {
            (vec![("of", what.to_owned())], Number::Whole(count))
        }),
        Family::counter(
            "busway_vector_updates",
            "Interrupts of assigned devices that were given another message",
        )
        .whole(observed.vector_updates),
    ]
}

fn device(id: &str) -> Label {
    ("device", id.to_owned())
}

fn of_devices(devices: &[&DeviceSeen]) -> Vec<Family> {
    let info = |one: &&DeviceSeen| {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let labels = vec![
            device(&one.id),
            ("kind", one.kind.to_owned()),
            ("host_address", text(&one.host)),
            ("guest_address", text(&one.guest)),
        ];
        (labels, Number::Whole(1))
    };
    let states = devices.iter().flat_map(|one| {
        DeviceState::ALL.map(|state| (one.id.clone(), state.word(), one.state == state))
    });
    let doing = || {
        devices
            .iter()
            .filter_map(|one| Some((&*one.id, one.doing.as_ref()?)))
    };
    let exits = doing().flat_map(|(id, doing)| {
        let seen = doing.function;
        [
            ("config_read", seen.config_reads),
            ("config_write", seen.config_writes),
            ("bar_read", seen.bar_reads),
            ("bar_write", seen.bar_writes),
        ]
        .map(|(access, count)| (id, access, count))
    });
    let sent = doing().filter_map(|(id, doing)| Some((id, doing.virtio?.interrupts)));
    let errors = doing().filter_map(|(id, doing)| Some((id, doing.assigned.as_ref()?.errors)));
    let plain = |(id, count)| (vec![device(id)], Number::Whole(count));
    vec![
        Family::gauge("busway_device_info", "The guest's devices").of(devices, info),
        Family::gauge("busway_device_state", "1 for how a device is").of(
            states,
            |(id, word, here)| {
                let labels = vec![device(&id), ("state", word.to_owned())];
                (labels, Number::Whole(here.into()))
            },
        ),
        Family::counter(
            "busway_device_exits",
            "Accesses to a device that left the guest",
        )
        .of(exits, |(id, access, count)| {
            let labels = vec![device(id), ("access", access.to_owned())];
            (labels, Number::Whole(count))
        }),
        Family::gauge(
            "busway_device_interrupt_vectors",
            "Vectors of a device that have a way to the guest",
        )
        .of(doing(), |(id, doing)| {
            let labels = vec![device(id), ("mode", doing.function.mode.word().to_owned())];
            (labels, Number::Whole(doing.function.connected.into()))
        }),
        Family::counter(
            "busway_device_interrupts",
            "Interrupts that a virtio device has sent",
        )
        .of(sent, plain),
        Family::counter(
            "busway_device_errors",
            "Uncorrectable errors of an assigned device",
        )
        .of(errors, plain),
    ]
}

fn totals<'a>(devices: &'a [&DeviceSeen]) -> impl Iterator<Item = (&'a str, Totals)> {
    devices.iter().filter_map(|one| {
        let VirtioDoing { totals, .. } = one.doing.as_ref()?.virtio?;
        Some((&*one.id, totals))
    })
}

#[cfg(test)]
mod tests;
