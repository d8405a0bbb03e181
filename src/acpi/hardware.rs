//! What the tables describe, and who they say has made them.

use std::ops::Range;

pub(crate) const OEM_ID: [u8; 6] = *b"BUSWAY";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"BUSWAYVM";
pub(crate) const OEM_REVISION: u32 = 1;

/// What the tables describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Processors, the boot processor first. The position in the list is the ACPI processor UID.
    pub cpus: Vec<Cpu>,
    /// Processors can come and leave while the guest runs.
    pub cpu_hotplug: bool,
    /// The PCI segments, in their order from 0 on.
    pub roots: Vec<Root>,
    /// Where RAM is and where more can come, in ascending order; nothing where none can.
    pub pluggable: Option<PluggableMemory>,
    /// It comes by memory devices, of which there are as many as the registers have.
    pub memory_devices: bool,
    /// The guest's nodes; nothing where it has none.
    pub numa: Option<Numa>,
    /// There is a serial port COM1.
    pub serial: bool,
    /// There is a TPM.
    pub tpm: bool,
    /// Root ports have hot-plug slots that the guest's own driver handles.
    pub native_hotplug: bool,
}

/// The root of a PCI segment: its host bridge, and what that passes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The segment's number.
    pub segment: u16,
    /// The guest's NUMA node that it is near to, where there are nodes. §6.2.15
    pub node: Option<u32>,
    /// The highest bus number there is. The guest is told of no bus beyond it, not even where ECAM would
    /// reach one: Linux reads all of a told bus's 32 slots to find out that nothing is there, which
    /// for 255 empty buses is 16,000 exits at each boot.
    pub last_bus: u8,
    /// The ports for BARs; there may be none. Segment 0 passes on all ports below them as well.
    pub io: Range<u64>,
    /// The window for BARs below 4 GiB, in ascending parts.
    pub mmio32: Vec<Range<u64>>,
    /// The window for 64-bit BARs, in ascending parts; there may be none.
    pub mmio64: Vec<Range<u64>>,
    /// Bit n: the device in slot n of bus 0 can come and leave. Without any there is nothing that would tell
    /// of it.
    pub slots: u32,
    /// Configuration space in memory, below 4 GiB.
    pub ecam: Range<u64>,
}

impl Root {
    /// The host bridge's name in the namespace.
    pub(super) fn name(&self) -> String {
        match self.segment {
            0 => "PCI0".to_owned(),
            segment => format!("PC{segment:02X}"),
        }
    }
}

/// RAM to which more can come while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluggableMemory {
    /// Where there is RAM from the start on.
    pub ram: Vec<Range<u64>>,
    /// Where it can come, in ascending order, each piece with its node; that is 0 where there are no nodes.
    pub pieces: Vec<(u32, Range<u64>)>,
}

/// Which nodes there are, and what is near which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numa {
    /// The node of each processor, in the order of [`Hardware::cpus`].
    pub cpus: Vec<u32>,
    /// The stretches of RAM, ascending, each with its node.
    pub ram: Vec<(u32, Range<u64>)>,
    /// How far each node is from each, by their numbers.
    pub distances: Vec<Vec<u8>>,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The ID of its local APIC.
    pub apic_id: u32,
    /// It is there from the start; one that is not can come later.
    pub enabled: bool,
}

#[cfg(test)]
impl Hardware {
    /// A machine of which nothing is told.
    pub(crate) fn bare() -> Self {
        Self {
            cpus: Vec::new(),
            cpu_hotplug: false,
            roots: Vec::new(),
            pluggable: None,
            memory_devices: false,
            numa: None,
            serial: false,
            tpm: false,
            native_hotplug: false,
        }
    }
}
