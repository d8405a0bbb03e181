//! One person's changes to a host: taken step by step, each told beforehand and checked afterwards.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use busway_pci::Bdf;

use super::kernel::{Kernel, Readers};
use super::lock::{Lock, LockError, PATIENCE};
use super::root::{self, SysRoot};
use super::steps::{Action, Step, StepError};

/// Through what a host is changed, and who hears of it.
#[allow(missing_debug_implementations, reason = "it lends closures")]
pub struct Session<'a> {
    pub(super) root: &'a SysRoot,
    pub(super) kernel: &'a mut dyn Kernel,
    tell: &'a mut dyn FnMut(&Step),
    stop: &'a dyn Fn() -> bool,
    dry: bool,
    undoing: bool,
}

impl<'a> Session<'a> {
    /// Changes the host below `root` through `kernel`; `tell` hears of each step before it is taken.
    pub fn new(
        root: &'a SysRoot,
        kernel: &'a mut dyn Kernel,
        tell: &'a mut dyn FnMut(&Step),
    ) -> Self {
        Self {
            root,
            kernel,
            tell,
            stop: &|| false,
            dry: false,
            undoing: false,
        }
    }

    /// Asks `stop` before each step whether to go on; where it says so, what was done is undone.
    #[must_use]
    pub fn stop_when(mut self, stop: &'a dyn Fn() -> bool) -> Self {
        self.stop = stop;
        self
    }

    /// Tells of every step, and takes none.
    #[must_use]
    pub fn dry_run(mut self, dry: bool) -> Self {
        self.dry = dry;
        self
    }

    pub(super) fn is_dry(&self) -> bool {
        self.dry
    }

    /// Waits its turn. Who only tells need not.
    pub(super) fn lock(&self) -> Result<Option<Lock>, LockError> {
        self.lock_within(PATIENCE)
    }

    /// The same with another patience.
    pub(super) fn lock_within(&self, patience: Duration) -> Result<Option<Lock>, LockError> {
        if self.dry {
            return Ok(None);
        }
        Lock::take(self.root, self.stop, patience).map(Some)
    }

    /// Whether to begin giving a device back. What is begun is finished.
    pub(super) fn go_on(&mut self, address: Bdf) -> Result<(), StepError> {
        self.undoing = true;
        match (self.stop)() {
            true => Err(StepError::Interrupted {
                step: Step::Probe { address },
            }),
            false => Ok(()),
        }
    }

    /// From here on steps lead back, and nobody stops them.
    pub(super) fn undo(&mut self) {
        self.undoing = true;
    }

    /// Whether the device is still there.
    pub(super) fn is_there(&self, address: Bdf) -> bool {
        self.root.device(address).exists()
    }

    /// The driver that a device is bound to now.
    pub(super) fn driver_of(&self, address: Bdf) -> Option<String> {
        self.root.driver_of(&self.root.device(address))
    }

    /// The driver that alone may take a device, where one was set.
    pub(super) fn override_of(&self, address: Bdf) -> Option<String> {
        root::override_in(&self.root.device(address))
    }

    /// Loads a module.
    pub(super) fn load(&mut self, module: &str) -> Result<(), StepError> {
        self.take(Step::Load {
            module: module.to_owned(),
        })
    }

    /// Sets or clears `driver_override`.
    pub(super) fn set_override(
        &mut self,
        address: Bdf,
        driver: Option<&str>,
    ) -> Result<(), StepError> {
        self.take(Step::Override {
            address,
            driver: driver.map(str::to_owned),
        })
    }

    /// Takes a device from the driver that it is bound to now, if any.
    pub(super) fn detach(&mut self, address: Bdf) -> Result<(), StepError> {
        let Some(driver) = self.driver_of(address) else {
            return Ok(());
        };
        let step = Step::Detach { address, driver };
        let taken = self.take(step.clone());
        if self.dry {
            return taken;
        }
        match self.driver_of(address) {
            // Somebody else was quicker, or the device's driver was just removed: as wanted.
            None => Ok(()),
            now => taken.and(Err(StepError::WithoutEffect { step, address, now })),
        }
    }

    /// Gives a device to `driver`, and sees that it is there.
    ///
    /// The driver's own `bind` attribute probes before it returns, and returns what the probe did;
    /// `drivers_probe` keeps that to itself.
    pub(super) fn attach(&mut self, address: Bdf, driver: &str) -> Result<(), StepError> {
        let step = Step::Attach {
            address,
            driver: driver.to_owned(),
        };
        let taken = self.take(step.clone());
        if self.dry {
            return taken;
        }
        match self.driver_of(address) {
            // The kernel may have probed it on its own just before.
            Some(now) if now == driver => Ok(()),
            now => taken.and(Err(StepError::WithoutEffect { step, address, now })),
        }
    }

    /// Lets the kernel choose a driver; returns which took the device.
    pub(super) fn probe(&mut self, address: Bdf) -> Result<Option<String>, StepError> {
        let taken = self.take(Step::Probe { address });
        match self.driver_of(address) {
            Some(driver) => Ok(Some(driver)),
            None => taken.map(|()| None),
        }
    }

    /// Loads the host's own driver for a device, as udev does when it first sees one.
    pub(super) fn load_for(&mut self, address: Bdf) -> Result<(), StepError> {
        match root::text(&self.root.device(address).join("modalias")) {
            Some(alias) => self.load(&alias),
            None => Ok(()),
        }
    }

    /// Gives a node to a user.
    pub(super) fn own(&mut self, node: PathBuf, user: u32) -> Result<(), StepError> {
        self.take(Step::Own { node, user })
    }

    /// Writes a file, or removes it.
    pub(super) fn file(
        &mut self,
        path: &Path,
        text: Option<&str>,
        readers: Readers,
    ) -> Result<(), StepError> {
        self.take(Step::File {
            path: path.to_owned(),
            text: text.map(Box::from),
            readers,
        })
    }

    /// Takes a step, unless somebody wants this to stop.
    pub(super) fn take(&mut self, step: Step) -> Result<(), StepError> {
        if !self.undoing && (self.stop)() {
            return Err(StepError::Interrupted { step });
        }
        (self.tell)(&step);
        if self.dry {
            return Ok(());
        }
        let (result, attribute) = match step.action(self.root) {
            Action::Write(attribute, value) => {
                (self.kernel.write(&attribute, &value), Some(attribute))
            }
            Action::Load(module) => {
                let loaded = self.kernel.load_module(module);
                return loaded.map_err(|source| StepError::Load { step, source });
            }
            Action::Own(node, user) => (self.kernel.own(node, user), None),
            Action::SetFunction(interface, vf, setting) => {
                let index = self
                    .root
                    .sys
                    .join("class/net")
                    .join(interface)
                    .join("ifindex");
                // Gone meanwhile, where it has no number.
                let gone = || io::Error::from_raw_os_error(libc::ENODEV);
                let set = root::number(&index).ok_or_else(gone);
                let set = set.and_then(|index| self.kernel.set_vf(index, vf, setting));
                return set.map_err(|source| StepError::Interface { step, source });
            }
            Action::Save(path, text, readers) => (self.kernel.save(path, text, readers), None),
            Action::Remove(path) => (self.kernel.remove(path), None),
        };
        result.map_err(|source| match attribute {
            Some(attribute) => StepError::Write {
                step,
                attribute,
                source,
            },
            None => StepError::File { step, source },
        })
    }
}
