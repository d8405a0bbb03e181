//! Which threads may be on one core of the host's at the same time, where cores run several (SMT): only those that have the
//! same cookie. The kernel's Documentation/admin-guide/hw-vuln/core-scheduling.rst

use std::io;

use rustix::io::Errno;
use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, Pid, create_core_scheduling_cookie, gettid};

/// Keeps this process's threads, and those that they start, apart from all others of the host's.
///
/// # Errors
/// Of prctl(2), PR_SCHED_CORE: EINVAL where the kernel has no core scheduling (Linux before 5.14, or without
/// CONFIG_SCHED_CORE)
pub fn keep_process_apart() -> io::Result<()> {
    give_cookie(getpid(), CoreSchedulingScope::ThreadGroup)
}

/// Keeps the calling thread apart from all others.
///
/// # Errors
/// As [`keep_process_apart`]
pub(super) fn keep_thread_apart() -> io::Result<()> {
    give_cookie(gettid(), CoreSchedulingScope::Thread)
}

fn give_cookie(id: Pid, scope: CoreSchedulingScope) -> io::Result<()> {
    match create_core_scheduling_cookie(id, scope) {
        // Each core of this host runs one thread at a time, or the others are switched off.
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::core_scheduling_cookie;

    use super::*;

    #[test]
    fn threads_that_are_kept_apart_have_cookies_of_their_own() {
        let cookie = || core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread);
        let apart = || {
            std::thread::spawn(move || keep_thread_apart().map(|()| cookie()))
                .join()
                .unwrap()
        };
        match (apart(), apart()) {
            (Ok(Ok(one)), Ok(Ok(other))) => assert!(one != 0 && other != 0 && one != other),
            // It is told that there is nothing to keep apart, and the kernel has no cookies then.
            (Ok(Err(error)), Ok(Err(_))) => assert_eq!(error, Errno::NODEV),
            (Err(error), Err(_)) => assert_eq!(error.kind(), io::ErrorKind::InvalidInput),
            differing => panic!("{differing:?}"),
        }
    }
}
