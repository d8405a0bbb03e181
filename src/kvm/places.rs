//! Which of the host's processors a thread runs on.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::{fs, io};

/// The processors of a host that a set of the kernel's holds.
type Set = libc::cpu_set_t;

/// What this process was given before anything was kept from it.
static GIVEN: OnceLock<Option<Set>> = OnceLock::new();

/// Its threads are kept from some of that.
static KEPT: AtomicBool = AtomicBool::new(false);

/// Has a thread that has not been joined run on these of the host's processors only.
///
/// # Errors
/// Of pthread_setaffinity_np(3): EINVAL where the host has none of them, or this process may use none.
pub(super) fn run_on(thread: libc::pthread_t, processors: &[usize]) -> io::Result<()> {
    let mut set = empty();
    for &processor in processors {
        if processor >= libc::CPU_SETSIZE as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the number is below the set's size.
        unsafe { libc::CPU_SET(processor, &mut set) };
    }
    // SAFETY: it reads a set of the size that it is told; who gives the id holds the thread's handle.
    match unsafe { libc::pthread_setaffinity_np(thread, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Keeps all threads of this process, and those that they start, from `processors`. Whether any processor is left for
/// them; else they are let be.
///
/// # Errors
/// Of sched_getaffinity(2), sched_setaffinity(2) and the folder of threads
pub fn keep_from(processors: &[usize]) -> io::Result<bool> {
    let mut set = all_given()?;
    for &processor in processors {
        if processor < libc::CPU_SETSIZE as usize {
            // SAFETY: the number is below the set's size.
            unsafe { libc::CPU_CLR(processor, &mut set) };
        }
    }
    // SAFETY: the set is a valid one, which is only read.
    if unsafe { libc::CPU_COUNT(&set) } == 0 {
        return Ok(false);
    }
    KEPT.store(true, Relaxed);
    apply_to_all(&set)?;
    Ok(true)
}

/// Lets all threads of this process run on all processors that it was given, where they were
/// [kept](keep_from) from some: for a VM before this one.
///
/// # Errors
/// As [`keep_from`]
pub fn keep_from_none() -> io::Result<()> {
    match KEPT.swap(false, Relaxed) {
        true => apply_to_all(&all_given()?),
        false => Ok(()),
    }
}

fn all_given() -> io::Result<Set> {
    let given = *GIVEN.get_or_init(given);
    given.ok_or_else(|| io::Error::other("sched_getaffinity failed"))
}

fn apply_to_all(set: &Set) -> io::Result<()> {
    for thread in fs::read_dir("/proc/self/task")? {
        let folder = thread?.path();
        let status = match fs::read_to_string(folder.join("status")) {
            Err(error) if has_ended(&error) => continue,
            status => status?,
        };
        match own_number(&status).map(|id| apply(id, set)) {
            Some(Err(error)) if has_ended(&error) => {}
            Some(Err(error)) => return Err(error),
            Some(Ok(())) | None => {}
        }
    }
    Ok(())
}

/// Whether the thread that was asked for has ended meanwhile.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The number by which this process knows the thread that a `status` is of: in a jail the host has another one for it.
/// proc_pid_status(5)
fn own_number(status: &str) -> Option<libc::pid_t> {
    let number = |key| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_ascii_whitespace().last()?.parse().ok()
    };
    // A kernel without PID namespaces has the latter alone.
    number("NSpid:").or_else(|| number("Pid:"))
}

/// The processors that this process was given, ascending; nothing where the kernel does not say.
#[must_use]
pub fn given_processors() -> Option<Vec<usize>> {
    let set = GIVEN.get_or_init(given).as_ref()?;
    // SAFETY: each number is below the set's size, and the set is only read.
    let has = |processor: &usize| unsafe { libc::CPU_ISSET(*processor, set) };
    Some((0..libc::CPU_SETSIZE as usize).filter(has).collect())
}

fn empty() -> Set {
    // SAFETY: all zeros is a valid cpu_set_t, an empty one.
    unsafe { std::mem::zeroed() }
}

fn given() -> Option<Set> {
    let mut set = empty();
    // SAFETY: sched_getaffinity writes a set of the size that it is told.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    (result == 0).then_some(set)
}

fn apply(thread: libc::pid_t, set: &Set) -> io::Result<()> {
    // SAFETY: sched_setaffinity reads a set of the size that it is told.
    match unsafe { libc::sched_setaffinity(thread, size_of_val(set), set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> String {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let mut lines = status.lines();
        let line = lines.find(|line| line.starts_with("Cpus_allowed_list:"));
        line.unwrap().to_owned()
    }

    /// That this process has no other test beside this one, whose threads would be moved.
    const ALONE: &str = "BUSWAY_TEST_ALONE";

    #[test]
    fn what_threads_are_kept_from_for_a_vm_is_theirs_again_for_the_next() {
        if std::env::var_os(ALONE).is_none() {
            let run = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--nocapture"])
                .arg(concat!(
                    "kvm::places::tests::",
                    "what_threads_are_kept_from_for_a_vm_is_theirs_again_for_the_next"
                ))
                .env(ALONE, "1")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&run.stdout);
            assert!(run.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let (before, given) = (allowed(), given_processors().unwrap());
        let [first, _, ..] = given[..] else {
            eprintln!("skipped: this process has one processor");
            return;
        };
        keep_from_none().unwrap();
        assert_eq!(allowed(), before);
        assert!(keep_from(&[first]).unwrap());
        let kept = allowed();
        assert_ne!(kept, before);
        // Those that begin later are kept from it as well.
        assert_eq!(std::thread::spawn(allowed).join().unwrap(), kept);
        assert!(!keep_from(&given).unwrap(), "none would be left");
        assert_eq!(allowed(), kept);
        keep_from_none().unwrap();
        assert_eq!(allowed(), before);
    }

    #[test]
    fn a_thread_is_asked_for_by_the_number_that_its_own_process_has_for_it() {
        let in_a_jail = "Name:\tvcpu0\nPid:\t4711\nPPid:\t1\nNSpid:\t4711\t7\n";
        assert_eq!(own_number(in_a_jail), Some(7));
        assert_eq!(
            own_number("Name:\tvcpu0\nPid:\t4711\nNSpid:\t4711\n"),
            Some(4711)
        );
        assert_eq!(own_number("Name:\tvcpu0\nPid:\t4711\n"), Some(4711));
        assert_eq!(own_number("Name:\tvcpu0\n"), None);
    }

    #[test]
    fn a_thread_runs_where_it_is_told_to_and_nowhere_that_there_is_not() {
        std::thread::spawn(move || {
            // SAFETY: it gives the id of the calling thread.
            let me = unsafe { libc::pthread_self() };
            run_on(me, &[0]).unwrap();
            assert_eq!(allowed(), "Cpus_allowed_list:\t0");
            assert!(run_on(me, &[1000]).is_err());
            assert!(run_on(me, &[5000]).is_err());
            assert_eq!(allowed(), "Cpus_allowed_list:\t0");
        })
        .join()
        .unwrap();
    }
}
