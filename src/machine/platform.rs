//! The devices of the board, those that are not on PCI.

use std::path::PathBuf;
use std::sync::Arc;

use busway_pci::Cf8Cfc;
use busway_vfio::EventFd;

use super::RunError;
use super::bus::ConfigPorts;
use super::events::Events;
use super::pci::Pci;
use crate::acpi;
use crate::config::ConsoleConfig;
use crate::devices::console::Endpoint;
use crate::devices::power::{self, AcpiPower, KeyboardReset, ResetControl};
use crate::devices::rtc::{self, Rtc};
use crate::devices::serial::{self, Serial};
use crate::devices::{InterruptLine, PowerSink};
use crate::kvm::{Buses, IrqRouter, LevelLine};

impl InterruptLine for LevelLine {
    fn set_level(&self, asserted: bool) {
        self.set(asserted);
    }
}

/// The board.
#[derive(Debug)]
pub(super) struct Platform {
    pub(super) power: Arc<AcpiPower>,
    pub(super) rtc: Arc<Rtc>,
    serial: Option<Arc<Serial>>,
    /// The pseudo-terminal that it is at.
    pub(super) serial_terminal: Option<PathBuf>,
    config_ports: Arc<Cf8Cfc>,
}

impl Platform {
    /// Puts the board's devices on the buses. `quit` is signalled when a person wants to leave.
    pub(super) fn new(
        serial: &ConsoleConfig,
        buses: &Buses,
        router: &IrqRouter,
        pci: &Pci,
        events: &Arc<Events>,
        quit: &EventFd,
    ) -> Result<Self, RunError> {
        let ports = &buses.ports;
        let sink: Arc<dyn PowerSink> = events.clone();

        let sci = Arc::new(router.level_line(acpi::SCI));
        let mut power = AcpiPower::new(sci, sink.clone());
        if pci.mch().is_some() {
            power = power.for_firmware();
        }
        let power = Arc::new(power);
        ports.insert(
            "ACPI registers",
            power::PM_BASE.into(),
            power::PM_SIZE.into(),
            power.clone(),
        )?;

        let config_ports = Arc::new(Cf8Cfc::new(pci.topology().clone()));
        let reset = ResetControl::new(sink.clone(), Arc::new(ConfigPorts(config_ports.clone())));
        ports.insert(
            "PCI configuration ports",
            power::CONFIG_PORTS.into(),
            power::CONFIG_PORTS_SIZE.into(),
            Arc::new(reset),
        )?;
        let mut keyboard = KeyboardReset::new(sink);
        if pci.mch().is_some() {
            keyboard = keyboard.without_controller();
        }
        ports.insert(
            "keyboard controller",
            power::KEYBOARD_COMMAND.into(),
            1,
            Arc::new(keyboard),
        )?;

        let rtc = Rtc::new(router.edge_line(rtc::IRQ)?)
            .map_err(RunError::system("the clock's timer cannot be made"))?;
        let rtc = Arc::new(rtc);
        ports.insert("clock", rtc::BASE.into(), rtc::SIZE.into(), rtc.clone())?;

        let mut serial_terminal = None;
        let serial = match open_console("--serial", serial, quit)? {
            Some(endpoint) => {
                serial_terminal = terminal(serial, &endpoint);
                let port = Serial::new(router.edge_line(serial::IRQ)?, endpoint)
                    .map_err(RunError::system("the serial port cannot be made"))?;
                let port = Arc::new(port);
                ports.insert(
                    "serial port",
                    serial::BASE.into(),
                    serial::SIZE.into(),
                    port.clone(),
                )?;
                Some(port)
            }
            None => None,
        };
        Ok(Self {
            power,
            rtc,
            serial,
            serial_terminal,
            config_ports,
        })
    }

    /// As after power-on. No vCPU may run.
    pub(super) fn reset(&self) {
        self.power.reset();
        self.rtc.reset();
        self.config_ports.reset();
        if let Some(serial) = &self.serial {
            serial.reset();
        }
    }
}

/// The pseudo-terminal of a console, whose name nobody can know beforehand.
pub(super) fn terminal(config: &ConsoleConfig, endpoint: &Endpoint) -> Option<PathBuf> {
    match config {
        ConsoleConfig::Pty => endpoint.location.clone(),
        _ => None,
    }
}

/// Opens a console, and says where it is where a person could not know.
pub(super) fn open_console(
    flag: &'static str,
    config: &ConsoleConfig,
    quit: &EventFd,
) -> Result<Option<Endpoint>, RunError> {
    let endpoint =
        Endpoint::open(config, quit).map_err(|source| RunError::Console { flag, source })?;
    if let Some(location) = endpoint.as_ref().and_then(|end| end.location.as_ref()) {
        // After what has been logged.
        log::logger().flush();
        eprintln!("busway: {flag} is at {}", location.display());
    }
    Ok(endpoint)
}
