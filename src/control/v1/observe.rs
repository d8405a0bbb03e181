//! What a VM's vCPUs and devices have done, as JSON: `vm.devices`, `vm.activity` and `vm.counters`.

use std::collections::BTreeMap;

use busway_pci::InterruptMode;
use serde::Serialize;

use super::info::word;
use crate::control::threads::{self, Thread};
use crate::machine::{AssignedDoing, DeviceSeen, DmaSeen, Doing, Observed, State, VirtioDoing};
use crate::virtio::{DiskTotals, NetTotals, ServedBy, Totals, TransferTotals};

/// Counters by their names.
type Counters = BTreeMap<&'static str, u64>;

/// The answer to `vm.devices`.
#[derive(Serialize)]
pub(super) struct Devices<'a> {
    devices: Vec<DeviceJson<'a>>,
}

/// The answer to `vm.activity`.
#[derive(Serialize)]
pub(super) struct Activity<'a> {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<bool>,
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    uptime_ms: Option<u64>,
    memory_bytes: u64,
    process_cpu_us: u64,
    vcpus: Vec<VcpuJson>,
    threads: Vec<ThreadJson>,
    devices: Vec<DeviceJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dma: Option<DmaJson>,
    vector_updates: u64,
}

#[derive(Serialize)]
struct VcpuJson {
    id: u8,
    exits: Counters,
    kvm: Counters,
}

#[derive(Serialize)]
struct ThreadJson {
    tid: u32,
    name: String,
    cpu_us: u64,
    minor_faults: u64,
    major_faults: u64,
}

#[derive(Serialize)]
struct DmaJson {
    mappings: u64,
    bytes: u64,
    map_calls: u64,
    device_map_calls: u64,
}

#[derive(Serialize)]
struct DeviceJson<'a> {
    id: &'a str,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_bdf: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pci_bdf: Option<&'a str>,
    state: &'static str,
    /// How far the guest's driver is, where the device is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    driver: Option<&'static str>,
    /// Who serves a virtio device's queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    served_by: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interrupts: Option<InterruptsJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exits: Option<ExitsJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dma: Option<DmaJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reset: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    errors: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    counters: Counters,
}

#[derive(Serialize)]
struct InterruptsJson {
    mode: &'static str,
    /// Vectors with a way to the guest now; 1 for a pin.
    vectors: u32,
    /// Vectors that the guest can have.
    vectors_most: u16,
    /// How many there were, where Busway sends them.
    #[serde(skip_serializing_if = "Option::is_none")]
    sent: Option<u64>,
}

#[derive(Serialize)]
struct ExitsJson {
    config_reads: u64,
    config_writes: u64,
    bar_reads: u64,
    bar_writes: u64,
}

impl From<DmaSeen> for DmaJson {
    fn from(dma: DmaSeen) -> Self {
        Self {
            mappings: dma.mappings,
            bytes: dma.bytes,
            map_calls: dma.map_calls,
            device_map_calls: dma.device_map_calls,
        }
    }
}

impl<'a> DeviceJson<'a> {
    fn new(device: &'a DeviceSeen, dma: Option<DmaSeen>) -> Self {
        let mut json = Self {
            id: &device.id,
            kind: device.kind,
            host_bdf: device.host.as_deref(),
            pci_bdf: device.guest.as_deref(),
            state: device.state.word(),
            driver: None,
            served_by: None,
            interrupts: None,
            exits: None,
            dma: None,
            direct_bytes: None,
            reset: None,
            errors: None,
            counters: BTreeMap::new(),
        };
        if let Some(doing) = &device.doing {
            json.show(doing, dma);
        }
        json
    }

    fn show(&mut self, doing: &Doing, dma: Option<DmaSeen>) {
        let seen = &doing.function;
        self.interrupts = Some(InterruptsJson {
            mode: seen.mode.word(),
            vectors: match seen.mode {
                InterruptMode::None => 0,
                _ => seen.connected,
            },
            vectors_most: doing.vectors,
            sent: doing
                .virtio
                .filter(|virtio| virtio.served_by == ServedBy::Busway)
                .map(|virtio| virtio.interrupts),
        });
        self.exits = Some(ExitsJson {
            config_reads: seen.config_reads,
            config_writes: seen.config_writes,
            bar_reads: seen.bar_reads,
            bar_writes: seen.bar_writes,
        });
        if let Some(AssignedDoing {
            reset,
            direct_bytes,
            errors,
        }) = doing.assigned
        {
            self.dma = dma.map(DmaJson::from);
            self.direct_bytes = Some(direct_bytes);
            self.reset = reset;
            self.errors = Some(errors);
        }
        if let Some(VirtioDoing {
            driver,
            served_by,
            totals,
            ..
        }) = doing.virtio
        {
            self.driver = Some(driver.word());
            self.served_by = Some(served_by.word());
            self.counters = counters_of(&totals);
        }
    }
}

