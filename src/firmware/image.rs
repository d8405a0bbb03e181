//! What a firmware file is, by what it begins and ends with: UEFI's firmware volumes. References are to the
//! Platform Initialization Specification 1.8, volume 3.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::FirmwareError;

/// The most bytes that are read of a file that is to be firmware.
const LARGEST: u64 = 32 << 20;
/// What regions come in multiples of: a page.
const PAGE: u64 = 0x1000;
/// The bytes of a BIOS: what a PC of that time has room for below 1 MiB, and what is reached above.
const BIOS_SIZES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 20;
/// The first instruction is 16 bytes before the end.
const RESET_VECTOR: usize = 16;

// The header of a volume. §3.2.1, EFI_FIRMWARE_VOLUME_HEADER.
const FILE_SYSTEM: usize = 16;
const LENGTH: usize = 32;
const SIGNATURE: usize = 40;
const HEADER_LENGTH: usize = 48;
const SIGNATURE_BYTES: [u8; 4] = *b"_FVH";

/// `gEfiSystemNvDataFvGuid`: the volume holds variables. EDK II MdeModulePkg/Include/Guid/SystemNvDataGuid.h
const NV_DATA: [u8; 16] = [
    0x8d, 0x2b, 0xf1, 0xff, 0x96, 0x76, 0x8b, 0x4c, 0xa9, 0x85, 0x27, 0x47, 0x07, 0x5b, 0x4f, 0x50,
];

// The header of the variables, behind that of the volume. MdeModulePkg/Include/Guid/VariableFormat.h
/// `gEfiAuthenticatedVariableGuid`
const AUTHENTICATED: [u8; 16] = [
    0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92,
];
/// `gEfiVariableGuid`
const PLAIN: [u8; 16] = [
    0x16, 0x36, 0xcf, 0xdd, 0x75, 0x32, 0x64, 0x41, 0x98, 0xb6, 0xfe, 0x85, 0x70, 0x7f, 0xfe, 0x7d,
];
const STORE_SIZE: usize = 16;
const STORE_FORMAT: usize = 20;
const STORE_STATE: usize = 21;
const FORMATTED: u8 = 0x5a;
const HEALTHY: u8 = 0xfe;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Code alone.
    Code,
    /// Variables, of that many bytes, and code behind them.
    Whole { variables: u64 },
    /// Variables alone.
    Variables,
    /// A BIOS, which has no variables.
    Bios,
}

/// Whether a regular file begins as firmware does, with a volume.
pub(crate) fn is_firmware(path: &Path) -> bool {
    let mut start = [0; SIGNATURE + SIGNATURE_BYTES.len()];
    // Asked before opening: opening a FIFO would wait for its writer.
    let is_file = fs::metadata(path).is_ok_and(|there| there.is_file());
    let read =
        is_file && File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok());
    read && start.ends_with(&SIGNATURE_BYTES)
}

/// A file's bytes.
#[derive(Debug)]
pub(super) struct Image {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Image {
    /// Reads a regular file.
    pub(super) fn read(path: &Path) -> Result<Self, FirmwareError> {
        let failed = |source| FirmwareError::Open {
            path: path.to_owned(),
            source,
        };
        let wrong = |why: &str| FirmwareError::NotFirmware {
            path: path.to_owned(),
            why: why.to_owned(),
        };
        // Asked before opening: opening a FIFO would wait for its writer.
        let metadata = fs::metadata(path).map_err(failed)?;
        if metadata.is_dir() {
            return Err(wrong("it is a folder"));
        }
        if !metadata.is_file() {
            return Err(wrong("it is a special file"));
        }
        if metadata.len() > LARGEST {
            return Err(wrong(&format!("it has {} bytes", metadata.len())));
        }
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(LARGEST).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
        })
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// What the file is.
    pub(super) fn kind(&self) -> Result<Kind, FirmwareError> {
        let size = self.bytes.len() as u64;
        let wrong = |why: String| FirmwareError::NotFirmware {
            path: self.path.clone(),
            why,
        };
        if size == 0 {
            return Err(wrong("it is empty".to_owned()));
        }
        if let Some(what) = other_kind(&self.bytes) {
            return Err(wrong(format!("it is {what}")));
        }
        if !size.is_multiple_of(PAGE) {
            return Err(wrong(format!(
                "its size, {size} bytes, is no multiple of {PAGE}: it may have been cut off"
            )));
        }
        let Some(volume) = volume(&self.bytes) else {
            if is_bios(&self.bytes) && BIOS_SIZES.contains(&size) {
                return Ok(Kind::Bios);
            }
            return Err(wrong("it does not begin with a firmware volume".to_owned()));
        };
        let ends_with_code = self
            .bytes
            .get(self.bytes.len() - RESET_VECTOR..)
            .is_some_and(|vector| vector.iter().any(|byte| ![0, u8::MAX].contains(byte)));
        match volume.holds_variables {
            true if volume.length == size => Ok(Kind::Variables),
            true if volume.length > size => Err(wrong(format!(
                "it has {size} bytes of {}: it was cut off",
                volume.length
            ))),
            _ if !ends_with_code => Err(wrong(
                "it does not end with a processor's first instruction: it may have been cut off"
                    .to_owned(),
            )),
            true => Ok(Kind::Whole {
                variables: volume.length,
            }),
            false => Ok(Kind::Code),
        }
    }

