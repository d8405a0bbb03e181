//! What this process may do by the kernel's older means: privileges, capabilities, core files and limits.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

use super::kind::Kind;
use super::user::User;
use super::{WallsError, table};

/// Takes from this process what no VM needs, and its user, where it is to be another one. Call it before any thread is
/// started. `before`: the capabilities that it was started with.
///
/// # Errors
/// The kernel's: prctl(2), capset(2), setresuid(2).
pub(super) fn give_up(user: Option<&User>, before: CapabilitySet) -> Result<(), WallsError> {
    if let Some(user) = user {
        User::check_rights()?;
        leave_bounding_set();
        user.become_it()?;
    }
    give_up_privileges(before).map_err(WallsError::Rights)
}

fn give_up_privileges(before: CapabilitySet) -> io::Result<()> {
    // No program that it could start gets more than it has.
    set_no_new_privs(true)?;
    let may_trace = before.contains(CapabilitySet::SYS_PTRACE);
    leave_bounding_set();
    // A change of the user leaves none in effect.
    let kept = capabilities(None)?.permitted & before & table::capabilities(Kind::Main);
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    // A core would have the guest's memory in it, which is nobody else's.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    // Nobody of the same user traces it or reads its memory, and a core goes to no program either. Where there are no
    // capabilities, that would keep `busway ctl list` from finding it.
    if may_trace {
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    // A write beyond RLIMIT_FSIZE then fails, as one to a full disk does, and ends nothing.
    // SAFETY: no handler is set, and the disposition is the process's own.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    Ok(())
}

/// Keeps of the calling thread's capabilities those in `kept`, for it and for the threads that it starts.
///
/// # Errors
/// capset(2)
pub(super) fn keep(kept: CapabilitySet) -> io::Result<()> {
    let now = capabilities(None)?;
    let sets = CapabilitySets {
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    if sets != now {
        set_capabilities(None, sets)?;
    }
    Ok(())
}

/// No program that is started can have a capability, not even from its file. Where the process may not say so, it has
/// no capabilities to speak of.
fn leave_bounding_set() {
    for capability in CapabilitySet::all().iter() {
        if remove_capability_from_bounding_set(capability).is_err() {
            return;
        }
    }
}
