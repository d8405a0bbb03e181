//! The consoles that a configuration asks for.

use std::path::PathBuf;

use busway_vfio::EventFd;

use super::RunError;
use crate::config::ConsoleConfig;
use crate::devices::console::Endpoint;

/// The pseudo-terminal of a console, whose name nobody can know beforehand.
pub(super) fn terminal(config: &ConsoleConfig, endpoint: Option<&Endpoint>) -> Option<PathBuf> {
    match config {
        ConsoleConfig::Pty => endpoint?.location.clone(),
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
