//! What the tables say of the TPM.

use acpi_tables::aml::{Device, Memory32Fixed, Name, ResourceTemplate};
use acpi_tables::sdt::Sdt;

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, in_system_bus, path};
use crate::arch::layout;
use crate::devices::tpm;

/// Size of the header that each table has.
const HEADER: u32 = 36;
/// The revision whose fields these are. TCG ACPI Specification 1.4, §8
const REVISION: u8 = 4;
/// A client's platform, and a field that is reserved.
const CLIENT: [u8; 4] = [0; 4];
/// Commands are started by the registers of a CRB. Table 8
const BY_CRB: u32 = 7;
/// What that start needs besides, and where firmware has left a log of what it measured: neither. A UEFI hands its log on
/// itself.
const NO_PARAMETERS_AND_NO_LOG: [u8; 24] = [0; 24];

/// The table that says how commands are started. TCG ACPI Specification 1.4, table 7
pub(crate) fn tpm2() -> Sdt {
    let mut tpm2 = Sdt::new(
        *b"TPM2",
        HEADER,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let control_area = layout::TPM_START + tpm::CONTROL_AREA;
    tpm2.append_slice(&CLIENT);
    tpm2.append_slice(&control_area.to_le_bytes());
    tpm2.append_slice(&BY_CRB.to_le_bytes());
    tpm2.append_slice(&NO_PARAMETERS_AND_NO_LOG);
    tpm2
}

/// Appends the device, by the name that drivers look for.
pub(crate) fn append_tpm(aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &"MSFT0101");
    let uid = Name::new(path("_UID"), &1_u8);
    let registers = Memory32Fixed::new(true, layout::TPM_START as u32, tpm::SIZE as u32);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&registers]));
    in_system_bus(&Device::new(path("TPM_"), vec![&hid, &uid, &crs]), aml);
}
