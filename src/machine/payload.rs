//! What a VM begins with, where a client of Cloud Hypervisor's API calls it by the other's name.
//!
//! libvirt and others give UEFI firmware as the kernel, and what is entered as a kernel, such as
//! rust-hypervisor-firmware, is firmware to Cloud Hypervisor. Which of them it is stands in the file.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use crate::config::{FirmwareConfig, VmConfig};
use crate::firmware::is_firmware;

/// What begins an ELF file. System V ABI, ELF header
const ELF: [u8; 4] = *b"\x7fELF";

/// Has firmware be firmware, and what is entered as a kernel the kernel. A file that cannot be read is left where it
/// is, for whoever opens it says why.
pub(super) fn sort(config: &mut VmConfig) {
    match (&mut config.kernel, &mut config.firmware) {
        (kernel @ Some(_), None) if kernel.as_deref().is_some_and(is_firmware) => {
            config.firmware = Some(FirmwareConfig {
                path: kernel.take(),
                vars: None,
            });
            // Of a kernel, which there is not.
            config.initramfs = None;
            config.cmdline = None;
        }
        (None, Some(FirmwareConfig { path, vars: None }))
            if path.as_deref().is_some_and(is_elf) =>
        {
            config.kernel = path.take();
            config.firmware = None;
        }
        _ => {}
    }
}

fn is_elf(path: &Path) -> bool {
    let mut start = [0; ELF.len()];
    // Asked before opening: opening a FIFO would wait for its writer.
    fs::metadata(path).is_ok_and(|there| there.is_file())
        && File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok())
        && start == ELF
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_and_kernels_are_told_apart_by_what_is_in_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, start: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, start).unwrap();
            Some(path)
        };
        let mut volume = vec![0; 40];
        volume.extend(b"_FVH");
        let (flash, elf) = (file("flash", &volume), file("elf", b"\x7fELF\x02"));
        let (short, missing) = (file("short", b"_FVH"), Some(folder.path().join("none")));
        let firmware = |path: &Option<std::path::PathBuf>| {
            let path = path.clone();
            Some(FirmwareConfig { path, vars: None })
        };
        // (kernel, firmware) and what they are
        for (said, is) in [
            ((flash.clone(), None), (None, firmware(&flash))),
            ((None, firmware(&elf)), (elf.clone(), None)),
            ((elf.clone(), None), (elf.clone(), None)),
            ((None, firmware(&flash)), (None, firmware(&flash))),
            (
                (elf.clone(), firmware(&flash)),
                (elf.clone(), firmware(&flash)),
            ),
            ((short.clone(), None), (short.clone(), None)),
            ((missing.clone(), None), (missing.clone(), None)),
            ((None, firmware(&missing)), (None, firmware(&missing))),
            (
                (Some(folder.path().into()), None),
                (Some(folder.path().into()), None),
            ),
        ] {
            let mut config = VmConfig {
                kernel: said.0,
                firmware: said.1,
                cmdline: Some("quiet".into()),
                ..VmConfig::default()
            };
            let had_kernel = config.kernel.is_some();
            sort(&mut config);
            assert_eq!((config.kernel.clone(), config.firmware.clone()), is);
            assert_eq!(
                config.cmdline.is_some(),
                config.kernel.is_some() || !had_kernel
            );
        }
    }
}
