//! One emulated host after another, for one trial: booted when it is asked for, kept while the same is wanted.

use std::path::PathBuf;

use anyhow::Result;

use crate::calls;
use crate::config::HostConfig;
use crate::host::Host;
use crate::spent;

/// Keeps one host running, so that many guests share its boot.
#[derive(Debug, Default)]
pub struct Lab {
    programs: Vec<PathBuf>,
    current: Option<Host>,
}

impl Lab {
    /// A lab whose hosts have these programs in their `/usr/local/bin`.
    pub fn new(programs: Vec<PathBuf>) -> Self {
        Self {
            programs,
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
            for program in &self.programs {
                host.install(program)?;
            }
            calls::begin(&host)?;
            self.current = Some(host);
        }
        let host = self.current.as_ref().expect("a host was just put there");
        spent::emulator(host.qemu_pid());
        Ok(host)
    }

    /// Stops the running host: also after a failed test, so that the next one starts afresh.
    pub fn stop(&mut self) {
        if let Some(host) = self.current.take()
            && let Err(error) = calls::end(&host)
        {
            eprintln!("lab: the calls of a host's threads are lost: {error:#}");
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop();
    }
}
