//! What host functions and empty slots need of the guest's addresses, before any device is opened.

use std::path::PathBuf;

use busway_host::{Resource, resources_in};
use busway_pci::{BarIndex, BarKind, Behind, Needs, Reserve, WindowKind, spec};
use busway_vfio::{AssignOptions, RomChoice};

use crate::machine::passthrough::placement::{HostIdentity, behind_ports};
use crate::memory::Amount;

/// How many devices a refusal names as those that need most.
const NAMED: usize = 3;

/// A host function that the guest is to have, as sysfs shows it.
#[derive(Clone, Debug)]
pub(in crate::machine) struct PlannedFunction {
    pub(super) host: HostIdentity,
    pub(super) bars: Vec<(BarIndex, BarKind, u64)>,
    /// It sits on bus 0 by itself.
    on_root_bus: bool,
    /// The PCI segment that it is in.
    segment: u16,
}

impl PlannedFunction {
    /// The function that `host` is, given with `options`. Of a mediated device sysfs says nothing, and only
    /// VFIO once it is open: it has the room that is reserved for what is plugged in.
    pub(in crate::machine) fn new(
        host: &HostIdentity,
        options: &AssignOptions,
        reserve: Reserve,
    ) -> Self {
        if host.is_mediated() {
            return Self {
                host: host.clone(),
                bars: reserved(reserve),
                on_root_bus: false,
                segment: 0,
            };
        }
        let mut bars: Vec<_> = resources_in(&host.folder)
            .iter()
            .filter_map(|resource| match (bar_of(resource)?, &options.rom) {
                ((BarIndex::Rom, ..), RomChoice::None | RomChoice::Image(_)) => None,
                (bar, _) => Some(bar),
            })
            .collect();
        if let RomChoice::Image(image) = &options.rom {
            bars.push((BarIndex::Rom, ROM, image.size()));
        }
        Self {
            host: host.clone(),
            bars,
            on_root_bus: false,
            segment: 0,
        }
    }

    /// The same where it sits on bus 0 by itself, or does not.
    pub(in crate::machine) fn on_root_bus(self, on_root_bus: bool) -> Self {
        Self {
            on_root_bus,
            ..self
        }
    }

    /// The same in a PCI segment.
    pub(in crate::machine) fn in_segment(self, segment: u16) -> Self {
        Self { segment, ..self }
    }

    /// An empty slot of a segment, which reserves room.
    pub(in crate::machine) fn empty_slot(reserve: Reserve, segment: u16) -> Self {
        let key = match segment {
            0 => "hotplug_slots",
            _ => "segment_hotplug_slots",
        };
        Self {
            host: HostIdentity {
                folder: PathBuf::from(format!("an empty slot (--platform {key}=)")),
                host: None,
                is_virtual: false,
            },
            bars: reserved(reserve),
            on_root_bus: false,
            segment,
        }
    }

    /// What of its BARs is below 4 GiB where it sits, in bytes.
    fn below_4_gib(&self) -> u64 {
        let below = |kind| WindowKind::of(kind, self.on_root_bus) == WindowKind::Memory32;
        self.bars
            .iter()
            .filter(|(_, kind, _)| below(*kind))
            .fold(0, |sum, (_, _, size)| sum.saturating_add(*size))
    }
}

const ROM: BarKind = BarKind::Memory32 {
    prefetchable: false,
};

/// The BARs that room is reserved for.
fn reserved(reserve: Reserve) -> Vec<(BarIndex, BarKind, u64)> {
    let prefetchable = BarKind::Memory64 { prefetchable: true };
    vec![
        (BarIndex::Bar(0), ROM, reserve.memory32),
        (BarIndex::Bar(2), prefetchable, reserve.memory64),
    ]
}

/// What VFIO will show: BARs by their register, with the host's sizes. A size that no BAR can have is
/// refused when the device is opened.
fn bar_of(resource: &Resource) -> Option<(BarIndex, BarKind, u64)> {
    let prefetchable = resource.is_prefetchable();
    let (index, kind) = match resource.index {
        bar if bar >= spec::BAR_COUNT => (BarIndex::Rom, ROM),
        bar if resource.is_io() => (BarIndex::Bar(bar), BarKind::Io),
        bar if resource.is_64bit() => (BarIndex::Bar(bar), BarKind::Memory64 { prefetchable }),
        bar => (BarIndex::Bar(bar), BarKind::Memory32 { prefetchable }),
    };
    resource
        .size
        .is_power_of_two()
        .then_some((index, kind, resource.size))
}

/// What bus 0 of each of so many segments needs.
pub(super) fn needs_of_segments(
    functions: &[PlannedFunction],
    segments: u16,
) -> Vec<Vec<Needs<Option<usize>>>> {
    let here = |segment| {
        let all = placed(functions).into_iter();
        let here = all.filter(move |(other, _)| *other == segment);
        here.map(|(_, needs)| needs).collect()
    };
    (0..segments.max(1)).map(here).collect()
}

/// What the buses 0 need together.
pub(super) fn needs(functions: &[PlannedFunction]) -> Vec<Needs<Option<usize>>> {
    let all = placed(functions).into_iter();
    all.map(|(_, needs)| needs).collect()
}

/// What bus 0 of a segment needs: a port for each device, with its functions behind it, or the device itself.
fn placed(functions: &[PlannedFunction]) -> Vec<(u16, Needs<Option<usize>>)> {
    behind_ports(functions.iter().map(|function| &function.host))
        .into_iter()
        .map(|behind| {
            let given = |index: usize| functions.get(index);
            let needs = behind.iter().filter_map(|behind| {
                Some(Needs {
                    function: Some(behind.index),
                    bars: given(behind.index)?.bars.clone(),
                    bridge: None,
                })
            });
            let mut needs: Vec<_> = needs.collect();
            let first = behind.first().and_then(|behind| given(behind.index));
            let segment = first.map_or(0, |first| first.segment);
            let mut behind = behind.iter().filter_map(|behind| given(behind.index));
            if needs.len() == 1
                && behind.all(|one| one.on_root_bus)
                && let Some(alone) = needs.pop()
            {
                return (segment, alone);
            }
            let port = Needs {
                function: None,
                bars: Vec::new(),
                bridge: Some(Behind {
                    reserve: Reserve::SMALL,
                    functions: needs,
                }),
            };
            (segment, port)
        })
        .collect()
}

/// What a function has of bus 0: itself, or the port alone that it is behind.
pub(super) fn port_of(
    functions: &[PlannedFunction],
    function: Option<usize>,
) -> Vec<Needs<Option<usize>>> {
    let mut ports = needs(functions);
    ports.retain(|port| {
        let behind = port.bridge.iter().flat_map(|bridge| &bridge.functions);
        let mut all = behind.chain(port.bridge.is_none().then_some(port));
        all.any(|needs| needs.function == function)
    });
    ports
}

/// The devices that need most below 4 GiB, as a person says them.
pub(super) fn needing_most(functions: &[PlannedFunction]) -> String {
    let mut most: Vec<_> = functions
        .iter()
        .map(|function| (function.below_4_gib(), function.host.name()))
        .collect();
    most.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
    let most = most.iter().take(NAMED);
    let most: Vec<_> = most
        .map(|(size, name)| format!("{name} ({})", Amount(*size)))
        .collect();
    most.join(", ")
}
