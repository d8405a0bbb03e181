//! One change to the host at a time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::root::{self, SysRoot};
use crate::files::{self, OwnError};

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
    #[error("cannot take the lock {}: {source}\n  {}", path.display(), source.remedy(path))]
    File {
        /// The lock, or its folder.
        path: PathBuf,
        /// Why not.
        source: OwnError,
    },
    /// interrupted while another busway, process {holder}, is changing devices
    #[error("interrupted while another busway, process {holder}, is changing devices")]
    Interrupted {
        /// Its process id.
        holder: String,
    },
}

impl Lock {
    /// Takes the lock, waiting this long for its holder.
    pub(super) fn take(
        root: &SysRoot,
        stop: &dyn Fn() -> bool,
        patience: Duration,
    ) -> Result<Self, LockError> {
        let failed = |path: &Path, source: OwnError| LockError::File {
            path: path.to_owned(),
            source,
        };
        let folder = root::state(root);
        files::make_own_folder(&folder).map_err(|error| failed(&folder, error))?;
        let path = folder.join("lock");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file =
            files::open_own(&path, &mut options).map_err(|error| failed(&path, error))?;
        let deadline = Instant::now() + patience;
        let mut waits = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(source)) => return Err(failed(&path, source.into())),
                Err(TryLockError::WouldBlock) => {}
            }
            let holder = holder(root, &mut file);
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
        say(&mut file).map_err(|error| failed(&path, error.into()))?;
        Ok(Self { _file: file })
    }
}

/// The process that has the lock: by the kernel's list, else by what it has written down. One that has
/// just taken it may not have done so yet.
fn holder(root: &SysRoot, file: &mut File) -> String {
    let locks = fs::read_to_string(root.proc.join("locks")).unwrap_or_default();
    let listed = file.metadata().ok().and_then(|there| {
        let device = there.dev();
        let (major, minor) = (libc::major(device), libc::minor(device));
        holder_in(&locks, &format!("{major:02x}:{minor:02x}:{}", there.ino()))
    });
    listed.unwrap_or_else(|| {
        let mut text = String::new();
        let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
        match read.map(|_| text.trim().parse::<u32>()) {
            Ok(Ok(pid)) => pid.to_string(),
            _ => "unknown".to_owned(),
        }
    })
}

/// The process that holds the flock(2) of this file (device and inode). A line for one that only waits
/// begins `1: ->`. proc_locks(5)
fn holder_in(locks: &str, file: &str) -> Option<String> {
    let holds = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, _, pid, its, ..] if its == file => {
                Some(pid.parse::<u32>().ok()?.to_string())
            }
            _ => None,
        }
    };
    locks.lines().find_map(holds)
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
    fn the_kernel_says_who_has_it() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:19:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 42 00:19:78 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 43 00:19:77 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 44 00:19:77 0 EOF\n";
        assert_eq!(holder_in(locks, "00:19:77").as_deref(), Some("43"));
        assert_eq!(holder_in(locks, "00:19:79"), None);
    }

    #[test]
    fn what_the_lock_says_of_its_holder_is_a_number_or_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        let mut file = tempfile::tempfile().unwrap();
        for (text, says) in [
            ("4711\n", "4711"),
            ("", "unknown"),
            ("1; rm -r /", "unknown"),
        ] {
            file.set_len(0).unwrap();
            file.rewind().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(holder(&root, &mut file), says);
        }
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
