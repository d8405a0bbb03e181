//! The file that a VM's variables are kept in: made from the template where it is not there, locked for as
//! long as the VM runs, and written whenever the guest sets a variable.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use super::Initial;
use super::error::FirmwareError;
use super::image::check_variables;
use crate::devices::pflash::Backing;
use crate::sandbox::{self, Kind};
use crate::virtio::blk::lock::{ImageLockError, lock};

/// The most bytes that are read of a file that is to be a store.
const LARGEST: u64 = 16 << 20;

/// An opened and locked store. The lock ends with it.
#[derive(Debug)]
pub(super) struct Store {
    file: File,
    path: PathBuf,
    /// Wakes the thread that has the disk take what was written, so that no vCPU waits for that.
    sync: Option<Sync>,
}

/// The thread, and the way to wake it. It has the file open, so it ends with the store.
#[derive(Debug)]
struct Sync {
    ask: SyncSender<()>,
    thread: JoinHandle<()>,
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(Sync { ask, thread }) = self.sync.take() {
            drop(ask);
            let _panicked = thread.join();
        }
    }
}

impl Store {
    /// Opens the store at `vars` for the firmware at `path`, whose code has `code` bytes, and gives what it
    /// holds. Where it is not there, it is made from what is `initial`.
    pub(super) fn open(
        vars: &Path,
        initial: &Initial,
        path: &Path,
        code: u64,
    ) -> Result<(Vec<u8>, Self), FirmwareError> {
        let failed = |what| {
            move |source| FirmwareError::Store {
                vars: vars.to_owned(),
                what,
                source,
            }
        };
        match fs::metadata(vars) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if initial.bytes.is_empty() {
                    return Err(FirmwareError::NoStore {
                        vars: vars.to_owned(),
                        path: path.to_owned(),
                    });
                }
                make(vars, &initial.bytes).map_err(failed("it cannot be made"))?;
                log::info!(
                    "firmware variables are kept in {}, made from {}",
                    vars.display(),
                    initial.path.display()
                );
            }
            // Asked before opening: opening a FIFO would wait for its writer.
            Ok(metadata) if !metadata.is_file() => {
                return Err(FirmwareError::NotVariables {
                    vars: vars.to_owned(),
                    why: "it is no regular file".to_owned(),
                });
            }
            Ok(metadata) if metadata.len() > LARGEST => {
                return Err(FirmwareError::NotVariables {
                    vars: vars.to_owned(),
                    why: format!("it has {} bytes", metadata.len()),
                });
            }
            Ok(_) => {}
            Err(source) => return Err(failed("it cannot be looked at")(source)),
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(vars)
            .map_err(failed("it cannot be opened to be written"))?;
        lock(&file, false).map_err(|error| match error {
            ImageLockError::Held(holder) => FirmwareError::Locked {
                vars: vars.to_owned(),
                holder,
            },
            ImageLockError::Kernel(source) => failed("it cannot be locked")(source),
        })?;
        let size = file
            .metadata()
            .map_err(failed("it cannot be looked at"))?
            .len();
        let mut bytes = vec![0; usize::try_from(size.min(LARGEST)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)
            .map_err(failed("it cannot be read"))?;
        check_variables(vars, &bytes)?;
        check_pair(vars, size, initial, path, code)?;
        let mut store = Self {
            file,
            path: vars.to_owned(),
            sync: None,
        };
        store.sync = store.start_syncing();
        Ok((bytes, store))
    }

    /// A thread that has the disk take what was written, until the store is dropped.
    fn start_syncing(&self) -> Option<Sync> {
        let file = self.file.try_clone().ok()?;
        let path = self.path.clone();
        let (ask, asked) = sync_channel(1);
        let sync = move || {
            sandbox::enter(Kind::Variables);
            while asked.recv().is_ok() {
                if let Err(error) = file.sync_data() {
                    log::warn!("{}: {error}", path.display());
                }
            }
        };
        let thread = thread::Builder::new().name("variables".to_owned());
        let thread = thread.spawn(sync).ok()?;
        Some(Sync { ask, thread })
    }
}

impl Backing for Store {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn sync(&self) {
        match self.sync.as_ref().map(|sync| sync.ask.try_send(())) {
            // One that waits does this one's work, too.
            Some(Ok(()) | Err(TrySendError::Full(()))) => {}
            Some(Err(TrySendError::Disconnected(()))) | None => {
                log::debug!("{}: written, and left to the kernel", self.path.display());
            }
        }
    }
}

/// Makes a store whole or not at all: another file is written first, and gets its name when it is complete.
fn make(vars: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = vars.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", crate::sandbox::process_id()));
    let beside = vars.with_file_name(name);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    let written = file
        .write_all_at(bytes, 0)
        .and_then(|()| file.sync_all())
        // Not over one that somebody else has made meanwhile.
        .and_then(|()| fs::hard_link(&beside, vars));
    let removed = fs::remove_file(&beside);
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => removed,
        written => written.and(removed),
    }
}

/// That store and firmware were made for each other: a store is as large as the template, or, where there is
/// none, both together have a size that flash chips have, a power of two.
fn check_pair(
    vars: &Path,
    size: u64,
    initial: &Initial,
    path: &Path,
    code: u64,
) -> Result<(), FirmwareError> {
    let template = initial.bytes.len() as u64;
    let whole = code.saturating_add(size);
    let expected = match template {
        0 if whole.is_power_of_two() => return Ok(()),
        0 => whole.next_power_of_two().saturating_sub(code).to_string(),
        _ if template == size => return Ok(()),
        _ => template.to_string(),
    };
    Err(FirmwareError::Mismatch {
        vars: vars.to_owned(),
        size,
        path: path.to_owned(),
        expected,
    })
}
