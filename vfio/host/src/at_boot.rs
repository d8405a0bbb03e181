//! What is bound at each boot, done once more: by a service that guests are started after.
//!
//! udev obeys the rules when it comes to the devices, and asks nobody whether that went well: the module of a driver
//! may not have been there yet, or something had a device open. This waits for udev, does what is left to do, and
//! says what could not be done.

use std::path::PathBuf;

use busway_pci::Bdf;

use super::bind::{BindError, BindOptions, Bound, bind};
use super::device::HostError;
use super::host::Host;
use super::identity::HardwareIds;
use super::lines::Lines;
use super::persist::{self, Rule};
use super::session::Session;

/// What became of a device that is bound at each boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AtBoot {
    /// VFIO has it.
    Bound(Bound),
    /// There is no device at the address.
    Absent(Bdf),
    /// Another kind of device is there, which is the host's.
    Another(Bdf),
}

/// Devices that are to be bound at each boot were not.
#[derive(Debug, thiserror::Error)]
#[error("{}", Lines(.failures))]
pub struct AtBootError {
    /// What became of the others.
    pub done: Vec<AtBoot>,
    /// Why these were not bound.
    pub failures: Vec<NotBound>,
}

/// Why a device was not bound.
#[derive(Debug, thiserror::Error)]
pub enum NotBound {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Its binding failed.
    #[error("{address}: {source}")]
    Failed {
        /// The device.
        address: Bdf,
        /// Why.
        source: BindError,
    },
    /// The rule is not one of Busway's.
    #[error(
        "{}: it is no rule that `busway device bind --persist` writes\n  \
         write it anew: busway device bind --persist {address}",
        path.display()
    )]
    Rule {
        /// The device.
        address: Bdf,
        /// The rule's file.
        path: PathBuf,
    },
}

/// Binds each device that a rule binds at boot, as its rule says. One that fails keeps none of the others.
///
/// # Errors
///
/// [`AtBootError`], with what was done.
pub fn bind_persisted(session: &mut Session<'_>) -> Result<Vec<AtBoot>, AtBootError> {
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    if !session.is_dry() {
        session.kernel.wait_for_udev();
    }
    let host = match Host::read(session.root) {
        Ok(host) => host,
        Err(error) => {
            let failures = vec![NotBound::Host(error)];
            return Err(AtBootError { done, failures });
        }
    };
    for address in persist::addresses(session.root) {
        let Some(text) = persist::rule_text(session.root, address) else {
            // It was removed just now.
            continue;
        };
        let Some(rule) = Rule::read(&text) else {
            let path = persist::rule(session.root, address);
            failures.push(NotBound::Rule { address, path });
            continue;
        };
        match host.device(address).map(HardwareIds::of) {
            None => {
                done.push(AtBoot::Absent(address));
                continue;
            }
            Some(identity) if !persist::is_for(&text, identity) => {
                done.push(AtBoot::Another(address));
                continue;
            }
            Some(_) => {}
        }
        let options = BindOptions {
            driver: Some(rule.driver),
            user: rule.user,
            from_rule: true,
            ..BindOptions::default()
        };
        match bind(session, &[address], &options) {
            Ok(bound) => done.extend(bound.into_iter().map(AtBoot::Bound)),
            Err(source) => failures.push(NotBound::Failed { address, source }),
        }
    }
    match failures.is_empty() {
        true => Ok(done),
        false => Err(AtBootError { done, failures }),
    }
}
