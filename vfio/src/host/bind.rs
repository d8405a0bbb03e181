//! Giving devices to VFIO: all of those asked for, or none.

use std::collections::BTreeSet;

use busway_pci::Bdf;

use super::check::check_bind;
use super::error::{BindError, RefusedError, Stranded};
use super::kernel::Kernel;
use super::permit::Permits;
use super::root::SysRoot;
use super::steps::{Step, StepError, Stepper};
use super::{Host, is_vfio_driver};

/// The driver that lends a PCI device to user space.
pub const VFIO_PCI: &str = "vfio-pci";

/// A device that VFIO has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The device.
    pub address: Bdf,
    /// Its IOMMU group.
    pub group: u32,
    /// The VFIO driver that has it.
    pub driver: String,
    /// The driver that it was taken from.
    pub former: Option<String>,
    /// Whether VFIO had it before.
    pub already: bool,
}

/// What a device had before.
struct Before {
    address: Bdf,
    driver: Option<String>,
    driver_override: Option<String>,
}

/// Binds the devices at `addresses` to `vfio-pci` through `driver_override`, in spite of
/// what `permits` allows; `tell` hears of each step before it is taken.
///
/// # Errors
///
/// Where something stands against it, with nothing changed; or where a step failed, with every
/// device given back the driver and override that it had.
pub fn bind(
    root: &SysRoot,
    kernel: &mut dyn Kernel,
    addresses: &[Bdf],
    permits: &Permits,
    tell: &mut dyn FnMut(&Step),
) -> Result<Vec<Bound>, BindError> {
    let addresses: BTreeSet<_> = addresses.iter().copied().collect();
    let host = Host::read(root)?;
    let refusals = check_bind(&host, &addresses, permits);
    if !refusals.is_empty() {
        return Err(RefusedError(refusals).into());
    }

    let mut bound = Vec::new();
    let mut plan = Vec::new();
    for device in addresses.iter().filter_map(|&address| host.device(address)) {
        let before = device.driver.clone();
        let already = before.clone().filter(|driver| is_vfio_driver(driver));
        bound.push(Bound {
            address: device.address,
            group: device.group.unwrap_or_default(),
            driver: already.clone().unwrap_or_else(|| VFIO_PCI.to_owned()),
            former: before.clone().filter(|_| already.is_none()),
            already: already.is_some(),
        });
        if already.is_none() {
            plan.push(Before {
                address: device.address,
                driver: before,
                driver_override: device.driver_override.clone(),
            });
        }
    }

    let mut stepper = Stepper::new(root, kernel, tell);
    let mut begun = 0;
    match take_all(&mut stepper, &plan, &mut begun) {
        Ok(()) => Ok(bound),
        Err(source) => {
            let begun = plan.get(..begun).unwrap_or(&plan);
            let stranded = begun
                .iter()
                .rev()
                .filter_map(|before| restore(&mut stepper, before));
            let stranded = stranded.collect();
            Err(BindError::Failed { source, stranded })
        }
    }
}

/// Takes every device of the plan; `begun` counts those that may have been touched.
fn take_all(
    stepper: &mut Stepper<'_>,
    plan: &[Before],
    begun: &mut usize,
) -> Result<(), StepError> {
    if !plan.is_empty() && !stepper.root.driver(VFIO_PCI).exists() {
        stepper.load(VFIO_PCI)?;
    }
    for Before { address, .. } in plan {
        *begun += 1;
        stepper.set_override(*address, Some(VFIO_PCI))?;
        stepper.detach(*address)?;
        stepper.attach(*address, VFIO_PCI)?;
    }
    Ok(())
}

/// Gives a device back what it had, judging by what it has now and not by what was done. Returns
/// what went wrong.
fn restore(stepper: &mut Stepper<'_>, before: &Before) -> Option<Stranded> {
    let address = before.address;
    // One that has been unplugged has nothing to be given back.
    if !stepper.is_there(address) {
        return None;
    }
    let mut first = None;
    let mut keep = |result: Result<(), StepError>| {
        if let Err(error) = result {
            first.get_or_insert(error);
        }
    };
    if stepper.root.override_of(address) != before.driver_override {
        keep(stepper.set_override(address, before.driver_override.as_deref()));
    }
    if stepper.root.driver_of(address) != before.driver {
        keep(stepper.detach(address));
        if let Some(driver) = &before.driver {
            keep(stepper.attach(address, driver));
        }
    }
    // What counts is where it ended.
    let given_back = stepper.root.driver_of(address) == before.driver
        && stepper.root.override_of(address) == before.driver_override;
    first.filter(|_| !given_back).map(|source| Stranded {
        address,
        driver: before.driver.clone(),
        source,
    })
}
