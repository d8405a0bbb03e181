//! An image in QEMU's copy-on-write format, by the crate `imago`.
//!
//! An image is read as qcow2 only where whoever configures the VM says that it is: what a guest writes to
//! a raw image never makes it one, for a header can name files of the host's. Of an image that is, such names
//! are followed only where that is asked for, and then to be read only; each has to say its format, there
//! are [`MOST_BACKING`] at most, and an external data file is refused.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};

use super::error::ImageError;
use super::open::{ImageMode, open_raw};
use super::ordered::{MakeLast, Order, Part, parts};
use super::retry;
use crate::virtio::segments::Segments;

/// Most backing files below one another.
pub(super) const MOST_BACKING: usize = 8;

/// An open qcow2 image, which any thread may use: its metadata change under one order, `imago`'s.
#[derive(Debug)]
pub(super) struct Qcow2Image<S: Storage + 'static = File> {
    /// What gives clusters back excludes everything else.
    layer: RwLock<Layer<S>>,
    order: Arc<Order<S>>,
    /// One flush at a time. Taken before the layer.
    flushing: Mutex<()>,
}

/// An image with what it lies on.
#[derive(Debug)]
struct Layer<S: Storage + 'static> {
    access: FormatAccess<Part<S>>,
    /// Clusters have been given back, and tables that were made last still name them.
    has_freed: bool,
}

impl Qcow2Image {
    /// Opens the image in `file`, which is locked, with what it lies on.
    pub(super) fn open(file: fs::File, path: &Path, mode: ImageMode) -> Result<Self, ImageError> {
        let (access, order) = open_layer(file, path, mode, 0)?;
        Ok(Self::new(access, order))
    }
}

impl<S: Storage> Qcow2Image<S> {
    pub(super) fn new(access: FormatAccess<Part<S>>, order: Arc<Order<S>>) -> Self {
        Self {
            layer: RwLock::new(Layer {
                access,
                has_freed: false,
            }),
            order,
            flushing: Mutex::new(()),
        }
    }

    /// Bytes of the guest's disk.
    pub(super) fn size(&self) -> u64 {
        self.shared().access.size()
    }

    fn shared(&self) -> RwLockReadGuard<'_, Layer<S>> {
        self.layer.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Layer<S>> {
        self.layer.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `call` write, which may allocate clusters: none that has been given back while a table that was made last
    /// names it.
    fn allocate(
        &self,
        call: impl FnOnce(&FormatAccess<Part<S>>) -> io::Result<()>,
    ) -> io::Result<()> {
        let layer = self.shared();
        if !layer.has_freed {
            return call(&layer.access);
        }
        drop(layer);
        let flushing = self.flush_alone();
        let mut layer = self.alone();
        self.settle_freed(&mut layer, &flushing)?;
        call(&layer.access)
    }

    /// Has no table name what has been given back, wherever the host crashes.
    fn settle_freed(&self, layer: &mut Layer<S>, _flushing: &MutexGuard<'_, ()>) -> io::Result<()> {
        if layer.has_freed {
            self.order.flush(|| layer.access.flush())?;
            self.order.sync()?;
            layer.has_freed = false;
        }
        Ok(())
    }

    fn flush_alone(&self) -> MutexGuard<'_, ()> {
        self.flushing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(&self, data: &Segments<'_>, start: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVectorMut::from_volatile_slice(data.slices());
        self.shared().access.readv(buffers, start)
    }

    pub(super) fn write(&self, data: &Segments<'_>, start: u64) -> io::Result<()> {
        let (buffers, _guard) = IoVector::from_volatile_slice(data.slices());
        self.allocate(|access| access.writev(buffers, start))
    }

    /// Makes what has been written last, the tables that say where it is too.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.write_tables()?;
        self.order.sync()
    }

    /// Writes the tables that are in memory only, so that the image has all that was written to it.
    pub(super) fn write_tables(&self) -> io::Result<()> {
        let _alone = self.flush_alone();
        self.order.flush(|| self.shared().access.flush())
    }

