//! Which calls of the kernel's the threads on a host make, counted by their names: what `src/sandbox/used.txt` is made of, where
//! `BUSWAY_LAB_CALLS` names a folder for that.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::host::Host;

/// Events, and what of each is told apart. The kernel's Documentation/trace/histogram.rst
const EVENTS: &str = "\
raw_syscalls/sys_enter id
syscalls/sys_enter_ioctl cmd.hex
syscalls/sys_enter_fcntl cmd
syscalls/sys_enter_prctl option
syscalls/sys_enter_socket family
syscalls/sys_enter_socketpair family
";

/// How many hosts have been counted on.
static COUNT: AtomicU32 = AtomicU32::new(0);

fn folder() -> Option<PathBuf> {
    env::var_os("BUSWAY_LAB_CALLS").map(PathBuf::from)
}

/// Has a host count, where that is wanted.
pub(crate) fn begin(host: &Host) -> Result<()> {
    if folder().is_none() {
        return Ok(());
    }
    let script = format!(
        "set -e; mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing\n\
         cd /sys/kernel/tracing/events\n\
         while read -r event key; do\n\
         echo \"hist:keys=common_pid.execname,$key:size=16384\" >>$event/trigger\n\
         done <<'END'\n{EVENTS}END"
    );
    host.run(&script).map(drop)
}

/// Adds what a host has counted to the folder.
pub(crate) fn end(host: &Host) -> Result<()> {
    let Some(folder) = folder().filter(|_| host.is_running()) else {
        return Ok(());
    };
    let script = format!(
        "cd /sys/kernel/tracing/events\n\
         while read -r event key; do echo \"event $event\"; cat $event/hist; done <<'END'\n{EVENTS}END"
    );
    let counted = host.run(&script)?;
    fs::create_dir_all(&folder)?;
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("lab-{}-{number}", process::id()));
    fs::write(&path, counted).with_context(|| format!("writing {}", path.display()))
}
