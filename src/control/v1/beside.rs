//! The descriptors that came beside a request, and which part of its body each is for.
//!
//! A request that adds one device has its descriptors to itself. `vm.create` says by their places among those
//! that came which is for what: Cloud Hypervisor has no word for that, and numbers of the client's own say nothing
//! here. Each has a use, or the request is refused: one that nobody named would be closed, and the VM would be another
//! than whoever sent it thinks. All are closed with the request, but for those that the VM keeps.

use super::lacking::Fault;
use crate::machine::Files;

/// Descriptors that are to be used once each.
#[derive(Debug)]
pub(super) struct Beside<'a> {
    files: &'a Files,
    used: Vec<bool>,
}

impl<'a> Beside<'a> {
    pub(super) fn new(files: &'a Files) -> Self {
        Self {
            files,
            used: vec![false; files.all().len()],
        }
    }

    /// Those that stand at `places`, from 0 on, which `key` says.
    ///
    /// # Errors
    /// There are not so many, or one has a use already
    pub(super) fn take(&mut self, places: &[usize], key: &str) -> Result<Files, Fault> {
        let count = self.used.len();
        for &place in places {
            match self.used.get_mut(place) {
                None => {
                    return Err(Fault::Wrong(format!(
                        "{key}={place}: {count} descriptors came beside the request (SCM_RIGHTS), and the first one is 0"
                    )));
                }
                Some(true) => {
                    return Err(Fault::Wrong(format!(
                        "{key}={place}: this descriptor is for something else already"
                    )));
                }
                Some(used) => *used = true,
            }
        }
        let files = self.files.pick(places);
        files.map_err(|error| Fault::Wrong(format!("{key}: a descriptor cannot be kept: {error}")))
    }

    /// Each has a use.
    ///
    /// # Errors
    /// One has none
    pub(super) fn finish(self) -> Result<(), Fault> {
        match self.used.iter().position(|used| !used) {
            None => Ok(()),
            Some(place) => Err(Fault::Wrong(format!(
                "descriptor {place} that came beside the request has no use: say its place by fd_index of a disk or a device, \
                 fd_indexes of a NIC, or platform.iommufd_fd_index"
            ))),
        }
    }
}

/// That a descriptor that is kept for a device can be found again: by the device's name.
pub(super) fn needs_id(id: Option<&str>, key: &str) -> Result<String, Fault> {
    id.map(str::to_owned).ok_or_else(|| {
        Fault::Wrong(format!(
            "{key}: a device that comes by a descriptor needs an id"
        ))
    })
}
