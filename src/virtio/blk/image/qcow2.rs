//! An image in QEMU's copy-on-write format, by the crate `imago`.
//!
//! An image is read as qcow2 only where whoever configures the VM says that it is: what a guest writes to
//! a raw image never makes it one, for a header can name files of the host's. Of an image that is, such names
//! are followed only where that is asked for, and then to be read only; each has to say its format, there
//! are [`MOST_BACKING`] at most, and an external data file is refused.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::error::ImageError;
use super::open::{ImageMode, open_raw};
use crate::virtio::segments::Segments;

/// Most backing files below one another.
pub(super) const MOST_BACKING: usize = 8;

/// An open qcow2 image, which any thread may use: its metadata change under one order, `imago`'s.
#[derive(Debug)]
pub(super) struct Qcow2Image {
    /// What gives clusters back excludes everything else.
    access: RwLock<FormatAccess<File>>,
}

impl Qcow2Image {
    /// Opens the image in `file`, which is locked, with what it lies on.
    pub(super) fn open(file: fs::File, path: &Path, mode: ImageMode) -> Result<Self, ImageError> {
        let access = open_layer(file, path, mode, 0)?;
        Ok(Self {
            access: RwLock::new(access),
        })
    }

    /// Bytes of the guest's disk.
    pub(super) fn size(&self) -> u64 {
        self.shared(FormatAccess::size)
    }

    fn shared<T>(&self, call: impl FnOnce(&FormatAccess<File>) -> T) -> T {
        call(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn alone<T>(&self, call: impl FnOnce(&mut FormatAccess<File>) -> T) -> T {
        call(&mut self.access.write().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn read(&self, data: &Segments<'_>, start: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVectorMut::from_volatile_slice(data.slices());
        self.shared(|access| access.readv(buffers, start))
    }

    pub(super) fn write(&self, data: &Segments<'_>, start: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVector::from_volatile_slice(data.slices());
        self.shared(|access| access.writev(buffers, start))
    }

    /// Makes what has been written last, the tables that say where it is first of all.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.shared(|access| {
            access.flush()?;
            access.sync()
        })
    }

    /// Gives up what a range holds. Where the format has no way to, all stays as it is.
    pub(super) fn discard(&self, start: u64, len: u64) -> io::Result<()> {
        match self.alone(|access| access.discard_to_any(start, len)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    pub(super) fn zero(&self, start: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            self.alone(|access| access.discard_to_zero(start, len))
        } else {
            self.shared(|access| access.write_zeroes(start, len))
        }
    }
}

/// Opens the image in `file`, `depth` layers below the guest's.
fn open_layer(
    file: fs::File,
    path: &Path,
    mode: ImageMode,
    depth: usize,
) -> Result<FormatAccess<File>, ImageError> {
    let failed = |source| ImageError::Qcow2 {
        path: path.to_owned(),
        source,
    };
    let options = StorageOpenOptions::new()
        .filename(path)
        .write(!mode.readonly)
        .direct(mode.direct);
    let storage = File::from_open_file(file, options).map_err(failed)?;
    let mut image = Qcow2::<File>::builder(storage)
        .write(!mode.readonly)
        .backing(None)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())
        .map_err(failed)?;
    if image.requires_external_data_file() {
        return Err(ImageError::DataFile {
            path: path.to_owned(),
        });
    }
    if let Some(name) = image.implicit_backing_file() {
        let format = image.implicit_backing_format().cloned();
        let backing = beside(path, name);
        if !mode.backing_files {
            return Err(ImageError::Backing {
                path: path.to_owned(),
                backing,
            });
        }
        let access = open_backing(path, backing, format.as_deref(), mode, depth + 1)?;
        image.set_backing(Some(access));
    }
    Ok(FormatAccess::new(image))
}

/// Opens what `above` lies on, to be read only.
fn open_backing(
    above: &Path,
    path: PathBuf,
    format: Option<&str>,
    mode: ImageMode,
    depth: usize,
) -> Result<FormatAccess<File>, ImageError> {
    if depth > MOST_BACKING {
        return Err(ImageError::Depth {
            path: above.to_owned(),
        });
    }
    let mode = ImageMode {
        readonly: true,
        fd: None,
        ..mode
    };
    let (file, _is_device) = open_raw(&path, mode)?;
    log::info!("{} lies on {}", above.display(), path.display());
    match format {
        Some("qcow2") => open_layer(file, &path, mode, depth),
        Some("raw") => {
            let failed = |source| ImageError::Qcow2 {
                path: path.clone(),
                source,
            };
            let options = StorageOpenOptions::new()
                .filename(&path)
                .direct(mode.direct);
            let storage = File::from_open_file(file, options).map_err(failed)?;
            let raw = Raw::builder(storage)
                .open(DenyImplicitOpenGate::default())
                .map_err(failed)?;
            Ok(FormatAccess::new(raw))
        }
        other => Err(ImageError::BackingFormat {
            path: above.to_owned(),
            backing: path.clone(),
            format: other.unwrap_or("none").to_owned(),
        }),
    }
}

/// Where a name in the image at `path` leads: names count from the image's folder.
pub(super) fn beside(path: &Path, name: &str) -> PathBuf {
    let name = Path::new(name.strip_prefix("file:").unwrap_or(name));
    path.parent().unwrap_or(Path::new("")).join(name)
}
