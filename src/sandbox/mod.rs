//! The walls behind the VMM: what a thread of this process could do, were a guest to take it over.
//!
//! Privileges and capabilities that no VM needs are given up at the start ([`confine`]), and so is, by `--seccomp`,
//! each call of the kernel's that is not in the [`table`], and by `--landlock` each file that the VM does not name
//! ([`landlock`]). A thread begins by [`enter`]ing its kind. What is allowed
//! stands in the table alone; `docs/security.md` says what it is worth.

mod filter;
mod ioctls;
mod jail;
mod kind;
pub mod landlock;
mod limits;
mod rights;
mod table;
#[cfg(test)]
mod takeover;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod used;
mod user;
mod violation;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use clap::ValueEnum;
use rustix::thread::{CapabilitySet, capabilities as capabilities_now};

use crate::config::Choice;

use filter::Filters;
pub(crate) use jail::is_told_on;
pub use jail::{JailError, process_id, remedy as jail_remedy};
use jail::{Outer, Side};
pub use kind::Kind;
use landlock::{LandlockError, Rules};
pub use limits::{SizeLimitError, check_size, size_limit};
pub use table::capabilities;
pub use user::{User, UserError};

/// What becomes of a call that a thread's filter has not: `--seccomp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The process ends, with a message that names thread and call
    #[default]
    True,
    /// The kernel does it, and logs it
    Log,
    /// It fails with EPERM
    Errno,
    /// There are no filters
    False,
}

impl Mode {
    /// The word of the flag.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::Log => "log",
            Self::Errno => "errno",
            Self::False => "false",
        }
    }
}

/// The walls of this process.
#[derive(Debug)]
struct Walls {
    mode: Mode,
    /// Of each kind that has been entered.
    filters: [OnceLock<Filters>; Kind::ALL.len()],
}

static WALLS: OnceLock<Walls> = OnceLock::new();

/// The walls cannot be put up.
#[derive(Debug, thiserror::Error)]
pub enum WallsError {
    /// cannot give up privileges: {0}
    #[error("cannot give up privileges (prctl, capset): {0}")]
    Rights(io::Error),
    /// --jail
    #[error(transparent)]
    Jail(#[from] JailError),
    /// --user
    #[error(transparent)]
    User(#[from] UserError),
    /// --landlock
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// --seccomp: the kernel takes no filter: {0}
    #[error(
        "--seccomp: the kernel takes no filter: {0}; it needs CONFIG_SECCOMP_FILTER, and --seccomp false goes without"
    )]
    Filter(io::Error),
}

/// What Landlock does in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds<'a> {
    /// Nothing.
    None,
    /// Threads that serve the guest have no files, where the kernel can do that.
    Threads,
    /// The process has these files, and threads what of them their kinds need; the choice says what becomes of a kernel
    /// that cannot do that.
    Files(Choice, &'a Rules),
}

/// Where the process goes, and as whom.
#[derive(Clone, Debug, Default)]
pub struct Apart {
    /// `--jail`: what is in its tree.
    pub jail: Option<Rules>,
    /// `--user`: whose rights it has.
    pub user: Option<User>,
    /// Folders in which files and sockets are made and removed while the guest runs.
    pub made: Vec<PathBuf>,
}

/// Puts the walls up round the calling thread, which is to be the only one, and all that it will start. With a jail, it is the
/// thread of a new process that goes on, and the process that was started ends with that one.
///
/// # Errors
/// [`WallsError`]: some of them may stand.
pub fn confine(mode: Mode, bounds: Bounds<'_>, apart: &Apart) -> Result<(), WallsError> {
    let before = capabilities_now(None).map_err(|error| WallsError::Rights(error.into()))?;
    let mut inner = None;
    if let Some(rules) = &apart.jail {
        let begun = match jail::divide(apart.user.is_some())? {
            Side::Outer(outer) => match stay_outside(outer, mode, apart, before.effective)? {},
            Side::Inner(begun) => inner.insert(begun),
        };
        begun.begin().map_err(WallsError::Rights)?;
        jail::enter(rules)?;
    }
    rights::give_up(apart.user.as_ref(), before.effective)?;
    // A change of the user would undo it.
    if let Some(inner) = inner {
        inner.end_with_outer().map_err(WallsError::Rights)?;
    }
    if let Some(user) = &apart.user {
        user.check_folders(&apart.made)?;
    }
    match bounds {
        Bounds::None => {}
        Bounds::Threads => landlock::bound_threads()?,
        Bounds::Files(choice, rules) => landlock::restrict_by_choice(choice, || rules.clone())?,
    }
    if mode == Mode::True {
        violation::tell_of().map_err(WallsError::Filter)?;
    }
    busway_vfio::begin_threads_with(|| enter(Kind::Unmask));
    let walls = WALLS.get_or_init(|| Walls {
        mode,
        filters: Default::default(),
    });
    walls.filter(Kind::Main).map_err(WallsError::Filter)
}

/// What becomes of the process that was started, where another one is in a jail. It has that one's user, so that it may signal
/// it, and no rights, and opens nothing.
fn stay_outside(
    outer: Outer,
    mode: Mode,
    apart: &Apart,
    before: CapabilitySet,
) -> Result<Infallible, WallsError> {
    let manager = outer.close_others().map_err(WallsError::Rights)?;
    rights::give_up(apart.user.as_ref(), before)?;
    rights::keep(capabilities(Kind::Supervisor)).map_err(WallsError::Rights)?;
    // As it is seen beside the other one.
    let named = rustix::thread::set_name(c"supervisor");
    named.map_err(|error| WallsError::Rights(error.into()))?;
    if mode == Mode::True {
        violation::tell_of().map_err(WallsError::Filter)?;
    }
    let filtered = Filters::of(Kind::Supervisor, mode).and_then(|filters| filters.apply());
    filtered.map_err(WallsError::Filter)?;
    outer.wait(manager)
}

/// Narrows the calling thread, and what it will start, to what a thread of this kind does. To be called at a thread's
/// beginning; where the process has no walls, as in tests, it does nothing.
///
/// # Panics
/// The kernel refuses, for want of memory: a thread does not go on without its walls, and the VM ends.
pub fn enter(kind: Kind) {
    let Some(walls) = WALLS.get() else { return };
    let entered = rights::keep(capabilities(kind) & user::bound(kind))
        .and_then(|()| landlock::narrow(kind))
        .and_then(|()| walls.filter(kind));
    if let Err(error) = entered {
        panic!("a thread ({kind:?}) cannot give up its rights: {error}");
    }
}

/// All that the VM names is open. Where the process is another user than the one that started it, it has that user's
/// rights and no others from now on. The calling thread is the main one, and the only one of its kind.
///
/// # Errors
/// capset(2)
pub fn end_opening() -> io::Result<()> {
    user::end_opening();
    rights::keep(user::bound(Kind::Main))
}

impl Walls {
    fn filter(&self, kind: Kind) -> io::Result<()> {
        let place = Kind::ALL.iter().position(|one| *one == kind);
        let Some(filters) = place.and_then(|place| self.filters.get(place)) else {
            return Ok(());
        };
        if let Some(filters) = filters.get() {
            return filters.apply();
        }
        let made = Filters::of(kind, self.mode)?;
        filters.get_or_init(|| made).apply()
    }
}
