//! One change to the host at a time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::root::SysRoot;

/// How long somebody else's change is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// The same for a rule of udev's, which gives a program three minutes.
pub(super) const BOOT: Duration = Duration::from_secs(120);
/// How often it is looked whether that is over. A lock that is waited for in the kernel could
/// neither run out nor be interrupted by name.
const INTERVAL: Duration = Duration::from_millis(20);

/// The right to change the host. It ends with this, or with the process.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

/// The host is being changed by somebody else, or may not be changed.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// another busway, process {holder}, is changing devices
    #[error(
        "another busway, process {holder}, is changing devices, and was not done in {} s\n  \
         see what it waits for: ps -fp {holder}",
        patience.as_secs()
    )]
    Held {
        /// Its process id.
        holder: String,
        /// How long it was waited for.
        patience: Duration,
    },
    /// cannot take the lock {path}: {source}
    #[error("cannot take the lock {}: {source}\n  {}", path.display(), remedy(.source))]
    File {
        /// The lock.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// interrupted while another busway, process {holder}, is changing devices
    #[error("interrupted while another busway, process {holder}, is changing devices")]
    Interrupted {
        /// Its process id.
        holder: String,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "only root may change devices: run it with sudo",
        _ => "the lock keeps two changes apart: see that its folder can be written",
    }
}

impl Lock {
    /// Takes the lock, waiting this long for its holder.
    pub(super) fn take(
        root: &SysRoot,
        stop: &dyn Fn() -> bool,
        patience: Duration,
    ) -> Result<Self, LockError> {
        let path = root.state().join("lock");
        let failed = |source| LockError::File {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(root.state()).map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let deadline = Instant::now() + patience;
        let mut waits = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Err(TryLockError::WouldBlock) => {}
            }
            let mut holder = String::new();
            // One that has just taken it may not have said yet who it is.
            let read = file
                .rewind()
                .and_then(|()| file.read_to_string(&mut holder));
            let holder = match read {
                Ok(_) if !holder.trim().is_empty() => holder.trim().to_owned(),
                _ => "unknown".to_owned(),
            };
            if stop() {
                return Err(LockError::Interrupted { holder });
            }
            if Instant::now() >= deadline {
                return Err(LockError::Held { holder, patience });
            }
            if !waits {
                log::warn!("waiting for another busway, process {holder}, to finish its change");
                waits = true;
            }
            thread::sleep(INTERVAL);
        }
        let say = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        say(&mut file).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_a_little_and_names_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        let go_on = || false;
        let first = Lock::take(&root, &go_on, PATIENCE).unwrap();
        let wait = Duration::from_millis(50);
        let error = Lock::take(&root, &go_on, wait).unwrap_err();
        let own = std::process::id();
        assert!(
            error.to_string().contains(&format!("process {own},")),
            "{error}"
        );
        let interrupted = Lock::take(&root, &|| true, PATIENCE).unwrap_err();
        assert!(matches!(interrupted, LockError::Interrupted { .. }));
        drop(first);
        Lock::take(&root, &go_on, Duration::ZERO).unwrap();
    }

    #[test]
    fn who_waits_goes_on_when_the_first_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        let first = Lock::take(&root, &|| false, PATIENCE).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| Lock::take(&root, &|| false, PATIENCE));
            drop(first);
            second.join().unwrap().unwrap();
        });
    }
}