    /// The first bytes and the rest: variables and code of a whole image.
    pub(super) fn split(mut self, variables: u64) -> Result<(Vec<u8>, Vec<u8>), FirmwareError> {
        let at = usize::try_from(variables).unwrap_or(usize::MAX);
        let code = self.bytes.split_off(at.min(self.bytes.len()));
        check_variables(&self.path, &self.bytes)?;
        Ok((self.bytes, code))
    }

    /// That it is variables, whole and undamaged.
    pub(super) fn check_variables(&self) -> Result<(), FirmwareError> {
        check_variables(&self.path, &self.bytes)
    }
}

/// That `bytes`, those of `path`, are variables, whole and undamaged.
pub(super) fn check_variables(path: &Path, bytes: &[u8]) -> Result<(), FirmwareError> {
    let wrong = |why: String| FirmwareError::NotVariables {
        vars: path.to_owned(),
        why,
    };
    let size = bytes.len() as u64;
    if size == 0 {
        return Err(wrong("it is empty".to_owned()));
    }
    if let Some(what) = other_kind(bytes) {
        return Err(wrong(format!("it is {what}")));
    }
    let Some(volume) = volume(bytes) else {
        return Err(wrong("it does not begin with a firmware volume".to_owned()));
    };
    if !volume.holds_variables {
        return Err(wrong("it is firmware's code".to_owned()));
    }
    if volume.length != size {
        return Err(wrong(format!(
            "it has {size} bytes, and says that it has {}",
            volume.length
        )));
    }
    if volume.checksum != 0 {
        return Err(wrong("its first bytes are damaged (checksum)".to_owned()));
    }
    let store = bytes.get(volume.header..).unwrap_or_default();
    let known = [AUTHENTICATED, PLAIN]
        .iter()
        .any(|guid| store.starts_with(guid));
    let fits = word(store, STORE_SIZE).is_some_and(|length| u64::from(length) <= size);
    let whole =
        store.get(STORE_FORMAT) == Some(&FORMATTED) && store.get(STORE_STATE) == Some(&HEALTHY);
    if !known || !fits || !whole {
        return Err(wrong("the header of its variables is damaged".to_owned()));
    }
    Ok(())
}

struct Volume {
    length: u64,
    header: usize,
    holds_variables: bool,
    /// Zero where the header is as it was written.
    checksum: u16,
}

/// The volume that `bytes` begin with.
fn volume(bytes: &[u8]) -> Option<Volume> {
    if bytes.get(SIGNATURE..SIGNATURE + 4)? != SIGNATURE_BYTES {
        return None;
    }
    let length = bytes.get(LENGTH..LENGTH + 8)?.try_into().ok()?;
    let header = bytes
        .get(HEADER_LENGTH..HEADER_LENGTH + 2)?
        .try_into()
        .ok()?;
    let header = usize::from(u16::from_le_bytes(header));
    let words = bytes.get(..header)?.chunks_exact(2);
    let sum = words.fold(0_u16, |sum, word| {
        let word = word.try_into().map_or(0, u16::from_le_bytes);
        sum.wrapping_add(word)
    });
    Some(Volume {
        length: u64::from_le_bytes(length),
        header,
        holds_variables: bytes.get(FILE_SYSTEM..FILE_SYSTEM + 16)? == NV_DATA,
        checksum: sum,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    bytes.try_into().ok().map(u32::from_le_bytes)
}

/// What a BIOS's first instruction is: a jump into the segment at 0xF0000, from where it is copied to.
/// SeaBIOS, src/romlayout.S, `reset_vector`
fn is_bios(bytes: &[u8]) -> bool {
    const FAR_JUMP: u8 = 0xea;
    let start = bytes.len().checked_sub(RESET_VECTOR);
    let vector = start.and_then(|start| bytes.get(start..start + 5));
    matches!(vector, Some([FAR_JUMP, _, _, 0x00, 0xf0]))
}

/// What a file is that people mistake for firmware.
fn other_kind(bytes: &[u8]) -> Option<&'static str> {
    const BOOT_FLAG: usize = 0x1fe;
    const BZIMAGE: usize = 0x202;
    match bytes {
        [b'Q', b'F', b'I', 0xfb, ..] => {
            Some("a qcow2 image: `qemu-img convert -O raw` makes a raw file of it")
        }
        [0x7f, b'E', b'L', b'F', ..] => Some("an ELF file; a kernel is given with --kernel"),
        _ if bytes.get(BZIMAGE..BZIMAGE + 4) == Some(b"HdrS") => {
            Some("a Linux kernel, which is given with --kernel")
        }
        _ if bytes.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa]) => {
            Some("a disk image, which is given with --disk")
        }
        _ => None,
    }
}
