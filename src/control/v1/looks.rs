//! What is asked of a VM without changing anything: how it is, what it does, and whether it could have a device.

use std::io;
use std::path::Path;

use busway_host::Called;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use serde::Deserialize;

use super::{Api, failed, observe, refused, succeeded};
use crate::config::MemoryConfig;
use crate::control::http::{Answer, Request as HttpRequest};
use crate::control::{json, metrics};
use crate::machine::{self, Observed, Request, RequestError, State};
use crate::preflight::{Preflight, PreflightError};

/// What is to be checked.
#[derive(Deserialize)]
struct CheckDevice {
    /// As `vm.add-device` has it, or as `busway device` does.
    path: String,
    /// The bytes of memory that the guest is to have, if other than the VM's.
    memory: Option<u64>,
}

impl CheckDevice {
    fn into_called(self) -> Result<(Called, Option<u64>), String> {
        let path = self.path.trim_end_matches('/');
        let called = path.parse::<Called>().map_err(|error| error.to_string())?;
        Ok((called, self.memory))
    }
}

/// Whether this process may open a node for reading and writing. It is asked and not tried, for a thread that serves clients
/// opens nothing to be written (`sandbox`). So a device cgroup that forbids it is not seen here.
fn may_open(node: &Path) -> io::Result<()> {
    let both = Access::READ_OK | Access::WRITE_OK;
    Ok(accessat(CWD, node, both, AtFlags::EACCESS)?)
}

impl Api {
    pub(super) fn info(&self) -> Answer {
        match self.control.ask(Request::Info) {
            Ok(machine::Answer::Info(info)) => super::info::show(&info),
            Ok(_) => failed(500, &["The VM did not say how it is"]),
            Err(error) => refused("The VM info is not available", &error),
        }
    }

    /// What the VM's vCPUs and devices have done.
    pub(super) fn observe(&self, what: &str, show: impl FnOnce(&Observed) -> Answer) -> Answer {
        match self.control.ask(Request::Observe) {
            Ok(machine::Answer::Observed(seen)) => show(&seen),
            Ok(_) => failed(500, &[what]),
            Err(error) => refused(what, &error),
        }
    }

    /// What a guest has its devices do; there is nothing of it while none runs.
    pub(super) fn counters(&self) -> Answer {
        const WHAT: &str = "The VM's counters are not available";
        self.observe(WHAT, |seen| match seen.state {
            State::Created | State::Shutdown => refused(WHAT, &RequestError::NotRunning),
            _ => succeeded(&observe::counters(seen)),
        })
    }

    /// A process that has no VM, or is about to end, has metrics as well.
    pub(super) fn metrics(&self, request: &HttpRequest) -> Answer {
        if request.method != "GET" {
            let text = format!("metrics are asked for by GET, not by {}", request.method);
            return failed(400, &[&text]);
        }
        let observed = match self.control.ask(Request::Observe) {
            Ok(machine::Answer::Observed(seen)) => Some(seen),
            Err(error @ RequestError::TooMany) => {
                return refused("The metrics are not available", &error);
            }
            _ => None,
        };
        match metrics::text(observed.as_deref()) {
            Ok(text) => Answer {
                status: 200,
                body: Some(text.into_bytes()),
                content_type: metrics::CONTENT_TYPE,
            },
            Err(error) => failed(500, &["The metrics cannot be written", &error.to_string()]),
        }
    }

    /// Looks at a host device as `busway device check` does, for a guest with the VM's memory. It is done here, beside
    /// the machine, which waits for nothing of it.
    pub(super) fn check_device(&self, body: &[u8]) -> Answer {
        const WHAT: &str = "The device could not be checked";
        let asked = json::parse::<CheckDevice>(body).and_then(CheckDevice::into_called);
        let (called, memory) = match asked {
            Ok(asked) => asked,
            Err(why) => return failed(400, &[WHAT, &why]),
        };
        let info = self.control.ask(Request::Info);
        let config = match &info {
            Ok(machine::Answer::Info(info)) => Some(&info.config),
            _ => None,
        };
        let memory = match (memory, config, &info) {
            (Some(memory), ..) => memory,
            (None, Some(config), _) => config.most_memory(),
            (None, None, Ok(_) | Err(RequestError::NotCreated)) => MemoryConfig::default().size,
            (None, None, Err(error)) => return refused(WHAT, error),
        };
        let opens = &may_open;
        match Preflight::of(&self.host, &[called], memory, opens) {
            Ok(mut found) => {
                if let Some(config) = config {
                    found.across(config);
                }
                succeeded(&found.json())
            }
            Err(error @ PreflightError::Called(_)) => failed(404, &[WHAT, &error.to_string()]),
            Err(error) => failed(500, &[WHAT, &error.to_string()]),
        }
    }
}
