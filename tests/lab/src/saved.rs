//! States of hosts that have booted: a host that is started from one is there in a second, and as it was each time.
//!
//! A state is kept for what it was made of (the parts and QEMU's command line) and for as long as this machine is up: the
//! time-stamp counter goes on in it at this machine's pace.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::config::{Accelerator, HostConfig};
use crate::machine;
use crate::parts::Parts;
use crate::tsc;
use crate::zoo;

/// The file with the state of such a host, which `make` writes where there is none.
pub(crate) fn state(
    parts: &Parts,
    config: &HostConfig,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let folder = parts.cache.join("states");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let machine = machine::arguments(config, parts, Accelerator::Tcg)?;
    let [fixed, _] = zoo::plans(&config.devices, Path::new("/"));
    // The clock's pace is measured anew in each process, and differs a little.
    let pace = tsc::khz().to_string();
    let mut hash = Sha256::new();
    for word in machine.iter().chain(&fixed.words).chain(&fixed.devices) {
        hash.update(word.replace(&pace, ""));
        hash.update([0]);
    }
    hash.update(parts.root.as_os_str().as_encoded_bytes());
    let digits: String = hash.finalize()[..6]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let name = format!("{digits}-{}", boot.trim());
    let path = folder.join(&name);
    // One process makes it, and others that want it wait.
    let lock = File::create(folder.join(format!("{digits}.lock")))?;
    lock.lock()?;
    if !path.exists() {
        sweep(&folder, boot.trim())?;
        let partial = folder.join(format!("{name}.partial"));
        make(&partial).context("making a host's saved state")?;
        fs::rename(&partial, &path)?;
    }
    Ok(path)
}

/// Removes the states of earlier times that this machine was up.
fn sweep(folder: &Path, boot: &str) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !name.ends_with(".lock") && !name.contains(boot) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
