//! The PCI segments of a machine as it is put together: where each has configuration space, its empty slots, and what
//! tells of devices that come to its bus 0.

use std::sync::Arc;

use busway_pci::{InterruptRoutes, SlotListener, Windows};

use super::RunError;
use super::address_plan::SegmentAddresses;
use super::events::Events;
use super::pci::Pci;
use crate::arch::{gsi, layout};
use crate::config::VmConfig;
use crate::devices::pci_hotplug;
use crate::kvm::{Buses, IrqRouter};

/// The highest bus number of a segment: one bus is behind each root port, and each assigned device has a port.
pub(super) fn last_bus(config: &VmConfig, segment: u16) -> u8 {
    let devices = config.device.iter();
    let here = devices
        .filter(|device| device.pci_segment == segment)
        .count();
    let slots = config.platform.hotplug_slots(segment);
    u8::try_from(here).unwrap_or(u8::MAX).saturating_add(slots)
}

/// The segments with these windows, in their order, and with configuration space for as many buses as each has.
pub(super) fn segments(
    config: &VmConfig,
    windows: Vec<Windows>,
) -> Result<Vec<SegmentAddresses>, RunError> {
    let last_buses = (0..).zip(&windows);
    let last_buses: Vec<_> = last_buses
        .map(|(segment, _)| last_bus(config, segment))
        .collect();
    let ecams = layout::ecams(&last_buses).ok_or(RunError::NoEcamRoom {
        segments: windows.len(),
        room: (layout::ECAMS_END - layout::ECAM_START - layout::ECAM_SIZE) >> 20,
    })?;
    let segments = windows.into_iter().zip(ecams);
    Ok(segments
        .map(|(windows, ecam)| SegmentAddresses { windows, ecam })
        .collect())
}

/// Root ports with empty slots, for devices that are added later.
pub(super) fn add_empty_ports(
    pci: &mut Pci,
    config: &VmConfig,
    router: &IrqRouter,
    events: &Arc<Events>,
) -> Result<(), RunError> {
    let routes: Arc<dyn InterruptRoutes> = Arc::new(router.clone());
    let listener: Arc<dyn SlotListener> = events.clone();
    let platform = &config.platform;
    for segment in 0..platform.segments() {
        let count = platform.hotplug_slots(segment);
        pci.add_empty_ports(segment, count, platform.reserve(), &routes, &listener)?;
    }
    Ok(())
}

/// Lets devices come to bus 0 of each segment while the guest runs, and leave it: gives the slots for that, by segment.
pub(super) fn open_slots(
    pci: &Pci,
    buses: &Buses,
    router: &IrqRouter,
    events: &Arc<Events>,
) -> Result<Vec<u32>, RunError> {
    // One interrupt for all, which is up while something is unseen in any.
    let lines = router.shared_lines();
    let mut opened = Vec::new();
    for (number, segment) in (0..).zip(pci.segments()) {
        let line = Arc::new(lines.pin(gsi::PCI_HOTPLUG));
        let free = pci.free_slots(segment);
        buses.mmio.insert(
            "PCI hot-plug registers",
            layout::pci_hotplug(number),
            pci_hotplug::SIZE,
            pci.seats().open(segment, free, line, events),
        )?;
        opened.push(pci.seats().open_slots(segment));
    }
    Ok(opened)
}
