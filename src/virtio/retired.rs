//! What is left of a device whose end on the host was taken away while the guest still had it.

use std::io;
use std::sync::Arc;

use super::activation::Activation;
use super::config_space::ConfigSpace;
use super::device::VirtioDevice;
use super::error::StartError;
use super::life::Running;

/// A device that is what another was to the transport, and never starts.
#[derive(Debug)]
pub(super) struct Retired {
    name: String,
    device_type: u16,
    class: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    config: Arc<dyn ConfigSpace>,
}

impl Retired {
    pub(super) fn of(device: &dyn VirtioDevice) -> Self {
        Self {
            name: device.name().to_owned(),
            device_type: device.device_type(),
            class: device.class(),
            features: device.features(),
            queue_sizes: device.queue_sizes(),
            config: device.config(),
        }
    }
}

impl VirtioDevice for Retired {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        self.device_type
    }

    fn class(&self) -> u32 {
        self.class
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.queue_sizes.clone()
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, _activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let why = "its end on the host was taken away";
        Err(io::Error::other(why).into())
    }
}
