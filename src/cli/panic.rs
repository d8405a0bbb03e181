//! A panic is a bug of Busway's: it ends the process, whichever thread it is on, with a word for the
//! person who meets it. A VM that runs ends in order first.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::process;
use std::thread;
use std::time::Duration;

use super::logging;
use crate::exit::RUNTIME;
use crate::machine;
use crate::sandbox::{self, Kind};

/// How long the VM's end may take: the kernel waits a minute for a device that does not come back from
/// its reset, and what the thread that panicked was to do may be waited for in vain.
const END_LIMIT: Duration = Duration::from_secs(120);

/// Makes every panic the end of the process, with the status of a runtime failure.
///
/// A VM of which one thread is gone would hang, so it ends: its devices are reset and given back as at
/// any end. Where there is none, or at a second panic, the process ends at once, and the kernel takes back
/// all that it had. Who must put something right before (the terminal) sets a hook of its own that calls
/// the one it finds.
pub(super) fn exit_on_any() {
    panic::set_hook(Box::new(|info| {
        logging::last_words(&message(info));
        if machine::end_on_panic() && watch_the_end() {
            return;
        }
        process::exit(i32::from(RUNTIME));
    }));
}

/// Ends the process where the VM does not end in time; `false` where nobody can see to that.
fn watch_the_end() -> bool {
    let watcher = thread::Builder::new().name("end".to_owned()).spawn(|| {
        sandbox::enter(Kind::Watchdog);
        thread::sleep(END_LIMIT);
        logging::last_words(&format!(
            "busway: error: the VM did not end within {} s of that\n",
            END_LIMIT.as_secs()
        ));
        process::exit(i32::from(RUNTIME));
    });
    watcher.is_ok()
}

/// What `run` gives; `None` where it panicked, which has been told of.
pub(super) fn caught<T>(run: impl FnOnce() -> T) -> Option<T> {
    // Whoever panics leaves nothing behind that is used again: the process ends.
    panic::catch_unwind(AssertUnwindSafe(run)).ok()
}

fn message(info: &PanicHookInfo<'_>) -> String {
    let place = info.location().map(ToString::to_string);
    let thread = thread::current();
    let thread = thread.name().map(|name| format!("thread {name}"));
    let whence: Vec<_> = place.into_iter().chain(thread).collect();
    format!(
        "busway: error: this is a bug in Busway {}: {} ({})\n",
        env!("CARGO_PKG_VERSION"),
        payload(info.payload()),
        whence.join(", ")
    )
}

fn payload(payload: &dyn Any) -> &str {
    payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::process::Command;

    use crate::machine::PanicWatch;

    /// Set in the process that is to panic.
    const CHILD: &str = "BUSWAY_TEST_PANIC";

    /// Runs this test again in a process of its own, in which `act` is done; gives its status and what
    /// it wrote to standard error.
    fn in_a_process(test: &str, act: impl FnOnce()) -> (Option<i32>, String) {
        if env::var_os(CHILD).is_some() {
            exit_on_any();
            act();
            process::exit(0);
        }
        let output = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                &format!("cli::panic::tests::{test}"),
                "--nocapture",
            ])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), stderr)
    }

    fn reported(what: &str) -> String {
        let version = env!("CARGO_PKG_VERSION");
        format!("busway: error: this is a bug in Busway {version}: {what} (src/cli/panic.rs:")
    }

    #[test]
    fn a_panic_on_any_thread_ends_the_process() {
        let (status, stderr) = in_a_process("a_panic_on_any_thread_ends_the_process", || {
            let _never = thread::spawn(|| panic!("out of tea")).join();
        });
        assert_eq!(status, Some(1));
        assert!(stderr.starts_with(&reported("out of tea")), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }

    /// Says that it was dropped, as a machine that gives its devices back.
    struct Devices;

    impl Drop for Devices {
        fn drop(&mut self) {
            eprintln!("devices released");
        }
    }

    #[test]
    fn a_panic_beside_a_vm_leaves_the_vm_to_end_in_order() {
        let test = "a_panic_beside_a_vm_leaves_the_vm_to_end_in_order";
        let (status, stderr) = in_a_process(test, || {
            let _watch = PanicWatch::start();
            let devices = Devices;
            assert!(thread::spawn(|| panic!("out of tea")).join().is_err());
            // The event loop has been told, and ends the VM.
            drop(devices);
            process::exit(7);
        });
        assert_eq!(status, Some(7), "{stderr}");
        assert!(stderr.starts_with(&reported("out of tea")), "{stderr}");
        assert!(stderr.ends_with("devices released\n"), "{stderr}");
    }

    #[test]
    fn a_panic_of_the_event_loop_drops_the_vm_and_is_caught() {
        let test = "a_panic_of_the_event_loop_drops_the_vm_and_is_caught";
        let (status, stderr) = in_a_process(test, || {
            let run = || {
                let _watch = PanicWatch::start();
                let _devices = Devices;
                panic!("out of tea");
            };
            process::exit(if caught(run).is_none() { 7 } else { 8 });
        });
        assert_eq!(status, Some(7), "{stderr}");
        assert!(stderr.starts_with(&reported("out of tea")), "{stderr}");
        assert!(stderr.ends_with("devices released\n"), "{stderr}");
    }

    #[test]
    fn a_second_panic_ends_the_process_at_once() {
        let test = "a_second_panic_ends_the_process_at_once";
        let (status, stderr) = in_a_process(test, || {
            let _watch = PanicWatch::start();
            let _devices = Devices;
            for _ in 0..2 {
                let _panicked = thread::spawn(|| panic!("out of tea")).join();
            }
        });
        assert_eq!(status, Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 2, "{stderr}");
    }
}
