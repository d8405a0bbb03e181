//! What is answered where devices were added.

use serde::Serialize;

use crate::machine::{Added, AddedFunction};

/// `PciDeviceInfo`
#[derive(Serialize)]
pub(super) struct PciDeviceInfo {
    id: String,
    bdf: String,
    /// Beside Cloud Hypervisor's: false where no driver of the guest's attends to the slot, yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    attended: Option<bool>,
    /// Beside Cloud Hypervisor's: the further functions that came with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    functions: Vec<PciDeviceInfo>,
}

impl From<AddedFunction> for PciDeviceInfo {
    fn from(added: AddedFunction) -> Self {
        Self {
            id: added.id,
            bdf: added.address,
            attended: None,
            functions: Vec::new(),
        }
    }
}

impl From<Added> for PciDeviceInfo {
    fn from(added: Added) -> Self {
        Self {
            attended: (!added.attended).then_some(false),
            functions: added.others.into_iter().map(Self::from).collect(),
            ..Self::from(added.first)
        }
    }
}
