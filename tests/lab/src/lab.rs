//! One emulated host after another: booted when a test needs it, shared by those that want the same.

use std::path::PathBuf;

use anyhow::Result;

use crate::config::HostConfig;
use crate::host::Host;

/// Keeps one host running, so that many guests share its boot.
#[derive(Debug, Default)]
pub struct Lab {
    busway: Option<PathBuf>,
    current: Option<Host>,
}

impl Lab {
    /// A lab whose hosts have this `busway`, if any, in their `/usr/local/bin`.
    pub fn new(busway: Option<PathBuf>) -> Self {
        Self {
            busway,
            current: None,
        }
    }

    /// A host of this configuration: the running one, if that is what it is; else a new one, after
    /// the other has been stopped.
    pub fn host(&mut self, config: &HostConfig) -> Result<&Host> {
        let fits = |host: &Host| host.config() == config && host.is_running();
        if !self.current.as_ref().is_some_and(fits) {
            self.stop();
            let host = Host::boot(config.clone())?;
            if let Some(busway) = &self.busway {
                host.install(busway)?;
            }
            self.current = Some(host);
        }
        Ok(self.current.as_ref().expect("a host was just put there"))
    }

    /// Stops the running host: also after a failed test, so that the next one starts afresh.
    pub fn stop(&mut self) {
        self.current = None;
    }
}
