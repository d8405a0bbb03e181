//! What a kind of virtio device is to the transport: what it offers, and how it starts.

use std::fmt::Debug;
use std::sync::Arc;

use super::activation::Activation;
use super::config_space::ConfigSpace;
use super::counts::{Counts, ServedBy};
use super::error::StartError;
use super::life::{DeviceState, Running};
use super::spec;

/// A kind of virtio device, apart from the transport that carries it.
///
/// The transport negotiates and validates the queues; the device knows what a request means. Between
/// [`start`](Self::start) and the end of [`Running::stop`] only what runs touches guest memory. What has
/// to outlive a run is either the host's (an image, a tap), of which the device keeps a share, or the
/// driver's, and then what runs leaves it to the transport, as [`life`](super::life) says.
pub trait VirtioDevice: Send + Debug {
    /// The device's name in this VM: in messages and as its threads' name.
    fn name(&self) -> &str;

    /// Its type. Virtio 1.3 §5.
    fn device_type(&self) -> u16;

    /// Its PCI class code: base class, sub-class and programming interface, as Linux writes them.
    fn class(&self) -> u32;

    /// The features it offers, without those that the transport and the rings add.
    fn features(&self) -> u64;

    /// Of the rings' own features, those that who serves its queues can do. `VIRTIO_F_VERSION_1` is always offered.
    fn ring_features(&self) -> u64 {
        spec::feature::EVENT_IDX | spec::feature::INDIRECT_DESC
    }

    /// The most descriptors of each of its queues; powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Its configuration.
    fn config(&self) -> Arc<dyn ConfigSpace>;

    /// Who serves its queues, all its life.
    fn served_by(&self) -> ServedBy {
        ServedBy::Busway
    }

    /// Where what its queues do is counted, from its first start to its end.
    fn counts(&self) -> Counts {
        Counts::default()
    }

    /// Whether the driver's choice among the features can be served.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// Whether a run of this device with these features could have left `state`, which may come from a
    /// file.
    fn takes(&self, features: u64, state: &DeviceState) -> bool {
        let _ = features;
        *state == DeviceState::None
    }

    /// It does not run, and goes on from `state`, which is what a reset leaves, or what was saved: what the
    /// driver has chosen in its configuration is as it was then.
    fn set_state(&mut self, state: &DeviceState) {
        let _ = state;
    }

    /// What runs that are over still wait for, in words: the host has requests of theirs that use guest
    /// memory, and nothing ends those before the host does. A reset is not over before this is `None`.
    fn outstanding(&self) -> Option<String> {
        None
    }

    /// Starts it: the driver is ready, or the device was stopped and goes on. What it starts with was
    /// left by a run of this device, or [`takes`](Self::takes) has said that it could have been.
    ///
    /// # Errors
    /// [`StartError`]; the guest is told that the device needs a reset.
    fn start(&mut self, activation: Activation) -> Result<Box<dyn Running>, StartError>;
}
