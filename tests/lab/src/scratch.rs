//! A host's scratch folder: disk images, sockets, logs and the shared folder.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

/// A folder under the cache's `run`, removed when dropped. Its owner holds a lock on a file in it,
/// so that what a killed process left behind is known for what it is.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    _lock: File,
}

const LOCK: &str = "lock";

impl Scratch {
    /// Makes a new folder, and removes those whose owner is gone.
    pub(crate) fn new(cache: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let all = cache.join("run");
        fs::create_dir_all(&all).with_context(|| format!("cannot make {}", all.display()))?;
        // Between a folder's making and its lock's taking, nobody may sweep.
        let sweeping = File::create(all.join(LOCK))?;
        sweeping.lock()?;
        sweep(&all)?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = all.join(format!("{}-{number}", process::id()));
        fs::create_dir(&path)?;
        let lock = File::create(path.join(LOCK))?;
        lock.lock()?;
        Ok(Self { path, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn sweep(all: &Path) -> Result<()> {
    for entry in fs::read_dir(all)? {
        let path = entry?.path();
        let Ok(lock) = File::open(path.join(LOCK)) else {
            continue;
        };
        match lock.try_lock() {
            Ok(()) => fs::remove_dir_all(&path)?,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next one's sweep.
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_owners_folder_is_swept_and_a_living_ones_is_not() {
        let cache = std::env::temp_dir().join(format!("busway-lab-scratch-{}", process::id()));
        let dead = cache.join("run/dead");
        fs::create_dir_all(&dead).unwrap();
        File::create(dead.join(LOCK)).unwrap();
        let first = Scratch::new(&cache).unwrap();
        assert!(!dead.exists());
        let second = Scratch::new(&cache).unwrap();
        assert!(first.path().exists());
        drop((first, second));
        fs::remove_dir_all(&cache).unwrap();
    }
}
