//! Small parts of AML that several tables' objects are made of.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Path, Scope};

/// Appends a device below `\\_SB`.
pub(crate) fn in_system_bus(device: &Device<'_>, aml: &mut Vec<u8>) {
    Scope::new(path("\\_SB_"), vec![device]).to_aml_bytes(aml);
}

/// A name, relative to where it stands unless it begins at the root.
pub(crate) fn path(name: &str) -> Path {
    Path::new(name)
}

/// What is AML already.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Bytes {
    pub(super) fn of(aml: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        aml.to_aml_bytes(&mut bytes);
        Self(bytes)
    }
}

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
