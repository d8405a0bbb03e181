//! A disk's image: a file or a block device of the host, raw or in a format, opened, locked, measured, read
//! and written.

mod bounce;
mod chain;
#[cfg(test)]
mod crash_tests;
mod error;
mod limits;
mod open;
mod ordered;
mod qcow2;
#[cfg(test)]
pub(super) mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::steps::{self, Stop};
use super::sys;
use crate::config::ImageType;
use crate::sandbox::{check_size, size_limit};
use crate::virtio::segments::Segments;
use bounce::Bounce;
pub(crate) use chain::backing_files;
pub use error::ImageError;
use limits::Limits;
pub(super) use open::ImageMode;
use open::open_raw;
use qcow2::Qcow2Image;

/// An opened and locked image. The lock ends with it.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    /// Who knows where in the file the guest's bytes are, where they are not as the guest has them.
    format: Option<Qcow2Image>,
    path: PathBuf,
    /// Bytes.
    capacity: AtomicU64,
    readonly: bool,
    is_device: bool,
    limits: Limits,
    /// Keeps each call of a thread waiting while it is closed.
    #[cfg(test)]
    pub(super) gate: super::gate::Gate,
}

impl Image {
    pub(super) fn open(path: &Path, mode: ImageMode) -> Result<Self, ImageError> {
        let (file, is_device) = open_raw(path, mode)?;
        let kernel = |what| {
            move |source| ImageError::Kernel {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let limits = if is_device {
            limits::of_device(&file, mode.direct).map_err(kernel("asking for the geometry"))?
        } else {
            limits::of_file(&file, path, mode.direct)?
        };
        let format = match mode.image_type {
            ImageType::Raw => {
                warn_of_formats(&file, path);
                None
            }
            ImageType::Qcow2 => {
                let file = file.try_clone().map_err(kernel("dup"))?;
                Some(Qcow2Image::open(file, path, mode)?)
            }
        };
        let limits = match format {
            // It takes memory and positions as they come.
            Some(_) => Limits {
                block_size: 512,
                memory_alignment: 1,
                discard_granularity: limits.discard_granularity.max(512),
                ..limits
            },
            None => limits,
        };
        let image = Self {
            file,
            format,
            path: path.to_owned(),
            capacity: AtomicU64::new(0),
            readonly: mode.readonly,
            is_device,
            limits,
            #[cfg(test)]
            gate: super::gate::Gate::default(),
        };
        image.measure()?;
        Ok(image)
    }

    /// Finds out how large it is now, and gives that: [`capacity`](Self::capacity) from now on.
    ///
    /// # Errors
    /// [`ImageError::Empty`] or [`ImageError::Kernel`]; the capacity then stays.
    pub(super) fn measure(&self) -> Result<u64, ImageError> {
        let kernel = |what| {
            move |source| ImageError::Kernel {
                what,
                path: self.path.clone(),
                source,
            }
        };
        let size = if let Some(format) = &self.format {
            format.size()
        } else if self.is_device {
            sys::device_size(&self.file).map_err(kernel("BLKGETSIZE64"))?
        } else {
            self.file.metadata().map_err(kernel("fstat"))?.len()
        };
        let block = u64::from(self.limits.block_size);
        let capacity = size - size % block;
        if capacity == 0 {
            return Err(ImageError::Empty {
                path: self.path.clone(),
                size,
                block: self.limits.block_size,
            });
        }
        if capacity != size {
            log::warn!(
                "{}: the last {} bytes do not fill a block of {block} and stay out of the guest's sight",
                self.path.display(),
                size - capacity
            );
        }
        if !self.readonly && !self.is_device {
            let what = format!("{}", self.path.display());
            if let Err(error) = check_size(&what, size, size_limit()) {
                log::warn!("{error}; a guest's writes beyond fail");
            }
        }
        self.capacity.store(capacity, Ordering::Release);
        Ok(capacity)
    }

    /// Bytes; a multiple of the block size.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    pub(super) fn readonly(&self) -> bool {
        self.readonly
    }

    /// The file that the guest's bytes lie in as the guest has them.
    pub(super) fn file(&self) -> Option<&File> {
        self.format.is_none().then_some(&self.file)
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Fills `data` from byte `start` on.
    ///
    /// # Errors
    /// The host's; and, as of all that takes `stop`, [`io::ErrorKind::Interrupted`] where it was left
    /// off for the device's end.
    pub(super) fn read(
        &self,
        mut data: Segments<'_>,
        start: u64,
        stop: Stop<'_>,
    ) -> io::Result<()> {
        if let Some(format) = &self.format {
            return format.read(&data, start);
        }
        let mut at = start;
        if !data.aligned(self.memory_alignment()) {
            return self.read_bounced(data, start, stop);
        }
        while !data.is_empty() {
            steps::go_on(stop)?;
            let done = retry(|| data.read_from(self.file.as_fd(), at))?;
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            data.advance(done);
            at = at.saturating_add(done as u64);
        }
        Ok(())
    }

    /// Stores `data` from byte `start` on.
    pub(super) fn write(
        &self,
        mut data: Segments<'_>,
        start: u64,
        stop: Stop<'_>,
    ) -> io::Result<()> {
        if let Some(format) = &self.format {
            return format.write(&data, start);
        }
        let mut at = start;
        if !data.aligned(self.memory_alignment()) {
            return self.write_bounced(data, start, stop);
        }
        while !data.is_empty() {
            steps::go_on(stop)?;
            let done = retry(|| data.write_to(self.file.as_fd(), at))?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            data.advance(done);
            at = at.saturating_add(done as u64);
        }
        Ok(())
    }

    /// Makes what has been written last.
    pub(super) fn flush(&self) -> io::Result<()> {
        match &self.format {
            Some(format) => format.flush(),
            None => retry(|| self.file.sync_data()),
        }
    }

    /// Whether there is something that [`write_tables`](Self::write_tables) may have to write.
    pub(super) fn has_tables(&self) -> bool {
        self.format.is_some() && !self.readonly
    }

    /// Writes what a format has in memory only: the file then has all that was written, if the host does not crash.
    pub(super) fn write_tables(&self) -> io::Result<()> {
        #[cfg(test)]
        self.gate.pass();
        match &self.format {
            Some(format) if !self.readonly => format.write_tables(),
            _ => Ok(()),
        }
    }

    /// Gives up what `start..start + len` holds.
    pub(super) fn discard(&self, start: u64, len: u64, stop: Stop<'_>) -> io::Result<()> {
        let granularity = u64::from(self.limits.discard_granularity.max(1));
        let step = steps::FREED.next_multiple_of(granularity);
        steps::each(start, len, step, stop, |start, len| {
            if let Some(format) = &self.format {
                return format.discard(start, len);
            }
            if self.is_device {
                return retry(|| sys::discard(&self.file, start, len));
            }
            match self.fallocate(true, start, len) {
                // A discard is advice: where the file system takes none, all stays as it is.
                Err(error) if unsupported(&error) => Ok(()),
                result => result,
            }
        })
    }

    /// Zeroes `start..start + len`, which may free it where `may_unmap`.
    pub(super) fn zero(
        &self,
        start: u64,
        len: u64,
        may_unmap: bool,
        stop: Stop<'_>,
    ) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        steps::go_on(stop)?;
        if let Some(format) = &self.format {
            return format.zero(start, len, may_unmap);
        }
        match self.fallocate(may_unmap, start, len) {
            Err(error) if unsupported(&error) => self.write_zeros(start, len, stop),
            result => result,
        }
    }

    /// Zeroes by the file system's or the block device's own means, and frees it where `unmap`.
    fn fallocate(&self, unmap: bool, start: u64, len: u64) -> io::Result<()> {
        let keep_size = true;
        retry(|| {
            let mode = if unmap {
                FallocateMode::PunchHole
            } else {
                FallocateMode::ZeroRange
            };
            Ok(fallocate(&self.file, mode, keep_size, start, len)?)
        })
    }

    pub(super) fn memory_alignment(&self) -> usize {
        self.limits.memory_alignment as usize
    }

    fn read_bounced(&self, mut data: Segments<'_>, start: u64, stop: Stop<'_>) -> io::Result<()> {
        let mut bounce = Bounce::new(self.memory_alignment());
        let mut at = start;
        while !data.is_empty() {
            steps::go_on(stop)?;
            let buffer = bounce.first(data.len());
            self.file.read_exact_at(buffer, at)?;
            at = at.saturating_add(data.write(buffer) as u64);
        }
        Ok(())
    }

    fn write_bounced(&self, mut data: Segments<'_>, start: u64, stop: Stop<'_>) -> io::Result<()> {
        let mut bounce = Bounce::new(self.memory_alignment());
        let mut at = start;
        while !data.is_empty() {
            steps::go_on(stop)?;
            let buffer = bounce.first(data.len());
            let count = data.read(buffer);
            self.file.write_all_at(buffer, at)?;
            at = at.saturating_add(count as u64);
        }
        Ok(())
    }

    fn write_zeros(&self, start: u64, len: u64, stop: Stop<'_>) -> io::Result<()> {
        let mut bounce = Bounce::new(self.memory_alignment());
        let mut done = 0;
        while done < len {
            steps::go_on(stop)?;
            let left = usize::try_from(len - done).unwrap_or(usize::MAX);
            let buffer = bounce.first(left);
            self.file.write_all_at(buffer, start.saturating_add(done))?;
            done = done.saturating_add(buffer.len() as u64);
        }
        Ok(())
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Says so where a raw image looks like one of another format, which the guest would see as it is.
fn warn_of_formats(file: &File, path: &Path) {
    let mut bounce = Bounce::new(4096);
    let start = bounce.first(4096);
    let formats: [(&[u8], &str); 3] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
    ];
    if file.read_at(start, 0).is_err() {
        return;
    }
    for (magic, name) in formats {
        if start.starts_with(magic) {
            log::warn!(
                "{} looks like {name}: it is given to the guest as a raw disk; give image_type=qcow2 if it is one and no guest has written that, or convert it with `qemu-img convert -O raw`",
                path.display()
            );
        }
    }
}