/// Cloud Hypervisor's names, and some beside them.
fn counters_of(totals: &Totals) -> Counters {
    match totals {
        Totals::None => Counters::new(),
        Totals::Disk(DiskTotals {
            reads,
            writes,
            others,
            errors,
        }) => Counters::from([
            ("read_ops", reads.ops),
            ("read_bytes", reads.bytes),
            ("read_latency_min", reads.shortest_micros),
            ("read_latency_max", reads.longest_micros),
            ("read_latency_avg", average(reads)),
            ("write_ops", writes.ops),
            ("write_bytes", writes.bytes),
            ("write_latency_min", writes.shortest_micros),
            ("write_latency_max", writes.longest_micros),
            ("write_latency_avg", average(writes)),
            ("other_ops", *others),
            ("errors", *errors),
        ]),
        Totals::Mem(memory) => Counters::from([
            ("requested_bytes", memory.requested),
            ("plugged_bytes", memory.plugged),
            ("region_bytes", memory.region),
            ("block_bytes", memory.block),
        ]),
        Totals::Balloon(balloon) => {
            let own = [
                ("target_bytes", balloon.target),
                ("actual_bytes", balloon.actual),
                ("given_bytes", balloon.given),
                ("taken_back_bytes", balloon.taken_back),
                ("unmapped_bytes", balloon.unmapped),
                ("remap_failures", balloon.failures),
                ("inhibited", balloon.inhibited.into()),
                ("reported_bytes", balloon.reported),
                ("wanted_bytes", balloon.wanted),
            ];
            own.into_iter().chain(balloon.stats()).collect()
        }
        Totals::Net(NetTotals {
            rx_frames,
            rx_bytes,
            rx_dropped,
            tx_frames,
            tx_bytes,
            tx_dropped,
            tx_spoofed,
        }) => Counters::from([
            ("rx_frames", *rx_frames),
            ("rx_bytes", *rx_bytes),
            ("rx_dropped", *rx_dropped),
            ("tx_frames", *tx_frames),
            ("tx_bytes", *tx_bytes),
            ("tx_dropped", *tx_dropped),
            ("tx_spoofed", *tx_spoofed),
        ]),
    }
}

fn average(transfers: &TransferTotals) -> u64 {
    transfers.micros.checked_div(transfers.ops).unwrap_or(0)
}

/// The answer to `vm.counters`: of each device that counts, by its name.
pub(super) fn counters(observed: &Observed) -> BTreeMap<&str, Counters> {
    let devices = observed.devices.iter();
    devices
        .filter_map(|device| {
            let totals = device.doing.as_ref()?.virtio?.totals;
            let counters = counters_of(&totals);
            (!counters.is_empty()).then_some((device.id.as_str(), counters))
        })
        .collect()
}

impl<'a> Devices<'a> {
    pub(super) fn of(observed: &'a Observed) -> Self {
        let devices = observed.devices.iter();
        Self {
            devices: devices
                .map(|device| DeviceJson::new(device, observed.dma))
                .collect(),
        }
    }
}

impl<'a> Activity<'a> {
    /// With what the threads of this process have used.
    pub(super) fn of(observed: &'a Observed) -> Self {
        let vcpus = observed.vcpus.iter();
        Self {
            state: word(observed.state),
            held: (observed.state == State::Held).then_some(true),
            pid: crate::sandbox::process_id(),
            uptime_ms: observed
                .uptime
                .map(|uptime| u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX)),
            memory_bytes: observed.memory,
            process_cpu_us: threads::process_cpu_us(),
            vcpus: vcpus
                .map(|vcpu| VcpuJson {
                    id: vcpu.id,
                    exits: vcpu.exits.into_iter().collect(),
                    kvm: vcpu.kvm.iter().copied().collect(),
                })
                .collect(),
            threads: threads::all().into_iter().map(ThreadJson::from).collect(),
            devices: Devices::of(observed).devices,
            dma: observed.dma.map(DmaJson::from),
            vector_updates: observed.vector_updates,
        }
    }
}

impl From<Thread> for ThreadJson {
    fn from(thread: Thread) -> Self {
        Self {
            tid: thread.tid,
            name: thread.name,
            cpu_us: thread.cpu_us,
            minor_faults: thread.minor_faults,
            major_faults: thread.major_faults,
        }
    }
}
