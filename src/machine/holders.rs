//! What is done before the process is bounded: who has what a VM's configuration names is found out, for behind Landlock
//! nobody else's descriptors are seen, and what is refused could not be said to be whose; and what a jail does not have of
//! the host's network is opened.

use busway_iommu::{SysRoot, remember_holders};

use crate::config::VmConfig;
use crate::virtio::blk::lock::remember_holder;
use crate::virtio::net::{self, TapError};

/// Looks at the host devices, images and stores of a VM that are opened by their paths. What nobody has costs a few calls
/// of the kernel's.
pub fn look_for_holders(config: &VmConfig) {
    let paths = SysRoot::default();
    let devices = config.device.iter().filter(|device| device.fd.is_none());
    for group in devices.filter_map(|device| paths.group_of(&device.path)) {
        remember_holders(&paths, group);
    }
    let disks = config.disk.iter();
    for disk in disks.filter(|disk| disk.fd.is_none() && !disk.vhost_user) {
        remember_holder(&disk.path, disk.readonly);
    }
    for pmem in &config.pmem {
        remember_holder(&pmem.file, pmem.discard_writes);
    }
    let firmware = config.firmware.as_ref();
    if let Some(vars) = firmware.and_then(|firmware| firmware.vars.as_ref()) {
        remember_holder(vars, false);
    }
}

/// Opens what a VM's taps need of the host's network namespace, which the process is about to leave for a jail: a tap
/// cannot be opened by its name any more after that.
///
/// # Errors
/// [`TapError`]
pub fn keep_host_network(config: &VmConfig) -> Result<(), TapError> {
    let taps = config.net.iter();
    let taps = taps.filter(|net| net.fd.is_empty() && !net.vhost_user);
    let pairs = taps.map(|net| usize::from(net.num_queues / 2).max(1));
    net::keep_host_network(pairs.sum())
}
