//! QEMU's machine protocol: what happens to the emulated host's hardware.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// One connection to the emulated host's QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

/// How long QEMU may take to answer a command.
const PATIENCE: Duration = Duration::from_secs(60);

impl Qmp {
    /// Greets QEMU, whose monitor is at the other end.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: VecDeque::new(),
        };
        qmp.read(Instant::now() + PATIENCE)?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self, deadline: Instant) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("QEMU did not answer in time");
        }
        self.stream.get_ref().set_read_timeout(Some(left))?;
        let mut line = String::new();
        if self
            .stream
            .read_line(&mut line)
            .context("reading QEMU's answer")?
            == 0
        {
            bail!("QEMU closed its QMP socket");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Executes a command, such as `device_del` with `{"id": "nv0"}`, and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let order = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{order}")
            .with_context(|| format!("sending QEMU {command}"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut answer = self.read(deadline)?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command} {arguments}: {}", error["desc"]);
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Executes a line of the human monitor, such as `pcie_aer_inject_error`, and returns its text.
    pub fn monitor(&mut self, line: &str) -> Result<String> {
        let text = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Waits for an event by its name, such as `DEVICE_DELETED`, also one that has come already.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at).expect("the position was just found"));
            }
            let message = self
                .read(deadline)
                .with_context(|| format!("waiting for the event {name}"))?;
            self.events.push_back(message);
        }
    }

    /// The address of the function that was given this id, as `0000:01:00.0`.
    pub fn address(&mut self, id: &str) -> Result<String> {
        let buses = self.execute("query-pci", json!({}))?;
        find_function(&buses, id).with_context(|| format!("the emulated host has no device {id}"))
    }
}

fn find_function(buses: &Value, id: &str) -> Option<String> {
    buses
        .as_array()?
        .iter()
        .flat_map(|bus| bus["devices"].as_array())
        .flatten()
        .find_map(|device| {
            if device["qdev_id"] == id {
                let number = |name| device[name].as_u64().unwrap_or_default();
                let (bus, slot, function) = (number("bus"), number("slot"), number("function"));
                return Some(format!("0000:{bus:02x}:{slot:02x}.{function:x}"));
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
