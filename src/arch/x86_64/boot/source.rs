//! What the guest boots: open files, looked at once and kept open for a guest's reset.

use std::path::Path;

use super::bzimage::SetupHeader;
use super::elf::PvhElf;
use super::error::BootError;
use super::identify;
use super::input::{Input, Inputs};
use crate::config::ConsoleConfig;
use crate::firmware::Kernel;

/// A kernel, perhaps an initramfs, and the command line.
#[derive(Debug)]
pub struct BootSource {
    inputs: Inputs,
    format: Format,
}

/// What kind of kernel it is.
#[derive(Debug)]
pub(super) enum Format {
    BzImage(Box<SetupHeader>),
    Elf(PvhElf),
}

impl BootSource {
    /// Opens the files and finds out what kind of kernel it is; nothing is loaded.
    ///
    /// # Errors
    /// [`BootError`]: a file is missing, is no kernel, or is not for this kind of machine.
    pub fn open(kernel: &Path, initramfs: Option<&Path>, cmdline: &str) -> Result<Self, BootError> {
        if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
            return Err(BootError::CommandLineZero { at });
        }
        let kernel = Input::open("kernel", kernel)?;
        let format = if let Some(header) = SetupHeader::read(&kernel)? {
            Format::BzImage(Box::new(header))
        } else if let Some(elf) = PvhElf::read(&kernel)? {
            Format::Elf(elf)
        } else {
            return Err(identify::no_kernel(&kernel));
        };
        let initramfs = initramfs.map(|path| Input::open("initramfs", path));
        let inputs = Inputs {
            kernel,
            initramfs: initramfs.transpose()?,
            cmdline: cmdline.to_owned(),
        };
        Ok(Self { inputs, format })
    }

    /// The same for firmware, which starts the kernel by its EFI stub: a bzImage that is a PE file as well.
    ///
    /// # Errors
    /// Why firmware cannot start it.
    pub fn for_firmware(self) -> Result<Kernel, &'static str> {
        let Format::BzImage(header) = &self.format else {
            return Err("it is an ELF file");
        };
        let Inputs {
            kernel,
            initramfs,
            cmdline,
        } = self.inputs;
        let mut magic = [0; 2];
        let read = kernel.read_at(&mut magic, 0).unwrap_or(0);
        if read < magic.len() || magic != *b"MZ" {
            return Err("it has no EFI stub");
        }
        Ok(Kernel {
            setup: header.payload(),
            image: kernel.file,
            size: kernel.size,
            initramfs: initramfs.map(|input| (input.file, input.size)),
            cmdline,
        })
    }

    pub(super) fn format(&self) -> &Format {
        &self.format
    }

    pub(super) fn inputs(&self) -> &Inputs {
        &self.inputs
    }
}

/// The command line for a guest that was given none: it puts the guest's console where somebody
/// listens, or else where there is a device, and says nothing else. The serial port goes first, for
/// every kernel has its driver.
#[must_use]
pub fn default_cmdline(serial: &ConsoleConfig, console: &ConsoleConfig) -> &'static str {
    use ConsoleConfig::{Null, Off};
    match (serial, console) {
        (Off, Off) => "",
        (Null, Off | Null) => "console=ttyS0",
        (Off | Null, _) => "console=hvc0",
        _ => "console=ttyS0",
    }
}
