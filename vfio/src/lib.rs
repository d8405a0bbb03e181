//! One host device, as a PCI function; and binding it.

pub mod host;
