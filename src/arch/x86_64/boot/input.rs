//! What is put into the guest's memory: files, which stay open for a guest's reset, and the command line.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::error::BootError;
use super::low_memory::CMDLINE;

/// A kernel, perhaps an initramfs, and the command line.
#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) kernel: Input,
    pub(super) initramfs: Option<Input>,
    pub(super) cmdline: String,
}

impl Inputs {
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

/// A file that goes into guest memory.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) what: &'static str,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) file: File,
}

impl Input {
    /// Opens a regular file; nothing is read.
    ///
    /// # Errors
    /// [`BootError::Open`] or [`BootError::NotAFile`]
    pub(super) fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
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
