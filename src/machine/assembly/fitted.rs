//! The devices that a machine begins with.

use std::path::PathBuf;
use std::sync::Arc;

use super::Steps;
use super::ground::Ground;
use super::taken::Taken;
use super::told::node_of_pluggable;
use crate::arch::layout;
use crate::config::VmConfig;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::tpm::{self, Tpm};
use crate::devices::watchdog::Watchdog;
use crate::machine::RunError;
use crate::machine::consoles::{CONSOLE, open_console, terminal};
use crate::machine::memory_devices::MemoryDevices;
use crate::machine::pci::Pci;
use crate::machine::seats::Owner;
use crate::machine::segments::{add_empty_ports, open_slots};
use crate::machine::virtio::VirtioDevices;
use crate::memory::{Ram, Regions, Slots};
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;

/// The devices.
#[derive(Debug)]
pub(super) struct Fitted {
    pub(super) virtio: VirtioDevices,
    /// Where RAM comes by ACPI.
    pub(super) memory_devices: Option<MemoryDevices>,
    pub(super) watchdog: Option<Arc<Watchdog>>,
    /// The pseudo-terminal that the console is at.
    pub(super) console_terminal: Option<PathBuf>,
}

impl Fitted {
    /// Fits the board with all that the configuration names, and with the places for what may come.
    pub(super) fn fit(
        steps: &Steps<'_>,
        taken: &mut Taken,
        ground: &mut Ground,
        tpm: Option<&Tpm>,
    ) -> Result<Self, RunError> {
        let Steps { config, .. } = steps;
        let (ram, pci) = (&taken.ram, &mut ground.pci);
        let slots = Slots::new(ram.guest(), &taken.memory.0, ground.area.clone());
        let routes = Arc::new(steps.router.clone());
        let (table, seats) = (&taken.table, pci.seats());
        let mut virtio =
            VirtioDevices::new(ram.guest(), table, slots, routes, seats, &steps.events);
        let console_terminal = add_virtio(steps, taken, &mut virtio, pci)?;
        let memory_devices = memory_devices(steps, taken)?;
        ground.acpi.memory_devices = memory_devices.is_some();
        let watchdog = add_board_devices(config, pci)?;
        if let Some(tpm) = tpm {
            let (at, registers) = (layout::TPM_START, tpm.registers());
            steps.buses.mmio.insert("TPM", at, tpm::SIZE, registers)?;
        }
        if let Some(opened) = taken.opened.take() {
            taken.passthrough.attach_first(opened, pci)?;
        }
        add_empty_ports(pci, config, &steps.router, &steps.events)?;
        // The host can want back an assigned device of any VM.
        if steps.can_be_asked || pci.seats().count(Owner::Assigned) > 0 {
            let slots = open_slots(pci, &steps.buses, &steps.router, &steps.events)?;
            for (root, slots) in ground.acpi.roots.iter_mut().zip(slots) {
                root.slots = slots;
            }
        }
        Ok(Self {
            virtio,
            memory_devices,
            watchdog,
            console_terminal,
        })
    }
}

/// The virtio devices: disks, NICs, console, entropy source, balloon, and RAM that comes and goes. Gives the
/// pseudo-terminal that the console is at.
fn add_virtio(
    steps: &Steps<'_>,
    taken: &Taken,
    virtio: &mut VirtioDevices,
    pci: &mut Pci,
) -> Result<Option<PathBuf>, RunError> {
    let Steps {
        config, definition, ..
    } = steps;
    let regions = &taken.memory.0;
    virtio.add_first(config, &definition.files, pci)?;
    let at = definition.terminals.console.as_ref();
    let endpoint = open_console(CONSOLE, &config.console, at, &steps.quit)?;
    let console_terminal = terminal(&config.console, endpoint.as_ref());
    if let Some(endpoint) = endpoint {
        virtio.add_fixed(Box::new(Console::new("console", endpoint)), pci)?;
    }
    virtio.add_fixed(Box::new(Rng::new("rng", &config.rng)?), pci)?;
    if let Some(balloon) = &config.balloon {
        let ballooned = taken.ram.ballooned(regions);
        virtio.add_balloon(balloon, regions.discards(), ballooned, pci)?;
    }
    if config.memory.comes_by_virtio() {
        add_memory(config, &taken.ram, regions, virtio, pci)?;
    }
    Ok(console_terminal)
}

/// The devices by which RAM comes and goes: one for each piece of it.
fn add_memory(
    config: &VmConfig,
    ram: &Ram,
    regions: &Arc<Regions>,
    virtio: &mut VirtioDevices,
    pci: &mut Pci,
) -> Result<(), RunError> {
    for (zone, pluggable) in ram.pluggable(regions) {
        let node = u16::try_from(node_of_pluggable(config, zone)).unwrap_or(u16::MAX);
        let zone = zone.and_then(|zone| config.memory_zone.get(zone));
        let requested = match zone {
            Some(zone) => zone.hotplugged_size,
            None => config.memory.hotplugged_size,
        };
        let name = zone.map(|zone| zone.id.clone());
        virtio.add_memory(name, pluggable, requested.unwrap_or(0), node, pci)?;
    }
    Ok(())
}

/// The memory devices, where RAM comes by ACPI.
fn memory_devices(steps: &Steps<'_>, taken: &Taken) -> Result<Option<MemoryDevices>, RunError> {
    let memory = &steps.config.memory;
    let mut pieces = taken.ram.pluggable(&taken.memory.0);
    let pluggable = pieces.next().filter(|_| !memory.comes_by_virtio());
    let first = memory.hotplugged_size.unwrap_or(0);
    let new = |(_, pluggable)| {
        let Steps {
            buses,
            router,
            events,
            ..
        } = steps;
        MemoryDevices::new(pluggable, first, buses, router, events)
    };
    pluggable.map(new).transpose()
}

/// The devices of the board that are on PCI and not virtio's. Gives the watchdog.
pub(in crate::machine) fn add_board_devices(
    config: &VmConfig,
    pci: &mut Pci,
) -> Result<Option<Arc<Watchdog>>, RunError> {
    if config.pvpanic {
        let pvpanic = Pvpanic::new().map_err(std::io::Error::other);
        let pvpanic = pvpanic.map_err(RunError::system("a BAR of pvpanic's"))?;
        pci.add_board(Arc::new(pvpanic))?;
    }
    if !config.watchdog {
        return Ok(None);
    }
    let watchdog = Arc::new(Watchdog::new().map_err(RunError::system("timerfd_create"))?);
    pci.add_board(watchdog.clone())?;
    Ok(Some(watchdog))
}
