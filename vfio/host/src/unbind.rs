//! Giving devices back to the host's own drivers.

use std::collections::BTreeSet;

use busway_iommu::is_vfio_driver;
use busway_pci::Bdf;

use super::check::check_unbind;
use super::device::{HostDevice, HostError};
use super::host::Host;
use super::identity::HardwareIds;
use super::journal::{Journal, JournalError};
use super::kernel::Readers;
use super::lines::Lines;
use super::lock::LockError;
use super::permit::Permits;
use super::persist;
use super::refusal::{RefusedError, refuse_if};
use super::session::Session;
use super::steps::StepError;

/// A device that the host has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unbound {
    /// The device.
    pub address: Bdf,
    /// The VFIO driver that it was taken from; none where VFIO did not have it.
    pub former: Option<String>,
    /// The driver that has it now; none where the host has none for it.
    pub driver: Option<String>,
    /// Whether it was to be bound at each boot, and is not any more.
    pub persisted: bool,
}

/// Devices were not given to the host's own drivers.
#[derive(Debug, thiserror::Error)]
pub enum UnbindError {
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
    /// Steps failed; every other device was given to the host's own drivers.
    #[error("{}", Lines(.failures))]
    Steps {
        /// Devices that the host has now.
        unbound: Vec<Unbound>,
        /// The steps, one for each of the others.
        failures: Vec<StepError>,
    },
}

/// Takes the devices at `addresses` from VFIO, gives them the `driver_override` that they had before,
/// and lets the host's own drivers have them. A rule that would bind them at boot is removed.
///
/// # Errors
///
/// Where something stands against it, with nothing changed; or where steps failed, with every other
/// device given back. A device that no driver of the host takes is no error.
pub fn unbind(
    session: &mut Session<'_>,
    addresses: &[Bdf],
    permits: &Permits,
) -> Result<Vec<Unbound>, UnbindError> {
    let addresses: BTreeSet<_> = addresses.iter().copied().collect();
    refuse_if(check_unbind(
        &Host::read(session.root)?,
        &addresses,
        permits,
    ))?;
    let _lock = session.lock()?;
    let host = Host::read(session.root)?;
    refuse_if(check_unbind(&host, &addresses, permits))?;
    let mut journal = Journal::read(session.root)?;

    let mut unbound = Vec::new();
    let mut failures = Vec::new();
    for device in addresses.iter().filter_map(|&address| host.device(address)) {
        // Between two devices, for half of the way back is no place to stop.
        if let Err(error) = session.go_on(device.address) {
            failures.push(error);
            break;
        }
        match give_to_host(session, &mut journal, device) {
            Ok(device) => unbound.push(device),
            Err(error) => failures.push(error),
        }
    }
    match failures.is_empty() {
        true => Ok(unbound),
        false => Err(UnbindError::Steps { unbound, failures }),
    }
}

/// Lets the host's own driver have a device, and forgets what Busway knew of it.
pub(super) fn give_to_host(
    session: &mut Session<'_>,
    journal: &mut Journal,
    device: &HostDevice,
) -> Result<Unbound, StepError> {
    let address = device.address;
    // First of all, or a device that comes anew would be bound again.
    let persisted = persist::rule_text(session.root, address).is_some();
    if persisted {
        let rule = persist::rule(session.root, address);
        session.file(&rule, None, Readers::Everybody)?;
    }
    let vfio = |driver: &Option<String>| driver.clone().filter(|driver| is_vfio_driver(driver));
    let former = vfio(&device.driver);
    let reserved = vfio(&device.driver_override).is_some();
    let driver = if former.is_some() || reserved || device.driver.is_none() {
        let record = journal.get(address).cloned();
        let record = record.filter(|record| record.identity == HardwareIds::of(device));
        if let Some(record) = &record {
            for (node, &user) in &record.nodes {
                if session.kernel.owner(node).is_ok_and(|now| now != user) {
                    session.own(node.clone(), user)?;
                }
            }
        }
        if reserved {
            let earlier = record.and_then(|record| record.driver_override);
            let earlier = earlier.filter(|driver| !is_vfio_driver(driver));
            session.set_override(address, earlier.as_deref())?;
        }
        offer(session, address, former.is_some())?
    } else {
        device.driver.clone()
    };
    journal.remove(address);
    journal.save(session)?;
    Ok(Unbound {
        address,
        former,
        driver,
        persisted,
    })
}

/// Returns the driver that has the device then.
fn offer(
    session: &mut Session<'_>,
    address: Bdf,
    bound: bool,
) -> Result<Option<String>, StepError> {
    if bound {
        session.detach(address)?;
    }
    if session.is_dry() {
        return session.probe(address).map(|_| None);
    }
    if let Some(driver) = session.driver_of(address) {
        return Ok(Some(driver));
    }
    if let Some(driver) = session.probe(address)? {
        return Ok(Some(driver));
    }
    // Its module may never have been loaded, where the device was reserved since boot. That there is
    // none, or that it may not be loaded, leaves the device without a driver, as it then was at boot.
    if session.load_for(address).is_ok() {
        return session.probe(address);
    }
    Ok(None)
}
