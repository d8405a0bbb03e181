//! What the tables say of the TPM.

use acpi_tables::aml::{Device, Memory32Fixed, Name, ResourceTemplate};
use acpi_tables::tpm2::{PlatformClass, StartMethod, Tpm2};

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, in_system_bus, path};
use crate::arch::layout;
use crate::devices::tpm;

/// The table that says how commands are started: by the control area's registers. There is no log of what firmware has
/// measured, which hands that on itself. TCG ACPI Specification 1.4, §8
pub(crate) fn tpm2() -> Tpm2 {
    Tpm2::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        PlatformClass::Client,
        layout::TPM_START + tpm::CONTROL_AREA,
        StartMethod::Crb,
    )
}

/// Appends the device, by the name that drivers look for.
pub(crate) fn append_tpm(aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &"MSFT0101");
    let uid = Name::new(path("_UID"), &1_u8);
    let registers = Memory32Fixed::new(true, layout::TPM_START as u32, tpm::SIZE as u32);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&registers]));
    in_system_bus(&Device::new(path("TPM_"), vec![&hid, &uid, &crs]), aml);
}
