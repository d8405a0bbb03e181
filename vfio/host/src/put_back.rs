//! Giving a device what it had, judging by what it has now and not by what was done to it.

use busway_pci::Bdf;

use super::journal::Record;
use super::session::Session;
use super::steps::StepError;

/// A device that could not be given back what it had before.
#[derive(Debug, thiserror::Error)]
#[error("{address} was with {}, and could not be given back: {source}", driver.as_deref().unwrap_or("no driver"))]
pub struct Stranded {
    /// The device.
    pub address: Bdf,
    /// The driver that it had.
    pub driver: Option<String>,
    /// What went wrong.
    pub source: StepError,
}

/// Gives a device the driver, the override and the nodes' owners of its record. Goes on where a step
/// fails; returns the first failure if the device did not end as recorded.
pub(super) fn put_back(
    session: &mut Session<'_>,
    address: Bdf,
    record: &Record,
) -> Option<Stranded> {
    // One that has been unplugged has nothing to be given back.
    if !session.is_there(address) {
        return None;
    }
    let mut first = None;
    let mut keep = |result: Result<(), StepError>| {
        if let Err(error) = result {
            first.get_or_insert(error);
        }
    };
    for (node, &user) in &record.nodes {
        // The nodes end with the driver; one that is left may be another device's by now, but then
        // it belongs to whom such nodes belong to.
        if session.kernel.owner(node).is_ok_and(|now| now != user) {
            keep(session.own(node.clone(), user));
        }
    }
    if session.override_of(address) != record.driver_override {
        keep(session.set_override(address, record.driver_override.as_deref()));
    }
    if session.driver_of(address) != record.driver {
        keep(session.detach(address));
        if let Some(driver) = &record.driver {
            if !session.root.driver(driver).exists() {
                // Its module was removed meanwhile.
                keep(session.load(driver));
            }
            keep(session.attach(address, driver));
        }
    }
    // What counts is where it ended.
    let given_back = session.driver_of(address) == record.driver
        && session.override_of(address) == record.driver_override;
    first.filter(|_| !given_back).map(|source| Stranded {
        address,
        driver: record.driver.clone(),
        source,
    })
}
