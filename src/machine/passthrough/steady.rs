//! When a slot can be changed so that the guest sees it.

use std::time::Duration;

use busway_pci::{FunctionId, Topology};

/// How long a change of a slot waits at most until the guest is done with what it is at there: the five
/// seconds that Linux takes for a button, one for the power to go, and as many again.
pub(super) const STEADY_LIMIT: Duration = Duration::from_secs(12);

/// Whether the slot behind a port can be changed without the guest missing it.
pub(super) fn is_steady(topology: &Topology, port: FunctionId) -> bool {
    topology.with_slot(port, |slot| slot.steady()) != Some(false)
}
