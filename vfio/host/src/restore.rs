//! Putting devices back as they were before Busway moved them, after a crash as well.

use std::collections::BTreeSet;

use busway_pci::Bdf;

use super::check::check_unbind;
use super::device::HostError;
use super::host::Host;
use super::identity::HardwareIds;
use super::journal::{Journal, JournalError};
use super::kernel::Readers;
use super::lines::Lines;
use super::lock::LockError;
use super::permit::Permits;
use super::persist;
use super::put_back::{Stranded, put_back};
use super::refusal::{RefusedError, refuse_if};
use super::session::Session;
use super::unbind::give_to_host;
use super::vfs::end_withholding;

/// What became of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The device.
    pub address: Bdf,
    /// What happened.
    pub outcome: Outcome,
    /// Whether it was to be bound at each boot, and is not any more.
    pub persisted: bool,
}

/// What happened to a device that was to be put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has what it had before.
    AsBefore {
        /// Its driver.
        driver: Option<String>,
        /// The driver that alone may take it.
        driver_override: Option<String>,
    },
    /// A rule had bound it at boot; it was left to the host's own drivers.
    LeftToHost {
        /// The one that has it.
        driver: Option<String>,
    },
    /// New virtual functions of it may have the host's drivers again, as before `vfs` was ended in the middle.
    NotWithheld,
    /// It is not there any more.
    Gone,
    /// Another device is at its address, and was left alone.
    Another,
    /// Nothing is known of it, so it was left alone.
    NotRecorded,
}

/// Devices were not put back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something stands against it. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// Somebody else is changing devices. Nothing was changed.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What devices had before cannot be read. Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Steps failed; every other device was put back, and these still are in the journal.
    #[error("{}\n  what they had is still recorded: try again with `busway device restore --all`", Lines(.stranded))]
    Steps {
        /// Devices that are as they were.
        restored: Vec<Restored>,
        /// The others.
        stranded: Vec<Stranded>,
    },
}

/// Puts the devices at `addresses` back as they were; without any, all that Busway has moved.
///
/// # Errors
///
/// Where something stands against it, with nothing changed; or where steps failed, with every other
/// device put back.
pub fn restore(
    session: &mut Session<'_>,
    addresses: &[Bdf],
    permits: &Permits,
) -> Result<Vec<Restored>, RestoreError> {
    let asked: BTreeSet<_> = addresses.iter().copied().collect();
    check(session, &asked, permits)?;
    let _lock = session.lock()?;
    let (host, mut journal, targets) = check(session, &asked, permits)?;

    let mut restored = Vec::new();
    let mut stranded = Vec::new();
    for &address in &targets {
        // Between two devices, for half of the way back is no place to stop.
        if let Err(source) = session.go_on(address) {
            let driver = journal
                .get(address)
                .and_then(|record| record.driver.clone());
            stranded.push(Stranded {
                address,
                driver,
                source,
            });
            break;
        }
        let persisted = persist::rule_text(session.root, address).is_some();
        match put_one_back(session, &host, &mut journal, address) {
            Ok(outcome) => restored.push(Restored {
                address,
                outcome,
                persisted,
            }),
            Err(failure) => stranded.push(failure),
        }
    }
    match stranded.is_empty() {
        true => Ok(restored),
        false => Err(RestoreError::Steps { restored, stranded }),
    }
}

/// The host, the journal and the devices, where nothing stands against it.
fn check(
    session: &Session<'_>,
    asked: &BTreeSet<Bdf>,
    permits: &Permits,
) -> Result<(Host, Journal, BTreeSet<Bdf>), RestoreError> {
    let host = Host::read(session.root)?;
    let journal = Journal::read(session.root)?;
    let rules = persist::addresses(session.root);
    let known: BTreeSet<_> = journal.addresses().chain(rules).collect();
    let targets = match asked.is_empty() {
        true => known.clone(),
        false => asked.clone(),
    };
    let moves = |address: &&Bdf| {
        let Some(device) = host.device(**address) else {
            // One that is known and gone is only forgotten.
            return !known.contains(*address);
        };
        match journal.get(**address) {
            Some(record) => {
                record.identity == HardwareIds::of(device) && record.driver != device.driver
            }
            None => known.contains(*address),
        }
    };
    let moving = targets.iter().filter(moves).copied().collect();
    refuse_if(check_unbind(&host, &moving, permits))?;
    Ok((host, journal, targets))
}

fn put_one_back(
    session: &mut Session<'_>,
    host: &Host,
    journal: &mut Journal,
    address: Bdf,
) -> Result<Outcome, Stranded> {
    let record = journal.get(address).cloned();
    let failed = |source| Stranded {
        address,
        driver: record.as_ref().and_then(|record| record.driver.clone()),
        source,
    };
    let ended = end_withholding(session, journal, address).map_err(failed)?;
    let device = host.device(address).filter(|_| session.is_there(address));
    let rule = persist::rule_text(session.root, address);
    let outcome = match (device, &record, &rule) {
        (Some(device), None, Some(rule)) if persist::is_for(rule, HardwareIds::of(device)) => {
            let given = give_to_host(session, journal, device).map_err(failed)?;
            let driver = given.driver;
            return Ok(Outcome::LeftToHost { driver });
        }
        (_, None, None) if ended => return Ok(Outcome::NotWithheld),
        (None, None, None) | (Some(_), None, None) => return Ok(Outcome::NotRecorded),
        (None, ..) => Outcome::Gone,
        (Some(device), Some(record), _) if record.identity == HardwareIds::of(device) => {
            Outcome::AsBefore {
                driver: record.driver.clone(),
                driver_override: record.driver_override.clone(),
            }
        }
        // Since it was recorded, or since the rule was made.
        (Some(_), ..) => Outcome::Another,
    };
    if rule.is_some() {
        session
            .file(
                &persist::rule(session.root, address),
                None,
                Readers::Everybody,
            )
            .map_err(failed)?;
    }
    if let (Outcome::AsBefore { .. }, Some(record)) = (&outcome, &record)
        && let Some(stranded) = put_back(session, address, record)
    {
        return Err(stranded);
    }
    journal.remove(address);
    journal.save(session).map_err(failed)?;
    Ok(outcome)
}
