//! The numbers of a report as they stood at one moment, in their two forms: JSON for programs and a table for people.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::Stage;
use super::placed::PlacedNode;
use super::walls::Walls;

/// What the JSON file holds. Its names are an interface: others read them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Snapshot {
    /// Busway's version.
    pub busway: &'static str,
    /// From the process's start to each stage.
    pub milliseconds: Milliseconds,
    /// DMA mappings made.
    pub dma_mappings: Mappings,
    /// Host interrupt vectors in use for assigned devices.
    pub vectors: u64,
    /// How often one of them was given another message, as a guest does to move it to another CPU.
    pub vector_updates: u64,
    /// Memory that is Busway's own: its proportional set size beyond guest RAM. Absent (`null`) where
    /// it was not measured.
    pub own_memory_bytes: Option<u64>,
    /// The way to the IOMMU; absent (`null`) where there are no assigned devices.
    pub iommu: Option<IommuWay>,
    /// The walls round the process; absent (`null`) where they were not put up.
    pub walls: Option<Walls>,
    /// The assigned devices, as they were given.
    pub devices: Vec<AssignedDevice>,
    /// Where the guest was placed by its devices; absent (`null`) where it was not.
    pub placement: Option<Vec<PlacedNode>>,
    /// Exits to user space, by kind.
    pub exits: BTreeMap<&'static str, u64>,
}

/// By which of the kernel's interfaces the assigned devices are reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IommuWay {
    /// `iommufd` or `type1`.
    pub interface: &'static str,
    /// Why it is this one, in words.
    pub why: String,
}

/// A host device that the guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AssignedDevice {
    /// Its address on the host, or a mediated device's UUID.
    pub host: String,
    /// Its address in the guest.
    pub guest: String,
    /// How it is reset: `flr`, `af_flr`, `device_specific`, `acpi`, `bus` or `pm` for what the kernel
    /// does with the function alone, `mediated` for what the driver does that made it, `hot` where that takes
    /// its slot or bus, or `none`.
    pub reset: &'static str,
}

/// Milliseconds from the process's start; absent (`null`) where a stage was not reached.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Milliseconds {
    /// [`Stage::Parse`]
    pub parse: Option<f64>,
    /// [`Stage::Memory`]
    pub memory: Option<f64>,
    /// [`Stage::Open`]
    pub open: Option<f64>,
    /// [`Stage::DmaMap`]
    pub dma_map: Option<f64>,
    /// [`Stage::Devices`]
    pub devices: Option<f64>,
    /// [`Stage::FirstInstruction`]
    pub first_instruction: Option<f64>,
}

/// DMA mappings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mappings {
    /// Calls to the kernel for memory.
    pub calls: u64,
    /// Bytes of memory that are mapped.
    pub bytes: u64,
    /// Calls to the kernel for BARs of devices, which others reach: one each time that one is mapped.
    pub device_calls: u64,
}

/// The table for people.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = &self.milliseconds;
        let mut last = 0.0;
        writeln!(f, "{:<18} {:>10} {:>10}", "stage", "at ms", "took ms")?;
        for (stage, time) in Stage::ALL.into_iter().zip([
            times.parse,
            times.memory,
            times.open,
            times.dma_map,
            times.devices,
            times.first_instruction,
        ]) {
            let Some(time) = time else { continue };
            let took = time - last;
            writeln!(f, "{:<18} {time:>10.1} {took:>10.1}", stage.title())?;
            last = time;
        }
        writeln!(
            f,
            "{:<18} {:>10} calls, {}; {} calls for BARs",
            "DMA mappings",
            self.dma_mappings.calls,
            Bytes(self.dma_mappings.bytes),
            self.dma_mappings.device_calls
        )?;
        writeln!(
            f,
            "{:<18} {:>10} moved {} times",
            "vectors", self.vectors, self.vector_updates
        )?;
        if let Some(IommuWay { interface, why }) = &self.iommu {
            writeln!(f, "{:<18} {interface:>10} {why}", "IOMMU")?;
        }
        if let Some(walls) = &self.walls {
            writeln!(f, "{:<18} {walls}", "walls")?;
        }
        for device in &self.devices {
            let AssignedDevice { host, guest, reset } = device;
            writeln!(f, "{host:<18} {guest:>10} in the guest, reset {reset}")?;
        }
        for node in self.placement.iter().flatten() {
            writeln!(f, "{node}")?;
        }
        if let Some(bytes) = self.own_memory_bytes {
            writeln!(f, "{:<18} {:>10}", "own memory", Bytes(bytes))?;
        }
        for (kind, count) in &self.exits {
            writeln!(f, "{:<18} {count:>10}", format!("exits {kind}"))?;
        }
        Ok(())
    }
}

/// A number of bytes, as a person reads it.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            bytes if bytes >= 1 << 30 => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
            bytes if bytes >= 1 << 20 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
            bytes => format!("{:.1} KiB", bytes as f64 / 1024.0),
        };
        f.pad(&text)
    }
}
