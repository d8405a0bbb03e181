//! What clients of Cloud Hypervisor's API say of a VM that Busway keeps and shows, and that changes nothing in the guest
//! yet.

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Bits of a physical address.
    pub max_phys_bits: Option<u8>,
}
