//! The machine: assembled from a configuration, run until its end, taken apart again.
//!
//! What a part does is its module's; here is what belongs together. Parts come and go in this order:
//! KVM's VM, host memory, the host's devices and their DMA space, platform, PCI with its functions,
//! vCPUs; and in reverse at the end, so that no guest runs without its devices, no device has DMA
//! into memory that is gone, and every host device is reset before it is given back.

mod address_plan;
mod aside;
mod assembly;
mod bars;
mod bus;
mod consoles;
mod definition;
mod early;
mod end;
mod error;
mod events;
mod firmware;
mod handed;
mod holders;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod life;
mod long_work;
mod madvise;
mod observed;
mod panics;
mod passthrough;
mod payload;
mod pci;
mod placing;
mod pluggable;
mod quiet;
mod removal;
mod requests;
mod resize;
mod restart;
mod seats;
mod segments;
mod shown;
mod signals;
mod virtio;
mod vmm;

pub use address_plan::NoRoomError;
pub use assembly::few_arenas;
pub use error::RunError;
pub use handed::{Files, Handed, check_iommufd, device_of};
pub use holders::{keep_host_network, look_for_holders};
pub use life::Ended;
pub use observed::{
    AssignedDoing, DeviceSeen, DeviceState, DmaSeen, Doing, Observed, State, VirtioDoing,
};
pub(crate) use panics::PanicWatch;
pub use panics::end_on_panic;
pub use placing::PlacingError;
pub use pluggable::PluggableError;
pub use requests::{
    Added, AddedFunction, Answer, Control, Extent, Info, Request, RequestError, Requests,
    VirtioInfo,
};
pub(crate) use signals::Signals;
pub use signals::block_signals;
pub use vmm::{ProcessBounds, run, serve};
