//! What each device had before it was moved, written down before the first change to it.
//!
//! The journal lies in `/run`, which lasts exactly as long as what it is about: a driver's hold on a
//! device and `driver_override` outlive a process that is killed, and do not outlive a reboot. What is
//! to outlive that too is a rule of udev's, which is its own record.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use busway_pci::Bdf;
use serde::{Deserialize, Serialize};

use super::identity::HardwareIds;
use super::kernel::Readers;
use super::root::{self, SysRoot};
use super::session::Session;
use super::steps::StepError;
use crate::files::{self, OwnError};

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
    withheld: BTreeMap<Bdf, HardwareIds>,
}

/// What one device had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Which device it is, for another may come to its address.
    pub(super) identity: HardwareIds,
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

impl Record {
    /// Whether root can act on what it says: the names are a driver's, and no node is outside `vfio`.
    fn check(&self, vfio: &Path) -> Result<(), String> {
        let drivers = [&self.driver, &self.driver_override];
        let drivers = drivers.into_iter().flatten().chain([&self.taken_for]);
        for driver in drivers {
            let mut parts = Path::new(driver).components();
            let is_name =
                matches!(parts.next(), Some(Component::Normal(name)) if name == driver.as_str());
            if !is_name || driver.contains(char::is_control) {
                return Err(format!("`{}` is no driver's name", root::one_line(driver)));
            }
        }
        for node in self.nodes.keys() {
            let below = node.strip_prefix(vfio).ok();
            let mut parts = below.into_iter().flat_map(Path::components).peekable();
            let is_node =
                parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)));
            if !is_node {
                let node = root::one_line(&node.to_string_lossy());
                return Err(format!("{node} is no node below {}", vfio.display()));
            }
        }
        Ok(())
    }
}

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// cannot read the journal {path}: {source}
    #[error("cannot read the journal {}: {source}\n  {}", path.display(), source.remedy(path))]
    Read {
        /// Where it is, or its folder.
        path: PathBuf,
        /// Why not.
        source: OwnError,
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
    withheld: BTreeMap<String, HardwareIds>,
}

/// Where it is.
fn file(root: &SysRoot) -> PathBuf {
    root::state(root).join("devices.json")
}

impl Journal {
    /// Reads it; there is none where nothing was moved since the host booted.
    pub(super) fn read(root: &SysRoot) -> Result<Self, JournalError> {
        let (folder, path) = (root::state(root), file(root));
        let failed = |path: &Path, source: OwnError| JournalError::Read {
            path: path.to_owned(),
            source,
        };
        if files::own_folder(&folder)
            .map_err(|error| failed(&folder, error))?
            .is_none()
        {
            return Ok(Self::default());
        }
        let mut file = match files::open_own(&path, OpenOptions::new().read(true)) {
            Ok(file) => file,
            Err(OwnError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(failed(&path, error)),
        };
        let mut text = String::new();
        file.read_to_string(&mut text)
            .map_err(|error| failed(&path, error.into()))?;
        let nodes = root.dev.join("vfio");
        Self::parse(&text, &nodes).map_err(|reason| JournalError::Malformed { path, reason })
    }

    /// `vfio` is the folder below which nodes are that may be given to users.
    fn parse(text: &str, vfio: &Path) -> Result<Self, String> {
        let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if written.version != VERSION {
            return Err(format!("its version is {}", written.version));
        }
        written
            .devices
            .values()
            .try_for_each(|record| record.check(vfio))?;
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
        let path = file(session.root);
        if self.devices == Known::default() {
            session.file(&path, None, Readers::Owner)?;
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
        session.file(&path, Some(&(text + "\n")), Readers::Owner)?;
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
    pub(super) fn withheld(&self, address: Bdf) -> Option<HardwareIds> {
        self.devices.withheld.get(&address).copied()
    }

    /// Notes whether the device's virtual functions are kept from the host's drivers.
    pub(super) fn withhold(&mut self, address: Bdf, device: Option<HardwareIds>) {
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

    fn parse(text: &str) -> Result<Journal, String> {
        Journal::parse(text, Path::new("/dev/vfio"))
    }

    #[test]
    fn another_version_is_not_guessed_at() {
        let error = parse("{\"version\": 2, \"devices\": {}}").unwrap_err();
        assert_eq!(error, "its version is 2");
    }

    #[test]
    fn an_address_that_is_none_is_named() {
        let record = "{\"identity\": {\"vendor\": 1, \"device\": 2, \"subsystem_vendor\": 3, \
                      \"subsystem_device\": 4}, \"driver\": null, \"driver_override\": null, \
                      \"taken_for\": \"vfio-pci\"}";
        let text = format!("{{\"version\": 1, \"devices\": {{\"1f\": {record}}}}}");
        assert_eq!(parse(&text).unwrap_err(), "1f is no address");
    }

    fn with_record(driver: &str, node: &str) -> String {
        serde_json::json!({"version": 1, "devices": {"0000:01:00.0": {
            "identity": {"vendor": 1, "device": 2, "subsystem_vendor": 3, "subsystem_device": 4},
            "driver": driver, "driver_override": null, "taken_for": "vfio-pci",
            "nodes": {node: 1000},
        }}})
        .to_string()
    }

    #[test]
    fn a_node_outside_of_vfio_s_folder_is_given_to_nobody() {
        for node in [
            "/dev/vfio/12",
            "/dev/vfio/devices/vfio0",
            "/dev/vfio/noiommu-3",
        ] {
            parse(&with_record("nvme", node)).unwrap();
        }
        for node in [
            "/etc/shadow",
            "/dev/vfio",
            "/dev/vfio/",
            "/dev/vfio/../sda",
            "/dev/vfio/devices/../../kmem",
            "/dev/vfio2/12",
            "dev/vfio/12",
            "",
        ] {
            let error = parse(&with_record("nvme", node)).unwrap_err();
            assert!(
                error.contains("is no node below /dev/vfio"),
                "{node}: {error}"
            );
        }
    }

    #[test]
    fn a_driver_s_name_is_one_part_of_a_path() {
        for driver in [
            "",
            ".",
            "..",
            "../../etc",
            "a/b",
            "a/",
            "/a",
            "a\u{1b}[2J",
            "a\nb",
        ] {
            let error = parse(&with_record(driver, "/dev/vfio/12")).unwrap_err();
            assert!(error.contains("no driver's name"), "{driver:?}: {error}");
            assert!(!error.contains(char::is_control), "{error:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail(text in ".*") {
            let _ = parse(&text);
        }
    }
}
