//! All that a virtio function remembers, as one plain structure, and the way back from it.

use busway_pci::{MsixState, MsixStateError};
use serde::{Deserialize, Serialize};

use super::registers::Registers;
use super::{FunctionState, VirtioPci, spec};
use crate::virtio::life::{Life, Progress};

/// The version of [`VirtioPciState`] that is written and read. It changes with the meaning of a field.
const VERSION: u16 = 1;

/// Bytes of configuration space that a guest can change something in.
const CONFIG_SIZE: usize = 256;

/// What a virtio function remembers: no descriptor, no thread and no address of this process is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciState {
    /// The version of this structure.
    pub version: u16,
    /// The device's type. Virtio 1.3 §5.
    pub device_type: u16,
    /// The first 256 bytes of configuration space, as registers: its BAR and command register
    /// among them. Of those, a restore takes what a guest can write.
    pub config: Vec<u8>,
    /// The common configuration.
    pub registers: Registers,
    /// The device's configuration, as the driver last could read it. It is not restored, for it says what
    /// the device is; but the driver hears where it is another one.
    pub device_config: Vec<u8>,
    /// The ISR register.
    pub isr: u8,
    /// The device waits for its driver to reset it.
    pub needs_reset: bool,
    /// The MSI-X table.
    pub msix: MsixState,
    /// The positions in the queues, and what the device itself keeps.
    pub progress: Progress,
}

/// A saved state is not one that this device can go on from.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// virtio device {name}: its state was saved in version {found} of the format, and this Busway knows {VERSION}: restore it with the Busway that saved it
    #[error(
        "virtio device {name}: its state was saved in version {found} of the format, and this Busway \
         knows {VERSION}: restore it with the Busway that saved it"
    )]
    Version {
        /// The device.
        name: String,
        /// The version of the state.
        found: u16,
    },
    /// virtio device {name}: its saved state does not fit: {what}; restore it with the configuration that it was saved with
    #[error(
        "virtio device {name}: its saved state does not fit: {what}; restore it with the configuration \
         that it was saved with"
    )]
    Mismatch {
        /// The device.
        name: String,
        /// What does not fit.
        what: &'static str,
    },
    /// virtio device {name}: its saved MSI-X table does not fit: {source}; restore it with the configuration that it was saved with
    #[error(
        "virtio device {name}: its saved MSI-X table does not fit: {source}; restore it with the \
         configuration that it was saved with"
    )]
    Msix {
        /// The device.
        name: String,
        /// What does not fit.
        source: MsixStateError,
    },
}

impl VirtioPci {
    /// All that the device remembers; `None` while it runs, for then its workers are ahead of what could
    /// be said. [Pause](Self::pause) it first.
    #[must_use]
    pub fn state(&self) -> Option<VirtioPciState> {
        let function = self.function();
        let mut config = vec![0; CONFIG_SIZE];
        // Not as the guest reads it, for that reaches through the access capability into the BAR.
        function.config.read(0, &mut config);
        Some(VirtioPciState {
            version: VERSION,
            device_type: function.device.device_type(),
            config,
            registers: function.registers.clone(),
            device_config: self.device_config_bytes(),
            isr: self.interrupts.isr(),
            needs_reset: self.interrupts.is_broken(),
            msix: self.interrupts.msix().state(),
            progress: function.life.progress()?.clone(),
        })
    }

    /// Puts the device into a state that was saved, whatever it was in, and leaves it paused: it goes on
    /// with [`resume`](Self::resume). To be called before the function is on a bus, for its BAR may be
    /// elsewhere afterwards. A driver that finds another configuration than it knew, such as another size
    /// of a disk, hears of that.
    ///
    /// # Errors
    /// [`StateError`]; the device is then as it was.
    pub fn restore(&self, state: &VirtioPciState) -> Result<(), StateError> {
        let mut function = self.function();
        self.check(&function, state)?;
        function.paused = true;
        self.stop(&mut function);
        function.registers.restore(&state.registers);
        self.show_status(&function);
        function.config.reset();
        function.config.write(0, &state.config);
        function.device.set_state(&state.progress.device);
        function.life = Life::Stopped(state.progress.clone());
        let isr = state.isr & spec::isr::ALL;
        let queues = state.registers.queues.iter().map(|queue| queue.vector);
        let config = state.registers.config_vector;
        self.interrupts
            .restore(config, queues, isr, state.needs_reset);
        self.interrupts
            .with_msix(|msix, owner| msix.restore(&state.msix, owner));
        let control = self.interrupts.msix().control();
        function.config.set(self.capabilities.msix_control, control);
        if state.device_config != self.device_config_bytes() {
            self.interrupts.config_changed();
        }
        Ok(())
    }

    /// Whether the device can go on from `state`.
    fn check(&self, function: &FunctionState, state: &VirtioPciState) -> Result<(), StateError> {
        let name = || self.name.clone();
        let mismatch = |what| StateError::Mismatch { name: name(), what };
        if state.version != VERSION {
            return Err(StateError::Version {
                name: name(),
                found: state.version,
            });
        }
        let FunctionState {
            registers, device, ..
        } = function;
        if state.device_type != device.device_type() {
            return Err(mismatch("it is another kind of device's"));
        }
        if state.config.len() != CONFIG_SIZE {
            return Err(mismatch("its configuration space has another size"));
        }
        let msix = self.interrupts.msix();
        let accepts = |features| device.accepts(features);
        registers
            .could_be(&state.registers, msix.vectors(), accepts)
            .map_err(mismatch)?;
        if state.progress.queues.len() > registers.queues.len() {
            return Err(mismatch("it has positions in more queues than there are"));
        }
        if !device.takes(state.registers.driver_features, &state.progress.device) {
            return Err(mismatch("what the device itself keeps is not this one's"));
        }
        msix.check(&state.msix).map_err(|source| StateError::Msix {
            name: name(),
            source,
        })
    }

    fn device_config_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.device_config.size()];
        self.device_config.read(0, &mut bytes);
        bytes
    }
}
