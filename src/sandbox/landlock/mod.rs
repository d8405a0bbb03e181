//! Landlock: files, network and signals that a VM's configuration does not name are out of reach, whatever the rights
//! of the process's user. linux/landlock.h; the kernel's Documentation/userspace-api/landlock.rst
//!
//! There are two layers. That of the process ([`restrict`]) is made of [`Rules`]. That of a thread ([`narrow`]) takes
//! from it what the thread's kind has no business with, which is all files for most. What is open stays open.
//!
//! Kernels differ in what they can enforce. All that this one can is taken; which level that is, is logged once.

mod anchor;
mod narrow;
mod rules;

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, PathFdError, RestrictSelfAttr as _, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use rustix::io::Errno;

use crate::config::{Choice, LandlockAccess};
use anchor::Mounts;
pub(super) use narrow::narrow;
pub use rules::Rules;

/// The newest level of which it is known what it means for a VM. The crate leaves out what a kernel does not have.
const NEWEST: ABI = ABI::V9;

/// The level that the process's layer has; 0 where there is none.
static LEVEL: AtomicI32 = AtomicI32::new(0);
/// Why there is none, where it was to be there if the kernel has it.
static LACKING: OnceLock<String> = OnceLock::new();
/// Threads have their layers, whether or not the process has one.
static NARROWS: AtomicBool = AtomicBool::new(false);

/// Landlock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// the kernel has none
    #[error(
        "--landlock true: this kernel has no Landlock ({0}): it needs Linux 5.13 with CONFIG_SECURITY_LANDLOCK, and \
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

/// Whether the kernel has it.
#[must_use]
pub fn is_available() -> bool {
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    created.is_ok()
}

/// Has threads that serve the guest be bounded from now on, each as its kind is ([`narrow`]), where the kernel can.
///
/// # Errors
/// [`LandlockError::Kernel`]
pub(super) fn bound_threads() -> Result<(), LandlockError> {
    let can = is_available();
    if can {
        narrow::prepare()?;
    }
    NARROWS.store(can, Ordering::Release);
    Ok(())
}

/// Bounds the process to `rules`, where that is asked for, or where the kernel has Landlock. A process that is bounded
/// stays as it is, for bounds cannot be widened.
///
/// # Errors
/// [`LandlockError`]
pub fn restrict_by_choice(
    choice: Choice,
    rules: impl FnOnce() -> Rules,
) -> Result<(), LandlockError> {
    match choice {
        Choice::Off => Ok(()),
        _ if is_in_force() => {
            log::debug!("Landlock: what may be opened is what could be before");
            Ok(())
        }
        Choice::On => restrict(&rules()),
        Choice::Auto if lacking().is_some() => Ok(()),
        Choice::Auto => restrict_where_possible(&rules()),
    }
}

/// [`restrict`], where the kernel has Landlock and rules can name what the VM does. Elsewhere threads are bounded alone.
fn restrict_where_possible(rules: &Rules) -> Result<(), LandlockError> {
    let mounts = Mounts::read();
    let mut named = rules.iter().map(|rule| &*rule.path);
    if let Some(path) = named.find(|path| mounts.is_unnamable(path)) {
        let why = format!(
            "{} is on 9p, whose files no rule can name; --landlock true leaves all of that file system in reach",
            path.display()
        );
        log::info!("Landlock bounds threads alone: {why}");
        bound_threads()?;
        let _already = LACKING.set(why);
        return Ok(());
    }
    match restrict(rules) {
        Err(LandlockError::Missing(why)) => {
            log::info!(
                "Landlock bounds nothing: this kernel has none ({why}): it needs Linux 5.13 with \
                 CONFIG_SECURITY_LANDLOCK, and `landlock` among the modules of lsm= on its command line"
            );
            let _already = LACKING.set(format!("the kernel has none: {why}"));
            Ok(())
        }
        restricted => restricted,
    }
}

/// Bounds the calling thread, and all that it starts, to `rules`; with level 8 the process's other threads, too.
///
/// # Errors
/// [`LandlockError`]
fn restrict(rules: &Rules) -> Result<(), LandlockError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        // No rule allows any port.
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?;
    let mut created = ruleset.create()?;
    let mounts = Mounts::read();
    for rule in rules.iter() {
        // What is not there cannot be opened either, and whoever wants it says so in its own words.
        let Some(path) = open(&mounts.anchor(&rule.path))? else {
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
        if let Some(folder) = open(&mounts.anchor(folder))? {
            // Kernels that do not bound connections take the former for an access that is none.
            let connect = AccessFs::ResolveUnix | AccessFs::ReadDir;
            created = created.add_rule(PathBeneath::new(folder, connect))?;
        }
    }
    for rule in rules.images() {
        if let Some(folder) = open(&mounts.anchor(&rule.path))? {
            let access = image_rights(rule.access);
            created = created.add_rule(PathBeneath::new(folder, access))?;
        }
    }
    narrow::prepare()?;
    let status = created.all_threads(true)?.restrict_self()?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            return Err(LandlockError::Missing("it is switched off"));
        }
        (RulesetStatus::NotEnforced, _) => {
            return Err(LandlockError::Missing("it was built without it"));
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            let abi = effective_abi as i32;
            log::info!("{}", in_words(abi));
            LEVEL.store(abi, Ordering::Release);
        }
        // It is enforced, so that it is there.
        _ => LEVEL.store(1, Ordering::Release),
    }
    Ok(())
}

/// What a rule is of; nothing where it cannot be opened, but for want of descriptors.
fn open(path: &Path) -> Result<Option<PathFd>, LandlockError> {
    match PathFd::new(path) {
        Ok(opened) => Ok(Some(opened)),
        Err(PathFdError::OpenCall { source, .. })
            if !matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
        {
            Ok(None)
        }
        Err(source) => Err(LandlockError::Path {
            path: path.display().to_string(),
            source: source.into(),
        }),
    }
}

/// Whether [`restrict`] has bounded this process.
#[must_use]
pub fn is_in_force() -> bool {
    level().is_some()
}

/// The level at which [`restrict`] has bounded this process.
#[must_use]
pub fn level() -> Option<i32> {
    Some(LEVEL.load(Ordering::Acquire)).filter(|level| *level > 0)
}

/// Why nothing bounds the process that was to be bounded where the kernel can.
#[must_use]
pub fn lacking() -> Option<&'static str> {
    LACKING.get().map(String::as_str)
}

/// Whether a VM for which that was chosen is in a process that is bounded, or will be.
#[must_use]
pub fn applies(choice: Choice) -> bool {
    choice == Choice::On || is_in_force()
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
    --landlock-rules path=PATH,access=rw adds some, and a descriptor (busway ctl add-disk --send) needs none";

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

/// The rights with images in a folder.
fn image_rights(access: LandlockAccess) -> BitFlags<AccessFs> {
    match access {
        LandlockAccess::Read => AccessFs::ReadFile.into(),
        LandlockAccess::Write | LandlockAccess::ReadWrite => {
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate
        }
    }
}

/// What is enforced at a level, in words.
fn in_words(abi: i32) -> String {
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
        assert_eq!(in_words(9), "Landlock is in force, at level 9");
        assert_eq!(
            in_words(7),
            "Landlock is in force, at level 7: the kernel is too old to bound Unix sockets by path"
        );
        assert!(in_words(1).contains("cut off, TCP, requests"));
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
            let own = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
            assert!(own.contains(image_rights(access)), "{access:?}");
        }
    }
}
