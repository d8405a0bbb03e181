//! What a function of a host device is given when it is made.

use std::sync::Arc;

use busway_pci::pace::Clock;
use busway_pci::{InterruptLines, InterruptRoutes};

use crate::{Resets, RomChoice};

/// How a function is connected to its guest.
#[derive(Clone, Debug)]
pub struct Wiring {
    /// Ways for MSI and MSI-X.
    pub routes: Arc<dyn InterruptRoutes>,
    /// Ways for the interrupt pin.
    pub lines: Arc<dyn InterruptLines>,
    /// The resets of its VM, which knows the device, or is made known to it.
    pub resets: Arc<Resets>,
    /// The time by which the guest's resets and changes of interrupts are paced.
    pub clock: Arc<dyn Clock>,
    /// Where it is in the guest.
    pub placement: Placement,
}

/// Where a function is in its guest, which decides what kind of function a PCIe one is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// At a link, behind a root port: an endpoint. PCIe 6.0 §1.3.2.1, §1.3.2.2
    #[default]
    BehindPort,
    /// On bus 0, a part of the root complex: an endpoint that is integrated into it and has no link. PCIe 6.0
    /// §1.3.2.3
    RootBus,
}

/// What the person who gives a device away can choose about it.
#[derive(Clone, Debug, Default)]
pub struct AssignOptions {
    /// What the guest finds as its expansion ROM.
    pub rom: RomChoice,
    /// Which of NVIDIA's cliques a GPU is in, 0 to 15, where it is in one.
    pub nv_gpudirect_clique: Option<u8>,
}
