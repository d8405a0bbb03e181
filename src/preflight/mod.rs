//! Whether a guest can have devices, asked by the command line and over the control socket in the same words: what a
//! check finds, in the form that `docs/device-json.md` describes.

mod nodes;

use std::borrow::Cow;
use std::collections::BTreeSet;

use busway_host::{
    Called, CalledError, Check, DeviceCheck, Finding, Host, HostError, Level, MediatedCheck, Opens,
};
use busway_iommu::{SysRoot, Uuid};
use busway_pci::Bdf;
use serde::{Deserialize, Serialize};

/// The version of the schema.
pub const VERSION: u32 = 1;

/// Why there is nothing to check.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// What was named is not one device.
    #[error(transparent)]
    Called(#[from] CalledError),
}

/// A host that was looked at, and what was found for a guest that is to have some of its devices.
#[derive(Debug)]
pub struct Preflight {
    /// The host.
    pub host: Host,
    /// What was found.
    pub check: Check,
}

impl Preflight {
    /// Looks at the devices that somebody named, as one guest's of so many bytes of memory. Nothing is changed. Reads
    /// much of sysfs, which takes milliseconds.
    ///
    /// # Errors
    /// [`PreflightError`]
    pub fn of(
        root: &SysRoot,
        called: &[Called],
        memory: u64,
        opens: Opens<'_>,
    ) -> Result<Self, PreflightError> {
        let host = Host::read(root)?;
        let (addresses, uuids) = find_all(root, called)?;
        let check = Check::of_all(&host, &addresses, &uuids, memory, opens);
        Ok(Self { host, check })
    }

    /// What was found, to be written.
    #[must_use]
    pub fn json(&self) -> CheckJson<'_> {
        let check = &self.check;
        CheckJson {
            version: VERSION,
            ready: check.is_ready(),
            devices: check.devices.iter().map(device_json).collect(),
            mediated_devices: check.mediated.iter().map(mediated_json).collect(),
            host: findings_json(&check.host),
        }
    }
}

/// The devices that a person named: PCI functions, and mediated devices.
///
/// # Errors
/// [`CalledError`]
pub fn find_all(
    root: &SysRoot,
    called: &[Called],
) -> Result<(BTreeSet<Bdf>, BTreeSet<Uuid>), CalledError> {
    let (mut addresses, mut uuids) = (BTreeSet::new(), BTreeSet::new());
    for called in called {
        match called.find(root) {
            Ok(address) => drop(addresses.insert(address)),
            Err(CalledError::Mediated(uuid)) => drop(uuids.insert(uuid)),
            Err(error) => return Err(error),
        }
    }
    Ok((addresses, uuids))
}

/// What a check found, as the schema has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckJson<'a> {
    /// The schema's.
    pub version: u32,
    /// Whether a guest can have all of them now.
    pub ready: bool,
    /// PCI functions.
    pub devices: Vec<DeviceJson<'a>>,
    /// Mediated devices.
    pub mediated_devices: Vec<MediatedJson<'a>>,
    /// What concerns all devices.
    pub host: Vec<FindingJson<'a>>,
}

/// What was found of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceJson<'a> {
    /// Its address.
    pub address: String,
    /// Whether a guest can have it now.
    pub ready: bool,
    /// Whether it could once it is bound.
    pub needs_only_binding: bool,
    /// What was found.
    pub findings: Vec<FindingJson<'a>>,
}

/// What was found of a mediated device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediatedJson<'a> {
    /// Its UUID.
    pub uuid: String,
    /// Whether a guest can have it now.
    pub ready: bool,
    /// What was found.
    pub findings: Vec<FindingJson<'a>>,
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingJson<'a> {
    /// How much it matters.
    pub level: Cow<'a, str>,
    /// What it is about.
    pub topic: Cow<'a, str>,
    /// What was found.
    pub text: Cow<'a, str>,
    /// What to do about it.
    pub remedies: Vec<RemedyJson<'a>>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemedyJson<'a> {
    /// In words.
    pub what: Cow<'a, str>,
    /// The command that does it.
    pub command: Option<String>,
}

impl FindingJson<'_> {
    /// Its level; fine where there is no such word.
    pub(crate) fn level(&self) -> Level {
        let levels = [Level::Note, Level::Warning, Level::Obstacle];
        let level = levels.into_iter().find(|level| level.word() == self.level);
        level.unwrap_or(Level::Fine)
    }
}

/// Findings, to be written.
#[must_use]
pub fn findings_json(findings: &[Finding]) -> Vec<FindingJson<'_>> {
    findings.iter().map(one).collect()
}

fn one(finding: &Finding) -> FindingJson<'_> {
    FindingJson {
        level: finding.level.word().into(),
        topic: finding.topic.into(),
        text: finding.text.as_str().into(),
        remedies: finding
            .remedies
            .iter()
            .map(|remedy| RemedyJson {
                what: remedy.what.as_str().into(),
                command: remedy.command.as_ref().map(ToString::to_string),
            })
            .collect(),
    }
}

fn device_json(device: &DeviceCheck) -> DeviceJson<'_> {
    DeviceJson {
        address: device.address.to_string(),
        ready: device.is_ready(),
        needs_only_binding: device.needs_only_binding(),
        findings: findings_json(&device.findings),
    }
}

fn mediated_json(device: &MediatedCheck) -> MediatedJson<'_> {
    MediatedJson {
        uuid: device.uuid.to_string(),
        ready: device.is_ready(),
        findings: findings_json(&device.findings),
    }
}
