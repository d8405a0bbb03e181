//! Firmware as distributions package it, unmodified: which file it is, where its variables are kept, and what it is told
//! of the board. It is UEFI's, or a BIOS, SeaBIOS, for disks that are older than that.
//!
//! The flash chips are [`devices::pflash`](crate::devices::pflash), the way to tell is
//! [`devices::fw_cfg`](crate::devices::fw_cfg), and the board that firmware knows is
//! [`arch::q35`](crate::arch::q35).

mod descriptors;
mod error;
mod image;
mod items;
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use descriptors::FirmwareRoots;
pub use error::FirmwareError;
pub(crate) use image::is_firmware;
pub use items::{BiosItems, BoardItems, Kernel, Window, hardware_info, items};

use crate::arch::layout::{FLASH_END, FLASH_SIZE};
use crate::config::FirmwareConfig;
use image::{Image, Kind};
use store::Store;

/// Where a BIOS ends below 1 MiB, and the most bytes of it there. SeaBIOS, src/config.h, `BUILD_BIOS_ADDR`; QEMU
/// hw/i386/x86-common.c, `x86_isa_bios_init`
const LOW_END: u64 = 1 << 20;
const LOW_COPY: usize = 128 << 10;

/// Firmware, opened and looked at.
#[derive(Debug)]
pub struct Firmware {
    /// The file with its code, for a person.
    pub path: PathBuf,
    code: Vec<u8>,
    is_bios: bool,
    variables: Vec<u8>,
    store: Option<Arc<Store>>,
}

impl Firmware {
    /// Opens what `config` asks for; firmware that is not named is found below `roots`.
    ///
    /// # Errors
    /// [`FirmwareError`]: what is wrong with which file, and what to do.
    pub fn open(config: &FirmwareConfig, roots: &FirmwareRoots) -> Result<Self, FirmwareError> {
        let known = roots.descriptors();
        let (path, template) = match &config.path {
            Some(path) => {
                known.refuse_smm(path)?;
                (path.clone(), known.template_of(path))
            }
            None => known.choose()?,
        };
        let image = Image::read(&path)?;
        let (code, initial) = match image.kind()? {
            Kind::Whole { variables } => {
                let (variables, code) = image.split(variables)?;
                (code, Initial::of(&path, variables))
            }
            Kind::Variables => {
                return Err(FirmwareError::IsVariables { path });
            }
            Kind::Bios => {
                if let Some(vars) = &config.vars {
                    let vars = vars.clone();
                    return Err(FirmwareError::BiosVariables { path, vars });
                }
                return Ok(Self {
                    path,
                    code: image.into_bytes(),
                    is_bios: true,
                    variables: Vec::new(),
                    store: None,
                });
            }
            Kind::Code => {
                let initial = match template.or_else(|| descriptors::template_beside(&path)) {
                    Some(template) => Some(Initial::read(&template)?),
                    None => None,
                };
                (image.into_bytes(), initial.unwrap_or_default())
            }
        };
        let (variables, store) = match &config.vars {
            Some(vars) => {
                let (bytes, store) = Store::open(vars, &initial, &path, code.len() as u64)?;
                (bytes, Some(Arc::new(store)))
            }
            None if initial.bytes.is_empty() => {
                return Err(FirmwareError::NoTemplate { path });
            }
            None => (initial.bytes, None),
        };
        let size = (code.len() + variables.len()) as u64;
        if size > FLASH_SIZE {
            return Err(FirmwareError::TooLarge { path, size });
        }
        Ok(Self {
            path,
            code,
            is_bios: false,
            variables,
            store,
        })
    }

    /// The code, and where it is in guest memory: up to 4 GiB.
    #[must_use]
    pub fn code(&self) -> (u64, &[u8]) {
        (FLASH_END - self.code.len() as u64, &self.code)
    }

    /// Whether it is a BIOS, which has no variables and starts no kernel.
    #[must_use]
    pub fn is_bios(&self) -> bool {
        self.is_bios
    }

    /// What of it is in memory below 1 MiB at power-on, where a BIOS runs, and where that is: its end.
    #[must_use]
    pub fn low_copy(&self) -> Option<(u64, &[u8])> {
        let start = self.code.len().saturating_sub(LOW_COPY);
        let copy = self.code.get(start..).filter(|_| self.is_bios)?;
        Some((LOW_END - copy.len() as u64, copy))
    }

    /// What the variables' chip holds when the VM starts, and where it is: just below the code.
    #[must_use]
    pub fn variables(&self) -> (u64, &[u8]) {
        let end = self.code().0;
        (end - self.variables.len() as u64, &self.variables)
    }

    /// Where variables are kept; `None` where they last as long as the VM.
    #[must_use]
    pub fn store(&self) -> Option<Arc<dyn crate::devices::pflash::Backing>> {
        self.store
            .clone()
            .map(|store| store as Arc<dyn crate::devices::pflash::Backing>)
    }
}

/// What a variable store that nothing was written to holds.
#[derive(Debug, Default)]
struct Initial {
    /// The file that it is from.
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Initial {
    fn of(path: &Path, bytes: Vec<u8>) -> Self {
        Self {
            path: path.to_owned(),
            bytes,
        }
    }

    /// The template at `path`.
    fn read(path: &Path) -> Result<Self, FirmwareError> {
        let image = Image::read(path)?;
        image.check_variables()?;
        Ok(Self::of(path, image.into_bytes()))
    }
}

#[cfg(test)]
mod tests;