    /// Gives up what a range holds. Where the format has no way to, all stays as it is.
    pub(super) fn discard(&self, start: u64, len: u64) -> io::Result<()> {
        match self.free(start, len, FormatAccess::discard_to_any) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    pub(super) fn zero(&self, start: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        if may_unmap {
            self.free(start, len, FormatAccess::discard_to_zero)
        } else {
            self.allocate(|access| access.write_zeroes(start, len))
        }
    }

    /// Has `call` give back the clusters of one L2 table after the other: it may have to allocate such a table before.
    fn free(
        &self,
        start: u64,
        len: u64,
        call: impl Fn(&mut FormatAccess<Part<S>>, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = start.saturating_add(len);
        let mut at = start;
        while at < end {
            let (table_end, has_table) = self.order.l2_of(at);
            let next = table_end.min(end);
            let flushing = (!has_table).then(|| self.flush_alone());
            let mut layer = self.alone();
            if let Some(flushing) = &flushing {
                self.settle_freed(&mut layer, flushing)?;
            }
            // A table that has just been made names nothing that could be given back. Another thread may have made it since.
            layer.has_freed |= self.order.l2_of(at).1;
            call(&mut layer.access, at, next - at)?;
            at = next;
        }
        Ok(())
    }
}

/// Whoever has it last is not to write: the tables that `imago` has in memory are lost where
/// [`write_tables`](Qcow2Image::write_tables) was not called.
impl<S: Storage> Drop for Qcow2Image<S> {
    fn drop(&mut self) {
        self.order.end();
    }
}

/// What an image is to whoever uses it, and the order of the writes to its file.
type InOrder<I, S> = (I, Arc<Order<S>>);

/// Opens an image without what it lies on.
pub(super) fn open_image<S: Storage + 'static>(
    file: S,
    make_last: MakeLast,
    writable: bool,
) -> io::Result<InOrder<Qcow2<Part<S>>, S>> {
    let (order, [tables, data]) = parts(file, make_last);
    let mut image = Qcow2::<Part<S>>::builder(tables)
        .write(writable)
        .backing(None)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    if !image.requires_external_data_file() {
        image.set_data_file(Some(data));
    }
    order.look()?;
    Ok((image, order))
}

/// Opens the image in `file`, `depth` layers below the guest's.
fn open_layer(
    file: fs::File,
    path: &Path,
    mode: ImageMode,
    depth: usize,
) -> Result<InOrder<FormatAccess<Part<File>>, File>, ImageError> {
    let failed = |source| ImageError::Qcow2 {
        path: path.to_owned(),
        source,
    };
    let options = StorageOpenOptions::new()
        .filename(path)
        .write(!mode.readonly)
        .direct(mode.direct);
    let synced = file.try_clone().map_err(failed)?;
    let make_last = Box::new(move || retry(|| synced.sync_data()));
    let storage = File::from_open_file(file, options).map_err(failed)?;
    let (mut image, order) = open_image(storage, make_last, !mode.readonly).map_err(failed)?;
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
    Ok((FormatAccess::new(image), order))
}

/// Opens what `above` lies on, to be read only.
fn open_backing(
    above: &Path,
    path: PathBuf,
    format: Option<&str>,
    mode: ImageMode,
    depth: usize,
) -> Result<FormatAccess<Part<File>>, ImageError> {
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
        Some("qcow2") => open_layer(file, &path, mode, depth).map(|(access, _order)| access),
        Some("raw") => {
            let failed = |source| ImageError::Qcow2 {
                path: path.clone(),
                source,
            };
            let options = StorageOpenOptions::new()
                .filename(&path)
                .direct(mode.direct);
            let storage = File::from_open_file(file, options).map_err(failed)?;
            let (_order, [_tables, data]) = parts(storage, Box::new(|| Ok(())));
            let raw = Raw::builder(data)
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
