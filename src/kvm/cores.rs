//! Which threads may be on one core of the host's at the same time, where cores run several (SMT): only those that have the
//! same cookie. A thread has that of the one that starts it. The kernel's
//! Documentation/admin-guide/hw-vuln/core-scheduling.rst
//!
//! Cookies are given to single threads, and never to the process: only a thread without one can take it from another, and
//! there would be none. So those that serve VM after VM never have one, and a VM that asks for none has none of the VM before.

use std::io;
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;
use rustix::thread::{
    CoreSchedulingScope, Pid, create_core_scheduling_cookie, gettid, pull_core_scheduling_cookie,
};

use crate::config::CoreScheduling;

const THREAD: CoreSchedulingScope = CoreSchedulingScope::Thread;

/// The threads of one VM, of which each is, or is not, kept apart from all that are none of it.
#[derive(Clone, Debug)]
pub struct Cores {
    scheduling: CoreScheduling,
    /// A vCPU's thread: it has the VM's cookie, and is there as long as the VM.
    keeper: Arc<OnceLock<Pid>>,
}

impl Cores {
    /// Keeps the calling thread, and those that it starts from now on, apart from all others of the host's, unless that is
    /// [off](CoreScheduling::Off).
    ///
    /// # Errors
    /// Of prctl(2), PR_SCHED_CORE: EINVAL where the kernel has no core scheduling (Linux before 5.14, or without
    /// CONFIG_SCHED_CORE)
    pub fn keep_apart(scheduling: CoreScheduling) -> io::Result<Self> {
        if scheduling != CoreScheduling::Off {
            make_cookie()?;
        }
        Ok(Self {
            scheduling,
            keeper: Arc::default(),
        })
    }

    /// What is in effect.
    #[must_use]
    pub fn scheduling(&self) -> CoreScheduling {
        self.scheduling
    }

    /// The calling thread runs one of the VM's vCPUs. The first of them has to be started by the one that was
    /// [kept apart](Self::keep_apart).
    ///
    /// # Errors
    /// As [`Self::keep_apart`]
    pub(super) fn enter_vcpu(&self) -> io::Result<()> {
        match self.scheduling {
            CoreScheduling::Off => Ok(()),
            CoreScheduling::Vcpu => make_cookie(),
            CoreScheduling::Vm => {
                self.keeper.get_or_init(gettid);
                self.enter()
            }
        }
    }

    /// The calling thread is one of the VM's, though another one started it: it may be on a core with vCPUs where such
    /// threads may.
    ///
    /// # Errors
    /// As [`Self::keep_apart`]
    pub fn enter(&self) -> io::Result<()> {
        match self.keeper.get() {
            Some(keeper) if *keeper != gettid() => {
                where_cores_have_several(pull_core_scheduling_cookie(*keeper, THREAD))
            }
            _ => Ok(()),
        }
    }
}

fn make_cookie() -> io::Result<()> {
    where_cores_have_several(create_core_scheduling_cookie(gettid(), THREAD))
}

/// Each core of a host runs one thread at a time, or the others are switched off, where it says that there are none.
fn where_cores_have_several(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::thread;

    use rustix::thread::core_scheduling_cookie;

    use super::*;

    /// A thread that enters so: its cookie, and what it stays for.
    fn begin(cores: &Cores, enter: fn(&Cores) -> io::Result<()>) -> (u64, Sender<()>) {
        let cores = cores.clone();
        let ((tell, told), (end, stay)) = (channel(), channel());
        thread::spawn(move || {
            enter(&cores).unwrap();
            tell.send(own()).unwrap();
            let _ended = stay.recv();
        });
        (told.recv().unwrap(), end)
    }

    fn own() -> u64 {
        core_scheduling_cookie(gettid(), THREAD).unwrap()
    }

    /// The cookies of a VM's threads: of two vCPUs that it has at first and one that is plugged, of the thread that put it
    /// together, and of one more of its.
    fn cookies(scheduling: CoreScheduling) -> io::Result<([u64; 3], u64, u64)> {
        let assemble = move || {
            let cores = Cores::keep_apart(scheduling)?;
            let vcpus = [0, 1].map(|_| begin(&cores, Cores::enter_vcpu));
            Ok::<_, io::Error>((cores, vcpus, own()))
        };
        let (cores, [first, second], assembler) = thread::spawn(assemble).join().unwrap()?;
        let [plugged, other] = [Cores::enter_vcpu, Cores::enter].map(|how| begin(&cores, how));
        Ok(([first.0, second.0, plugged.0], assembler, other.0))
    }

    #[test]
    fn a_vms_threads_have_cookies_as_was_asked_and_no_other_thread_has_one() {
        match core_scheduling_cookie(gettid(), THREAD) {
            // A host that has given this test a cookie gives it to all that have no other.
            Ok(given) => {
                let (vcpus, assembler, other) = cookies(CoreScheduling::Vm).unwrap();
                assert!(vcpus == [assembler; 3] && assembler == other && other != given);
                let (vcpus, assembler, other) = cookies(CoreScheduling::Vcpu).unwrap();
                let [first, second, plugged] = vcpus;
                let mut all = vec![first, second, plugged, assembler, given];
                all.sort_unstable();
                all.dedup();
                assert!(all.len() == 5 && other == given, "{vcpus:?}");
                let off = cookies(CoreScheduling::Off).unwrap();
                assert_eq!(off, ([given; 3], given, given));
                assert_eq!(own(), given);
            }
            // There is nothing to keep apart, and the kernel has no cookies then.
            Err(Errno::NODEV) => {
                for scheduling in CoreScheduling::ALL {
                    Cores::keep_apart(scheduling).unwrap().enter_vcpu().unwrap();
                }
            }
            Err(error) => {
                assert_eq!(error, Errno::INVAL);
                for scheduling in [CoreScheduling::Vm, CoreScheduling::Vcpu] {
                    let refused = Cores::keep_apart(scheduling).unwrap_err();
                    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
                }
                Cores::keep_apart(CoreScheduling::Off).unwrap();
            }
        }
    }
}
