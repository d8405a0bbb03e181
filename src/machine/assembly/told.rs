//! What a guest is told of the board that it is on.

use crate::acpi::{self, PluggableMemory};
use crate::config::{ConsoleConfig, DEFAULT_ZONE, VmConfig};
use crate::devices::cpu_hotplug::CpuHotplug;
use crate::machine::address_plan::SegmentAddresses;
use crate::machine::segments::last_bus;
use crate::memory::Ram;
use crate::smbios::{self, FirmwareTable, Identity};

/// What ACPI's tables tell of the board; its hot-plug slots are not known yet.
pub(super) fn acpi_hardware(
    config: &VmConfig,
    segments: &[SegmentAddresses],
    ram: &Ram,
) -> acpi::Hardware {
    let topology = config.cpus.grouped();
    acpi::Hardware {
        cpus: (0..config.cpus.most())
            .map(|id| acpi::Cpu {
                apic_id: topology.apic_id(id),
                enabled: id < config.cpus.boot,
            })
            .collect(),
        cpu_hotplug: config.cpus.comes_and_goes(),
        roots: (0..)
            .zip(segments)
            .map(|(segment, addresses)| acpi::Root {
                segment,
                node: config.numa_node_of_segment(segment),
                last_bus: last_bus(config, segment),
                io: addresses.windows.io.clone(),
                mmio32: addresses.windows.memory32.clone(),
                mmio64: addresses.windows.memory64.clone(),
                slots: 0,
                ecam: addresses.ecam.clone(),
            })
            .collect(),
        pluggable: pluggable(config, ram),
        memory_devices: false,
        numa: numa(config, ram),
        serial: config.serial != ConsoleConfig::Off,
        tpm: config.tpm.is_some(),
        native_hotplug: !config.device.is_empty() || config.platform.has_hotplug_slots(),
    }
}

/// What the tables tell of RAM that can come, where some can.
fn pluggable(config: &VmConfig, ram: &Ram) -> Option<PluggableMemory> {
    let pieces = ram.pluggable_zones();
    let pieces: Vec<_> = pieces
        .map(|(zone, range)| (node_of_pluggable(config, zone), range))
        .collect();
    (!pieces.is_empty()).then(|| PluggableMemory {
        ram: ram.guest_ranges(),
        pieces,
    })
}

/// The node of RAM that can come, of a zone or of all RAM; 0 where there are no nodes. What is of all RAM lies behind the last
/// zone, and is of the same memory of the host's.
pub(super) fn node_of_pluggable(config: &VmConfig, zone: Option<usize>) -> u32 {
    let last = config.memory_zone.len().saturating_sub(1);
    node_of_zone(config, zone.unwrap_or(last))
}

/// The node of a zone, by its place among the zones; 0 where there are no nodes.
fn node_of_zone(config: &VmConfig, zone: usize) -> u32 {
    let zone = config.memory_zone.get(zone);
    let zone = zone.map_or(DEFAULT_ZONE, |zone| &zone.id);
    config.numa_node_of_zone(zone).unwrap_or(0)
}

/// What the tables tell of the guest's nodes, where it has some.
fn numa(config: &VmConfig, ram: &Ram) -> Option<acpi::Numa> {
    if config.numa.is_empty() {
        return None;
    }
    let stretches = ram.zone_ranges();
    let cpus = 0..config.cpus.most();
    Some(acpi::Numa {
        cpus: cpus
            .map(|cpu| config.numa_node_of_cpu(cpu.into()).unwrap_or(0))
            .collect(),
        ram: stretches
            .map(|(zone, range)| (node_of_zone(config, zone), range))
            .collect(),
        distances: config.numa_distances(),
    })
}

/// Has the tables say which processors are there now.
pub(in crate::machine) fn processors_now(acpi: &mut acpi::Hardware, registers: &CpuHotplug) {
    let present = registers.processors().present;
    for (id, cpu) in (0..=u8::MAX).zip(&mut acpi.cpus) {
        cpu.enabled = present.has(id);
    }
}

/// What a kernel without firmware reads in SMBIOS: nothing, unless it was said which machine it is.
pub(super) fn smbios_tables(config: &VmConfig) -> Option<smbios::Tables> {
    let identity = Identity::of(&config.platform);
    let board = smbios::Board {
        cpus: config.cpus.boot.into(),
        memory: config.memory.size,
        identity,
    };
    (!board.identity.is_empty()).then(|| smbios::tables(&board, FirmwareTable::Ours))
}
