//! The devices of the board that are not on PCI.

use std::io;
use std::sync::Arc;

use busway_pci::{Cf8Cfc, Topology};

use super::power::{self, AcpiPower, KeyboardReset, ResetControl};
use super::rtc::{self, Rtc};
use super::{gsi, layout};
use crate::devices::PowerSink;
use crate::devices::console::Endpoint;
use crate::devices::serial::{self, Serial};
use crate::kvm::{BusDevice, Buses, IrqRouter, KvmError, Overlap};

/// Why the board cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// {0}
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// {0}
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// the clock's timer cannot be made: {0}
    #[error("the clock's timer cannot be made: {0}")]
    Timer(#[source] io::Error),
    /// the serial port cannot be made: {0}
    #[error("the serial port cannot be made: {0}")]
    Serial(#[source] io::Error),
}

/// The board.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) power: Arc<AcpiPower>,
    pub(crate) rtc: Arc<Rtc>,
    serial: Option<Arc<Serial>>,
    config_ports: Arc<Cf8Cfc>,
}

impl Board {
    /// Puts the board's devices on the buses. `serial` is the console of the serial port, where there is one;
    /// `topology` is what the configuration ports reach; `firmware` says that the guest begins with firmware,
    /// which looks for devices that a kernel does not look for.
    ///
    /// # Errors
    /// [`BoardError`]
    pub(crate) fn new(
        serial: Option<Endpoint>,
        buses: &Buses,
        router: &IrqRouter,
        topology: &Arc<Topology>,
        sink: Arc<dyn PowerSink>,
        firmware: bool,
    ) -> Result<Self, BoardError> {
        let ports = &buses.ports;

        let sci = Arc::new(router.level_line(gsi::SCI));
        let mut power = AcpiPower::new(sci, sink.clone());
        if firmware {
            power = power.for_firmware();
        }
        let power = Arc::new(power);
        ports.insert(
            "ACPI registers",
            power::PM_BASE.into(),
            power::PM_SIZE.into(),
            power.clone(),
        )?;

        let config_ports = Arc::new(Cf8Cfc::new(topology.clone()));
        let reset = ResetControl::new(sink.clone(), Arc::new(ConfigPorts(config_ports.clone())));
        ports.insert(
            "PCI configuration ports",
            power::CONFIG_PORTS.into(),
            power::CONFIG_PORTS_SIZE.into(),
            Arc::new(reset),
        )?;
        let mut keyboard = KeyboardReset::new(sink);
        if firmware {
            keyboard = keyboard.without_controller();
        }
        ports.insert(
            "keyboard controller",
            power::KEYBOARD_COMMAND.into(),
            1,
            Arc::new(keyboard),
        )?;

        let rtc = Rtc::new(router.edge_line(gsi::RTC)?).map_err(BoardError::Timer)?;
        let rtc = Arc::new(rtc);
        ports.insert("clock", rtc::BASE.into(), rtc::SIZE.into(), rtc.clone())?;

        let serial = match serial {
            Some(endpoint) => {
                let port = Serial::new(router.edge_line(gsi::SERIAL)?, endpoint)
                    .map_err(BoardError::Serial)?;
                let port = Arc::new(port);
                ports.insert(
                    "serial port",
                    layout::SERIAL_PORT.into(),
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
            config_ports,
        })
    }

    /// As after power-on. No vCPU may run.
    pub(crate) fn reset(&self) {
        self.power.reset();
        self.rtc.reset();
        self.config_ports.reset();
        if let Some(serial) = &self.serial {
            serial.reset();
        }
    }
}

/// The configuration ports.
struct ConfigPorts(Arc<Cf8Cfc>);

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}
