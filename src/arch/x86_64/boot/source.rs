//! What the guest boots: open files, looked at once and kept open for a guest's reset.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::bzimage::SetupHeader;
use super::elf::PvhElf;
use super::error::BootError;
use super::identify;
use super::layout::CMDLINE;
use crate::config::ConsoleConfig;
use crate::firmware::Kernel;

/// A kernel, perhaps an initramfs, and the command line.
#[derive(Debug)]
pub struct BootSource {
    pub(super) kernel: Input,
    format: Format,
    pub(super) initramfs: Option<Input>,
    cmdline: String,
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
        Ok(Self {
            kernel,
            format,
            initramfs: initramfs
                .map(|path| Input::open("initramfs", path))
                .transpose()?,
            cmdline: cmdline.to_owned(),
        })
    }

    /// The same for firmware, which starts the kernel by its EFI stub: a bzImage that is a PE file as well.
    ///
    /// # Errors
    /// Why firmware cannot start it.
    pub fn for_firmware(self) -> Result<Kernel, &'static str> {
        let Format::BzImage(header) = &self.format else {
            return Err("it is an ELF file");
        };
        let mut magic = [0; 2];
        let read = self.kernel.read_at(&mut magic, 0).unwrap_or(0);
        if read < magic.len() || magic != *b"MZ" {
            return Err("it has no EFI stub");
        }
        Ok(Kernel {
            setup: header.payload(),
            image: self.kernel.file,
            size: self.kernel.size,
            initramfs: self.initramfs.map(|input| (input.file, input.size)),
            cmdline: self.cmdline,
        })
    }

    pub(super) fn format(&self) -> &Format {
        &self.format
    }

    /// Writes the command line with its terminating zero; `max` is without it.
    pub(super) fn write_cmdline(&self, ram: &impl GuestMemory, max: u64) -> Result<(), BootError> {
        let length = self.cmdline.len();
        if length as u64 > max {
            return Err(BootError::CommandLineTooLong { length, max });
        }
        let write = |bytes: &[u8], address| {
            ram.write_slice(bytes, GuestAddress(address))
                .map_err(|source| BootError::Memory {
                    what: "the command line",
                    address,
                    source,
                })
        };
        write(self.cmdline.as_bytes(), CMDLINE)?;
        write(&[0], CMDLINE + length as u64)
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

/// A file that goes into guest memory.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) what: &'static str,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    file: File,
}

impl Input {
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let failed = |source| BootError::Open {
            what,
            path: path.to_owned(),
            source,
        };
        let metadata = path.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() {
            // Asked before opening: opening a FIFO would wait for its writer.
            return Err(BootError::NotAFile {
                what,
                path: path.to_owned(),
                found: if kind.is_dir() {
                    "a folder"
                } else {
                    "a special file"
                },
            });
        }
        let file = File::open(path).map_err(failed)?;
        Ok(Self {
            what,
            path: path.to_owned(),
            size: metadata.len(),
            file,
        })
    }

    /// Reads up to `buffer.len()` bytes from `offset`; fewer only at the end of the file.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, BootError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.unreadable(error)),
            }
        }
        Ok(done)
    }

    /// Reads `length` bytes from `offset` straight into guest memory at `address`.
    pub(super) fn read_into(
        &self,
        ram: &impl GuestMemory,
        address: u64,
        offset: u64,
        length: u64,
    ) -> Result<(), BootError> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))
            .map_err(|error| self.unreadable(error))?;
        let mut done = 0;
        while done < length {
            // A read of more than 2 GiB comes back short in any case; see read(2).
            let chunk = (length - done).min(1 << 30) as usize;
            let at = address.saturating_add(done);
            match ram.read_volatile_from(GuestAddress(at), &mut file, chunk) {
                Ok(0) => return Err(self.unreadable(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count as u64,
                Err(GuestMemoryError::IOError(error))
                    if error.kind() == io::ErrorKind::Interrupted => {}
                Err(GuestMemoryError::IOError(error)) => return Err(self.unreadable(error)),
                Err(source) => {
                    return Err(BootError::Memory {
                        what: self.what,
                        address: at,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    pub(super) fn damaged(&self, why: impl Into<String>) -> BootError {
        BootError::Damaged {
            path: self.path.clone(),
            why: why.into(),
        }
    }

    fn unreadable(&self, source: io::Error) -> BootError {
        BootError::Read {
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }
}
