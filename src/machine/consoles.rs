//! The consoles that a configuration asks for.

use std::path::PathBuf;

use busway_vfio::EventFd;

use super::RunError;
use crate::config::{ConsoleConfig, VmConfig};
use crate::devices::console::{ConsoleError, Endpoint};
use crate::devices::terminal::Pty;

/// The pseudo-terminals of a VM that is to be. They are there as soon as it is known what it is to be, for clients look
/// for their names then, and stay the same through all its boots.
#[derive(Debug, Default)]
pub(super) struct Terminals {
    pub(super) serial: Option<Pty>,
    pub(super) console: Option<Pty>,
}

impl Terminals {
    /// Makes those that the configuration asks for.
    ///
    /// # Errors
    /// [`RunError::Console`]
    pub(super) fn open(config: &VmConfig) -> Result<Self, RunError> {
        let open = |flag, console: &ConsoleConfig| match console {
            ConsoleConfig::Pty => {
                let failed = |source| RunError::Console {
                    flag,
                    source: ConsoleError::Pty(source),
                };
                Pty::open().map(Some).map_err(failed)
            }
            _ => Ok(None),
        };
        Ok(Self {
            serial: open(SERIAL, &config.serial)?,
            console: open(CONSOLE, &config.console)?,
        })
    }

    /// Where they are: the serial port's and the console's.
    pub(super) fn paths(&self) -> [Option<PathBuf>; 2] {
        [&self.serial, &self.console].map(|pty| pty.as_ref().map(|pty| pty.path.clone()))
    }
}

/// What the serial port is called.
pub(super) const SERIAL: &str = "--serial";
/// What the console is called.
pub(super) const CONSOLE: &str = "--console";

/// The pseudo-terminal of a console, whose name nobody can know beforehand.
pub(super) fn terminal(config: &ConsoleConfig, endpoint: Option<&Endpoint>) -> Option<PathBuf> {
    match config {
        ConsoleConfig::Pty => endpoint?.location.clone(),
        _ => None,
    }
}

/// Opens a console, at its pseudo-terminal where it has one already, and says where it is where a person could not
/// know.
pub(super) fn open_console(
    flag: &'static str,
    config: &ConsoleConfig,
    pty: Option<&Pty>,
    quit: &EventFd,
) -> Result<Option<Endpoint>, RunError> {
    let opened = match pty {
        Some(pty) => pty
            .try_clone()
            .map_err(ConsoleError::Pty)
            .and_then(Endpoint::at_pty)
            .map(Some),
        None => Endpoint::open(config, quit),
    };
    let endpoint = opened.map_err(|source| RunError::Console { flag, source })?;
    if let Some(location) = endpoint.as_ref().and_then(|end| end.location.as_ref()) {
        // After what has been logged.
        log::logger().flush();
        eprintln!("busway: {flag} is at {}", location.display());
    }
    Ok(endpoint)
}
