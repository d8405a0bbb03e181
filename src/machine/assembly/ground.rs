//! The board without its devices: where everything lies, PCI, and what stands in for a chipset.

use std::path::PathBuf;
use std::sync::Arc;

use busway_pci::Windows;

use super::Steps;
use super::taken::Taken;
use super::told::acpi_hardware;
use crate::acpi;
use crate::arch::board::Board;
use crate::arch::layout;
use crate::machine::RunError;
use crate::machine::consoles::{SERIAL, open_console, terminal};
use crate::machine::pci::Pci;
use crate::machine::segments::segments;
use crate::memory::Area;

/// The board.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) pci: Pci,
    pub(super) board: Board,
    /// The pseudo-terminal that the serial port is at.
    pub(super) serial_terminal: Option<PathBuf>,
    /// What its tables will tell.
    pub(super) acpi: acpi::Hardware,
    /// Where BARs of the first segment may be.
    pub(super) windows: Windows,
    /// Where memory that comes with devices goes.
    pub(super) area: Arc<Area>,
}

impl Ground {
    /// Lays it out around what was taken. A BIOS knows fewer places than other firmware.
    pub(super) fn lay_out(
        steps: &Steps<'_>,
        taken: &Taken,
        is_bios: bool,
    ) -> Result<Self, RunError> {
        let Steps { config, plan, .. } = steps;
        let has_firmware = config.firmware.is_some();
        let usable = taken.passthrough.usable_ranges();
        let mut used = taken.ram.guest_ranges();
        used.extend(taken.ram.pluggable_ranges());
        let windows = plan.windows(&used, &usable);
        let mut segments = segments(config, plan.share(&windows)?)?;
        let acpi = acpi_hardware(config, &segments, &taken.ram);
        if has_firmware && let Some(only) = segments.first_mut() {
            only.windows = plan.bar_windows(&windows, &usable);
            if is_bios {
                only.windows.memory32 = layout::bios_mmio32(&only.windows.memory32);
            }
        }
        let windows = match segments.first() {
            Some(first) => first.windows.clone(),
            None => windows,
        };
        let mut pci = Pci::new(
            segments,
            &steps.buses,
            taken.memory.0.clone(),
            steps.vm.doorbells(),
            steps.router.shared_lines(),
            has_firmware,
        )?;
        pci.keep_places(config);
        let at = steps.definition.terminals.serial.as_ref();
        let serial = open_console(SERIAL, &config.serial, at, &steps.quit)?;
        let serial_terminal = terminal(&config.serial, serial.as_ref());
        let board = Board::new(
            serial,
            &steps.buses,
            &steps.router,
            pci.topology(),
            steps.events.clone(),
            has_firmware,
        )?;
        let top_of_ram = used.last().map_or(0, |range| range.end);
        Ok(Self {
            pci,
            board,
            serial_terminal,
            acpi,
            windows,
            area: Area::new(plan.plugged_area(top_of_ram, &usable)),
        })
    }
}
