//! The words of `--firmware`.

use super::{Key, Section};
use crate::cli::value::{Reason, Value};
use crate::config::FirmwareConfig;

/// `--firmware`
pub(in crate::cli) static FIRMWARE: Section<FirmwareConfig> = Section {
    name: "firmware",
    summary: "UEFI firmware, which boots a disk or starts the kernel: auto|FILE[,vars=FILE]",
    words: &[(
        "auto",
        "what the distribution's package has installed; also where there is neither\n\
         kernel nor firmware, but a disk or a device",
    )],
    notes: "\
Without vars=, variables such as boot entries last as long as the VM.",
    blank: FirmwareConfig::default,
    keys: keys! {
        "path" { "FILE": "code (OVMF_CODE_4M.fd), or code and variables in one (OVMF.fd); needs no\n\
                 `path=`" }
            |firmware, value| set_firmware_path(firmware, value)?;
        "vars" { "FILE": "its variables: a file of this VM's own, made from the package's template\n\
                 where it is not there" }
            |firmware, value| firmware.vars = Some(value.text()?.into());
    },
    required: &["path"],
    bare: Some(set_firmware_path),
    single: false,
    details: &[],
};

fn set_firmware_path(firmware: &mut FirmwareConfig, value: &Value) -> Result<(), Reason> {
    firmware.path = match value.text()? {
        "auto" => None,
        path => Some(path.into()),
    };
    Ok(())
}
