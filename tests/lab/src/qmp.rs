//! QEMU's machine protocol: what happens to the emulated host's hardware.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::mem;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::agent::Agent;

/// One connection to the emulated host's QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// What has come of a line whose end has not.
    line: Vec<u8>,
    events: VecDeque<Value>,
    /// The number of the last command, by which a late answer to an earlier one is known.
    commands: u64,
    /// The line to the host's agent, to explain a wait that runs out of time.
    agent: Weak<Agent>,
}

/// How long QEMU may take to answer a command.
const PATIENCE: Duration = Duration::from_secs(60);

impl Qmp {
    /// Greets QEMU, whose monitor is at the other end.
    pub(crate) fn new(stream: UnixStream, agent: &Arc<Agent>) -> Result<Self> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            line: Vec::new(),
            events: VecDeque::new(),
            commands: 0,
            agent: Arc::downgrade(agent),
        };
        qmp.read(Instant::now() + PATIENCE)?
            .context("QEMU did not greet in time")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// What QEMU says next; nothing if it says nothing until the deadline.
    fn read(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    return Ok(Some(serde_json::from_slice(&mem::take(&mut self.line))?));
                }
                Ok(_) => bail!("QEMU closed its QMP socket"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("reading QEMU's answer"),
            }
        }
    }

    /// Executes a command, such as `device_del` with `{"id": "nv0"}`, and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        match self.attempt(command, arguments, PATIENCE)? {
            Some(value) => Ok(value),
            None => Err(self.timed_out(&format!("QEMU's answer to {command}"), PATIENCE)),
        }
    }

    /// The same for who explains a wait that ran out of time, and must not wait long.
    pub(crate) fn execute_within(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value> {
        let answer = self.attempt(command, arguments, limit)?;
        answer.with_context(|| format!("QEMU does not answer {command}"))
    }

    /// Executes a command; returns nothing if it takes longer than the limit.
    fn attempt(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Option<Value>> {
        self.commands += 1;
        let order = json!({ "execute": command, "arguments": arguments, "id": self.commands });
        writeln!(self.stream.get_mut(), "{order}")
            .with_context(|| format!("sending QEMU {command}"))?;
        let deadline = Instant::now() + limit;
        while let Some(mut answer) = self.read(deadline)? {
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if answer["id"] != self.commands {
                // It came too late for an earlier command.
            } else if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command} {arguments}: {}", error["desc"]);
            } else {
                return Ok(Some(answer["return"].take()));
            }
        }
        Ok(None)
    }

    fn timed_out(&mut self, waited_for: &str, limit: Duration) -> anyhow::Error {
        match self.agent.upgrade() {
            Some(agent) => agent.timed_out(waited_for, limit, "", Some(self)),
            None => anyhow::Error::msg(format!("{waited_for} did not come")),
        }
    }

    /// Executes a line of the human monitor, such as `pcie_aer_inject_error`, and returns its text.
    pub fn monitor(&mut self, line: &str) -> Result<String> {
        let text = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// The same within a limit, as [`execute_within`](Self::execute_within).
    pub(crate) fn monitor_within(&mut self, line: &str, limit: Duration) -> Result<String> {
        let arguments = json!({ "command-line": line });
        let text = self.execute_within("human-monitor-command", arguments, limit)?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for an event by its name, such as `DEVICE_DELETED`, also one that has come already.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at).expect("the position was just found"));
            }
            let message = self.read(deadline);
            match message.with_context(|| format!("waiting for the event {name}"))? {
                // Anything else is an answer that came too late for its command.
                Some(message) if message.get("event").is_some() => self.events.push_back(message),
                Some(_) => {}
                None => return Err(self.timed_out(&format!("QEMU's event {name}"), timeout)),
            }
        }
    }

    /// The addresses of all functions that were given an id, as the host has numbered its buses. Virtual functions that
    /// are not enabled have none.
    pub(crate) fn functions(&mut self) -> Result<Vec<String>> {
        fn below(buses: &Value, found: &mut Vec<String>) {
            for device in buses
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|bus| bus["devices"].as_array())
                .flatten()
            {
                if device["qdev_id"] != "" {
                    found.push(address_of(device));
                }
                if let Some(bridge) = device.get("pci_bridge") {
                    below(&Value::Array(vec![bridge.clone()]), found);
                }
            }
        }
        let mut found = Vec::new();
        below(&self.execute("query-pci", json!({}))?, &mut found);
        Ok(found)
    }

    /// The address of the function that was given this id, as `0000:01:00.0`.
    pub fn address(&mut self, id: &str) -> Result<String> {
        let buses = self.execute("query-pci", json!({}))?;
        find_function(&buses, id).with_context(|| format!("the emulated host has no device {id}"))
    }
}

/// A function's address, from what `query-pci` says of it.
fn address_of(device: &Value) -> String {
    let number = |name| device[name].as_u64().unwrap_or_default();
    let (bus, slot, function) = (number("bus"), number("slot"), number("function"));
    format!("0000:{bus:02x}:{slot:02x}.{function:x}")
}

fn find_function(buses: &Value, id: &str) -> Option<String> {
    buses
        .as_array()?
        .iter()
        .flat_map(|bus| bus["devices"].as_array())
        .flatten()
        .find_map(|device| {
            if device["qdev_id"] == id {
                return Some(address_of(device));
            }
            let below = device.get("pci_bridge")?;
            // The bridge's answer has the same shape as one bus.
            find_function(&Value::Array(vec![below.clone()]), id)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_below_bridges() {
        let leaf = json!({ "qdev_id": "nv0", "bus": 2, "slot": 31, "function": 1 });
        let bridge = json!({ "qdev_id": "port1", "bus": 0, "slot": 4, "function": 0,
            "pci_bridge": { "bus": { "number": 2 }, "devices": [leaf] } });
        let buses = json!([{ "bus": 0, "devices": [{ "qdev_id": "" }, bridge] }]);
        assert_eq!(
            find_function(&buses, "nv0").as_deref(),
            Some("0000:02:1f.1")
        );
        assert_eq!(find_function(&buses, "nv1"), None);
    }
}
