//! What each device had before it was moved, written down before the first change to it.
//!
//! The journal lies in `/run`, which lasts exactly as long as what it is about: a driver's hold on a
//! device and `driver_override` outlive a process that is killed, and do not outlive a reboot. What is
//! to outlive that too is a rule of udev's, which is its own record.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use busway_pci::Bdf;
use serde::{Deserialize, Serialize};

use super::device::HostDevice;
use super::root::SysRoot;
use super::session::Session;
use super::steps::StepError;

/// The format that is written, and the only one that is read.
const VERSION: u32 = 1;

/// What every device had that was moved and not put back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Journal {
    devices: Known,
    /// The same as it is in the file.
    saved: Known,
}

/// What is known of devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    records: BTreeMap<Bdf, Record>,
    /// Devices whose virtual functions are kept from the host's drivers: while they are made, and where
    /// that was asked for.
    withheld: BTreeMap<Bdf, Identity>,
}

/// What one device had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Which device it is, for another may come to its address.
    pub(super) identity: Identity,
    /// The driver that it had.
    pub(super) driver: Option<String>,
    /// The driver that alone might take it.
    pub(super) driver_override: Option<String>,
    /// The driver that it was taken for.
    pub(super) taken_for: String,
    /// Nodes that were given to a user, and who had them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) nodes: BTreeMap<PathBuf, u32>,
}

/// What kind of device one is: as much as sysfs and udev can compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) subsystem_vendor: u16,
    pub(super) subsystem_device: u16,
}

impl Identity {
    pub(super) fn of(device: &HostDevice) -> Self {
        Self {
            vendor: device.vendor,
            device: device.device,
            subsystem_vendor: device.subsystem_vendor,
            subsystem_device: device.subsystem_device,
        }
    }
}

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// cannot read the journal {path}: {source}
    #[error("cannot read the journal {}: {source}\n  it says what each device had before: only root may see to it", path.display())]
    Read {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// the journal {path} is not one that this busway wrote: {reason}
    #[error(
        "the journal {} is not one that this busway wrote: {reason}\n  \
         use the busway that wrote it, or move it away and give devices back by `busway device unbind`",
        path.display()
    )]
    Malformed {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// The journal as a file.
#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    devices: BTreeMap<String, Record>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    withheld: BTreeMap<String, Identity>,
}

impl Journal {
    /// Reads it; there is none where nothing was moved since the host booted.
    pub(super) fn read(root: &SysRoot) -> Result<Self, JournalError> {
        let path = root.journal();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(JournalError::Read { path, source }),
        };
        Self::parse(&text).map_err(|reason| JournalError::Malformed { path, reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if written.version != VERSION {
            return Err(format!("its version is {}", written.version));
        }
        let devices = Known {
            records: by_address(written.devices)?,
            withheld: by_address(written.withheld)?,
        };
        let saved = devices.clone();
        Ok(Self { devices, saved })
    }

    /// Writes it down for good before returning.
    pub(super) fn save(&mut self, session: &mut Session<'_>) -> Result<(), StepError> {
        if session.is_dry() || self.devices == self.saved {
            return Ok(());
        }
        let path = session.root.journal();
        if self.devices == Known::default() {
            session.file(&path, None)?;
            self.saved = Known::default();
            return Ok(());
        }
        let written = Written {
            version: VERSION,
            devices: by_text(&self.devices.records),
            withheld: by_text(&self.devices.withheld),
        };
        // Nothing in it can fail to be written as JSON: its keys are strings.
        let text = serde_json::to_string_pretty(&written).unwrap_or_default();
        session.file(&path, Some(&(text + "\n")))?;
        self.saved.clone_from(&self.devices);
        Ok(())
    }

    pub(super) fn get(&self, address: Bdf) -> Option<&Record> {
        self.devices.records.get(&address)
    }

    /// Every device of which something is known.
    pub(super) fn addresses(&self) -> impl Iterator<Item = Bdf> {
        let Known { records, withheld } = &self.devices;
        records.keys().chain(withheld.keys()).copied()
    }

    pub(super) fn insert(&mut self, address: Bdf, record: Record) {
        self.devices.records.insert(address, record);
    }

    pub(super) fn remove(&mut self, address: Bdf) {
        self.devices.records.remove(&address);
    }

    /// The device whose virtual functions are kept from the host's drivers.
    pub(super) fn withheld(&self, address: Bdf) -> Option<Identity> {
        self.devices.withheld.get(&address).copied()
    }

    /// Notes whether the device's virtual functions are kept from the host's drivers.
    pub(super) fn withhold(&mut self, address: Bdf, device: Option<Identity>) {
        match device {
            Some(device) => self.devices.withheld.insert(address, device),
            None => self.devices.withheld.remove(&address),
        };
    }

    /// Has the device's record be what it is in another.
    pub(super) fn copy_from(&mut self, other: &Self, address: Bdf) {
        match other.get(address) {
            Some(record) => self.insert(address, record.clone()),
            None => self.remove(address),
        }
    }
}

fn by_address<T>(written: BTreeMap<String, T>) -> Result<BTreeMap<Bdf, T>, String> {
    let parse = |(address, known): (String, T)| match address.parse() {
        Ok(parsed) => Ok((parsed, known)),
        Err(_) => Err(format!("{address} is no address")),
    };
    written.into_iter().map(parse).collect()
}

fn by_text<T: Clone>(devices: &BTreeMap<Bdf, T>) -> BTreeMap<String, T> {
    let text = |(address, known): (&Bdf, &T)| (address.to_string(), known.clone());
    devices.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn another_version_is_not_guessed_at() {
        let error = Journal::parse("{\"version\": 2, \"devices\": {}}").unwrap_err();
        assert_eq!(error, "its version is 2");
    }

    #[test]
    fn an_address_that_is_none_is_named() {
        let record = "{\"identity\": {\"vendor\": 1, \"device\": 2, \"subsystem_vendor\": 3, \
                      \"subsystem_device\": 4}, \"driver\": null, \"driver_override\": null, \
                      \"taken_for\": \"vfio-pci\"}";
        let text = format!("{{\"version\": 1, \"devices\": {{\"1f\": {record}}}}}");
        assert_eq!(Journal::parse(&text).unwrap_err(), "1f is no address");
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail(text in ".*") {
            let _ = Journal::parse(&text);
        }
    }
}
