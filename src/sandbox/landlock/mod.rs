//! Landlock: files, network and signals that a VM's configuration does not name are out of reach, whatever the rights
//! of the process's user. linux/landlock.h; the kernel's Documentation/userspace-api/landlock.rst
//!
//! There are two layers. That of the process ([`restrict`]) is made of [`Rules`]. That of a thread ([`narrow`]) takes
//! from it what the thread's kind has no business with, which is all files for most. What is open stays open.
//!
//! Kernels differ in what they can enforce. All that this one can is taken; which level that is, is logged once.

mod rules;

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, RestrictSelfAttr as _, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    RulesetStatus, Scope,
};
use rustix::io::Errno;

use super::kind::Kind;
use super::table::{self, Files};
use crate::config::LandlockAccess;
pub use rules::Rules;

/// The newest level of which it is known what it means for a VM. The crate leaves out what a kernel does not have.
const NEWEST: ABI = ABI::V9;

/// The process has its layer.
static IN_FORCE: AtomicBool = AtomicBool::new(false);

/// Landlock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// the kernel has none
    #[error(
        "--landlock: this kernel has no Landlock ({0}): it needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and \
         `landlock` among the modules of lsm= on its command line; --landlock false goes without"
    )]
    Missing(&'static str),
    /// a rule's path cannot be opened
    #[error("--landlock-rules: {path} cannot be opened: {source}")]
    Path {
        /// The path.
        path: String,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// the kernel refuses
    #[error("--landlock: the kernel refuses it: {0}; --landlock false goes without")]
    Kernel(#[from] ::landlock::RulesetError),
}

/// Bounds the calling thread, and all that it starts, to `rules`; with level 8 the process's other threads, too. A
/// process that is bounded stays as it is, for bounds cannot be widened.
///
/// # Errors
/// [`LandlockError`]
pub fn restrict(rules: &Rules) -> Result<(), LandlockError> {
    if is_in_force() {
        log::debug!("Landlock: what may be opened is what could be before");
        return Ok(());
    }
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        // No rule allows any port.
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?;
    let mut created = ruleset.create()?;
    for rule in rules.iter() {
        // What is not there cannot be opened either, and whoever wants it says so in its own words.
        let Ok(path) = PathFd::new(&rule.path) else {
            continue;
        };
        let path = PathBeneath::new(path, rights(rule.access));
        // A pipe has no place among files, and needs no rule.
        match (&mut created).add_rule(path) {
            Ok(_) => {}
            Err(error) if rule.path.starts_with("/proc/self/fd") => {
                log::debug!("Landlock: {}: {error}", rule.path.display());
            }
            Err(source) => {
                return Err(LandlockError::Path {
                    path: rule.path.display().to_string(),
                    source: source.into(),
                });
            }
        }
    }
    for folder in rules.connects() {
        if let Ok(folder) = PathFd::new(folder) {
            // Kernels that do not bound connections take the former for an access that is none.
            let connect = AccessFs::ResolveUnix | AccessFs::ReadDir;
            created = created.add_rule(PathBeneath::new(folder, connect))?;
        }
    }
    let status = created.all_threads(true)?.restrict_self()?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            return Err(LandlockError::Missing("it is switched off"));
        }
        (RulesetStatus::NotEnforced, _) => {
            return Err(LandlockError::Missing("it was built without it"));
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            log::info!("{}", level(effective_abi as i32));
        }
        _ => {}
    }
    IN_FORCE.store(true, Ordering::Release);
    Ok(())
}

/// Whether [`restrict`] has bounded this process.
#[must_use]
pub fn is_in_force() -> bool {
    IN_FORCE.load(Ordering::Acquire)
}

/// Takes from the calling thread, and from what it will start, the files that its kind has no business with. Where the
/// process has no layer, it does nothing.
///
/// # Errors
/// The kernel's: no memory, or too many layers
pub(super) fn narrow(kind: Kind) -> io::Result<()> {
    if !is_in_force() {
        return Ok(());
    }
    let all = AccessFs::from_all(NEWEST);
    let taken = match table::files(kind) {
        Files::AsTheProcess => return Ok(()),
        Files::Read => all & !(AccessFs::ReadFile | AccessFs::ReadDir),
        Files::Change => all & !(AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile),
        Files::Remove => all & !BitFlags::from(AccessFs::RemoveFile),
        Files::Connect => all & !BitFlags::from(AccessFs::ResolveUnix),
        Files::None => all,
    };
    let narrowed = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(taken)
        .and_then(Ruleset::create)
        .and_then(|created| created.restrict_self());
    narrowed.map(drop).map_err(io::Error::other)
}

/// What an error of a file that was not opened is to be followed by, where Landlock may be the reason.
#[must_use]
pub fn remedy(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if !is_in_force() {
        return None;
    }
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        let refused = io.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
            || error.downcast_ref::<Errno>() == Some(&Errno::ACCESS);
        if refused {
            return Some(REMEDY);
        }
        cause = error.source();
    }
    None
}

const REMEDY: &str = "Landlock bounds this process to the files that its VM's configuration named at the start: \
    --landlock-rules path=PATH,access=rw adds some, and a descriptor needs none";

/// The rights of the kernel's that an access is.
fn rights(access: LandlockAccess) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::IoctlDev;
    let write = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::Refer
        | AccessFs::IoctlDev
        | AccessFs::ResolveUnix;
    match access {
        LandlockAccess::Read => read,
        LandlockAccess::Write => write,
        LandlockAccess::ReadWrite => read | write,
    }
}

/// What is enforced at a level, in words.
fn level(abi: i32) -> String {
    let lacking: Vec<&str> = [
        (3, "that files are cut off"),
        (4, "TCP"),
        (5, "requests to device nodes"),
        (6, "signals and abstract Unix sockets"),
        (9, "Unix sockets by path"),
    ]
    .into_iter()
    .filter_map(|(since, what)| (abi < since).then_some(what))
    .collect();
    match lacking.is_empty() {
        true => format!("Landlock is in force, at level {abi}"),
        false => format!(
            "Landlock is in force, at level {abi}: the kernel is too old to bound {}",
            lacking.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_says_what_it_does_not_bound() {
        assert_eq!(level(9), "Landlock is in force, at level 9");
        assert_eq!(
            level(7),
            "Landlock is in force, at level 7: the kernel is too old to bound Unix sockets by path"
        );
        assert!(level(1).contains("cut off, TCP, requests"));
    }

    #[test]
    fn no_access_makes_nodes_or_executes() {
        for access in [
            LandlockAccess::Read,
            LandlockAccess::Write,
            LandlockAccess::ReadWrite,
        ] {
            let never = AccessFs::Execute
                | AccessFs::MakeBlock
                | AccessFs::MakeChar
                | AccessFs::MakeSym
                | AccessFs::MakeDir;
            assert!((rights(access) & never).is_empty(), "{access:?}");
        }
    }
}
