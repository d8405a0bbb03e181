//! The single changes that binding is made of, each checked and each naming itself when it fails.

use std::fmt;
use std::io;
use std::path::PathBuf;

use busway_pci::Bdf;

use super::kernel::Kernel;
use super::root::{self, SysRoot};

/// One change to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Load a kernel module.
    Load {
        /// Its name, or a device's `modalias`.
        module: String,
    },
    /// Say which driver alone may take a device; none: any that matches.
    Override {
        /// The device.
        address: Bdf,
        /// The driver.
        driver: Option<String>,
    },
    /// Take a device from its driver. The kernel waits for whoever has it open by VFIO.
    Detach {
        /// The device.
        address: Bdf,
        /// The driver.
        driver: String,
    },
    /// Give a device to a driver.
    Attach {
        /// The device.
        address: Bdf,
        /// The driver.
        driver: String,
    },
    /// Let the kernel offer a device to the drivers that match it.
    Probe {
        /// The device.
        address: Bdf,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Load { module } => write!(f, "load the module {module}"),
            Self::Override {
                address,
                driver: Some(driver),
            } => write!(f, "reserve {address} for {driver}"),
            Self::Override {
                address,
                driver: None,
            } => write!(f, "open {address} to any driver"),
            Self::Detach { address, driver } => write!(f, "take {address} from {driver}"),
            Self::Attach { address, driver } => write!(f, "give {address} to {driver}"),
            Self::Probe { address } => write!(f, "offer {address} to the host's drivers"),
        }
    }
}

/// A step that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// cannot {step}: writing to {attribute}: {source}. {remedy}
    #[error("cannot {step}: writing to {}: {source}\n  {}", attribute.display(), remedy(.source))]
    Write {
        /// What was to be done.
        step: Step,
        /// The sysfs attribute.
        attribute: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// cannot {step}: {source}
    #[error("cannot {step}: {source}\n  {}", module_remedy(.source))]
    Load {
        /// What was to be done.
        step: Step,
        /// Why not.
        source: io::Error,
    },
    /// cannot {step}: the kernel took the request, but the device is with {now}
    #[error(
        "cannot {step}: the kernel took the request, but the device is with {}\n  \
         see what the driver says: dmesg | grep {address}",
        now.as_deref().unwrap_or("no driver")
    )]
    WithoutEffect {
        /// What was to be done.
        step: Step,
        /// The device.
        address: Bdf,
        /// The driver that it is bound to instead.
        now: Option<String>,
    },
}

impl StepError {
    /// Whether the caller lacks the right to change the host.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        match self {
            Self::Write { source, .. } | Self::Load { source, .. } => {
                source.kind() == io::ErrorKind::PermissionDenied
            }
            Self::WithoutEffect { .. } => false,
        }
    }
}

/// What to do about the kernel's refusal to take a value.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "only root may: run it with sudo",
        Some(libc::EROFS) => {
            "sysfs is mounted read-only here, as in a container: run it on the host itself"
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "the device or its driver has just gone away: see `busway device list`"
        }
        Some(libc::EBUSY) => {
            "somebody uses the device or its IOMMU group: see `busway device list`"
        }
        _ => "the kernel's log may say more: dmesg | tail",
    }
}

fn module_remedy(error: &io::Error) -> &'static str {
    let text = error.to_string();
    if error.kind() == io::ErrorKind::PermissionDenied
        || text.contains("Operation not permitted")
        || text.contains("Permission denied")
    {
        "only root may: run it with sudo"
    } else if text.contains("not found") {
        "this kernel has no such module: install the package with all of its modules, or a kernel \
         with CONFIG_VFIO_PCI"
    } else {
        "try it by hand, and see the kernel's log: dmesg | tail"
    }
}

/// Takes steps, telling of each beforehand.
pub(super) struct Stepper<'a> {
    pub(super) root: &'a SysRoot,
    kernel: &'a mut dyn Kernel,
    tell: &'a mut dyn FnMut(&Step),
}

impl<'a> Stepper<'a> {
    pub(super) fn new(
        root: &'a SysRoot,
        kernel: &'a mut dyn Kernel,
        tell: &'a mut dyn FnMut(&Step),
    ) -> Self {
        Self { root, kernel, tell }
    }

    /// Whether the device is still there.
    pub(super) fn is_there(&self, address: Bdf) -> bool {
        self.root.device(address).exists()
    }

    /// Loads a module.
    pub(super) fn load(&mut self, module: &str) -> Result<(), StepError> {
        let step = Step::Load {
            module: module.to_owned(),
        };
        (self.tell)(&step);
        let loaded = self.kernel.load_module(module);
        loaded.map_err(|source| StepError::Load { step, source })
    }

    /// Sets or clears `driver_override`.
    pub(super) fn set_override(
        &mut self,
        address: Bdf,
        driver: Option<&str>,
    ) -> Result<(), StepError> {
        let attribute = self.root.device(address).join("driver_override");
        let step = Step::Override {
            address,
            driver: driver.map(str::to_owned),
        };
        // An empty line clears it (drivers/base/driver.c, driver_set_override).
        self.write(
            step,
            attribute,
            &format!("{}\n", driver.unwrap_or_default()),
        )
    }

    /// Takes a device from the driver that it is bound to now, if any.
    pub(super) fn detach(&mut self, address: Bdf) -> Result<(), StepError> {
        let Some(driver) = self.root.driver_of(address) else {
            return Ok(());
        };
        let attribute = self.root.driver(&driver).join("unbind");
        let step = Step::Detach { address, driver };
        let written = self.write(step.clone(), attribute, &address.to_string());
        match self.root.driver_of(address) {
            // Somebody else was quicker, or the device's driver was just removed: as wanted.
            None => Ok(()),
            now => written.and(Err(StepError::WithoutEffect { step, address, now })),
        }
    }

    /// Gives a device to `driver`, and sees that it is there.
    ///
    /// The driver's own `bind` attribute probes before it returns, and returns what the probe did;
    /// `drivers_probe` keeps that to itself.
    pub(super) fn attach(&mut self, address: Bdf, driver: &str) -> Result<(), StepError> {
        let attribute = self.root.driver(driver).join("bind");
        let step = Step::Attach {
            address,
            driver: driver.to_owned(),
        };
        let written = self.write(step.clone(), attribute, &address.to_string());
        match self.root.driver_of(address) {
            // The kernel may have probed it on its own just before.
            Some(now) if now == driver => Ok(()),
            now => written.and(Err(StepError::WithoutEffect { step, address, now })),
        }
    }

    /// Lets the kernel choose a driver; returns which took the device.
    pub(super) fn probe(&mut self, address: Bdf) -> Result<Option<String>, StepError> {
        let attribute = self.root.bus().join("drivers_probe");
        let written = self.write(Step::Probe { address }, attribute, &address.to_string());
        match self.root.driver_of(address) {
            Some(driver) => Ok(Some(driver)),
            None => written.map(|()| None),
        }
    }

    /// Loads the host's own driver for a device, as udev does when it first sees one.
    pub(super) fn load_for(&mut self, address: Bdf) -> Result<(), StepError> {
        match root::text(&self.root.device(address).join("modalias")) {
            Some(alias) => self.load(&alias),
            None => Ok(()),
        }
    }

    fn write(&mut self, step: Step, attribute: PathBuf, value: &str) -> Result<(), StepError> {
        (self.tell)(&step);
        let written = self.kernel.write(&attribute, value);
        written.map_err(|source| StepError::Write {
            step,
            attribute,
            source,
        })
    }
}
