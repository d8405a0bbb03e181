//! Giving devices back to the host's own drivers.

use std::collections::BTreeSet;

use busway_pci::Bdf;

use super::check::check_unbind;
use super::error::{RefusedError, UnbindError};
use super::kernel::Kernel;
use super::permit::Permits;
use super::root::SysRoot;
use super::steps::{Step, StepError, Stepper};
use super::{Host, is_vfio_driver};

/// A device that the host has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unbound {
    /// The device.
    pub address: Bdf,
    /// The VFIO driver that it was taken from; none where VFIO did not have it.
    pub former: Option<String>,
    /// The driver that has it now; none where the host has none for it.
    pub driver: Option<String>,
}

/// Takes the devices at `addresses` from VFIO, clears their `driver_override`, and lets the host's
/// own drivers have them; `tell` hears of each step before it is taken.
///
/// # Errors
///
/// Where something stands against it, with nothing changed; or where a step failed. A device that no
/// driver of the host takes is no error.
pub fn unbind(
    root: &SysRoot,
    kernel: &mut dyn Kernel,
    addresses: &[Bdf],
    permits: &Permits,
    tell: &mut dyn FnMut(&Step),
) -> Result<Vec<Unbound>, UnbindError> {
    let addresses: BTreeSet<_> = addresses.iter().copied().collect();
    let host = Host::read(root)?;
    let refusals = check_unbind(&host, &addresses, permits);
    if !refusals.is_empty() {
        return Err(RefusedError(refusals).into());
    }
    let mut stepper = Stepper::new(root, kernel, tell);
    let mut unbound = Vec::new();
    for device in addresses.iter().filter_map(|&address| host.device(address)) {
        let is_vfio = |driver: &&String| is_vfio_driver(driver);
        let former = device.driver.as_ref().filter(is_vfio).cloned();
        let reserved = device.driver_override.as_ref().filter(is_vfio).is_some();
        let driver = if former.is_some() || reserved || device.driver.is_none() {
            give_back(&mut stepper, device.address, former.is_some(), reserved)?
        } else {
            device.driver.clone()
        };
        unbound.push(Unbound {
            address: device.address,
            former,
            driver,
        });
    }
    Ok(unbound)
}

/// Returns the driver that has the device then.
fn give_back(
    stepper: &mut Stepper<'_>,
    address: Bdf,
    bound: bool,
    reserved: bool,
) -> Result<Option<String>, StepError> {
    if reserved {
        stepper.set_override(address, None)?;
    }
    if bound {
        stepper.detach(address)?;
    }
    if let Some(driver) = stepper.root.driver_of(address) {
        return Ok(Some(driver));
    }
    if let Some(driver) = stepper.probe(address)? {
        return Ok(Some(driver));
    }
    // Its module may never have been loaded, where the device was reserved since boot. That there is
    // none, or that it may not be loaded, leaves the device without a driver, as it then was at boot.
    if stepper.load_for(address).is_ok() {
        return stepper.probe(address);
    }
    Ok(None)
}
