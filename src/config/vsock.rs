//! The vsock device, as the command line and the file say it.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::InvalidVirtio;

/// The context ids that guests can have: 0 to 2 are the hypervisor's, the local one and the host's, and all
/// ones is any. linux/vm_sockets.h
const GUEST_CIDS: RangeInclusive<u32> = 3..=u32::MAX - 1;

/// `--vsock`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id: its address, which it alone has on the host where the host's kernel serves it.
    pub cid: u32,
    /// The Unix socket by which programs on the host reach those in the guest; the host's AF_VSOCK where there is none.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Name, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
    /// The PCI segment that it is in.
    #[serde(default)]
    pub pci_segment: u16,
    /// Its device number on bus 0 of that segment, 1 to 15; any that is free where absent.
    #[serde(default)]
    pub pci_device_id: Option<u8>,
}

impl VsockConfig {
    /// Whether there can be such a device.
    pub(crate) fn check(&self) -> Result<(), InvalidVirtio> {
        match GUEST_CIDS.contains(&self.cid) {
            true => Ok(()),
            false => Err(InvalidVirtio::Cid(self.cid)),
        }
    }
}
