//! What a thread's layer takes from the process's.
//!
//! The rulesets are made when the process is bounded: a thread may begin when no more descriptors are to be had, as where a
//! device comes to a guest that runs, and does not go on without its layer.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use ::landlock::{
    Access as _, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr as _,
    RulesetError,
};

use super::{NARROWS, NEWEST, is_in_force};
use crate::sandbox::kind::Kind;
use crate::sandbox::table::{self, Files};

/// What threads may have less than the process.
const LESS: [Files; 5] = [
    Files::Read,
    Files::Change,
    Files::Remove,
    Files::Connect,
    Files::None,
];

/// A ruleset for each of [`LESS`]; without a descriptor where the kernel can enforce nothing of it.
static RULESETS: OnceLock<Vec<Option<OwnedFd>>> = OnceLock::new();

/// Makes what threads are bounded by.
///
/// # Errors
/// The kernel's: no descriptors, or no memory
pub(super) fn prepare() -> Result<(), RulesetError> {
    if RULESETS.get().is_none() {
        let made = LESS.into_iter().map(ruleset);
        let made = made.collect::<Result<Vec<_>, _>>()?;
        RULESETS.get_or_init(|| made);
    }
    Ok(())
}

/// What takes all accesses to files but those of `files`.
fn ruleset(files: Files) -> Result<Option<OwnedFd>, RulesetError> {
    let all = AccessFs::from_all(NEWEST);
    let kept: BitFlags<AccessFs> = match files {
        Files::AsTheProcess => return Ok(None),
        Files::Read => AccessFs::ReadFile | AccessFs::ReadDir,
        Files::Change => AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile,
        Files::Remove => AccessFs::RemoveFile.into(),
        Files::Connect => AccessFs::ResolveUnix.into(),
        Files::None => BitFlags::empty(),
    };
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all & !kept)?
        .create()?;
    Ok(created.into())
}

/// Takes from the calling thread, and from what it will start, the files that its kind has no business with. Threads that
/// read files of the host are bounded where the process is, for who is bounded sees no descriptors of other processes.
///
/// # Errors
/// The kernel's: no memory, or too many layers
pub(in crate::sandbox) fn narrow(kind: Kind) -> io::Result<()> {
    let is_in_force = is_in_force();
    let files = table::files(kind);
    if files == Files::Read && !is_in_force {
        return Ok(());
    }
    if !is_in_force && !NARROWS.load(Ordering::Acquire) {
        return Ok(());
    }
    let place = LESS.iter().position(|one| *one == files);
    let rulesets = RULESETS.get().zip(place);
    match rulesets.and_then(|(rulesets, place)| rulesets.get(place)) {
        Some(Some(ruleset)) => restrict_self(ruleset),
        _ => Ok(()),
    }
}

/// landlock_restrict_self(2). The process has no new privileges, which it asks for.
fn restrict_self(ruleset: &OwnedFd) -> io::Result<()> {
    const NO_FLAGS: libc::c_uint = 0;
    // SAFETY: the call is given a descriptor that is open, and no memory.
    let done = unsafe {
        libc::syscall(
            libc::SYS_landlock_restrict_self,
            ruleset.as_raw_fd(),
            NO_FLAGS,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
